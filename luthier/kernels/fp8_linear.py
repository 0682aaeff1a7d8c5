"""Multiplying with a frozen weight in 8-bit floating point (e4m3), forward and for the gradient of the input.

Each row of the weight has a scale of its own, and so has each token: a product's scale is then that of its row and
column, which the multiply applies as it writes. For the input's gradient the sum runs over the weight's rows, so
their scales go into the gradient before it is rounded, and the same 8-bit weight serves both directions.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch

# Largest difference from `reference_fp8_linear`, relative to the norm: rounding of inputs to e4m3's three bits.
TOLERANCE = 4e-2

LARGEST = torch.finfo(torch.float8_e4m3fn).max
# The multiply takes inner and outer sizes that are multiples of this.
MULTIPLE = 16


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) -> the same in e4m3, and each row's scale (rows, 1) in fp32."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn), scale


def fp8_linear(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, scale_O1: torch.Tensor, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """x W' + b, (T, O) in x's dtype, with W = weight x scale in e4m3; x is rounded to e4m3 as well."""
    rounded, scale_T1 = quantize_rows(x_TI)
    out = torch._scaled_mm(
        rounded, weight_OI.t(), scale_a=scale_T1, scale_b=scale_O1.t(), out_dtype=x_TI.dtype
    )
    return out if bias_O is None else out.add_(bias_O)


def fp8_input_gradient(
    grad_TO: torch.Tensor, weight_OI: torch.Tensor, scale_O1: torch.Tensor
) -> torch.Tensor:
    """dY W, (T, I) in dY's dtype; dY with the weight's scales is rounded to e4m3."""
    rounded, scale_T1 = quantize_rows(grad_TO * scale_O1.t().to(grad_TO.dtype))
    columns = weight_OI.t().contiguous().t()  # the second factor has to lie column by column
    ones = torch.ones(1, columns.shape[1], device=columns.device)
    return torch._scaled_mm(rounded, columns, scale_a=scale_T1, scale_b=ones, out_dtype=grad_TO.dtype)


def reference_fp8_linear(
    x: torch.Tensor, weight_OI: torch.Tensor, scale_O1: torch.Tensor, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """The same with the weight widened and inputs as they are, for autograd to differentiate."""
    return torch.nn.functional.linear(x, (weight_OI.float() * scale_O1).to(x.dtype), bias_O)
