"""Log-probs of given tokens under an output head, without ever holding the full logits.

The logits of a step are its largest tensor by far (tokens x vocabulary). Only labelled positions need any,
and of each row only one number survives, so the head runs over a bounded chunk of rows at a time and the
chunk's logits are thrown away.

A row's hidden state receives gradient from its own log-prob alone. So the direction of that gradient is formed
in the forward pass, while the logits are there, and backward only scales each row by what arrives: nothing is
computed twice, whatever the objective. A trained head is different: its gradient sums over rows, so it can be
formed in the forward pass only where the weights of the rows are known by then, as they are for supervised
fine-tuning. Elsewhere the chunks are computed again in backward.

Shapes: N labelled positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from luthier.kernels.cross_entropy import cross_entropy_

TOLERANCE = 1e-5  # fp32, against `reference_logps`

# Floats in one chunk of logits: 2**25 fp32 values are 128 MiB, a few hundred rows of a large vocabulary. The head's
# weight is read once per chunk, so much smaller chunks cost time.
CHUNK_FLOATS = 2**25
# Numbers of a head stored in another dtype that are widened at a time, 16 MiB in fp32; 64 are no faster.
BLOCK_FLOATS = 2**22

Head = Callable[[torch.Tensor], torch.Tensor]


def linear_logps(
    hidden_ND: torch.Tensor,
    target_N: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    loss_weight_N: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target under a linear head, and whether it is the head's first choice.

    Args:
        hidden_ND: hidden states at the labelled positions, any float dtype.
        target_N: token ids in [0, V).
        scale: positive factor on the logits (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`).
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2, section 2 of its report).
        loss_weight_N: where the head is trained, says that the loss will be a multiple of
            -sum(loss_weight * logp), whose gradient the head gets; without it the logits are computed twice.
        weight_VD: a frozen one may be stored in another dtype than hidden_ND's.

    Returns:
        logp_N in fp32 (with gradient) and correct_N, boolean.
    """
    if not torch.is_grad_enabled():
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    trained = weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad)
    narrow = weight_VD.dtype != hidden_ND.dtype
    if narrow or not trained or loss_weight_N is not None:
        return _LinearLogps.apply(hidden_ND, weight_VD, bias_V, target_N, loss_weight_N, scale, softcap)
    return head_logps(
        hidden_ND,
        target_N,
        lambda hidden: F.linear(hidden, weight_VD, bias_V),
        vocabulary=weight_VD.shape[0],
        scale=scale,
        softcap=softcap,
    )


def head_logps(
    hidden_ND: torch.Tensor,
    target_N: torch.Tensor,
    head: Head,
    *,
    vocabulary: int,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for any head, as a function (n, D) -> (n, V) whose parameters receive gradients; backward computes
    each chunk's logits again.

    Args:
        vocabulary: V, to size the chunks.
    """

    def chunk(hidden: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = transform_logits(head(hidden).float(), scale, softcap)
        picked = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        return picked - logits.logsumexp(-1), logits.argmax(-1) == target

    rows = max(1, CHUNK_FLOATS // vocabulary)
    logps, corrects = [], []
    for hidden, target in zip(hidden_ND.split(rows), target_N.split(rows), strict=True):
        if torch.is_grad_enabled():
            # The head draws no random numbers, so there is no state to keep for the second computation.
            logp, correct = checkpoint(chunk, hidden, target, use_reentrant=False, preserve_rng_state=False)
        else:
            logp, correct = chunk(hidden, target)
        logps.append(logp)
        corrects.append(correct)
    if not logps:
        empty = hidden_ND.new_zeros(0, dtype=torch.float32)
        return empty + hidden_ND.sum() * 0.0, torch.zeros(0, dtype=torch.bool, device=hidden_ND.device)
    return torch.cat(logps), torch.cat(corrects)


def transform_logits(logits: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """A family's convention between its head and its softmax: first the scale, then the soft cap."""
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits


def reference_logps(
    hidden_ND: torch.Tensor,
    target_N: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """The same in plain torch with full logits, for autograd to differentiate."""
    logits = torch.nn.functional.linear(hidden_ND, weight_VD, bias_V).float()
    logp_NV = torch.log_softmax(transform_logits(logits, scale, softcap), -1)
    return logp_NV.gather(-1, target_N.unsqueeze(-1)).squeeze(-1)


def _blocks(weight_VD: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """A head's weight in a compute dtype: itself, or where it is stored in another one, some rows at a time."""
    if weight_VD.dtype == dtype:
        yield slice(0, len(weight_VD)), weight_VD
        return
    rows = max(1, BLOCK_FLOATS // weight_VD.shape[1])
    for start in range(0, len(weight_VD), rows):
        block = slice(start, min(start + rows, len(weight_VD)))
        yield block, weight_VD[block].to(dtype)


class _LinearLogps(torch.autograd.Function):
    """Saves the gradient of sum(-logp) to each row's hidden state, and with a trained head, that of
    sum(-loss_weight * logp) to the head.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_N: torch.Tensor,
        loss_weight_N: torch.Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        V = weight_VD.shape[0]
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        of_head = of_weight or of_bias
        d_hidden = torch.empty_like(hidden_ND) if of_hidden else None
        d_weight = torch.zeros_like(weight_VD) if of_weight else None
        d_bias = torch.zeros_like(bias_V) if of_bias else None  # type: ignore[arg-type]
        rows = max(1, min(CHUNK_FLOATS // V, len(hidden_ND)))
        logits_nV = hidden_ND.new_empty(rows, V)
        logps, corrects = [], []
        for start in range(0, len(hidden_ND), rows):
            part = slice(start, start + rows)
            hidden = hidden_ND[part]
            logits = logits_nV[: len(hidden)]
            for block, weight in _blocks(weight_VD, hidden.dtype):
                torch.mm(hidden, weight.t(), out=logits[:, block])
            if bias_V is not None:
                logits += bias_V
            row_weight = loss_weight_N[part] if of_head and loss_weight_N is not None else None
            logp, correct = cross_entropy_(logits, target_N[part], row_weight, scale, softcap)
            if d_hidden is not None:
                for block, weight in _blocks(weight_VD, hidden.dtype):
                    if block.start == 0:
                        torch.mm(logits[:, block], weight, out=d_hidden[part])
                    else:
                        d_hidden[part].addmm_(logits[:, block], weight)
            if d_weight is not None:
                d_weight.addmm_(logits.t(), hidden)
            if d_bias is not None:
                d_bias += logits.sum(0)
            logps.append(logp)
            corrects.append(correct)
        ctx.weighted = of_head
        ctx.save_for_backward(d_hidden, d_weight, d_bias, loss_weight_N)
        if not logps:
            return hidden_ND.new_zeros(0, dtype=torch.float32), target_N.bool()
        correct_N = torch.cat(corrects)
        ctx.mark_non_differentiable(correct_N)
        return torch.cat(logps).float(), correct_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logp_N: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        d_hidden, d_weight, d_bias, loss_weight_N = ctx.saved_tensors
        if not ctx.weighted:
            return d_hidden * -d_logp_N.unsqueeze(1).to(d_hidden.dtype), *[None] * 6
        # d_logp is -factor * loss_weight; the factor is one number, found without asking the device for it.
        factor = -(d_logp_N @ loss_weight_N) / (loss_weight_N @ loss_weight_N).clamp_min(1e-30)
        found = [None if d is None else d * factor.to(d.dtype) for d in (d_hidden, d_weight, d_bias)]
        return *found, *[None] * 4
