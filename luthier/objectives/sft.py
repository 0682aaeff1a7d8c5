"""Supervised fine-tuning: the mean negative log-likelihood of the trained tokens of a whole step."""

from __future__ import annotations

import torch


def sft(logp_N: torch.Tensor, weight_N: torch.Tensor, step_weight: float) -> torch.Tensor:
    """One pass's share of -sum(w * logp) / sum(w), where the lower sum runs over the whole optimizer step.

    The denominator is fixed before the first pass, so that the shares of all passes and ranks add up to the
    same loss however the step was cut.

    Args:
        logp_N: log-probs of the pass's labelled tokens, fp32.
        weight_N: their loss weights, fp32.
        step_weight: sum of the loss weights of the step, over all passes and ranks; > 0.
    """
    return -(weight_N * logp_N).sum() / step_weight
