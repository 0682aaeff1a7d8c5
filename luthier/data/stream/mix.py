"""Whose row is next, where several datasets are streamed.

`concat` goes through one after another, and a round ends behind the last. `interleave` has no end: each time the
dataset comes next that lags most behind its share (the divisor method of Webster), so that at every point of the
stream the counts are within a row of the shares; one that is through begins again by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from luthier.data.files import Row
from luthier.data.stream.sources import Cursor, Located, Position, Source
from luthier.errors import DataError

MixedRow = tuple[int, str, Row | DataError]
"""Number of the dataset, location, and the row or what is wrong with it."""


class Mix:
    """Rows of several sources.

    Args:
        starts: where each begins in every round: behind what is held out. weights: None: one after another.
        round_at_first: a round of weighted sources counts once one is through, else once all are.
        position: as `position` gave it; None: the beginning.

    Attributes:
        round: how often the data was gone through so far. taken: rows of each source. passes: how often each of
            weighted sources came to its end.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        starts: Sequence[Position | None],
        weights: Sequence[float] | None,
        *,
        round_at_first: bool = False,
        position: Position | None = None,
    ) -> None:
        self._sources, self._starts, self._weights = sources, list(starts), weights
        self._round_at_first = round_at_first
        position = position or {}
        n = len(sources)
        self._at: int = position.get("at", 0)
        self._round: int = position.get("round", 0)
        self.taken: list[int] = list(position.get("taken", [0] * n))
        self.passes: list[int] = list(position.get("passes", [0] * n))
        self._from: list[Position | None] = list(position.get("from", self._starts))
        self._cursors: list[tuple[Cursor, Iterator[Located]] | None] = [None] * n

    @property
    def round(self) -> int:
        if self._weights is None:
            return self._round
        return max(self.passes) if self._round_at_first else min(self.passes)

    def next(self) -> MixedRow | None:
        """The next row; None where a round of `concat` is over, and the one after it begins."""
        return self._next_of_concat() if self._weights is None else self._next_by_weight(self._weights)

    def _next_of_concat(self) -> MixedRow | None:
        while self._at < len(self._sources):
            found = next(self._rows(self._at), None)
            if found is not None:
                self.taken[self._at] += 1
                return self._at, *found
            self._again(self._at)
            self._at += 1
        self._at, self._round = 0, self._round + 1
        return None

    def _next_by_weight(self, weights: Sequence[float]) -> MixedRow:
        index = min(range(len(weights)), key=lambda i: ((self.taken[i] + 0.5) / weights[i], i))
        found = next(self._rows(index), None)
        if found is None:
            self.passes[index] += 1
            self._again(index)
            found = next(self._rows(index), None)
            if found is None:
                raise DataError(f"{self._sources[index].shown}: there are no rows in it to train on.")
        self.taken[index] += 1
        return index, *found

    def position(self) -> Position:
        """Where `next` goes on; what JSON can hold."""
        here: dict[str, Any] = {"at": self._at, "round": self._round, "taken": list(self.taken)}
        cursors = [
            given if open_ is None else open_[0].position()
            for given, open_ in zip(self._from, self._cursors, strict=True)
        ]
        return {**here, "passes": list(self.passes), "from": cursors}

    def _rows(self, index: int) -> Iterator[Located]:
        opened = self._cursors[index]
        if opened is None:
            cursor = self._sources[index].begin(self._from[index])
            opened = self._cursors[index] = (cursor, iter(cursor))
        return opened[1]

    def _again(self, index: int) -> None:
        self._cursors[index], self._from[index] = None, self._starts[index]
