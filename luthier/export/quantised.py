"""Quantised base weights, read as the numbers that training multiplied with.

An adapter that was trained on a base in 4 or 8 bits (bitsandbytes) has learned beside the rounded weights. They
are either in the checkpoint itself, as codes and scales, or were made of a 16-bit checkpoint at load; then they
are made again here, each tensor by itself, as the load did it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.errors import ModelError
from luthier.export.shards import Checkpoint

_QUANT_STATE = ".quant_state.bitsandbytes__"
_OF_4_BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_OF_8_BIT = ("SCB", "weight_format")


@dataclass(frozen=True)
class Rounding:
    """How a load quantises a weight.

    Attributes:
        bits: 4 or 8. kind: nf4 or fp4. double: whether the scales are quantised as well.
        dtype: what the weight is in before it is quantised, and what codes of 4 bits are read into.
    """

    bits: int
    kind: str = "nf4"
    double: bool = True
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        if self.bits == 8:
            return "8 bits"
        return f"4 bits ({self.kind}{', double quantisation' if self.double else ''})"

    @torch.no_grad()
    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight (out, in) as it is after quantising and reading it."""
        functional = _bitsandbytes()
        if self.bits == 8:
            codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
            return _from_8_bits(codes, scales)
        codes, state = functional.quantize_4bit(
            weight.to(self.dtype).contiguous(), compress_statistics=self.double, quant_type=self.kind
        )
        result: torch.Tensor = functional.dequantize_4bit(codes, state)
        return result.reshape(weight.shape)


def stored_bits(checkpoint: Checkpoint) -> int | None:
    """4 or 8 where bitsandbytes has saved a checkpoint, None where its tensors are the weights."""
    if any(_QUANT_STATE in name for name in checkpoint.stored):
        return 4
    return 8 if any(name.endswith(".SCB") for name in checkpoint.stored) else None


def is_packed(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor holds codes, so that its shape says nothing."""
    return _state_name(checkpoint, name) is not None or _scales_name(name) in checkpoint.stored


def belongs_to_another(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor holds the scales of another one."""
    owner, _, last = name.rpartition(".")
    if last in _OF_8_BIT:
        return f"{owner}.weight" in checkpoint.stored
    return (last in _OF_4_BIT and owner in checkpoint.stored) or _QUANT_STATE in name


def unpacked(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """The weight (out, in) behind the codes of a tensor."""
    functional = _bitsandbytes()
    codes = checkpoint.read(name)
    if (scales := _scales_name(name)) in checkpoint.stored:
        return _from_8_bits(codes, checkpoint.read(scales))
    state_name = _state_name(checkpoint, name)
    assert state_name is not None
    parts = {state_name: checkpoint.read(state_name)}
    for part in _OF_4_BIT:
        if f"{name}.{part}" in checkpoint.stored:
            parts[f"{name}.{part}"] = checkpoint.read(f"{name}.{part}")
    try:
        state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    except (ValueError, KeyError, AssertionError) as error:
        raise ModelError(f"{checkpoint.folder}: the scales of {name} cannot be read: {error}") from error
    result: torch.Tensor = functional.dequantize_4bit(codes, state)
    return result


def rounded_modules(model: PreTrainedModel, skip: list[str] | None) -> set[str]:
    """Paths of the modules whose weight transformers quantises at load.

    Args:
        model: with or without weights. skip: `llm_int8_skip_modules`.
    """
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(model, skip, getattr(model, "_keep_in_fp32_modules", None))
    return {
        path
        for path, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(path, kept)
    }


def method_of(config: Mapping[str, Any]) -> str | None:
    """Who quantised a checkpoint, by its `config.json`."""
    found = config.get("quantization_config")
    if not isinstance(found, dict):
        return None
    return str(found.get("quant_method") or json.dumps(found)[:60])


def _scales_name(name: str) -> str:
    return name.removesuffix("weight") + "SCB"


def _state_name(checkpoint: Checkpoint, name: str) -> str | None:
    return next((n for kind in ("nf4", "fp4") if (n := f"{name}{_QUANT_STATE}{kind}") in checkpoint.stored), None)


def _from_8_bits(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return codes * (scales.float() / 127.0).unsqueeze(1)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise ModelError(
            "the base is quantised with bitsandbytes, which is not installed: pip install bitsandbytes"
        ) from error
    return functional
