"""From sums of rows to figures with their intervals: over all rows, by dataset, by column, of one model or two.

Loss is the mean over trained tokens, exactly as in training: a long answer weighs more than a short one. Exact match is
the share of the rows that were asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from luthier.evaluate.intervals import Floats, beyond_chance, bootstrap, bootstrap_difference

LOWER_IS_BETTER = {"loss"}


@dataclass(frozen=True)
class RowFigures:
    """What is known of each of R rows under one model.

    Attributes:
        tokens: (R,) that are predicted. columns: figure -> its values (R,), NaN for a row that does not have it, and
            the weights (R,) that their sum is divided by; None for a mean.
    """

    tokens: Floats
    columns: Mapping[str, tuple[Floats, Floats | None]]

    def of(self, chosen: npt.NDArray[np.bool_]) -> RowFigures:
        def some(values: Floats | None) -> Floats | None:
            return None if values is None else values[chosen]

        columns = {name: (values[chosen], some(weights)) for name, (values, weights) in self.columns.items()}
        return RowFigures(self.tokens[chosen], columns)

    def sums(self, name: str) -> tuple[Floats, Floats | None]:
        """Values and weights of a figure, over the rows that have it."""
        values, weights = self.columns[name]
        known = ~np.isnan(values)
        return values[known], None if weights is None else weights[known]

    def count(self, name: str) -> int:
        """Rows that have a figure."""
        return len(self.sums(name)[0]) if name in self.columns else 0


def all_figures(
    target: RowFigures,
    compare: RowFigures | None,
    groups: Mapping[str, Sequence[str]],
    seed: int = 0,
) -> dict[str, Any]:
    """Figures over all rows, and `by` each column of each group.

    Args:
        groups: column -> the value of each row.

    Returns:
        `all` and `by: {column: {value: ...}}`, each of them with `rows`, `asked`, `tokens`, `target`, and where there
        are two models `compare` and `difference` (target minus compare). A figure is `{value, low, high}`, and a
        difference has `beyond_chance` and `better` as well.
    """
    everything = np.ones(len(target.tokens), dtype=bool)
    by: dict[str, dict[str, Any]] = {}
    for column, values in groups.items():
        column_of = np.asarray(values, dtype=object)
        by[column] = {
            value: _of_group(target, compare, column_of == value, seed) for value in sorted(set(values), key=_order)
        }
    return {"all": _of_group(target, compare, everything, seed), "by": by}


def _order(value: str) -> tuple[bool, float, str]:
    """Numbers by size, before words."""
    try:
        return False, float(value), value
    except ValueError:
        return True, 0.0, value


def _of_group(
    target: RowFigures, compare: RowFigures | None, chosen: npt.NDArray[np.bool_], seed: int
) -> dict[str, Any]:
    own = target.of(chosen)
    found: dict[str, Any] = {
        "rows": int(chosen.sum()),
        "asked": own.count("exact_match"),
        "tokens": int(own.tokens.sum()),
        "target": _of_model(own, seed),
    }
    if compare is not None:
        other = compare.of(chosen)
        found["compare"] = _of_model(other, seed)
        found["difference"] = _differences(other, own, seed)
    return found


def _of_model(rows: RowFigures, seed: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name in rows.columns:
        values, weights = rows.sums(name)
        if len(values):
            value = values.sum() / (len(values) if weights is None else weights.sum())
            figures[name] = _figure(value, bootstrap(values, weights, seed=seed))
        if name == "loss":  # the exponential keeps the order, so it may be taken of the ends
            figures["perplexity"] = {end: _exp(value) for end, value in figures[name].items()}
    return figures


def _differences(before: RowFigures, after: RowFigures, seed: int) -> dict[str, Any]:
    found = {}
    for name in after.columns:
        if name not in before.columns:
            continue
        (old, old_weights), (new, new_weights) = before.sums(name), after.sums(name)
        if not len(old) or len(old) != len(new):
            continue
        interval = bootstrap_difference(old, new, old_weights, new_weights, seed=seed)
        was, now = (v.mean() if w is None else v.sum() / w.sum() for v, w in ((old, old_weights), (new, new_weights)))
        # Of weighted rows, those whose own figure differs.
        own, others = (v if w is None else v / w for v, w in ((new, new_weights), (old, old_weights)))
        differing = int((~np.isclose(own, others, rtol=1e-9, atol=0)).sum())
        value, beyond = now - was, beyond_chance(interval, differing)
        found[name] = _figure(value, interval) | {
            "beyond_chance": beyond,
            "better": bool((value < 0) == (name in LOWER_IS_BETTER)) if beyond else None,
        }
    return found


def _figure(value: float, interval: tuple[float, float]) -> dict[str, float | None]:
    return {"value": _finite(value), "low": _finite(interval[0]), "high": _finite(interval[1])}


def _finite(value: float) -> float | None:
    """JSON has no word for the others."""
    return float(value) if math.isfinite(value) else None


def _exp(value: float | None) -> float | None:
    return math.exp(value) if value is not None and value < 700 else None
