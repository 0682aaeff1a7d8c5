"""SimPO: mean log-probs as rewards, with a margin that they have to differ by, and no reference model."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid


def simpo_losses(
    mean_logp_P_chosen: torch.Tensor,
    mean_logp_P_rejected: torch.Tensor,
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The loss of each of P pairs; no mean is taken.

    Meng, Xia & Chen 2024, https://arxiv.org/abs/2405.14734, equation 6: -log sigmoid(beta (A_chosen - A_rejected)
    - gamma). Smoothing weighs it against the loss of the pair turned round, as in cDPO (see `objectives.dpo`).

    Args:
        mean_logp_P_chosen, mean_logp_P_rejected: A, the mean log-prob of an answer's tokens in nats; fp32.
        beta: scale of the rewards; > 0. gamma: the margin, in units of reward; >= 0.
        label_smoothing: share of pairs taken to be labelled the wrong way round, in [0, 0.5).

    Returns:
        (P,), of the dtype of the log-probs.
    """
    excess_P = beta * (mean_logp_P_chosen - mean_logp_P_rejected) - gamma
    loss_P = -logsigmoid(excess_P)
    if label_smoothing:
        loss_P = (1 - label_smoothing) * loss_P - label_smoothing * logsigmoid(-excess_P)
    return loss_P
