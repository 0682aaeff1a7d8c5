"""The optimizer of a run: from its name to one object over all trained parameters.

One table maps names to constructors; what is known of a name without its library is in `config.optimizers`. The
parameters come in groups by weight decay and learning rate: the loop gives every group the schedule's rate times the
group's `lr_factor`. Several small optimizers can stand behind one face (`train.composed`): Muon for matrices with
AdamW for the rest, or one for each parameter where steps are taken inside of the backward pass.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

from luthier.config import TrainingConfig
from luthier.config.optimizers import OPTIMIZERS as KNOWN
from luthier.errors import ConfigError
from luthier.train.composed import Composed, PerParameter
from luthier.train.optim import Masters

log = logging.getLogger("luthier")

Groups = list[dict[str, Any]]
# (parameter groups, peak learning rate, config section, device) -> the optimizer
Constructor = Callable[[Groups, float, TrainingConfig, torch.device], torch.optim.Optimizer]

# Arguments that would be overruled by, or silently overrule, keys of the config.
_KEYS = {"lr": "learning_rate", "weight_decay": "weight_decay"}
_KEYS_OF_ADAM = {"betas": "adam_beta1 and adam_beta2", "eps": "adam_epsilon"}


def check_optimizer(training: TrainingConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Say what an optimizer cannot do on a device, before anything is loaded.

    Args:
        dtype: what the run computes in.

    Raises:
        ConfigError: its library is missing, it does not run on the device, or not in this precision, or it does not
            take `optim_args`.
    """
    name, info = training.optimizer, KNOWN[training.optimizer]
    if device.type not in info.devices:
        raise ConfigError(
            f"optimizer: {name} is bitsandbytes', which does not run on {device.type}; use adamw_torch_fused, or a "
            f"device that it has ({', '.join(info.devices)})"
        )
    if info.package is not None and importlib.util.find_spec(info.package) is None:
        raise ConfigError(f"optimizer: {name} needs {info.package}: pip install 'luthier[{info.extra}]'")
    if device.type == "cpu" and info.on_cpu:
        log.warning("optimizer: %s: %s", name, info.on_cpu)
    if training.optimizer_in_backward and dtype == torch.float16:
        raise ConfigError(
            "optimizer_in_backward: this run computes in fp16, where a step that overflows has to be taken back; use "
            "`bf16: true` or `bf16: false` with `fp16: false`, or leave optimizer_in_backward out"
        )
    if training.bf16_stochastic_rounding and dtype != torch.bfloat16:
        raise ConfigError(
            f"bf16_stochastic_rounding: this run computes in {str(dtype)[6:]} on {device}, and its weights are never "
            "in bfloat16; leave bf16_stochastic_rounding out"
        )
    if training.optim_args:
        # What it does not take, it says of any matrix.
        matrix = torch.nn.Parameter(torch.zeros(2, 2, device=device))
        _build([{"params": [matrix], "weight_decay": 0.0, "lr_factor": 1.0, "muon": True}], training, device)


def build_optimizer(masters: Masters, training: TrainingConfig) -> torch.optim.Optimizer:
    """The configured optimizer; weight decay leaves out biases and vectors such as norm weights.

    Raises:
        ConfigError: `optim_args` that the optimizer does not take, or `lr_groups` that match nothing.
    """
    return _build(parameter_groups(masters, training), training, next(iter(masters)).device)


def _build(groups: Groups, training: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    reserved = _KEYS | (_KEYS_OF_ADAM if KNOWN[training.optimizer].adam else {})
    for name in training.optim_args:
        if name in reserved:
            raise ConfigError(f"optim_args: {name} has a key of its own: set {reserved[name]} instead")
    assert training.learning_rate is not None  # derived when the config is loaded
    peak, constructor = training.learning_rate, OPTIMIZERS[training.optimizer]

    def build(groups: Groups) -> torch.optim.Optimizer:
        return constructor(groups, peak, training, device)

    try:
        if training.optimizer_in_backward or training.bf16_stochastic_rounding:
            return PerParameter(groups, build, rounds=training.bf16_stochastic_rounding)
        return build(groups)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"optim_args: {training.optimizer} does not take {training.optim_args}: {error}"
        ) from error


def set_labels(optimizer: torch.optim.Optimizer, labels: float) -> None:
    """Tell an optimizer that wants to know (`sophia`) how many trained tokens a step has."""
    for part in getattr(optimizer, "parts", [optimizer]):
        if hasattr(part, "labels"):
            part.labels = labels


def parameter_groups(masters: Masters, training: TrainingConfig) -> Groups:
    """Parameters by weight decay, learning rate and, for Muon, kind.

    Each group has `lr_factor`, its share of the schedule's rate. LoRA+ as PEFT's `create_loraplus_optimizer` has it
    (Hayou et al. 2024): B and all vectors at `loraplus_lr_ratio`, adapters on embeddings at a rate of their own.

    Raises:
        ConfigError: a group of `lr_groups` has no parameter.
    """
    rates = _rates(masters, training)
    groups: dict[tuple[bool, float, bool], dict[str, Any]] = {}
    for name, master in masters.masters.items():
        decayed, hidden = master.dim() >= 2, name in masters.hidden
        muon = training.optimizer == "muon" and hidden
        group = groups.setdefault(
            (not decayed, rates[name], not muon),
            {"params": [], "weight_decay": training.weight_decay if decayed else 0.0, "lr_factor": rates[name]},
        )
        if training.optimizer == "muon":
            group["muon"] = muon
        group["params"].append(master)
    return [groups[key] for key in sorted(groups)]


