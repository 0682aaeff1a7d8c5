"""Sophia (Liu et al. 2023): a momentum step divided by an estimate of the Hessian's diagonal, clipped by element.

The step is pytorch-optimizer's. Its own estimate (Hutchinson's) differentiates twice, which fused kernels and
checkpointed layers cannot; the paper's other one (Gauss-Newton-Bartlett) is the square of a gradient towards labels
that the model itself draws, times their number, and costs a pass of its own. Here the labels of the data stand for
drawn ones, so that the estimate is free: `labels * gradient**2` of every tenth step, the empirical Fisher. It is the
same in expectation where the model's distribution is the data's, and larger where the model is still wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from pytorch_optimizer import SophiaH


class Sophia(SophiaH):
    """Sophia with the empirical Fisher's diagonal.

    Args:
        gamma: of the paper: the larger, the fewer elements are clipped. update_period: steps between estimates.

    Attributes:
        labels: trained tokens of a step, set by the run once it is known.
    """

    group_state = ("step",)

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.965, 0.99),
        gamma: float = 0.05,
        eps: float = 1e-12,
        update_period: int = 10,
    ) -> None:
        # p = 1: an element's step is at most the learning rate, which therefore has Adam's scale.
        super().__init__(
            groups, lr=lr, betas=betas, weight_decay=0.0, p=1.0, eps=eps, update_period=update_period
        )
        self.gamma = gamma
        self.labels = 1.0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        estimates = None
        if self.param_groups[0].get("step", 0) % self.update_period == 0:
            scale = self.gamma * self.labels
            estimates = [
                torch.zeros_like(p) if p.grad is None else p.grad.square().mul_(scale)
                for group in self.param_groups
                for p in group["params"]
            ]
        super().step(hessian=estimates)
        for state in self.state.values():  # only their average is needed from here on
            state.pop("hessian", None)
