"""What the training loop takes as given of its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn


class Step(Protocol):
    """One optimizer step, fixed before its first pass; see `data.loader.Step`."""

    @property
    def rows(self) -> Sequence[int]: ...
    @property
    def tokens(self) -> int: ...
    @property
    def trained_tokens(self) -> int: ...


class Objective(Protocol):
    """What is minimised; see `objectives`.

    Attributes:
        sums: how many numbers beside the loss it adds up over a step, for `figures`.
    """

    @property
    def sums(self) -> int: ...

    def begin(
        self,
        policy: nn.Module,
        mismatched: Iterable[Any],
        step: Any,
        guarded: Callable[[Any, Callable[[], torch.Tensor]], torch.Tensor],
    ) -> None:
        """Called before the passes of a step; what runs the policy here goes through `guarded(batch, work)`."""

    def __call__(self, policy: nn.Module, batch: Any, step: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A pass's share of the step's loss, and of its sums."""

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """What is logged, from the sums over some steps."""


class Loader(Protocol):
    """Steps by number, and the passes of a step on a device; see `data.loader.StepLoader`."""

    steps_per_epoch: int
    tokens_per_pass: int

    def step(self, index: int) -> Any: ...
    def batches(self, step: Any, device: torch.device) -> Iterable[Any]: ...
    def mismatched(self, step: Any, device: torch.device) -> Iterable[Any]: ...
    def locations(self, step: Any) -> list[str]: ...


class Masters(Protocol):
    """The fp32 parameters that the optimizer steps on; see `train.optim.Masters`."""

    masters: dict[str, torch.Tensor]
    stepped_by_backward: bool

    def zero_grad(self) -> None: ...
    def publish(self) -> None: ...
    def looked_at(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]: ...


class Processes(Protocol):
    """All processes of the run; see `train.distributed.Processes`."""

    size: int

    def gather(self, values: Sequence[float]) -> list[list[float]]: ...
    def add_up(
        self,
        masters: Iterable[torch.Tensor],
        figures: Sequence[torch.Tensor],
        words: Sequence[float],
        *,
        failed: bool,
    ) -> list[list[float]]: ...
