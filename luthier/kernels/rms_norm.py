"""Root-mean-square norm, alone and fused with the residual sum before it (Zhang and Sennrich 2019).

    y = x / sqrt(mean(x^2) + eps) * (offset + weight),    offset 1 for Gemma, 0 elsewhere

Statistics are in fp32. Backward needs the input, which is alive anyway as the residual stream, and one number
per row, 1/rms; nothing else is saved. With g = dy (offset + weight) and x^ = x / rms

    dx = (g - x^ mean(g x^)) / rms,    dweight = sum over rows of dy x^

`add_rms_norm` returns the residual sum as well, and its backward adds that sum's gradient in the pass that
writes dx.

Shapes: T rows (any leading dimensions), D normalised features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from luthier.kernels.backend import use_triton

TOLERANCE = 1e-5  # fp32, against `reference_rms_norm`


def rms_norm(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    cast_before_weight: bool = False,
) -> torch.Tensor:
    """The norm of every row, in x's dtype.

    Args:
        x_TD: (..., D), any float dtype; contiguous rows are read where they are, others are copied.
        weight_D: receives a gradient if it requires one.
        eps: added to the mean square.
        offset: added to the weight.
        cast_before_weight: round the normalised row to x's dtype before the weight multiplies it (Llama and
            most others), instead of multiplying in fp32 (Gemma). The same in fp32.
    """
    return _RMSNorm.apply(x_TD, weight_D, eps, offset, cast_before_weight)


def add_rms_norm(
    x_TD: torch.Tensor,
    residual_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of x + residual, x + residual); arguments as for `rms_norm`.

    The gradients of x and residual are equal, and are the same tensor.
    """
    return _AddRMSNorm.apply(x_TD, residual_TD, weight_D, eps, offset, cast_before_weight)


def reference_rms_norm(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    cast_before_weight: bool = False,
) -> torch.Tensor:
    """The same in plain torch, differentiated by autograd."""
    x = x_TD.to(_statistics_dtype(x_TD))
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if cast_before_weight:
        return (normed.to(x_TD.dtype) * (offset + weight_D)).to(x_TD.dtype)
    return (normed * (offset + weight_D.to(x.dtype))).to(x_TD.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, cast_before_weight: bool
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, rstd = _forward(rows, weight, eps, offset, cast_before_weight)
        ctx.save_for_backward(rows, weight, rstd)
        ctx.offset = offset
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = _backward(
            dy.reshape(x.shape), x, weight, rstd, ctx.offset, None, weight_grad=ctx.needs_input_grad[1]
        )
        return dx.view(dy.shape), dweight, None, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        offset: float,
        cast_before_weight: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, total, rstd = _add_forward(x, residual, weight, eps, offset, cast_before_weight)
        ctx.save_for_backward(total, weight, rstd)
        ctx.offset = offset
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: torch.Tensor | None, dtotal: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if dy is None:  # only the sum was used
            return dtotal, dtotal, None, None, None, None
        total, weight, rstd = ctx.saved_tensors
        shape = (-1, total.shape[-1])
        dx, dweight = _backward(
            dy.reshape(shape),
            total.view(shape),
            weight,
            rstd,
            ctx.offset,
            None if dtotal is None else dtotal.reshape(shape),
            weight_grad=ctx.needs_input_grad[2],
        )
        dx = dx.view(total.shape)
        return dx, dx, dweight, None, None, None


def _forward(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, offset: float, cast_before_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_TD and rstd_T1."""
    if use_triton(x_TD):
        from luthier.kernels import triton_rms_norm

        return triton_rms_norm.forward(x_TD, weight_D, eps, offset, cast_before_weight)
    return _torch_forward(x_TD, weight_D, eps, offset, cast_before_weight)


def _add_forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    offset: float,
    cast_before_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, x + residual (both contiguous, of x's shape) and rstd_T1."""
    if use_triton(x):
        from luthier.kernels import triton_rms_norm

        return triton_rms_norm.add_forward(x, residual, weight_D, eps, offset, cast_before_weight)
    total = (x + residual).contiguous()
    y, rstd = _torch_forward(total.view(-1, x.shape[-1]), weight_D, eps, offset, cast_before_weight)
    return y.view(x.shape), total, rstd


def _backward(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    rstd_T1: torch.Tensor,
    offset: float,
    dtotal_TD: torch.Tensor | None,
    *,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx_TD, with the residual sum's gradient added, and dweight_D where wanted."""
    if use_triton(x_TD):
        from luthier.kernels import triton_rms_norm

        return triton_rms_norm.backward(
            dy_TD, x_TD, weight_D, rstd_T1, offset, dtotal_TD, weight_grad=weight_grad
        )
    return _torch_backward(dy_TD, x_TD, weight_D, rstd_T1, offset, dtotal_TD, weight_grad=weight_grad)


def _torch_forward(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, offset: float, cast_before_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = _statistics_dtype(x_TD)
    # vector_norm is the quickest sum of squares on a CPU: half the time of (x * x).sum(-1), without its
    # temporary.
    rstd = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True, dtype=dtype)
    rstd.square_().div_(x_TD.shape[-1]).add_(eps).rsqrt_()
    y = x_TD * rstd
    if cast_before_weight:
        y = y.to(x_TD.dtype)
    return y.mul_(_scale(weight_D, offset, y.dtype)).to(x_TD.dtype), rstd


def _torch_backward(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    rstd_T1: torch.Tensor,
    offset: float,
    dtotal_TD: torch.Tensor | None,
    *,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    dtype = rstd_T1.dtype
    x, scale = x_TD.to(dtype), _scale(weight_D, offset, dtype)
    # dy x is summed both ways by matrix-vector products, then its memory takes dx.
    dx = dy_TD * x
    mean_T1 = torch.mv(dx, scale).unsqueeze(1).mul_(rstd_T1.square()).div_(x.shape[-1])
    dweight = torch.mv(dx.t(), rstd_T1.squeeze(1)).to(weight_D.dtype) if weight_grad else None
    torch.mul(dy_TD, scale, out=dx).addcmul_(x, mean_T1, value=-1)
    if dtotal_TD is None:
        dx.mul_(rstd_T1)
    else:
        dx = torch.addcmul(dtotal_TD.to(dtype), dx, rstd_T1, out=dx)
    return dx.to(x_TD.dtype), dweight


def _scale(weight_D: torch.Tensor, offset: float, dtype: torch.dtype) -> torch.Tensor:
    weight = weight_D.detach().to(dtype)
    return weight + offset if offset else weight


def _statistics_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
