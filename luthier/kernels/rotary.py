"""Rotary position embedding (Su et al. 2021) in the half-split form of transformers.

The features of a head come in pairs (x1, x2), one from each half of the rotated dimensions, and turn by the
token's angle:

    y1 = x1 cos1 - x2 sin1,    y2 = x2 cos2 + x1 sin2

cos and sin are as a model's own rotary module gives them, scaling included. Their halves are equal in every
family known, but nothing here rests on it: backward is the transposed map

    dx1 = dy1 cos1 + dy2 sin2,    dx2 = dy2 cos2 - dy1 sin1

which for equal halves is the rotation by the opposite angle. It needs cos and sin only. Where they have fewer
features than a head, the head's other features pass unchanged.

Shapes: B batch, T tokens, H heads, d features of a head, r <= d rotated ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from luthier.kernels.backend import use_triton

TOLERANCE = 1e-5  # fp32, against `reference_rotary`


def rotary(
    q_BHTd: torch.Tensor, k_BHTd: torch.Tensor, cos_BTr: torch.Tensor, sin_BTr: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k, rotated; both keep their strides (they are mostly transposed views of a projection).

    Args:
        q_BHTd: query heads.
        k_BHTd: key heads, which may be fewer.
        cos_BTr, sin_BTr: their batch dimension may be 1; without gradient.
    """
    return _Rotary.apply(q_BHTd, k_BHTd, cos_BTr, sin_BTr)


def rotate_(
    x_THd: torch.Tensor, cos_Tr: torch.Tensor, sin_Tr: torch.Tensor, *, inverse: bool = False
) -> torch.Tensor:
    """Rotates in place, unseen by autograd.

    Args:
        x_THd: (..., T, H, d), the features of a head next to each other.
        cos_Tr, sin_Tr: (..., T, r), leading dimensions broadcast.
        inverse: apply the transposed map, which turns the gradient of the result into that of x.
    """
    return _rotate(x_THd, cos_Tr, sin_Tr, inverse=inverse, out=x_THd)


def reference_rotary(
    q_BHTd: torch.Tensor, k_BHTd: torch.Tensor, cos_BTr: torch.Tensor, sin_BTr: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch, differentiated by autograd."""
    cos, sin = cos_BTr.unsqueeze(1), sin_BTr.unsqueeze(1)
    rotated = cos.shape[-1]

    def turned(x: torch.Tensor) -> torch.Tensor:
        turning, still = x[..., :rotated], x[..., rotated:]
        first, second = turning.chunk(2, -1)
        return torch.cat((turning * cos + torch.cat((-second, first), -1) * sin, still), -1).to(x.dtype)

    return turned(q_BHTd), turned(k_BHTd)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotated(q, cos, sin, inverse=False), _rotated(k, cos, sin, inverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(dq, cos, sin, inverse=True), _rotated(dk, cos, sin, inverse=True), None, None


def _rotated(x_BHTd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inverse: bool) -> torch.Tensor:
    """A rotated copy, with the strides of x where these are dense."""
    out = torch.empty_like(x_BHTd)
    rotated = cos.shape[-1]
    if rotated < x_BHTd.shape[-1]:
        out[..., rotated:] = x_BHTd[..., rotated:]
    _rotate(x_BHTd.transpose(1, 2), cos, sin, inverse=inverse, out=out.transpose(1, 2))
    return out


def _rotate(
    x_THd: torch.Tensor, cos_Tr: torch.Tensor, sin_Tr: torch.Tensor, *, inverse: bool, out: torch.Tensor
) -> torch.Tensor:
    """Writes the first r features of every head to `out`, which may be x."""
    if cos_Tr.dim() == x_THd.dim():  # (1, T, r) for a batch that x does not spell out
        cos_Tr, sin_Tr = cos_Tr.squeeze(0), sin_Tr.squeeze(0)
    if use_triton(x_THd):
        from luthier.kernels import triton_rotary

        return triton_rotary.rotate(x_THd, cos_Tr, sin_Tr, inverse=inverse, out=out)
    cos, sin = cos_Tr.unsqueeze(-2).to(x_THd.dtype), sin_Tr.unsqueeze(-2).to(x_THd.dtype)
    rotated = cos.shape[-1]
    half = rotated // 2
    sin1, sin2 = sin[..., :half], sin[..., half:]
    if inverse:
        sin1, sin2 = -sin2, -sin1
    x, y = x_THd[..., :rotated], out[..., :rotated]
    if out is x_THd:
        x = x.clone()
    # A pass over whole heads is a third faster than two over their halves, so only the second step is cut.
    torch.mul(x, cos, out=y)
    y[..., :half].addcmul_(x[..., half:], sin1, value=-1)
    y[..., half:].addcmul_(x[..., :half], sin2)
    return out
