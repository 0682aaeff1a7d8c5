"""Several datasets as one: how often each epoch holds which of their documents, and in which order.

Nothing is drawn by lot. A source's documents stand in an endless round, in an order that the seed fixes, and an epoch
takes the stretch behind that of the epoch before it. So no document comes twice before all others of its source came
once, neither in an epoch nor over the run. How long the stretches are is known before the first step:

    concat       `weight` times the source, in all epochs so far to the nearest document
    interleave   in proportion to the weights: the source that ends the epoch whole, the others to the nearest document
    temperature  as interleave, in proportion to (weight x documents) ^ (1 / temperature)

An epoch of concat is shuffled as a whole. Interleaved sources are shuffled in themselves and then spread, so that each
beginning of the epoch has every source's part of it to less than one document.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from heapq import heappop, heappush
from itertools import accumulate
from math import ceil, floor, gcd
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from luthier.config import Config, DatasetEntry
from luthier.data.packing import best_fit
from luthier.errors import DataError

log = logging.getLogger("luthier")

Ints = npt.NDArray[np.int64]

# Examples that an epoch may hold: their order is in memory, at some 30 bytes each.
MOST_EXAMPLES = 200_000_000
# Interleaved documents that are packed together: parts are kept from one stretch of so many to the next.
_PACKED_TOGETHER = 1024
# What keeps random draws of the same seed apart; orders of whole epochs are drawn without one.
_OF_ROUND, _OF_STRETCH = 1, 2


class Epoch(NamedTuple):
    """What an epoch holds, in order.

    Attributes:
        documents: by index. copies: of each, how often the epoch had it before. groups: places in these that are one
            row of a step, in the order of steps.
    """

    documents: Ints
    copies: Ints
    groups: Sequence[Sequence[int]] | npt.NDArray[Any]


@dataclass(frozen=True)
class Mix:
    """What the epochs of a run hold.

    Attributes:
        members: of each source its documents, by index. strategy: as `mix_strategy`.
        times: of `concat`, how often an epoch holds each source. fixed: of the others, how many documents of each an
            epoch has.
        ends: epochs after which the run ends, where `epochs` of a source is to come out exactly: the part of an epoch
            that is left is one by itself.
    """

    members: tuple[Ints, ...]
    strategy: str
    times: tuple[Fraction, ...] = ()
    fixed: tuple[int, ...] = ()
    ends: Fraction | None = None

    @classmethod
    def of(cls, config: Config, members: Sequence[Ints]) -> Mix | None:
        """The mix that a config asks for; None where every epoch holds each document once, in any order.

        Args:
            members: documents of each entry of `datasets`.

        Raises:
            DataError: an epoch would hold nothing, or too much.
        """
        data, epochs = config.data, exact(config.training.num_epochs)
        if data.mix_strategy != "concat":
            if len(members) == 1:
                log.info("mix_strategy: %s has one dataset to mix: an epoch is all of it", data.mix_strategy)
                return None
            shares = parts(data.datasets, [len(own) for own in members], data.mix_temperature)
            if empty := [entry.path for entry, own in zip(data.datasets, members, strict=True) if not len(own)]:
                raise DataError(f"{empty[0]}: nothing of it is left to train on, so it cannot be mixed with others.")
            fixed = exhausting([len(own) for own in members], shares, first=data.mix_stopping == "first_exhausted")
            mix = cls(tuple(members), data.mix_strategy, fixed=fixed)
        else:
            times = tuple(
                exact(entry.weight or 1) if entry.epochs is None else exact(entry.epochs) / epochs
                for entry in data.datasets
            )
            if all(each == 1 for each in times):
                return None
            counted = any(entry.epochs is not None for entry in data.datasets)
            mix = cls(tuple(members), "concat", times=times, ends=epochs if counted else None)
        if not any(mix.counts(0)):
            raise DataError("an epoch of this mix holds no example: raise the `weight` of the datasets.")
        if (most := sum(mix.counts(0))) > MOST_EXAMPLES:
            advice = "lower the largest `weight`" if mix.times else "bring the weights nearer together"
            raise DataError(
                f"an epoch of this mix has {most:,} examples, and {MOST_EXAMPLES:,} are the most: {advice}"
                + (", or write `mix_stopping: first_exhausted`." if mix.fixed and data.mix_stopping != "first_exhausted"
                   else ".")
            )  # fmt: skip
        return mix

    def counts(self, epoch: int) -> tuple[int, ...]:
        """Examples of each source in an epoch."""
        return self.fixed or tuple(
            stop - start for start, stop in zip(self._before(epoch), self._before(epoch + 1), strict=True)
        )

    def stretches(self, epoch: int) -> list[tuple[int, int]]:
        """Of each source, where in its endless round the epoch begins and ends."""
        return list(zip(self._before(epoch), self._before(epoch + 1), strict=True))

    def most_copies(self) -> Ints:
        """How often an epoch holds each document at most."""
        copies = np.zeros(sum(map(len, self.members)), np.int64)
        for number, own in enumerate(self.members):
            count = self.fixed[number] if self.fixed else ceil(self.times[number] * len(own))
            copies[own] = -(-count // max(len(own), 1))
        return copies

    def epoch(self, epoch: int, seed: int, shuffle: bool, lengths: Ints, packed_len: int | None) -> Epoch:
        """An epoch's documents and their order; with `packed_len`, packed into rows of so many tokens."""
        rng = np.random.default_rng((seed, epoch, _OF_STRETCH))
        found = []
        for number, (own, (start, stop)) in enumerate(zip(self.members, self.stretches(epoch), strict=True)):
            places = self._round(number, seed, shuffle)[np.arange(start, stop) % max(len(own), 1)]
            if shuffle and self.fixed:
                for first in range(0, len(places), len(own)):  # copies stay as far apart as they are
                    rng.shuffle(places[first : first + len(own)])
            found.append((own[places], np.arange(stop - start) // max(len(own), 1)))
        documents, copies = (np.concatenate(each) for each in zip(*found, strict=True))
        if self.fixed:
            spread = np.argsort(evenly(self.fixed), kind="stable")
            documents[spread], copies[spread] = documents.copy(), copies.copy()
            return Epoch(documents, copies, self._packed_in_order(documents, lengths, packed_len, shuffle, rng))
        groups: Any = best_fit(lengths[documents], packed_len) if packed_len else np.arange(len(documents))[:, None]
        if shuffle:
            order = np.random.default_rng((seed, epoch)).permutation(len(groups))
            groups = [groups[place] for place in order] if packed_len else groups[order]
        return Epoch(documents, copies, groups)

    def seen(self, epochs: int, seed: int, shuffle: bool) -> Ints:
        """How often each document is in the first so many epochs."""
        times = np.zeros(sum(map(len, self.members)), np.int64)
        for number, (own, count) in enumerate(zip(self.members, self._before(epochs), strict=True)):
            rounds, rest = divmod(count, max(len(own), 1))
            times[own] = rounds
            times[own[self._round(number, seed, shuffle)[:rest]]] += 1
        return times

    def describe(self) -> dict[str, Any]:
        """What a run that goes on has to agree on; plain values."""
        return {
            "strategy": self.strategy,
            "times": [str(each) for each in self.times],
            "fixed": list(self.fixed),
            "documents": [len(own) for own in self.members],
            "ends": None if self.ends is None else str(self.ends),
        }

    def _round(self, source: int, seed: int, shuffle: bool) -> Ints:
        """The order of a source's documents in its round."""
        size = len(self.members[source])
        return np.random.default_rng((seed, source, _OF_ROUND)).permutation(size) if shuffle else np.arange(size)

    def at(self, epoch: int) -> Fraction:
        """Epochs before this one; where the run ends, a part of one may be among them."""
        if self.ends is None or epoch <= self.ends:
            return Fraction(epoch)
        return self.ends + epoch - ceil(self.ends)

    def _before(self, epoch: int) -> tuple[int, ...]:
        """Examples of each source in all epochs before this one."""
        if self.fixed:
            return tuple(epoch * count for count in self.fixed)
        gone = self.at(epoch)
        return tuple(
            floor(each * len(own) * gone + Fraction(1, 2)) for each, own in zip(self.times, self.members, strict=True)
        )

    @staticmethod
    def _packed_in_order(
        documents: Ints, lengths: Ints, packed_len: int | None, shuffle: bool, rng: np.random.Generator
    ) -> Any:
        if not packed_len:
            return np.arange(len(documents))[:, None]
        groups: list[list[int]] = []
        for first in range(0, len(documents), _PACKED_TOGETHER):
            packed = best_fit(lengths[documents[first : first + _PACKED_TOGETHER]], packed_len)
            packed = [[first + place for place in group] for group in packed]
            groups += [packed[place] for place in rng.permutation(len(packed))] if shuffle else packed
        return groups


def exact(value: float) -> Fraction:
    """A number as it is written: 0.1 is a tenth."""
    return Fraction(str(value))


def parts(entries: Sequence[DatasetEntry], sizes: Sequence[int], temperature: float | None) -> tuple[Fraction, ...]:
    """Each source's part of an interleaved epoch; all of them are 1 together.

    Args:
        temperature: None: in proportion to the weights alone.
    """
    weights = [exact(entry.weight or 1) for entry in entries]
    if temperature is not None:
        whole = [weight * size for weight, size in zip(weights, sizes, strict=True)]
        weights = [_nearly(float(each / max(whole)) ** (1 / temperature)) for each in whole]
    return tuple(weight / sum(weights) for weight in weights)


def _nearly(value: float) -> Fraction:
    """A power as a fraction: the simple one that it was before it was rounded, if there is one."""
    simple = Fraction(value).limit_denominator(1_000_000)
    return simple if abs(float(simple) - value) <= 1e-12 * value else Fraction(value)


def exhausting(sizes: Sequence[int], shares: Sequence[Fraction], *, first: bool) -> tuple[int, ...]:
    """How many documents of each source are in an epoch that ends with the first source that is through, or the last:
    of that one all, of the others what goes with it by their shares, to the nearest document."""
    lengths = [size / share for size, share in zip(sizes, shares, strict=True)]
    length = min(lengths) if first else max(lengths)
    return tuple(floor(length * share + Fraction(1, 2)) for share in shares)


@lru_cache(maxsize=2)
def evenly(counts: tuple[int, ...]) -> npt.NDArray[np.int32]:
    """The sources in an order in which each of them comes `counts` times, as evenly as whole numbers can: among the
    first t of all T, a source of n has more than t n / T - 1 and fewer than t n / T + 1.

    The j-th of a source (from 0) may come from place floor(j T / n) on and has to before ceil((j + 1) T / n); of those
    that may, the one that has to first comes next, which meets all of these (Baruah et al. 1996, proportionate
    progress, section 4; on one processor any such order does).
    """
    common = gcd(*counts)
    once = [count // common for count in counts]
    total = sum(once)
    order = np.empty(total, np.int32)
    waiting = [(0, source, 0) for source, count in enumerate(once) if count]  # (from where on, source, which)
    ready: list[tuple[int, int, int]] = []  # (before where, source, which)
    for place in range(total):
        while waiting and waiting[0][0] <= place:
            _, source, which = heappop(waiting)
            heappush(ready, (-(-(which + 1) * total // once[source]), source, which))
        _, source, which = heappop(ready)
        order[place] = source
        if which + 1 < once[source]:
            heappush(waiting, ((which + 1) * total // once[source], source, which + 1))
    return np.tile(order, common)


def members_of(rows: Ints, rows_of_sources: Sequence[int]) -> list[Ints]:
    """The documents of each source, by index.

    Args:
        rows: of each document, its row's number among those of all sources. rows_of_sources: how many each has.
    """
    source = np.searchsorted(np.array(list(accumulate(rows_of_sources))), rows, side="right")
    return [np.flatnonzero(source == number) for number in range(len(rows_of_sources))]
