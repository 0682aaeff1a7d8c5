"""Optimizers by name, learning-rate schedules as functions of the step, and fp32 masters for 16-bit weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from luthier.config import TrainingConfig
from luthier.errors import ConfigError

log = logging.getLogger("luthier")


def _adam_arguments(training: TrainingConfig) -> dict[str, Any]:
    return dict(betas=(training.adam_beta1, training.adam_beta2), eps=training.adam_epsilon)


# Arguments of torch's optimizers that would be overruled by, or silently overrule, keys of the config.
_KEYS = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
}

# name -> constructor of (parameter groups, learning rate, config section)
OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], float, TrainingConfig], torch.optim.Optimizer]] = {
    "adamw_torch": lambda groups, lr, t: torch.optim.AdamW(
        groups, lr=lr, **{**_adam_arguments(t), "fused": False, **t.optim_args}
    ),
    "adamw_torch_fused": lambda groups, lr, t: torch.optim.AdamW(
        groups, lr=lr, **{**_adam_arguments(t), "fused": True, **t.optim_args}
    ),
    "adam": lambda groups, lr, t: torch.optim.Adam(groups, lr=lr, **{**_adam_arguments(t), **t.optim_args}),
    "sgd": lambda groups, lr, t: torch.optim.SGD(groups, lr=lr, **t.optim_args),
}


class Masters:
    """The trained parameters as the optimizer sees them: fp32, whatever the model computes in.

    A 16-bit parameter gets an fp32 copy, because an update is often smaller than the parameter's own rounding;
    its gradients are added up in fp32 as each pass ends, and its 16-bit gradient is freed at once. An fp32
    parameter is its own master.
    """

    def __init__(self, model: nn.Module) -> None:
        self.masters: dict[str, torch.Tensor] = {}
        self._copies: list[tuple[nn.Parameter, torch.Tensor]] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.dtype == torch.float32:
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


def build_optimizer(masters: Masters, training: TrainingConfig) -> torch.optim.Optimizer:
    """The configured optimizer; weight decay leaves out biases and vectors such as norm weights.

    Raises:
        ConfigError: `optim_args` that the optimizer does not take.
    """
    decayed = [m for m in masters if m.dim() >= 2]
    others = [m for m in masters if m.dim() < 2]
    groups: list[dict[str, Any]] = []
    if decayed:
        groups.append({"params": decayed, "weight_decay": training.weight_decay})
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    for name in training.optim_args:
        if name in _KEYS:
            raise ConfigError(f"optim_args: {name} has a key of its own: set {_KEYS[name]} instead")
    assert training.learning_rate is not None  # derived when the config is loaded
    try:
        return OPTIMIZERS[training.optimizer](groups, training.learning_rate, training)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"optim_args: {training.optimizer} does not take {training.optim_args}: {error}"
        ) from error


def schedule(training: TrainingConfig, total_steps: int) -> Callable[[int], float]:
    """Learning rate of each optimizer step, counted from 0; the curves are those of transformers' schedulers.

    Warm-up rises linearly from 0; `linear` falls to 0 at `total_steps`, `cosine` along half a cosine, with
    `cosine_min_lr_ratio` (0.1 for `cosine_with_min_lr` if unset) down to that share of the peak.
    """
    peak = training.learning_rate or 0.0
    warmup = training.warmup_steps
    if warmup is None:
        warmup = math.ceil(total_steps * (training.warmup_ratio or 0.0))
    name = training.lr_scheduler
    if name == "constant":
        warmup = 0
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


def clip_gradients(masters: Masters, max_norm: float) -> torch.Tensor:
    """Scale the gradients so that their common norm is at most `max_norm` (0: leave them); the norm before."""
    gradients = [master.grad for master in masters if master.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(list(masters), max_norm, norm)
    return norm
