"""A preference objective over a whole validation set, as if it were one step of training without gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from luthier.data.loader import StepLoader


@torch.no_grad()
def evaluate_preference(
    policy: nn.Module,
    objective: Any,
    loader: StepLoader,
    device: torch.device,
    gather: Callable[[Sequence[float]], list[list[float]]] = lambda values: [list(values)],
) -> dict[str, float]:
    """The objective's loss and figures on the first step of a loader, which is to hold the whole set.

    Since every pass has the denominators of the whole set, the figures do not depend on how it is cut. Several
    processes share the passes between them, and all of them get the same figures.

    Args:
        objective: as `train.loop` calls it. gather: numbers -> those of each process, in order.

    Returns:
        `eval_loss`, and the objective's figures with `eval_` before their names.
    """
    was_training = policy.training
    policy.eval()
    step = loader.step(0)
    totals = [0.0] * (1 + objective.sums)
    try:
        objective.begin(policy, loader.mismatched(step, device), step, lambda batch, work: work())
        for batch in loader.batches(step, device):
            loss, sums = objective(policy, batch, step)
            if batch.spare:
                continue
            found = [float(loss), *sums.tolist()]
            totals = [a + b for a, b in zip(totals, found, strict=True)]
    finally:
        policy.train(was_training)
    loss_sum, *sums_of_all = map(sum, zip(*gather(totals), strict=True))
    figures = objective.figures(sums_of_all)
    return {"eval_loss": loss_sum, **{f"eval_{name}": value for name, value in figures.items()}}
