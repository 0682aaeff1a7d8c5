"""What is a difference and what is luck: runs of the same setting differ by their seeds, and settings have to differ by
more than that.

First one question for all settings together: do they differ more than seeds do (Fisher's F test, 5 %)? Only where they
do is anything else claimed, so that of studies in which nothing makes a difference about one in twenty claims one.
Then pairs of settings (Tukey's range test over all pairs, which allows for picking the best of many), keys averaged
over the rest (F tests, Holm's correction), and pairs of keys that depend on each other (likewise).

The noise is the spread over seeds, pooled over settings. Where all settings have the same seeds, they are compared seed
by seed: what a seed does to all of them alike, its held-out rows for instance, cancels. Where the spreads of settings
differ too much to be one (Bartlett's test, 1 %: a setting that diverges, mostly), each pair is judged by its own spread
(Games and Howell 1976). With one seed there is no such noise; in a grid of several keys what their separate effects
leave unexplained stands in for it, for the effects of keys only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations, pairwise
from typing import Any, Literal

import numpy as np

from luthier.experiments.study.distributions import (
    Floats,
    chi2_upper,
    f_upper,
    range_quantile,
    range_upper,
)
from luthier.experiments.study.settings import Group, Setting, contains, is_numeric, levels, plain, value

LUCK = 0.05
_UNEQUAL = 0.01
# Degrees of freedom that what is left unexplained needs to stand for noise.
_LEFT = 8
# A key with more values than this share of the settings is a dial that a search turned: no value comes twice.
_DIAL = 0.5

Source = Literal["seeds", "same seeds", "own", "rest", "none"]


@dataclass(frozen=True)
class Noise:
    """`spread`: standard deviation of one run; `freedom`: how well it is known; `source`: where it is from."""

    source: Source
    spread: float = 0.0
    freedom: float = 0.0


@dataclass(frozen=True)
class Difference:
    """Of a setting to the best. `least`: how large it has to be to count; `beyond`: None where there is no telling."""

    size: float
    least: float | None = None
    beyond: bool | None = None


@dataclass(frozen=True)
class Factor:
    """A key, or a part of a subset that is in or out. `codes`: the place of each setting's level."""

    name: str
    levels: list[str]
    codes: list[int]
    part: bool = False
    numeric: bool = False


@dataclass
class Effect:
    """What a factor does, the other ones being the same.

    Attributes:
        means: of the metric for each level. luck: probability of such differences by luck, corrected for the number of
            factors; None where nothing tells. clear: whether it is beyond the noise. alike: places of levels that
            cannot be told from the best one. least: how much two levels have to differ, by level.
    """

    factor: Factor
    means: list[float]
    counts: list[int]
    luck: float | None = None
    clear: bool | None = None
    alike: list[int] = field(default_factory=list)
    least: list[float] = field(default_factory=list)