def _rates(masters: Masters, training: TrainingConfig) -> dict[str, float]:
    """The factor on the learning rate of each parameter."""
    peak = training.learning_rate
    assert peak is not None
    names = list(masters.masters)
    if training.loraplus_lr_ratio is not None:
        rates = {}
        for name, master in masters.masters.items():
            if "lora_embedding_" in name:
                assert training.loraplus_lr_embedding is not None  # derived when the config is loaded
                rates[name] = training.loraplus_lr_embedding / peak
            else:
                rates[name] = training.loraplus_lr_ratio if "lora_B" in name or master.dim() == 1 else 1.0
        return rates
    rates, taken = dict.fromkeys(names, 1.0), dict.fromkeys(names, "")
    for group in training.lr_groups:
        fits = [name for name in names if any(re.search(pattern, name) for pattern in group.modules)]
        own = [name for name in fits if not taken[name]]
        if not own:
            why = (
                f"all that it fits belongs to {', '.join(sorted({taken[name] for name in fits}))}, which come before it"
                if fits
                else f"no trained parameter fits {', '.join(group.modules)}; there are {_kinds(names)}"
            )
            raise ConfigError(f"lr_groups: {group.name}: {why}")
        for name in own:
            rates[name], taken[name] = group.lr / peak, group.name
        log.info("lr_groups: %s: %d parameters learn at %g", group.name, len(own), group.lr)
    return rates


def _kinds(names: Iterable[str]) -> str:
    kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in names)
    shown = list(kinds)[:24]
    return ", ".join(shown) + (f" and {len(kinds) - 24} more" if len(kinds) > 24 else "")


def _adam(training: TrainingConfig, *more: float) -> dict[str, Any]:
    betas = (training.adam_beta1, training.adam_beta2, *more)
    return {"betas": betas, "eps": training.adam_epsilon, **training.optim_args}


def _torch(name: str, **fixed: Any) -> Constructor:
    def build(groups: Groups, lr: float, training: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
        settings = _adam(training) if KNOWN[training.optimizer].adam else training.optim_args
        return getattr(torch.optim, name)(groups, lr=lr, **{**fixed, **settings})

    return build


def _bitsandbytes(name: str, *betas: float) -> Constructor:
    """Of bitsandbytes, paged on a GPU only; `betas`: those beyond Adam's."""

    def build(groups: Groups, lr: float, training: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
        from luthier.train import bnb_optimizers

        info = KNOWN[training.optimizer]
        settings = _adam(training, *betas) if info.adam else training.optim_args
        return bnb_optimizers.build(name, groups, lr, settings, paged=info.paged and device.type == "cuda")

    return build


def _adafactor(
    groups: Groups, lr: float, training: TrainingConfig, device: torch.device
) -> torch.optim.Optimizer:
    """transformers', as its Trainer sets it up: at the given learning rate, not at one that it finds."""
    from transformers.optimization import Adafactor

    fixed = {"scale_parameter": False, "relative_step": False}
    return Adafactor(groups, lr=lr, **{**fixed, **training.optim_args})


def _muon(groups: Groups, lr: float, training: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    """torch's Muon for hidden matrices, AdamW for everything else. One learning rate serves both: a step of Muon is
    scaled to the size that AdamW's usually have (Liu et al. 2025, section 2.2)."""
    matrices = [group for group in groups if group["muon"]]
    others = [group for group in groups if not group["muon"]]
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        settings = {"adjust_lr_fn": "match_rms_adamw", **training.optim_args}
        parts.append(torch.optim.Muon(matrices, lr=lr, **settings))
    if others:
        betas = (training.adam_beta1, training.adam_beta2)
        parts.append(torch.optim.AdamW(others, lr=lr, betas=betas, eps=training.adam_epsilon, fused=True))
    return Composed(parts)


def _sophia(groups: Groups, lr: float, training: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    from luthier.train.sophia import Sophia

    return Sophia(groups, lr=lr, **training.optim_args)


def _schedule_free(
    groups: Groups, lr: float, training: TrainingConfig, device: torch.device
) -> torch.optim.Optimizer:
    from luthier.train.schedule_free import ScheduleFree

    return ScheduleFree(groups, lr=lr, **_adam(training))


OPTIMIZERS: dict[str, Constructor] = {
    "adamw_torch": _torch("AdamW", fused=False),
    "adamw_torch_fused": _torch("AdamW", fused=True),
    "adam": _torch("Adam"),
    "sgd": _torch("SGD"),
    "adamw_bnb_8bit": _bitsandbytes("AdamW8bit"),
    "adamw_8bit": _bitsandbytes("AdamW8bit"),
    "paged_adamw_8bit": _bitsandbytes("AdamW8bit"),
    "paged_adamw_32bit": _bitsandbytes("AdamW32bit"),
    "lion_8bit": _bitsandbytes("Lion8bit"),
    "paged_lion_8bit": _bitsandbytes("Lion8bit"),
    "ademamix_8bit": _bitsandbytes("AdEMAMix8bit", 0.9999),
    "paged_ademamix_8bit": _bitsandbytes("AdEMAMix8bit", 0.9999),
    "adafactor": _adafactor,
    "muon": _muon,
    "sophia": _sophia,
    "schedule_free_adamw": _schedule_free,
}
assert set(OPTIMIZERS) == set(KNOWN)
