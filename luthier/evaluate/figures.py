"""From sums of rows to figures with their intervals: over all rows, by dataset, by column, of one model or two.

Loss is the mean over trained tokens, exactly as in training: a long answer weighs more than a short one. Exact match is
the share of the rows that were asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from luthier.evaluate.intervals import Floats, beyond_chance, bootstrap, bootstrap_difference

LOWER_IS_BETTER = {"loss", "undesirable_logp"}
SHARES = {"token_accuracy", "exact_match", "stopped", "prefers_chosen", "reward_accuracy"}
SHARES |= {"accuracy", "accuracy_with_guess", "accuracy_with_letter", "answered"}  # of a benchmark's questions


@dataclass(frozen=True)
class RowFigures:
    """What is known of each of R rows under one model.

    Attributes:
        tokens: (R,) that are predicted. columns: figure -> its values (R,), NaN for a row that does not have it, and
            the weights (R,) that their sum is divided by, 0 for a row that does not have it; None for a mean.
        margins: figure -> two of the columns, of which it is how far the first is above the second.
    """

    tokens: Floats
    columns: Mapping[str, tuple[Floats, Floats | None]]
    margins: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def of(self, chosen: npt.NDArray[np.bool_]) -> RowFigures:
        def some(values: Floats | None) -> Floats | None:
            return None if values is None else values[chosen]

        columns = {name: (values[chosen], some(weights)) for name, (values, weights) in self.columns.items()}
        return RowFigures(self.tokens[chosen], columns, self.margins)

    def sums(self, name: str) -> tuple[Floats, Floats | None]:
        """Values and weights of a figure, over the rows that have it."""
        values, weights = self.columns[name]
        known = ~np.isnan(values) if weights is None else weights > 0
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
            figures[name] = _figure(value, _interval_of(name, values, weights, seed))
        if name == "loss":  # the exponential keeps the order, so it may be taken of the ends
            figures["perplexity"] = {end: _exp(value) for end, value in figures[name].items()}
    for name, (above, below) in rows.margins.items():
        if above in figures and below in figures:
            (first, its_weights), (second, other_weights) = rows.columns[above], rows.columns[below]
            assert its_weights is not None and other_weights is not None
            interval = bootstrap_difference(second, first, other_weights, its_weights, seed=seed)
            figures[name] = _figure(first.sum() / its_weights.sum() - second.sum() / other_weights.sum(), interval)
    return figures


def _differences(before: RowFigures, after: RowFigures, seed: int) -> dict[str, Any]:
    found = {}
    for name in after.columns:
        if name not in before.columns:
            continue
        (old, old_weights), (new, new_weights) = before.sums(name), after.sums(name)
        if not len(old) or len(old) != len(new):
            continue
        interval = _interval_of(name, new, new_weights, seed, old, old_weights)
        was, now = (v.mean() if w is None else v.sum() / w.sum() for v, w in ((old, old_weights), (new, new_weights)))
        # Of weighted rows, those whose own figure differs.
        own, others = (v if w is None else v / w for v, w in ((new, new_weights), (old, old_weights)))
        differing = int((~np.isclose(own, others, rtol=1e-9, atol=0)).sum())
        value = now - was
        beyond = math.isfinite(value) and beyond_chance(interval, differing)
        found[name] = _figure(value, interval) | {
            "beyond_chance": beyond,
            "better": bool((value < 0) == (name in LOWER_IS_BETTER)) if beyond else None,
        }
    return found


def _interval_of(
    name: str,
    values: Floats,
    weights: Floats | None,
    seed: int,
    before: Floats | None = None,
    weights_before: Floats | None = None,
) -> tuple[float, float]:
    """Of a figure, or of its difference to the figure `before`."""
    share = name in SHARES
    if before is None:
        low, high = bootstrap(values, weights, share=share, seed=seed)
    else:
        low, high = bootstrap_difference(before, values, weights_before, weights, share=share, seed=seed)
    # Every draw of a single row is that row, which says nothing.
    return (math.nan, math.nan) if len(values) < 2 and low == high else (low, high)


def _figure(value: float, interval: tuple[float, float]) -> dict[str, float | None]:
    """Of a value that is not finite the interval would be that of the other rows: there is none."""
    low, high = interval if math.isfinite(value) else (math.nan, math.nan)
    return {"value": _finite(value), "low": _finite(low), "high": _finite(high)}


def _finite(value: float) -> float | None:
    """JSON has no word for the others."""
    return float(value) if math.isfinite(value) else None


def _exp(value: float | None) -> float | None:
    return math.exp(value) if value is not None and value < 700 else None
