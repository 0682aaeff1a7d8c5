"""KTO: answers that are each desirable or not, valued as a person values gains and losses against a reference."""

from __future__ import annotations

import torch


def kto_losses(
    logratio_C: torch.Tensor,
    desirable_C: torch.Tensor,
    kl: torch.Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """The loss of each of C answers; no mean is taken.

    Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, equation 7: w (1 - sigmoid(beta (r - kl)))
    for a desirable answer, with the sign of the exponent turned for an undesirable one. 1 - sigmoid(x) is
    computed as sigmoid(-x), which does not cancel.

    Args:
        logratio_C: r = S_policy - S_reference in nats, S the sum of the log-probs of an answer's tokens; fp32.
        desirable_C: bool.
        kl: scalar, >= 0: how far the policy is from the reference on answers that do not belong to their prompts;
            takes no gradient.
        beta: > 0. desirable_weight, undesirable_weight: the paper's lambda_D and lambda_U.

    Returns:
        (C,), of the dtype of the log ratios.
    """
    gain_C = beta * (logratio_C - kl.detach())
    return torch.where(
        desirable_C,
        desirable_weight * torch.sigmoid(-gain_C),
        undesirable_weight * torch.sigmoid(gain_C),
    )
