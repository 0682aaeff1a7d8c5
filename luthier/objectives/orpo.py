"""ORPO: the odds of the chosen answer against those of the rejected one, beside the likelihood of the chosen."""

from __future__ import annotations

from math import log

import torch
from torch.nn.functional import logsigmoid


def orpo_losses(
    mean_logp_P_chosen: torch.Tensor, mean_logp_P_rejected: torch.Tensor, *, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The odds-ratio term of each of P pairs; no mean is taken, and the likelihood term is not in it.

    Hong, Lee & Thorne 2024, https://arxiv.org/abs/2403.07691, equations 4 and 7, in which the likelihood of an
    answer is the geometric mean of its tokens' probabilities: its logarithm A is their mean log-prob, and
    log odds = A - log(1 - exp(A)).

    Args:
        mean_logp_P_chosen, mean_logp_P_rejected: mean log-prob of an answer's tokens in nats, <= 0; fp32.
        beta: weight of the term, the paper's lambda; > 0.

    Returns:
        loss (P,): -beta * log sigmoid(log odds of chosen - log odds of rejected), and that difference (P,).
    """
    log_odds_P = _log_odds(mean_logp_P_chosen) - _log_odds(mean_logp_P_rejected)
    return -beta * logsigmoid(log_odds_P), log_odds_P


def _log_odds(logp: torch.Tensor) -> torch.Tensor:
    # A certain answer has infinite odds. Nearer to certain than one rounding of a probability no log-prob says
    # anything, so this is where the odds end. (It also keeps both branches below finite, and their gradients.)
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - _log1mexp(logp)


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0: Maechler 2012, https://cran.r-project.org/package=Rmpfr, vignette log1mexp,
    equation 7. Near 0 the subtraction cancels, so expm1 does it; far from 0 its result rounds to 1, so log1p does.
    """
    return torch.where(x > -log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
