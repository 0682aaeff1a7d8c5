"""The rotary embedding's Triton kernel: a program turns all heads of one token, reading its angles once.

Both elements of a pair are read before either is written, so it works in place.

Shapes: B batch, T tokens, H heads, d features of a head, of which r rotate.
"""

# A kernel's arguments have the types of each call.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl


# T changes from step to step: not to be compiled anew for multiples of 16.
@triton.jit(do_not_specialize=["T"])
def _kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr,
    x_stride_b, x_stride_t, x_stride_h, cos_stride_b, cos_stride_t, sin_stride_b, sin_stride_t,
    out_stride_b, out_stride_t, out_stride_h, T, H, half,
    INVERSE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // T, program % T
    head, column = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_HALF)
    inside = column < half
    mask = (head < H)[:, None] & inside[None, :]

    cos = cos_ptr + batch * cos_stride_b + token * cos_stride_t + column
    sin = sin_ptr + batch * sin_stride_b + token * sin_stride_t + column
    cos1 = tl.load(cos, inside, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos + half, inside, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin, inside, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin + half, inside, other=0.0).to(tl.float32)[None, :]

    x = x_ptr + batch * x_stride_b + token * x_stride_t + head[:, None] * x_stride_h + column[None, :]
    x1 = tl.load(x, mask, other=0.0).to(tl.float32)
    x2 = tl.load(x + half, mask, other=0.0).to(tl.float32)
    if INVERSE:
        y1, y2 = x1 * cos1 + x2 * sin2, x2 * cos2 - x1 * sin1
    else:
        y1, y2 = x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2
    out = (
        out_ptr + batch * out_stride_b + token * out_stride_t + head[:, None] * out_stride_h + column[None, :]
    )
    tl.store(out, y1.to(out_ptr.dtype.element_ty), mask)
    tl.store(out + half, y2.to(out_ptr.dtype.element_ty), mask)


def rotate(
    x_THd: torch.Tensor, cos_Tr: torch.Tensor, sin_Tr: torch.Tensor, *, inverse: bool, out: torch.Tensor
) -> torch.Tensor:
    """Writes the first r features of every head to `out`, which may be x. x: (T, H, d) or (B, T, H, d)."""
    if x_THd.dim() == 3:
        rotate(x_THd.unsqueeze(0), cos_Tr, sin_Tr, inverse=inverse, out=out.unsqueeze(0))
        return out
    B, T, H, _ = x_THd.shape
    rotated = cos_Tr.shape[-1]
    cos, sin = cos_Tr.expand(B, T, rotated), sin_Tr.expand(B, T, rotated)
    if cos.stride(-1) != 1 or sin.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    x = x_THd if x_THd.stride(-1) == 1 else x_THd.contiguous()
    target = out if out.stride(-1) == 1 else torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):
            _kernel[(B * T,)](
                x, cos, sin, target, *x.stride()[:3], *cos.stride()[:2], *sin.stride()[:2], *target.stride()[:3],
                T, H, rotated // 2, INVERSE=inverse,
                BLOCK_H=triton.next_power_of_2(H), BLOCK_HALF=triton.next_power_of_2(rotated // 2),
            )  # fmt: skip
    if target is not out:
        out[..., :rotated] = target[..., :rotated]
    return out
