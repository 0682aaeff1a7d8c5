"""Direct preference optimisation and its kin: log-probs of two answers against those of a reference model.

With S the log-prob of an answer and r = S - S_reference its log ratio, beta r is the reward that the policy
implies (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 5, less a term of the prompt alone).
The losses below are functions of the two rewards of a pair; most of them only of their difference, the margin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log, log1p

import torch
from torch.nn.functional import logsigmoid

# Where discopop passes from its one loss to the other; the paper's value.
_DISCOPOP_TEMPERATURE = 0.05


@dataclass(frozen=True)
class _Pairs:
    """The pairs of a pass: log ratios and lengths of both answers, and the method's two numbers."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    tokens_chosen: torch.Tensor
    tokens_rejected: torch.Tensor
    beta: float
    smoothing: float

    @property
    def margin(self) -> torch.Tensor:
        return self.beta * (self.chosen - self.rejected)

    @property
    def difference_of_means(self) -> torch.Tensor:
        """Of the log ratios per token: long answers count no more than short ones."""
        return self.chosen / self.tokens_chosen - self.rejected / self.tokens_rejected


def _sigmoid(p: _Pairs) -> torch.Tensor:
    """Equation 7 of the DPO paper; smoothed as in Mitchell 2023 (cDPO, https://ericmitchell.ai/cdpo.pdf, eq. 3)."""
    loss = -logsigmoid(p.margin)
    return loss if not p.smoothing else (1 - p.smoothing) * loss - p.smoothing * logsigmoid(-p.margin)


def _hinge(p: _Pairs) -> torch.Tensor:
    """The hinge of Zhao et al. 2023 (SLiC, https://arxiv.org/abs/2305.10425) on log ratios, as in Liu et al. 2023
    (RSO, https://arxiv.org/abs/2309.06657)."""
    return torch.relu(1 - p.margin)


def _ipo(p: _Pairs) -> torch.Tensor:
    """Azar et al. 2023, https://arxiv.org/abs/2310.12036, equation 17; log ratios are means over tokens, as the
    authors' own experiments have them, and beta is the paper's tau."""
    return (p.difference_of_means - 1 / (2 * p.beta)) ** 2


def _robust(p: _Pairs) -> torch.Tensor:
    """Chowdhury et al. 2024 (rDPO, https://arxiv.org/abs/2403.00409): unbiased where that share of the labels is
    flipped; may be negative."""
    right, flipped = -logsigmoid(p.margin), -logsigmoid(-p.margin)
    return ((1 - p.smoothing) * right - p.smoothing * flipped) / (1 - 2 * p.smoothing)


def _exo_pair(p: _Pairs) -> torch.Tensor:
    """Ji et al. 2024 (EXO, https://arxiv.org/abs/2402.00856, equation 16): the reverse KL divergence from labels
    (1 - smoothing, smoothing)."""
    if not p.smoothing:
        raise ValueError("exo_pair needs label_smoothing > 0")
    chosen, rejected = logsigmoid(p.margin), logsigmoid(-p.margin)
    return chosen.exp() * (chosen - log1p(-p.smoothing)) + rejected.exp() * (rejected - log(p.smoothing))


def _nca_pair(p: _Pairs) -> torch.Tensor:
    """Chen et al. 2024 (NCA, https://arxiv.org/abs/2402.05369), its form for pairs."""
    chosen, rejected = p.beta * p.chosen, p.beta * p.rejected
    return -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2


def _bco_pair(p: _Pairs) -> torch.Tensor:
    """Jung et al. 2024 (BCO, https://arxiv.org/abs/2404.04656) for pairs, with no reward shift."""
    return -logsigmoid(p.beta * p.chosen) - logsigmoid(-p.beta * p.rejected)


def _sppo_hard(p: _Pairs) -> torch.Tensor:
    """Wu et al. 2024 (SPPO, https://arxiv.org/abs/2405.00675, equation 4.7), the chosen answer winning for sure;
    beta is the inverse of the paper's eta."""
    return (p.chosen - 0.5 / p.beta) ** 2 + (p.rejected + 0.5 / p.beta) ** 2


def _apo_zero(p: _Pairs) -> torch.Tensor:
    """D'Oosterlinck et al. 2024 (APO, https://arxiv.org/abs/2408.06266, equation 7): chosen up, rejected down."""
    return torch.sigmoid(-p.beta * p.chosen) + torch.sigmoid(p.beta * p.rejected)


def _apo_down(p: _Pairs) -> torch.Tensor:
    """Equation 8 of the APO paper: both down, rejected further; for answers worse than the model's own."""
    return torch.sigmoid(p.beta * p.chosen) + torch.sigmoid(-p.margin)


def _discopop(p: _Pairs) -> torch.Tensor:
    """Lu et al. 2024 (DiscoPOP, https://arxiv.org/abs/2406.08414, equation 5): logistic below a margin of zero,
    exponential above. The exponential and its share are one exponent: apart they are inf * 0 far below zero."""
    gate = p.margin / _DISCOPOP_TEMPERATURE
    return -logsigmoid(p.margin) * torch.sigmoid(-gate) + torch.exp(logsigmoid(gate) - p.margin)


def _sigmoid_norm(p: _Pairs) -> torch.Tensor:
    """`sigmoid` on log ratios that are means over tokens (Lambert et al. 2024, Tulu 3,
    https://arxiv.org/abs/2411.15124)."""
    return -logsigmoid(p.beta * p.difference_of_means)


# Name of the loss -> the loss of each pair.
KINDS: dict[str, Callable[[_Pairs], torch.Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
}


def dpo_losses(
    logratio_P_chosen: torch.Tensor,
    logratio_P_rejected: torch.Tensor,
    tokens_P_chosen: torch.Tensor,
    tokens_P_rejected: torch.Tensor,
    *,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The loss of each of P pairs; no mean is taken.

    Args:
        logratio_P_chosen, logratio_P_rejected: S_policy - S_reference in nats, S the sum of the log-probs of an
            answer's tokens; fp32.
        tokens_P_chosen, tokens_P_rejected: number of those tokens, >= 1; read by `ipo` and `sigmoid_norm`.
        beta: > 0, the inverse of how far the policy may go from the reference.
        kind: one of KINDS.
        label_smoothing: share of pairs taken to be labelled the wrong way round, in [0, 0.5); read by `sigmoid`,
            `robust` and `exo_pair` (which needs it above 0, else ValueError).

    Returns:
        (P,), of the dtype of the log ratios.
    """
    return KINDS[kind](
        _Pairs(
            logratio_P_chosen,
            logratio_P_rejected,
            tokens_P_chosen,
            tokens_P_rejected,
            beta,
            label_smoothing,
        )
    )
