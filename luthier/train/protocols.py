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

    steps_per_epoch: int | float
    tokens_per_pass: int

    def step(self, index: int) -> Any: ...
    def batches(self, step: Any, device: torch.device) -> Iterable[Any]: ...
    def mismatched(self, step: Any, device: torch.device) -> Iterable[Any]: ...
    def locations(self, step: Any) -> list[str]: ...
    def standing(self, step: int) -> dict[str, Any]: ...
    def figures(self) -> dict[str, float]: ...
    def epochs_before(self, step: int) -> float: ...


class Processes(Protocol):
    """All processes of the run; see `train.distributed.Processes`."""

    rank: int
    size: int

    def gather(self, values: Sequence[float]) -> list[list[float]]: ...


class Engine(Protocol):
    """How gradients come together and a step is taken; see `train.engine.Engine`."""

    policy: nn.Module
    scaler: torch.amp.GradScaler
    lockstep: bool

    @property
    def processes(self) -> Processes: ...
    @property
    def stepped_by_backward(self) -> bool: ...
    def zero_grad(self) -> None: ...
    def backward(self, share: torch.Tensor, *, last: bool) -> None: ...
    def add_up(
        self, figures: Sequence[torch.Tensor], words: Sequence[float], *, failed: bool = False
    ) -> list[list[float]]: ...
    def set_rate(self, rate: float) -> None: ...
    def step(self) -> tuple[torch.Tensor, str]: ...
    def looked_at(self) -> AbstractContextManager[None]: ...
    def collect(self) -> Any: ...
