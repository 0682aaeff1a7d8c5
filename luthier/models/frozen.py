"""A linear layer that is not trained, whose weight stays as it is stored and is read where it is used.

Frozen weights take most of the memory of an adapter's training, and nothing writes to them. So they need not lie
there in the format of the multiplies: a checkpoint in 16 bits is the same numbers as its fp32 copy and half as
large, a quantised one a quarter to an eighth. Reading a weight costs time once a use and not once a token: 1% to
4% of the multiply from 512 tokens on, for 16 bits on a CPU (measured).
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.kernels.fp8_linear import quantize_rows
from luthier.kernels.lora_linear import Linear, lora_linears

log = logging.getLogger("luthier")

# Numbers of a weight that are read at a time where no gradient is wanted.
BLOCK = 2**24


class FrozenLinear(nn.Module):
    """Takes the place of a linear layer (or of GPT-2's transposed Conv1D), with its parameters under their names.

    Attributes:
        weight: as stored: (out, in), transposed for a Conv1D, or packed by bitsandbytes.
        storage: "dense", "4bit" (bitsandbytes' NF4 and FP4), "8bit" (its rows of int8) or "fp8" (rows of e4m3).
        row_scale: (out, 1) fp32, of fp8 alone.
    """

    row_scale: torch.Tensor | None

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.transposed = isinstance(base, Conv1D)
        self.weight = cast(nn.Parameter, base.weight)
        self.bias = cast(nn.Parameter | None, base.bias)
        self.storage = storage_of(self.weight)
        if self.storage == "8bit" and cast(Any, self.weight).SCB is None:
            # In its first forward pass bitsandbytes' layer moves the scales from the weight to itself.
            cast(Any, self.weight).SCB = cast(Any, base).state.SCB
        self.register_buffer("row_scale", None, persistent=False)
        self._copy: torch.Tensor | None = None
        self._state: Any = None
        if hasattr(base, "in_features"):
            self.in_features, self.out_features = cast(int, base.in_features), cast(int, base.out_features)
        else:
            self.in_features, self.out_features = map(int, self.weight.shape)
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        narrow = self.storage == "dense" and not self.transposed and self.weight.dtype != x.dtype
        if narrow and self.weight.numel() > BLOCK and not torch.is_grad_enabled():
            # A head is large as a whole.
            parts = self.weight.split(max(1, BLOCK // self.in_features))
            out = torch.cat([F.linear(x, part.to(x.dtype)) for part in parts], -1)
            return out if self.bias is None else out + self.bias
        return lora_linears(x, [self.linear(x)])[0]

    def linear(self, x: torch.Tensor) -> Linear:
        """The layer as the kernels take it, for the input x."""
        return Linear(self.plain_weight, self.bias, **self.reading(x.dtype))

    def reading(self, dtype: torch.dtype) -> dict[str, Any]:
        """How the kernels read the weight in a compute dtype."""
        shape = (self.out_features, self.in_features)
        return {"read": self.reader(dtype), "row_scale": self.row_scale, "shape": shape}

    @property
    def plain_weight(self) -> torch.Tensor:
        """The weight as stored, not transposed."""
        return self.weight.t() if self.transposed else self.weight

    def reader(self, dtype: torch.dtype) -> Any:
        """`weight_in`, or None where the weight is in that dtype already."""
        return None if self.storage == "dense" and self.weight.dtype == dtype else self.weight_in

    def weight_in(self, dtype: torch.dtype, brief: bool = False) -> torch.Tensor:
        """The weight (out, in) in a compute dtype, however it is stored; no copy where it is in that dtype.

        Args:
            brief: the caller is done with it before any other weight is read, so that one buffer may serve them all.
        """
        if self._copy is not None and self._copy.dtype == dtype:
            return self._copy
        if self.storage == "dense" and brief and self.weight.device.type == "cpu":
            return _in_buffer(self.plain_weight.detach(), dtype)
        if self.storage == "dense":
            return self.plain_weight.detach().to(dtype)
        if self.row_scale is not None:
            return (self.weight.float() * self.row_scale).to(dtype)
        return dequantized(self.weight, self._state).to(dtype)

    @torch.no_grad()
    def keep_copy(self, dtype: torch.dtype) -> None:
        """Read the weight once and for all."""
        self._copy = self.weight_in(dtype)

    @torch.no_grad()
    def to_fp8(self) -> None:
        """Round the weight to e4m3, with a scale for each row."""
        rounded, scale = quantize_rows(self.plain_weight)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.transposed, self.storage, self.row_scale = False, "fp8", scale

    def keep_plain(self, device: torch.device) -> None:
        """Take a 4-bit weight's scales, to a device, out of bitsandbytes' parameter, of which a plain one of packed
        bytes is left: what shares a weight out over processes makes a new parameter of it."""
        if self.storage == "4bit" and self._state is None:
            self._state = cast(Any, self.weight).quant_state
            self._state.to(device)
            self.weight = nn.Parameter(self.weight.data, requires_grad=False)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, {self.storage}, {self.weight.dtype}"


def keep_copies(model: nn.Module, budget: float, dtype: torch.dtype) -> None:
    """Copies in the compute dtype of the weights that are stored otherwise, layer by layer, as far as `budget` bytes
    go: those are not read at each use."""
    layers = [m for m in model.modules() if isinstance(m, FrozenLinear) and m.reader(dtype) is not None]
    kept, taken = 0, 0
    for layer in layers:
        size = layer.in_features * layer.out_features * dtype.itemsize
        if taken + size > budget:
            break
        layer.keep_copy(dtype)
        kept, taken = kept + 1, taken + size
    log.info(
        "%d of %d stored weights have a copy in %s, %.2f GiB", kept, len(layers), str(dtype)[6:], taken / 2**30
    )


_buffers: dict[torch.dtype, torch.Tensor] = {}


def _in_buffer(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight in another dtype, in a buffer that the next one overwrites. Fresh memory for each would leave a CPU's
    heap in pieces, between the activations that are kept: 0.3 GiB for a model of 0.6B (measured)."""
    buffer = _buffers.get(dtype)
    if buffer is None or buffer.numel() < weight.numel():
        buffer = _buffers[dtype] = torch.empty(weight.numel(), dtype=dtype)
    return buffer[: weight.numel()].view(weight.shape).copy_(weight)


def storage_of(weight: torch.Tensor) -> str:
    """How a weight is stored; bitsandbytes, which is optional, is known by the names of its classes."""
    return {"Params4bit": "4bit", "Int8Params": "8bit"}.get(type(weight).__name__, "dense")


def dequantized(weight: Any, state: Any = None) -> torch.Tensor:
    """A bitsandbytes parameter as (out, in): 4-bit in the dtype that it was quantised from, 8-bit in fp32.

    Args:
        state: the scales of a 4-bit weight that does not have them itself (`FrozenLinear.keep_plain`).

    Codes times scales: of a block of 64 for 4 bits (Dettmers et al. 2023, section 3), of a row for 8 (Dettmers et
    al. 2022, section 2.1).
    """
    if state is not None or storage_of(weight) == "4bit":
        import bitsandbytes.functional as functional

        return functional.dequantize_4bit(weight.data, state or weight.quant_state)
    scales = cast(torch.Tensor, weight.SCB)
    return weight.data * (scales / 127.0).unsqueeze(1)
