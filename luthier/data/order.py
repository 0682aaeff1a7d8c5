"""Which examples a step has: an epoch's documents in their order, in pieces of as many as make a step.

Epochs of a mix differ in length, by the document that a fraction leaves over or by how documents pack; where each one
begins is found as far as it is asked for.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.data.mixing import Epoch, Ints, Mix
from luthier.data.packing import best_fit


class Order:
    """The examples of all steps, by number; it follows from the arguments alone.

    Args:
        lengths: tokens of each document. rows_per_step: examples in a step; with `packed_len`, packed rows of that many
            tokens. mix: None: an epoch holds every document once.
    """

    def __init__(
        self,
        lengths: Ints,
        *,
        rows_per_step: int,
        seed: int,
        shuffle: bool,
        packed_len: int | None,
        mix: Mix | None,
    ) -> None:
        self.lengths = lengths
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.shuffle = shuffle
        self.packed_len = packed_len
        self.mix = mix
        self._drawn: tuple[int, Epoch] | None = None
        self._groups: Any = None
        if mix is None:
            self._groups = best_fit(lengths, packed_len) if packed_len else np.arange(len(lengths))[:, None]
        self._firsts = [0]  # the step that each epoch begins with

    def step(self, index: int) -> tuple[int, list[int], list[int]]:
        """Of a step, counted from 0: its epoch, its documents, and of each how often the epoch had it before."""
        epoch, within = self._place(index)
        held = self.epoch(epoch)
        places = _places(held.groups[within * self.rows_per_step : (within + 1) * self.rows_per_step])
        return epoch, held.documents[places].tolist(), held.copies[places].tolist()

    def steps_in(self, epoch: int) -> int:
        """Steps of an epoch."""
        if self.mix is None:
            return math.ceil(len(self._groups) / self.rows_per_step)
        while len(self._firsts) < epoch + 2:
            asked = len(self._firsts) - 1
            rows = len(self.epoch(asked).groups) if self.packed_len else sum(self.mix.counts(asked))
            self._firsts.append(self._firsts[-1] + math.ceil(rows / self.rows_per_step))
        return self._firsts[epoch + 1] - self._firsts[epoch]

    def total_steps(self, epochs: float) -> int:
        """Steps of so many epochs, up to the next whole one."""
        if self.mix is None:
            return math.ceil(epochs * self.steps_in(0))
        whole, rest = divmod(epochs, 1)
        if rest and self.mix.ends is not None:  # then what is left is an epoch by itself
            whole, rest = whole + 1, 0.0
        last = self.steps_in(int(whole))
        return self._firsts[int(whole)] + math.ceil(rest * last)

    def steps_per_epoch(self, epochs: float) -> int | float:
        """Steps of an epoch, on average over so many."""
        if self.mix is None:
            return self.steps_in(0)
        epochs = epochs if self.mix.ends is not None else math.ceil(epochs)
        mean = self.total_steps(epochs) / epochs
        return int(mean) if mean == int(mean) else mean

    def epochs_before(self, step: int) -> float:
        """Epochs that so many steps make."""
        if self.mix is None:
            return step / self.steps_in(0)
        epoch, within = self._place(step)
        start, stop = self.mix.at(epoch), self.mix.at(epoch + 1)
        return float(start + (stop - start) * within / self.steps_in(epoch))

    def seen(self, steps: int) -> Ints:
        """How often each document is in the first so many steps."""
        epoch, within = self._place(steps)
        mix = self.mix
        before = np.full(len(self.lengths), epoch) if mix is None else mix.seen(epoch, self.seed, self.shuffle)
        held = self.epoch(epoch)
        places = _places(held.groups[: within * self.rows_per_step])
        return before + np.bincount(held.documents[places], minlength=len(before))

    def once(self) -> Order:
        """The order in which an epoch holds every document once."""
        return Order(
            self.lengths,
            rows_per_step=self.rows_per_step,
            seed=self.seed,
            shuffle=self.shuffle,
            packed_len=self.packed_len,
            mix=None,
        )

    def epoch(self, epoch: int) -> Epoch:
        """What an epoch holds, in order."""
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = (epoch, self._draw(epoch))
        return self._drawn[1]

    def _draw(self, epoch: int) -> Epoch:
        if self.mix is not None:
            return self.mix.epoch(epoch, self.seed, self.shuffle, self.lengths, self.packed_len)
        groups = self._groups
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(groups))
            groups = groups[order] if isinstance(groups, np.ndarray) else [groups[place] for place in order]
        every = np.arange(len(self.lengths))
        return Epoch(every, np.zeros_like(every), groups)

    def _place(self, index: int) -> tuple[int, int]:
        """Of a step, its epoch, and which one it is there."""
        if self.mix is None:
            return divmod(index, self.steps_in(0))
        while self._firsts[-1] <= index:
            self.steps_in(len(self._firsts) - 1)
        epoch = bisect_right(self._firsts, index) - 1
        return epoch, index - self._firsts[epoch]


def _places(groups: Sequence[Sequence[int]] | np.ndarray) -> Ints:
    if isinstance(groups, np.ndarray):
        return groups.reshape(-1)
    return np.array([place for group in groups for place in group], np.int64)
