"""Base models whose linear layers are stored in 4 or 8 bits by bitsandbytes, for an adapter to be trained on them.

bitsandbytes makes and reads the formats (its checkpoints load as they are); the layers themselves become ours
(`models.frozen`), so that one fused path serves every format: a weight is dequantised once for each use, in
forward and in backward, multiplied with in the compute dtype, and forgotten. Inputs are not rounded: in 8 bits
bitsandbytes' own layer rounds them to int8 as well.
"""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from luthier.config import Config, ModelConfig
from luthier.errors import ConfigError, ModelError
from luthier.models.frozen import FrozenLinear

log = logging.getLogger("luthier")

_DEVICES = ("cpu", "cuda")
# Formats of checkpoints that transformers turns into plain weights where it has no kernels for them.
_TURNED_PLAIN = ("mxfp4",)


def quantization(config: ModelConfig, model_config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """What transformers has to be told to load the base as the config says; None where it is not quantised, or its
    checkpoint is so already.

    Args:
        dtype: what the weights are rounded to before they are quantised, and read into.

    Raises:
        ConfigError: bitsandbytes is missing or cannot run here, or the checkpoint is quantised otherwise.
    """
    check_format(config, model_config)
    asked, stored = _asked(config), quantized_as(model_config)
    if asked is None and stored not in ("4bit", "8bit"):
        return None
    what = asked or f"base_model: {config.base_model} is stored in {stored} and"
    if device.type not in _DEVICES:
        raise ConfigError(f"{what} needs bitsandbytes, which does not run on {device.type}; use cpu or cuda")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{what} needs bitsandbytes: pip install 'luthier[bitsandbytes]'")
    if asked is None or stored:
        return None
    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def check_format(config: ModelConfig, model_config: Any) -> None:
    """Whether the checkpoint's own format is one that can be trained on, and the one that the config names.

    Raises:
        ConfigError: it is quantised by something else than bitsandbytes, or otherwise than asked for.
    """
    asked, stored = _asked(config), quantized_as(model_config)
    if stored not in (None, "4bit", "8bit", *_TURNED_PLAIN):
        raise ConfigError(
            f"base_model: {config.base_model} is quantised by {stored}, and Luthier trains on bitsandbytes' formats: "
            "take the model's full checkpoint, with `load_in_4bit: true` to have it in 4 bits"
        )
    if asked and stored and asked != f"load_in_{stored}":
        raise ConfigError(
            f"{asked}: {config.base_model} is stored in another format ({stored}); leave {asked} out"
        )


def _asked(config: ModelConfig) -> str | None:
    return "load_in_4bit" if config.load_in_4bit else "load_in_8bit" if config.load_in_8bit else None


def quantized_as(model_config: Any) -> str | None:
    """The format of a checkpoint by its config.json: "4bit" and "8bit" for bitsandbytes', or another's name."""
    found = getattr(model_config, "quantization_config", None)
    if found is None:
        return None
    values = found if isinstance(found, dict) else found.to_dict()
    if values.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return str(values["quant_method"])
    return "4bit" if values.get("load_in_4bit") else "8bit"


def check_trains(config: Config, model_config: Any) -> None:
    """A quantised base can have an adapter trained on it and nothing else.

    Raises:
        ConfigError: the checkpoint is quantised, and the config trains its weights.
    """
    if quantized_as(model_config) in ("4bit", "8bit") and config.adapter.adapter is None:
        raise ConfigError(
            f"base_model: {config.model.base_model} is stored in {quantized_as(model_config)}, and quantised weights "
            "cannot be trained: write `adapter: lora`, or take the full checkpoint"
        )


def is_quantized(model: nn.Module) -> bool:
    """Whether transformers has loaded a model into bitsandbytes' layers."""
    return getattr(model, "quantization_method", None) is not None


def take_over(model: PreTrainedModel) -> None:
    """Let Luthier's layers read the quantised weights that no adapter has taken; says what there is."""
    for path, module in list(model.named_modules()):
        packed = type(module).__name__ in ("Linear4bit", "Linear8bitLt")
        reads = packed or (isinstance(module, FrozenLinear) and module.storage != "dense")
        if reads and hasattr(model.get_submodule(path.rpartition(".")[0]), "A_log"):
            raise ModelError(
                f"{type(model).__name__} has state-space layers, whose kernels read weights past the linear layers "
                "that hold them and cannot read quantised ones: leave load_in_4bit and load_in_8bit out"
            )
        if packed:
            model.set_submodule(path, FrozenLinear(module).train(module.training))
    layers = [m for m in model.modules() if isinstance(m, FrozenLinear) and m.storage != "dense"]
    kinds = Counter(layer.storage for layer in layers)
    if kinds:
        _say_experts(model)
    for storage, count in kinds.items():
        inside = [layer for layer in layers if layer.storage == storage]
        weights = sum(layer.in_features * layer.out_features for layer in inside)
        bytes_ = sum(stored_bytes(layer.weight) for layer in inside)
        log.info(
            "%d linear layers in %s: %.2f GiB, %.2f bits a weight",
            count,
            storage,
            bytes_ / 2**30,
            8 * bytes_ / weights,
        )


def experts_of(model: nn.Module) -> list[str]:
    """Names of the parameters that hold a matrix for each expert; the kernels of a convolution have as many
    dimensions."""
    convolutions = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv1d)}
    return [n for n, p in model.named_parameters() if p.dim() == 3 and id(p) not in convolutions]


def _say_experts(model: nn.Module) -> None:
    """transformers keeps the experts of a layer in one tensor each, which bitsandbytes leaves as they are."""
    experts = [model.get_parameter(name) for name in experts_of(model)]
    if experts:
        log.warning(
            "the experts of this model are no linear layers and are not quantised: %.2f GiB in %s",
            sum(p.nbytes for p in experts) / 2**30,
            str(experts[0].dtype)[6:],
        )


def stored_bytes(weight: Any) -> int:
    """Bytes of a quantised parameter, its scales included."""
    total = int(weight.data.nbytes)
    if (state := getattr(weight, "quant_state", None)) is not None:
        tensors = [state.absmax]
        if state.nested:
            tensors += [state.offset, state.state2.absmax]
        return total + sum(int(t.nbytes) for t in tensors)
    scales = getattr(weight, "SCB", None)
    return total + (0 if scales is None else int(scales.nbytes))
