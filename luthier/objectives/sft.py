"""Supervised fine-tuning: the mean negative log-likelihood of the trained tokens of a whole step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


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


class SFT:
    """The objective of supervised fine-tuning, as `train.loop` calls objectives."""

    sums = 2

    def begin(self, *step: Any) -> None:
        """Nothing has to be known before the first pass."""

    def __call__(self, policy: nn.Module, batch: Any, step: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logp_N, hit_N = policy(batch)
        sums = torch.stack([(hit_N * batch.weight_N).sum(), batch.weight_N.sum()])
        return sft(logp_N, batch.weight_N, float(max(1, step.trained_tokens))), sums

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """`token_accuracy`: share of trained tokens that were the model's first choice."""
        hits, tokens = sums
        return {"token_accuracy": hits / max(1.0, tokens)}