class Comparison:
    """The settings of one group, judged.

    Attributes:
        noise: of one run. differs: whether the settings as a whole differ beyond the noise; None: no telling. luck:
            the probability of that by luck. factors: what the settings are made of.
    """

    def __init__(self, group: Group, subsets: dict[str, list[list[Any]]]) -> None:
        self.group = group
        self.settings = group.settings
        self.subsets = subsets
        self.factors = factors_of(group, subsets)
        self._runs = [
            (place, trial.seed, trial.metric or 0.0)
            for place, setting in enumerate(self.settings)
            for trial in setting.trials
        ]
        self._values = np.array([number for *_, number in self._runs])
        self._places = [place for place, *_ in self._runs]
        self._cells = _dummies(self._places)
        self.same_seeds = self._have_same_seeds()
        seeds = [str(seed) for _, seed, _ in self._runs]
        one = np.ones((len(self._runs), 1))
        self._base = np.hstack([one, _dummies(seeds)]) if self.same_seeds else one
        self.noise = self._noise()
        self.luck = self._luck()
        self.differs = None if self.luck is None else self.luck < LUCK

    def _have_same_seeds(self) -> bool:
        sets = {tuple(sorted(str(trial.seed) for trial in setting.trials)) for setting in self.settings}
        return len(sets) == 1 and len(self.settings) > 1 and len(set(*sets)) == len(self.settings[0].trials) > 1

    def _noise(self) -> Noise:
        repeated = [setting for setting in self.settings if len(setting.trials) > 1]
        if repeated:
            if _unequal(repeated):
                return Noise("own")
            left, freedom = self._left(np.hstack([self._base, self._cells]))
            return Noise("same seeds" if self.same_seeds else "seeds", math.sqrt(left / freedom), freedom)
        if len(self.factors) > 1:
            left, freedom = self._left(self._additive())
            if freedom >= _LEFT:
                return Noise("rest", math.sqrt(left / freedom), freedom)
        return Noise("none")

    def _luck(self) -> float | None:
        """Of the settings as a whole."""
        if self.noise.source == "none" or len(self.settings) < 2:
            return None
        if self.noise.source == "own":
            largest: dict[float, float] = {}  # of pairs with as many degrees of freedom, only that one matters
            for one, other in combinations(self.settings, 2):
                if (pair := _welch(one, other)) is not None:
                    largest[pair[1]] = max(largest.get(pair[1], 0.0), abs(one.mean - other.mean) / pair[0])
            count = len(self.settings)
            return min((range_upper(size, count, free) for free, size in largest.items()), default=None)
        fuller = self._additive() if self.noise.source == "rest" else np.hstack([self._base, self._cells])
        return self._test(self._base, fuller)

    def difference(self, setting: Setting) -> Difference:
        """Of a setting to the best one, as much as it is worse."""
        best = self.settings[0]
        size = abs(setting.mean - best.mean)
        if self.noise.source in ("none", "rest") or setting is best:
            return Difference(size)
        if self.noise.source == "own":
            if (pair := _welch(best, setting)) is None:
                return Difference(size)
            least = range_quantile(len(self.settings), pair[1], LUCK) * pair[0]
            return Difference(size, least, bool(self.differs) and size > least)
        error = self.noise.spread * math.sqrt((1 / len(best.trials) + 1 / len(setting.trials)) / 2)
        least = range_quantile(len(self.settings), self.noise.freedom, LUCK) * error
        return Difference(size, least, bool(self.differs) and size > least and _apart(setting.mean, best.mean))

    @cached_property
    def calm(self) -> Comparison:
        """The settings of which effects are told: without those whose spread is far larger than that of the others, at
        most half of them. A mean over a setting that diverges says nothing of a key."""
        if self.noise.source != "own":
            return self
        kept = sorted(self.settings, key=lambda setting: setting.spread or 0.0)
        while len(kept) > len(self.settings) / 2 and _unequal([each for each in kept if each.spread is not None]):
            kept.pop()
        if len(kept) < max(2, len(self.settings) / 2):
            return self
        found = Comparison(replace(self.group, settings=[each for each in self.settings if each in kept]), self.subsets)
        found.differs = bool(self.differs and found.differs)
        return found

    @cached_property
    def effects(self) -> list[Effect]:
        """Of each factor; what cannot be told from the other ones is left out."""
        if self.calm is not self:
            return self.calm.effects
        additive = self._additive()
        inverse = np.linalg.pinv(additive.T @ additive)
        weights = inverse @ additive.T @ self._values
        found = []
        start = self._base.shape[1]
        spread, freedom = self._pooled
        for factor in self.factors:
            codes = [factor.codes[place] for place in self._places]
            counts = [codes.count(level) for level in range(len(factor.levels))]
            columns = slice(start, start + len(factor.levels))
            start += len(factor.levels)
            without = np.delete(additive, np.r_[columns], axis=1)
            if np.linalg.matrix_rank(additive) == np.linalg.matrix_rank(without):
                continue
            own = weights[columns]
            means = self._values.mean() + own - np.average(own, weights=counts)
            effect = Effect(factor, [float(mean) for mean in means], counts)
            if self.differs is not None:
                effect.luck = self._test(without, additive)
                part = inverse[columns, columns]
                best = self._best(effect.means)
                q = range_quantile(len(counts), freedom, LUCK) if freedom else 0.0
                effect.least = [
                    q * spread * math.sqrt(max(0.0, part[i, i] + part[best, best] - 2 * part[i, best]) / 2)
                    for i in range(len(counts))
                ]
            found.append(effect)
        self._correct(found)
        return found

    def _correct(self, effects: list[Effect]) -> None:
        """Holm's correction, and what follows from it."""
        known = [effect for effect in effects if effect.luck is not None]
        for effect, luck in zip(known, holm([effect.luck or 0.0 for effect in known]), strict=True):
            effect.luck = luck
            effect.clear = bool(self.differs) and luck < LUCK
            best = effect.means[self._best(effect.means)]
            effect.alike = [
                place
                for place, (mean, least) in enumerate(zip(effect.means, effect.least, strict=True))
                if not effect.clear or abs(mean - best) <= least or not _apart(mean, best)
            ]

    def interactions(self) -> list[tuple[Factor, Factor, float]]:
        """Pairs of factors whose effects depend on each other beyond the noise of seeds, and how likely that is by
        luck."""
        if self.calm is not self:
            return self.calm.interactions()
        if not self.differs or self.noise.source in ("rest", "own") or len(self.factors) < 2:
            return []
        additive = self._additive()
        found = []
        for one, other in combinations(self.factors, 2):
            cells = [f"{one.codes[place]} {other.codes[place]}" for place in self._places]
            if len(set(cells)) == len(one.levels) * len(other.levels):
                found.append((one, other, self._test(additive, np.hstack([additive, _dummies(cells)]))))
        lucks = holm([luck for *_, luck in found])
        kept = [(one, other, luck) for (one, other, _), luck in zip(found, lucks, strict=True) if luck < LUCK]
        return sorted(kept, key=lambda each: each[2])

    def _additive(self) -> Floats:
        parts = [_dummies([factor.codes[place] for place in self._places], factor) for factor in self.factors]
        return np.hstack([self._base, *parts])

    def _best(self, means: Sequence[float]) -> int:
        return means.index(max(means) if self.group.goal == "max" else min(means))

    @cached_property
    def _pooled(self) -> tuple[float, float]:
        """The spread of one run, of all settings together even where they differ, and its degrees of freedom."""
        if self.noise.source != "own":
            return self.noise.spread, self.noise.freedom
        left, freedom = self._left(np.hstack([self._base, self._cells]))
        return math.sqrt(left / freedom), freedom

    def _test(self, simple: Floats, fuller: Floats) -> float:
        """How likely it is by luck that the fuller model explains so much more."""
        (left, free), (least, rest) = self._left(simple), self._left(fuller)
        spread, freedom = self._pooled
        explained, more = left - least, free - rest
        size = float(np.square(self._values).sum())
        if not more or explained <= 1e-18 * size:
            return 1.0
        if spread**2 * freedom <= 1e-18 * size:
            return 0.0
        return f_upper(explained / more / spread**2, more, freedom)

    def _left(self, model: Floats) -> tuple[float, int]:
        """Squares that a model leaves, and their degrees of freedom."""
        weights, _, rank, _ = np.linalg.lstsq(model, self._values, rcond=None)
        return float(np.square(self._values - model @ weights).sum()), len(self._values) - int(rank)


