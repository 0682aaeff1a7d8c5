"""Figures of lm-evaluation-harness with intervals, of one model or two on the same questions.

The harness says each figure and, for most, a standard error. Where a figure is the mean of what each question gives,
its interval and that of the difference are drawn from the questions as in every other evaluation (`intervals`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.evaluate.intervals import beyond_chance, bootstrap, bootstrap_difference
from luthier.evaluate.record import as_table

_Z = 1.96  # a 95% interval in standard errors

Samples = dict[tuple[str, str], dict[int, dict[str, Any]]]  # of a task and a filter, by the question's number


@dataclass
class Side:
    """One model's results: of each task and group its metrics by name, each with a standard error, and all answers."""

    name: str
    metrics: dict[str, dict[str, tuple[float, float | None]]]
    samples: Samples
    described: dict[str, Any]


def metrics_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, tuple[float, float | None]]]:
    """Of each task or group, `metric` or `metric,filter`: the value and its standard error."""
    found: dict[str, dict[str, tuple[float, float | None]]] = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filter_ = key.partition(",")
            if not filter_ or metric.endswith("_stderr") or isinstance(value, bool | str) or value is None:
                continue
            error = values.get(f"{metric}_stderr,{filter_}")
            error = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
            found.setdefault(task, {})[_label(metric, filter_)] = (float(value), error)
    return found


def _label(metric: str, filter_: str) -> str:
    return metric if filter_ == "none" else f"{metric},{filter_}"


def samples_of(samples: Mapping[str, Sequence[dict[str, Any]]]) -> Samples:
    found: Samples = {}
    for task, rows in samples.items():
        for row in rows:
            found.setdefault((task, row["filter"]), {})[int(row["doc_id"])] = row
    return found


def figures_of(sides: Sequence[Side], known: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """By task: of each model every metric with its interval, and the difference between the two."""
    tasks: dict[str, Any] = {}
    for task, metrics in sides[0].metrics.items():
        found: dict[str, Any] = {}
        own = known.get(task)
        questions = [len(rows) for (name, _), rows in sides[0].samples.items() if name == task]
        if own is not None:
            found |= {
                "questions": questions[0] if questions else 0,
                "shots": own.get_config("num_fewshot"),
                "version": own.VERSION,
            }
        for role, side in zip(("target", "compare"), sides, strict=False):
            found[role] = {name: _figure(side, task, name, seed) for name in metrics if name in side.metrics[task]}
        if len(sides) == 2:
            found["difference"] = {
                name: difference
                for name in found["compare"]
                if (difference := _difference(sides, task, name, _higher_is_better(own, name), seed)) is not None
            }
        tasks[task] = found
    return {"tasks": tasks}


def _figure(side: Side, task: str, name: str, seed: int) -> dict[str, float | None]:
    value, error = side.metrics[task][name]
    values = _by_question(side, task, name)
    if values is not None:
        low, high = bootstrap(values, seed=seed)
        return {"value": value, "low": low, "high": high}
    if error is None:
        return {"value": value, "low": None, "high": None}
    return {"value": value, "low": value - _Z * error, "high": value + _Z * error}


def _difference(
    sides: Sequence[Side], task: str, name: str, higher_is_better: bool, seed: int
) -> dict[str, Any] | None:
    """The target's figure minus the other's."""
    (value, error), (other, other_error) = (side.metrics[task][name] for side in sides)
    after, before = (_by_question(side, task, name) for side in sides)
    low: float | None
    high: float | None
    if before is not None and after is not None and len(before) == len(after):
        low, high = bootstrap_difference(before, after, seed=seed)
        beyond = beyond_chance((low, high), int((before != after).sum()))
    elif error is None or other_error is None:
        low, high, beyond = None, None, False
    else:
        # Of a group there are no values by question: as if the questions had been different ones, which is too wide.
        away = _Z * math.hypot(error, other_error)
        low, high = value - other - away, value - other + away
        beyond = low > 0 or high < 0
    better = (value > other) == higher_is_better if beyond else None
    return {"value": value - other, "low": low, "high": high, "beyond_chance": beyond, "better": better}


def _by_question(side: Side, task: str, name: str) -> np.ndarray | None:
    """A metric's value for every question, where the figure is their mean."""
    metric, _, filter_ = name.partition(",")
    rows = side.samples.get((task, filter_ or "none"), {})
    values = [rows[number].get(metric) for number in sorted(rows)]
    if not values or not all(isinstance(value, int | float | np.number) for value in values):
        return None
    found = np.asarray(values, np.float64)
    return found if math.isclose(float(found.mean()), side.metrics[task][name][0], abs_tol=1e-9) else None


def _higher_is_better(task: Any, name: str) -> bool:
    known = getattr(task, "higher_is_better", None)
    known = known() if callable(known) else {}
    return bool(known.get(name.partition(",")[0], True))


def shown(result: Mapping[str, Any]) -> str:
    """The table for people."""
    paired = result["compare"] is not None
    names = result["names"]
    columns = ["task", "metric", "shots", "questions", *([names["compare"]] if paired else []), names["target"]]
    rows = []
    for task, found in result["figures"]["tasks"].items():
        for metric, figure in found["target"].items():
            row = [task, metric, *(str(found.get(key, "")) for key in ("shots", "questions"))]
            row += [_cell(found["compare"].get(metric))] if paired else []
            row += [_cell(figure)]
            if paired:
                difference = found["difference"].get(metric)
                sign = "*" if difference is not None and difference["beyond_chance"] else " "
                row += [_cell(difference, "+") + sign]
            rows.append(row)
    note = "[ ] 95% interval" + ("; * beyond chance" if paired else "")
    return as_table([*columns, *(["difference"] if paired else [])], rows) + f"\n{note}"


def _cell(figure: Mapping[str, Any] | None, sign: str = "") -> str:
    if figure is None:
        return "-"
    value, low, high = (figure[key] for key in ("value", "low", "high"))
    interval = "" if low is None or high is None else f" [{low:.3f} {high:.3f}]"
    return f"{value:{sign}.3f}{interval}"
