"""Log-probs of given tokens under an output head, without ever holding the full logits.

The logits of a step are its largest tensor by far (tokens x vocabulary). Only labelled positions need any,
and of each row only one number survives, so the head runs over a bounded chunk of rows at a time and the
chunk's logits are thrown away; backward computes them again.

Shapes: N labelled positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

# Floats in one chunk of logits: 2**25 fp32 values are 128 MiB, a few hundred rows of a large vocabulary.
CHUNK_FLOATS = 2**25

Head = Callable[[torch.Tensor], torch.Tensor]


def linear_logps(
    hidden_ND: torch.Tensor,
    target_N: torch.Tensor,
    head: Head,
    *,
    vocabulary: int,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target, and whether it is the head's first choice.

    Args:
        hidden_ND: hidden states at the labelled positions, any float dtype.
        target_N: token ids in [0, V).
        head: hidden (n, D) -> logits (n, V); its parameters receive gradients.
        vocabulary: V, to size the chunks.
        scale: factor on the logits (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`).
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2, section 2 of its report).

    Returns:
        logp_N in fp32 (with gradient) and correct_N, boolean.
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
    """The same in plain torch with full logits: what the chunked computation is tested against (1e-5, fp32)."""
    logits = torch.nn.functional.linear(hidden_ND, weight_VD, bias_V).float()
    logp_NV = torch.log_softmax(transform_logits(logits, scale, softcap), -1)
    return logp_NV.gather(-1, target_N.unsqueeze(-1)).squeeze(-1)
