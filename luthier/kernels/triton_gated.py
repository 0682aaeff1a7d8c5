"""The gated unit's Triton kernels: one pass, each program a stretch of one row.

Backward reads the gradient, gate and up once and writes all three results; each element is read before it is
written, by the same thread, so the results may take the storage of gate and up.

Shapes: T rows, I features.
"""

# A kernel's arguments have the types of each call.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 2048


@triton.jit
def _activation(x, KIND: tl.constexpr):
    """act(x) = x cdf(x) and its slope, in fp32."""
    if KIND == "silu":
        cdf = tl.sigmoid(x)
        slope = cdf + x * cdf * (1.0 - cdf)
    elif KIND == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        cdf = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        slope = cdf + x * cdf * (1.0 - cdf) * 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * x * x)
    else:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return x * cdf, slope


@triton.jit
def _forward_kernel(
    gate_ptr, up_ptr, h_ptr, gate_stride, up_stride, width, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask, other=0.0).to(tl.float32)
    activation, _ = _activation(gate, KIND)
    tl.store(h_ptr + row * width + column, (activation * up).to(h_ptr.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(
    d_out_ptr, gate_ptr, up_ptr, h_ptr, d_gate_ptr, d_up_ptr,
    d_out_stride, gate_stride, up_stride, d_gate_stride, d_up_stride, width,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    d_out = tl.load(d_out_ptr + row * d_out_stride + column, mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask, other=0.0).to(tl.float32)
    activation, slope = _activation(gate, KIND)
    tl.store(h_ptr + row * width + column, (activation * up).to(h_ptr.dtype.element_ty), mask)
    d_gate = (d_out * up * slope).to(d_gate_ptr.dtype.element_ty)
    tl.store(d_gate_ptr + row * d_gate_stride + column, d_gate, mask)
    d_up = (d_out * activation).to(d_up_ptr.dtype.element_ty)
    tl.store(d_up_ptr + row * d_up_stride + column, d_up, mask)


def forward(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """act(gate) * up, contiguous."""
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate_TI, up_TI = _rows(gate), _rows(up)
    if h.numel():
        with torch.cuda.device_of(h):
            _forward_kernel[_grid(gate_TI)](
                gate_TI,
                up_TI,
                h,
                gate_TI.stride(0),
                up_TI.stride(0),
                gate_TI.shape[1],
                KIND=kind,
                BLOCK=BLOCK,
            )
    return h


def backward(
    d_out: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    kind: str,
    d_gate: torch.Tensor,
    d_up: torch.Tensor,
) -> torch.Tensor:
    """Fills d_gate and d_up, which may be gate and up, and returns act(gate) * up, contiguous."""
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    d_out_TI, gate_TI, up_TI = _rows(d_out), _rows(gate), _rows(up)
    # Views, never copies: these are written.
    d_gate_TI, d_up_TI = d_gate.view(-1, d_gate.shape[-1]), d_up.view(-1, d_up.shape[-1])
    if h.numel():
        with torch.cuda.device_of(h):
            _backward_kernel[_grid(gate_TI)](
                d_out_TI, gate_TI, up_TI, h, d_gate_TI, d_up_TI,
                d_out_TI.stride(0), gate_TI.stride(0), up_TI.stride(0), d_gate_TI.stride(0), d_up_TI.stride(0),
                gate_TI.shape[1], KIND=kind, BLOCK=BLOCK,
            )  # fmt: skip
    return h


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(T, I) with dense rows; the same memory where these are."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _grid(x_TI: torch.Tensor) -> tuple[int, int]:
    return x_TI.shape[0], triton.cdiv(x_TI.shape[1], BLOCK)
