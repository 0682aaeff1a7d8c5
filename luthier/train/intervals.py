"""After which steps a run logs, evaluates and saves."""

from __future__ import annotations

import math
from collections.abc import Callable

from luthier.config import Config
from luthier.train.loop import Plan


def build_plan(config: Config, steps_per_epoch: float, total: int, *, evaluates: bool, samples: bool) -> Plan:
    """When the run that a config describes logs, evaluates and saves."""
    evaluation, output = config.evaluation, config.output
    return Plan(
        total_steps=total,
        log=every(config.logging.logging_steps, None, steps_per_epoch, total),
        evaluate=every(evaluation.eval_steps, evaluation.evals_per_epoch, steps_per_epoch, total)
        if evaluates or samples
        else lambda step: False,
        save=every(output.save_steps, output.saves_per_epoch, steps_per_epoch, total),
        save_best=output.load_best_model_at_end,
        patience=evaluation.early_stopping_patience,
    )


def every(
    steps: int | float | None, per_epoch: int | None, steps_per_epoch: float, total: int
) -> Callable[[int], bool]:
    """Which steps (counted from 1) something happens after: a number or fraction of steps, or a number of times
    per epoch; once an epoch, and at the end, if neither is set."""
    if steps is not None:
        interval = max(1, math.ceil(total * steps)) if steps < 1 else int(steps)
        return lambda step: step % interval == 0
    times = 1 if per_epoch is None else per_epoch

    def due(step: int) -> bool:
        return step * times // steps_per_epoch > (step - 1) * times // steps_per_epoch or (
            times > 0 and step == total
        )

    return due
