"""How far a figure may be off because it was measured on a sample of rows: 95% intervals by the bootstrap.

The rows are drawn again, as many as there are and with replacement, a thousand times; the middle 95% of what the
figure comes to is its interval (the percentile bootstrap; Efron and Tibshirani 1993, chapter 13). A row is drawn whole:
its tokens stay together, since tokens of one row are not independent of each other.

Two models that are measured on the same rows are compared row by row. Most of what makes a row easy or hard is the same
for both and cancels, so the interval of the difference is much narrower than the two intervals suggest.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000
LEVEL = 0.95
MIN_DIFFERING = 6

Floats = npt.NDArray[np.float64]

# Rows that are drawn at once: bounds the memory of the draws, not their outcome.
_DRAWS_AT_ONCE = 2_000_000


def bootstrap(
    values: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    *,
    share: bool | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """The 95% interval of sum(values) / sum(weights) over rows.

    Args:
        values: (N,) one sum for each row, for instance its negative log-likelihood. weights: (N,) what it is divided
            by, for instance the row's trained tokens; None for 1 each, which makes the figure a mean. share:
            whether the values count some of what the weights count; None: if there are no weights.

    Returns:
        Lower and upper end; both NaN where there are no rows. Of shares that are all 0 or all 1 every draw is the
        same, which says nothing: for them it is the exact binomial interval of rows (Clopper and Pearson 1934).
    """
    found = np.asarray(values, dtype=np.float64)
    share = weights is None if share is None else share
    if share and (same := _all_alike(found, weights)) is not None:
        return (_away(len(found)), 1.0) if same else (0.0, 1 - _away(len(found)))
    return _interval([found], [_ones_or(weights, found)], lambda figures: figures[0], seed, resamples)


def bootstrap_difference(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    weights_after: npt.ArrayLike | None = None,
    *,
    share: bool | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """The 95% interval of the figure of `after` minus that of `before`, both of the same rows in the same order.

    Args:
        before, after: (N,) as `values` of `bootstrap`; `share` as there. weights: (N,) of `before`. weights_after: (N,)
            of `after`, the same as `weights` unless given (two tokenizers cut a row into different numbers of tokens).

    Returns:
        As `bootstrap`. Where shares are all 0 or all 1 under both, the difference is at least the lower end of how many
        rows part, or at most the upper end of it.
    """
    old, new = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if old.shape != new.shape:
        raise ValueError(f"a paired difference needs the same rows: {old.shape} and {new.shape}")
    old_weights = _ones_or(weights, old)
    new_weights = old_weights if weights_after is None else np.asarray(weights_after, dtype=np.float64)
    share = weights is None if share is None else share
    was, now = _all_alike(old, old_weights), _all_alike(new, new_weights)
    if share and was is not None and now is not None:
        away = _away(len(old))
        return {0: (away - 1, 1 - away), 1: (away, 1.0), -1: (-1.0, -away)}[now - was]
    return _interval(
        [old, new], [old_weights, new_weights], lambda figures: figures[1] - figures[0], seed, resamples
    )


def _all_alike(values: Floats, weights: npt.ArrayLike | None) -> int | None:
    """0 or 1, if all rows are that."""
    if not len(values):
        return None
    if not values.any():
        return 0
    return 1 if (values == _ones_or(weights, values)).all() else None


def _away(rows: int) -> float:
    """A share that so many rows, all of them right, are drawn from once in 40 times."""
    return float(((1 - LEVEL) / 2) ** (1 / rows))


def beyond_chance(interval: tuple[float, float], differing: int) -> bool:
    """Whether a difference's interval leaves out 0, and enough rows differ to say so.

    Args:
        differing: rows that come out otherwise under one model than under the other. If chance alone decided which way
            each of them goes, five would all go one way once in 16 times, and six once in 32: fewer cannot say
            anything at this level (the sign test).
    """
    return differing >= MIN_DIFFERING and (interval[0] > 0 or interval[1] < 0)


def _ones_or(weights: npt.ArrayLike | None, values: Floats) -> Floats:
    return np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)


def _interval(
    values: list[Floats],
    weights: list[Floats],
    figure: Callable[[list[Floats]], Floats],
    seed: int,
    resamples: int,
) -> tuple[float, float]:
    rows = len(values[0])
    if rows == 0:
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    at_once = max(1, _DRAWS_AT_ONCE // rows)
    found = []
    for start in range(0, resamples, at_once):
        drawn = generator.integers(0, rows, (min(at_once, resamples - start), rows))
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append(figure([v[drawn].sum(1) / w[drawn].sum(1) for v, w in zip(values, weights, strict=True)]))
    figures = np.concatenate(found)
    figures = figures[np.isfinite(figures)]  # a draw may hold only rows of weight 0
    if not len(figures):
        return float("nan"), float("nan")
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(figures, [tail, 1 - tail])
    return float(low), float(high)
