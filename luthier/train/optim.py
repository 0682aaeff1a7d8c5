"""fp32 masters for 16-bit weights, learning-rate schedules as functions of the step, and clipping."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from luthier.config import TrainingConfig

log = logging.getLogger("luthier")


class Masters:
    """The trained parameters as the optimizer sees them: fp32, whatever the model computes in.

    A 16-bit parameter gets an fp32 copy, because an update is often smaller than the parameter's own rounding;
    its gradients are added up in fp32 as each pass ends, and its 16-bit gradient is freed at once. An fp32
    parameter is its own master.

    Args:
        copies: false where the optimizer rounds stochastically (`train.composed`): then 16-bit parameters are their
            own masters too, and only their gradients are in fp32.

    Attributes:
        masters: by parameter name. hidden: names of the matrices inside of the network, which are no embeddings and
            no head. stepped_by_backward: whether steps are taken inside of the backward pass.
    """

    def __init__(self, model: nn.Module, *, copies: bool = True) -> None:
        self.masters: dict[str, torch.Tensor] = {}
        self.hidden = _hidden_matrices(model)
        self.stepped_by_backward = False
        self._copies: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._parameters: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            self._parameters.append(parameter)
            if parameter.dtype == torch.float32 or not copies:
                if parameter.dtype != torch.float32:
                    parameter.grad_dtype = torch.float32
                self.masters[name] = parameter
                continue
            master = parameter.detach().float()
            master.grad = None
            self.masters[name] = master
            self._copies.append((parameter, master))
            parameter.register_post_accumulate_grad_hook(self._collect(master))

    @staticmethod
    def _collect(master: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            if parameter.grad is None:
                return
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

        return hook

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.masters.values())

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Of the whole parameters, by name."""
        return {name: list(master.shape) for name, master in self.masters.items()}

    def whole_here(self) -> Iterable[torch.Tensor]:
        """The masters that every process holds whole: all of them."""
        return self.masters.values()

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this process holds of a whole tensor that belongs to a parameter."""
        return tensor

    def pairs(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Each trained parameter of the model with its master."""
        return zip(self._parameters, self.masters.values(), strict=True)

    @contextmanager
    def looked_at(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """While the model is evaluated or saved: a schedule-free optimizer puts its average in place for that."""
        if not hasattr(optimizer, "eval"):
            yield
            return
        optimizer.eval()
        self.publish()
        try:
            yield
        finally:
            optimizer.train()  # type: ignore[attr-defined]
            self.publish()

    def zero_grad(self) -> None:
        for master in self:
            master.grad = None
        for parameter, _ in self._copies:  # what a pass that ended half way has left
            parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the model's 16-bit parameters, and let copies made elsewhere know of the step: a
        fused AdamW writes without raising the version that they go by."""
        torch.autograd.graph.increment_version(list(self))
        for parameter, master in self._copies:
            parameter.copy_(master)

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take masters from a checkpoint, by parameter name."""
        for name, master in self.masters.items():
            master.copy_(tensors[name])
        self.publish()


def _hidden_matrices(model: nn.Module) -> set[str]:
    head = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    outside = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    if head is not None:
        outside.add(id(head.weight))
    return {name for name, p in model.named_parameters() if p.dim() == 2 and id(p) not in outside}


def schedule(training: TrainingConfig, total_steps: int) -> Callable[[int], float]:
    """Learning rate of each optimizer step, counted from 0; the curves are those of transformers' schedulers.

    Warm-up rises linearly from 0; `linear` falls to 0 at `total_steps`, `cosine` along half a cosine, with
    `cosine_min_lr_ratio` (0.1 for `cosine_with_min_lr` if unset) down to that share of the peak.
    """
    peak, name = training.learning_rate or 0.0, training.lr_scheduler
    warmup = warmup_steps(training, total_steps)
    if warmup > total_steps:
        log.warning(
            "warmup_steps: %d, but the run has %d steps: the learning rate will not reach %g",
            warmup,
            total_steps,
            peak,
        )
    floor = training.cosine_min_lr_ratio
    if floor is None:
        floor = 0.1 if name == "cosine_with_min_lr" else 0.0

    def learning_rate(step: int) -> float:
        if step < warmup:
            return peak * step / max(1, warmup)
        if name in ("constant", "constant_with_warmup"):
            return peak
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if name == "linear":
            return peak * (1.0 - progress)
        return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))

    return learning_rate


def warmup_steps(training: TrainingConfig, total_steps: int) -> int:
    """Steps of the schedule in which the learning rate rises."""
    if training.lr_scheduler == "constant":
        return 0
    if training.warmup_steps is not None:
        return training.warmup_steps
    return math.ceil(total_steps * (training.warmup_ratio or 0.0))


def clip_gradients(masters: Masters, max_norm: float) -> torch.Tensor:
    """Scale the gradients so that their common norm is at most `max_norm` (0: leave them); the norm before."""
    gradients = [master.grad for master in masters if master.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(list(masters), max_norm, norm)
    return norm
