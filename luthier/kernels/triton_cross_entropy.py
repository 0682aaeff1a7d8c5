"""The cross-entropy's Triton kernel: a program goes over one row twice, first for its greatest entry and the sum
of its exponentials (online softmax, Milakov and Gimelshein 2018), then to write the gradient over it.

Shapes: N rows, V vocabulary.
"""

# A kernel's arguments have the types of each call.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 8192


@triton.jit
def _capped(x, scale, softcap, SOFTCAP: tl.constexpr):
    """scale x, soft-capped where wanted: tanh(u) = 2 sigmoid(2 u) - 1."""
    z = x * scale
    if SOFTCAP:
        z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    return z


@triton.jit
def _kernel(
    logits_ptr, target_ptr, weight_ptr, logp_ptr, correct_ptr, stride, V, scale, softcap,
    WEIGHTED: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(target_ptr + row)
    # Read before the second pass overwrites it: the sums of the first are a barrier between the two.
    chosen = _capped(tl.load(logits_ptr + target).to(tl.float32), scale, softcap, SOFTCAP)

    # Finite, so that a block of nothing but -inf has exponentials of 0 and not NaN.
    greatest = -3.0e38
    total = 0.0
    first_choice = target * 0
    best = -float("inf")
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        raw = tl.load(logits_ptr + column, column < V, other=-float("inf")).to(tl.float32)
        block_best, block_choice = tl.max(raw, axis=0, return_indices=True)
        first_choice = tl.where(block_best > best, start + block_choice, first_choice)
        best = tl.maximum(best, block_best)
        z = tl.where(column < V, _capped(raw, scale, softcap, SOFTCAP), -float("inf"))
        higher = tl.maximum(greatest, tl.max(z, axis=0))
        total = total * tl.exp(greatest - higher) + tl.sum(tl.exp(z - higher), axis=0)
        greatest = higher
    tl.store(logp_ptr + row, (chosen - greatest) - tl.log(total))
    tl.store(correct_ptr + row, first_choice == target)

    factor = scale
    if WEIGHTED:
        factor = scale * tl.load(weight_ptr + row).to(tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        raw = tl.load(logits_ptr + column, column < V, other=0.0).to(tl.float32)
        z = _capped(raw, scale, softcap, SOFTCAP)
        gradient = (tl.exp(z - greatest) / total - tl.where(column == target, 1.0, 0.0)) * factor
        if SOFTCAP:
            gradient *= 1.0 - (z / softcap) * (z / softcap)
        tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), column < V)


def cross_entropy_(
    logits_NV: torch.Tensor,
    target_N: torch.Tensor,
    weight_N: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logp_N and correct_N; the logits, whose rows are dense, become their gradient."""
    N, V = logits_NV.shape
    logp_N = torch.empty(N, dtype=torch.float32, device=logits_NV.device)
    correct_N = torch.empty(N, dtype=torch.bool, device=logits_NV.device)
    if N:
        with torch.cuda.device_of(logits_NV):
            _kernel[(N,)](
                logits_NV, target_N.contiguous(), logp_N if weight_N is None else weight_N.contiguous(),
                logp_N, correct_N, logits_NV.stride(0), V, scale, 1.0 if softcap is None else softcap,
                WEIGHTED=weight_N is not None, SOFTCAP=softcap is not None,
                BLOCK=min(BLOCK, triton.next_power_of_2(V)), num_warps=16 if V > 2048 else 4,
            )  # fmt: skip
    return logp_N, correct_N
