"""Log-prob of a target in every row of logits, the logits being overwritten with their gradient.

The logits of a chunk are the largest tensor of a step, so nothing of their size is made: what comes out in
their place is the gradient of the loss sum(-weight_n logp_n), ready to be multiplied with the head.
With z = softcap tanh(scale x / softcap) and p = softmax(z)

    d loss / dx = weight (p - onehot(target)) scale (1 - (z / softcap)^2)

and log-probs come by way of the row's greatest entry, (z - max z) + log(max p), exact to rounding, since
max p >= 1 / V. On a CPU the exponentials are the cost, and one fused softmax computes them; the passes around
it run on blocks of rows that are still in the cache.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import torch

from luthier.kernels.backend import use_triton

TOLERANCE = 1e-5  # fp32, against `reference_cross_entropy`

# Logits in a block, per thread: 2 MiB in fp32, what a core's share of the last cache holds.
BLOCK_FLOATS = 2**19


def cross_entropy_(
    logits_NV: torch.Tensor,
    target_N: torch.Tensor,
    weight_N: torch.Tensor | None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target, and whether the target is the row's first choice.

    Args:
        logits_NV: raw head output; overwritten with d(sum_n -weight_n logp_n) / d(logits), in its dtype. Rows
            may be apart, elements of a row may not.
        target_N: token ids in [0, V).
        weight_N: each row's share of the loss; None stands for ones and saves the multiply (the weight can
            then be applied to what the gradient is multiplied with, which is smaller than V).
        scale: positive factor on the logits.
        softcap: logits become softcap * tanh(logits / softcap), after the scale.

    Returns:
        logp_N in fp32 and correct_N, boolean.
    """
    if use_triton(logits_NV):
        from luthier.kernels import triton_cross_entropy

        return triton_cross_entropy.cross_entropy_(logits_NV, target_N, weight_N, scale, softcap)
    N, V = logits_NV.shape
    logp_N = torch.empty(N, dtype=_compute_dtype(logits_NV), device=logits_NV.device)
    correct_N = torch.empty(N, dtype=torch.bool, device=logits_NV.device)
    rows = max(1, BLOCK_FLOATS * torch.get_num_threads() // V)
    for start in range(0, N, rows):
        block = slice(start, start + rows)
        logits = logits_NV[block]
        weight = None if weight_N is None else weight_N[block]
        values = logits.to(logp_N.dtype)  # no copy in fp32
        coarse = values.dtype != logits.dtype
        _torch_block(
            values, target_N[block], weight, scale, softcap, logp_N[block], correct_N[block], coarse=coarse
        )
        if coarse:
            logits.copy_(values)
    return logp_N, correct_N


def reference_cross_entropy(
    logits_NV: torch.Tensor, target_N: torch.Tensor, scale: float = 1.0, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """logp_N and correct_N in plain torch, the first differentiable by autograd."""
    logits = logits_NV.to(_compute_dtype(logits_NV)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp_NV = torch.log_softmax(logits, -1)
    return logp_NV.gather(1, target_N.unsqueeze(1)).squeeze(1), logits_NV.argmax(-1) == target_N


def _torch_block(
    values: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    logp: torch.Tensor,
    correct: torch.Tensor,
    *,
    coarse: bool,
) -> None:
    """A few rows: `values` becomes the gradient, `logp` and `correct` are filled in."""
    index = target.unsqueeze(1)
    greatest = values.amax(-1, keepdim=True)
    chosen = values.gather(1, index)
    if coarse:
        correct.copy_(values.argmax(-1) == target)
    else:
        # argmax takes five times as long as amax on a CPU, and differs only where several entries are the
        # greatest: then the first is the head's choice. In fp32 that does not happen, in bf16 often.
        correct.copy_((chosen == greatest).squeeze(1))
    slope = None
    if softcap is not None:
        values.mul_(scale / softcap).tanh_()
        slope = torch.square(values).neg_().add_(1.0)
        values.mul_(softcap)
        greatest, chosen = (softcap * torch.tanh(z * (scale / softcap)) for z in (greatest, chosen))
    elif scale != 1.0:
        values.mul_(scale)
        greatest, chosen = greatest * scale, chosen * scale
    _softmax_(values)
    logp.copy_((chosen - greatest).add_(values.amax(-1, keepdim=True).log_()).squeeze(1))
    factor = torch.full_like(greatest, scale)
    if weight is not None:
        factor.mul_(weight.unsqueeze(1))
    values.scatter_add_(1, index, torch.full_like(greatest, -1.0))
    if weight is not None or scale != 1.0:
        values.mul_(factor)
    if slope is not None:
        values.mul_(slope)


def _softmax_(values: torch.Tensor) -> None:
    """Softmax of each row, in place. A new tensor of this size would cost more than the exponentials: its pages
    are fresh from the system each time (measured: 45 ms against 15 for 256 rows of 49,152)."""
    torch.softmax(values, -1, out=values)


def _compute_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)