def factors_of(group: Group, subsets: dict[str, list[list[Any]]]) -> list[Factor]:
    """What the settings are made of; a key that a search turned freely is none, since no value of it comes twice."""
    found = []
    for key in group.dials:
        if parts := subsets.get(key):
            for part in parts:
                codes = [int(contains(setting, key, part)) for setting in group.settings]
                if len(set(codes)) > 1:
                    found.append(Factor(value(list(part)), ["without", "with"], codes, part=True))
            continue
        there = levels(key, group.settings)
        if len(there) < 2 or (len(group.dials) > 1 and len(there) > max(2, _DIAL * len(group.settings))):
            continue
        names = [plain(each) for each in there]
        codes = [names.index(plain(setting.values.get(key))) for setting in group.settings]
        found.append(Factor(key, [value(each) for each in there], codes, numeric=is_numeric(key, group.settings)))
    return found


def holm(lucks: Sequence[float]) -> list[float]:
    """Probabilities corrected for how many there are (Holm 1979)."""
    order = sorted(range(len(lucks)), key=lambda place: lucks[place])
    found = [1.0] * len(lucks)
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(lucks) - rank) * lucks[place]))
        found[place] = largest
    return found


def is_monotone(numbers: Sequence[float]) -> int:
    """1 where each is larger than the one before, -1 where smaller, else 0."""
    signs = {(later > before) - (later < before) for before, later in pairwise(numbers)}
    return signs.pop() if len(signs) == 1 else 0


def _welch(one: Setting, other: Setting) -> tuple[float, float] | None:
    """The error of a mean by the spreads of two settings, and its degrees of freedom (Welch 1947); None where one has a
    single run."""
    if one.spread is None or other.spread is None:
        return None
    parts = [one.spread**2 / len(one.trials), other.spread**2 / len(other.trials)]
    free = [len(one.trials) - 1, len(other.trials) - 1]
    if not sum(parts):  # two settings on which seeds do nothing: what is more than rounding is a difference
        return 1e-9 * max(abs(one.mean), abs(other.mean), 1e-300), float(sum(free))
    below = sum(part**2 / count for part, count in zip(parts, free, strict=True))
    return math.sqrt(sum(parts) / 2), round(sum(parts) ** 2 / below, 1)


def _unequal(settings: Sequence[Setting]) -> bool:
    """Bartlett's test: whether the spreads differ too much to be one."""
    squares = [setting.spread**2 for setting in settings if setting.spread is not None]
    free = [len(setting.trials) - 1 for setting in settings]
    if len(squares) < 2 or not any(squares):
        return False
    if not all(squares):
        return True
    pooled = sum(n * square for n, square in zip(free, squares, strict=True)) / sum(free)
    size = sum(free) * math.log(pooled) - sum(
        n * math.log(square) for n, square in zip(free, squares, strict=True)
    )
    scale = 1 + (sum(1 / n for n in free) - 1 / sum(free)) / (3 * (len(free) - 1))
    return chi2_upper(size / scale, len(free) - 1) < _UNEQUAL


def _dummies(codes: Sequence[Any], factor: Factor | None = None) -> Floats:
    """A column for each level, with ones where it is."""
    names = list(range(len(factor.levels))) if factor else sorted(set(codes))
    return np.array([[float(code == name) for name in names] for code in codes])


def _apart(one: float, other: float) -> bool:
    """More than rounding."""
    return abs(one - other) > 1e-9 * max(abs(one), abs(other))
