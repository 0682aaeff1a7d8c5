"""The gated unit of an MLP, act(gate) * up (Shazeer 2020), and its gradients.

Nothing but gate and up is needed for backward; act(gate) * up itself, which the gradient of the down
projection's adapter needs, is one multiply away from what backward computes anyway. So an MLP keeps gate and up
only, and `gated_backward_` gives back all three: with a = act(gate)

    h = a up,    d_up = d_h a,    d_gate = d_h up act'(gate)

Gate and up may be the two halves of one (T, 2I) buffer: rows may be apart, elements of a row may not. In place,
the gradients take their storage, so that the buffer becomes the gradient of the stacked projection's output.

Shapes: T rows (any leading dimensions), I intermediate features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from luthier.kernels.backend import use_triton

TOLERANCE = 1e-5  # fp32, against `reference_gated`

# The kinds of act: x sigmoid(x), GELU's approximation by tanh (`gelu_pytorch_tanh` in transformers), exact GELU.
KINDS = ("silu", "gelu_tanh", "gelu")

_APPROXIMATE = {"gelu_tanh": "tanh", "gelu": "none"}


def gated(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """act(gate) * up, differentiable; saves gate and up."""
    return _Gated.apply(gate, up, kind)


def gated_forward(gate_TI: torch.Tensor, up_TI: torch.Tensor, kind: str) -> torch.Tensor:
    """act(gate) * up, contiguous, unseen by autograd."""
    if use_triton(gate_TI):
        from luthier.kernels import triton_gated

        return triton_gated.forward(gate_TI, up_TI, kind)
    return _activation(gate_TI, kind).mul_(up_TI)


def gated_backward_(
    d_out_TI: torch.Tensor, gate_TI: torch.Tensor, up_TI: torch.Tensor, kind: str, *, inplace: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """act(gate) * up, the gradient of gate and the gradient of up, from the gradient of the first.

    With `inplace` the two gradients are gate and up themselves, overwritten; d_out is left as it is either way.
    """
    d_gate = gate_TI if inplace else torch.empty_like(gate_TI)
    d_up = up_TI if inplace else torch.empty_like(up_TI)
    if use_triton(gate_TI):
        from luthier.kernels import triton_gated

        return triton_gated.backward(d_out_TI, gate_TI, up_TI, kind, d_gate, d_up), d_gate, d_up
    activation = _activation(gate_TI, kind)
    h = d_out_TI * up_TI
    _activation_backward(h, gate_TI, kind, d_gate)
    torch.mul(activation, up_TI, out=h)
    torch.mul(d_out_TI, activation, out=d_up)
    return h, d_gate, d_up


def reference_gated(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """The same in plain torch, differentiated by autograd."""
    if kind == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate=_APPROXIMATE[kind]) * up


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return gated_forward(gate, up, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if use_triton(gate):
            _, d_gate, d_up = gated_backward_(d_out, gate, up, ctx.kind)
            return d_gate, d_up, None
        d_gate = d_out * up
        _activation_backward(d_gate, gate, ctx.kind, d_gate)
        return d_gate, gated_forward(gate, d_out, ctx.kind), None


def _activation(gate: torch.Tensor, kind: str) -> torch.Tensor:
    # A fresh tensor, contiguous also where gate is a slice.
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if kind == "silu":
        return torch.ops.aten.silu.out(gate, out=out)
    return torch.ops.aten.gelu.out(gate, approximate=_APPROXIMATE[kind], out=out)


def _activation_backward(
    d_activation: torch.Tensor, gate: torch.Tensor, kind: str, out: torch.Tensor
) -> None:
    if kind == "silu":
        torch.ops.aten.silu_backward.grad_input(d_activation, gate, grad_input=out)
    else:
        torch.ops.aten.gelu_backward.grad_input(
            d_activation, gate, approximate=_APPROXIMATE[kind], grad_input=out
        )
