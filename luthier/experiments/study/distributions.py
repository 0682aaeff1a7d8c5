"""How likely a difference is by luck alone: the tails of three distributions, without more than numpy.

Student's t and Fisher's F come from the incomplete beta function (its continued fraction, summed from the far end;
Abramowitz and Stegun 26.5.8), the studentized range of Tukey's test by summing over its two integrals (Tukey 1953).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Terms of the continued fraction, and points of each integral: more change nothing in the fourth digit.
_TERMS, _POINTS = 400, 240
# Beyond so many standard deviations there is nothing of a normal distribution.
_FAR = 8.5
_GRID: Floats = np.linspace(-_FAR, _FAR, 3401)
_NORMAL: Floats = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in _GRID])


def f_upper(value: float, above: float, below: float) -> float:
    """P(F > value) with so many degrees of freedom above and below the line; 1 where nothing differs."""
    if not value > 0:
        return 1.0
    if math.isinf(value):
        return 0.0
    return _beta(below / (below + above * value), below / 2, above / 2)


def chi2_upper(value: float, freedom: float) -> float:
    """P(chi-squared > value), to about two digits (Wilson and Hilferty 1931)."""
    if not value > 0:
        return 1.0
    part = 2 / (9 * freedom)
    return 0.5 * math.erfc(((value / freedom) ** (1 / 3) - 1 + part) / math.sqrt(2 * part))


def range_upper(value: float, groups: int, freedom: float) -> float:
    """P(Q > value) of the studentized range of so many means; `value` is the difference of two, in standard errors of
    one mean."""
    if not value > 0:
        return 1.0
    if math.isinf(value):
        return 0.0
    width = 1 / math.sqrt(2 * freedom)
    edges = np.linspace(max(0.0, 1 - 7 * width), 1 + 9 * width, _POINTS + 1)
    spreads = (edges[1:] + edges[:-1]) / 2
    log = (freedom - 1) * np.log(spreads) - freedom * spreads**2 / 2
    weights = np.exp(log - log.max())
    within = _within(value * spreads, groups)
    return float(min(1.0, max(0.0, 1 - (weights * within).sum() / weights.sum())))


@lru_cache(maxsize=4096)
def range_quantile(groups: int, freedom: float, luck: float = 0.05) -> float:
    """The range that luck alone exceeds in a share `luck` of studies."""
    low, high = 0.0, 4.0
    while range_upper(high, groups, freedom) > luck:
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if range_upper(middle, groups, freedom) > luck else (low, middle)
    return (low + high) / 2


def _within(ranges: Floats, groups: int) -> Floats:
    """P(range of so many standard normal values <= each of `ranges`): the largest is anywhere, the others below it."""
    largest = np.linspace(-_FAR, _FAR, _POINTS)
    density = np.exp(-(largest**2) / 2) / math.sqrt(2 * math.pi)
    at = np.interp(largest, _GRID, _NORMAL)
    below = np.interp(largest[:, None] - ranges[None, :], _GRID, _NORMAL, left=0.0)
    inside: Floats = groups * density[:, None] * (at[:, None] - below) ** (groups - 1)
    found: Floats = inside.sum(axis=0) * (largest[1] - largest[0])
    return found


def _beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # there the fraction converges slowly
        return 1 - _beta(1 - x, b, a)
    fraction = 1.0
    for term in range(_TERMS, 0, -1):
        half, odd = divmod(term, 2)
        if odd:
            part = -(a + half) * (a + b + half) * x / ((a + 2 * half) * (a + 2 * half + 1))
        else:
            part = half * (b - half) * x / ((a + 2 * half - 1) * (a + 2 * half))
        fraction = 1 + part / fraction
    log = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return min(1.0, math.exp(log) / (a * fraction))
