"""What is left out because it says nothing new: exact duplicates, and most records of a template that has very many.

Both keep as much memory as is stated and no more. Duplicates are found by a hash of 64 bits (that one of 100 million
different records is taken for another has a chance below 1 in 1,000) in a table of buckets: a record may be in either
of two, and goes to the one with more room, so that the table fills up nearly evenly before a first pair is full. Then
the oldest of a bucket is forgotten, and counted; a duplicate of what was forgotten is kept.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Hashable
from pathlib import Path
from typing import Generic, TypeVar

import xxhash

from luthier.data.logs.settings import SEEN_SLOTS

_BUCKET = 16
_Value = TypeVar("_Value", bound=Hashable)


class Seen:
    """Records, by their hash: `first` says whether it is the first time."""

    def __init__(self, most: int = SEEN_SLOTS) -> None:
        """`most`: slots, a power of two."""
        self._most = most
        self._slots = array("Q", bytes(8 * min(1 << 14, most)))
        self.forgotten = 0

    def first(self, text: str) -> bool:
        number = xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) or 1
        slots = self._slots
        last = len(slots) - _BUCKET
        at, other = number & last, (number >> 32) & last
        one, two = slots[at : at + _BUCKET], slots[other : other + _BUCKET]
        if number in one or number in two:
            return False
        free, free_there = one.count(0), two.count(0)
        if free_there > free:
            slots[other + _BUCKET - free_there] = number
        elif free:
            slots[at + _BUCKET - free] = number
        elif len(slots) < self._most:
            self._grow()
            return self.first(text)
        else:
            self._forget_one(at, number)
        return True

    def _forget_one(self, at: int, number: int) -> None:
        slots = self._slots
        self.forgotten += 1
        slots[at : at + _BUCKET - 1] = slots[at + 1 : at + _BUCKET]
        slots[at + _BUCKET - 1] = number

    def _grow(self) -> None:
        """Twice the slots. What shared a bucket still does, or is in the one half as far: there is room for all."""
        old, size = self._slots, len(self._slots)
        self._slots = new = array("Q", bytes(16 * size))
        last = 2 * size - _BUCKET
        free = bytearray([_BUCKET]) * (2 * size // _BUCKET)
        for place, number in enumerate(old):
            if number:
                at, other = number & last, (number >> 32) & last
                # In the bucket of the two that goes on from the one it was in.
                if at & (size - 1) != place & -_BUCKET:
                    at = other
                new[at + _BUCKET - free[at // _BUCKET]] = number
                free[at // _BUCKET] -= 1

    def dump(self) -> memoryview:
        return memoryview(self._slots)

    def load(self, file: Path, forgotten: int) -> None:
        slots = array("Q")
        with file.open("rb") as opened:
            slots.fromfile(opened, file.stat().st_size // slots.itemsize)
        self._slots, self.forgotten = slots, forgotten


class Memo(dict[str, _Value], Generic[_Value]):
    """What was found out about texts, in about as many bytes as are stated: emptied when they are used up."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most, self._bytes = most, 0

    def put(self, text: str, value: _Value) -> None:
        # The entry of the dictionary (which doubles from time to time) and a small value take about 200 bytes.
        self._bytes += sys.getsizeof(text) + 200
        if self._bytes > self._most:
            self.forget()
            return
        self[text] = value

    def forget(self) -> None:
        self.clear()
        self._bytes = 0


def is_kept(k: int, keep: int) -> bool:
    """Whether the k-th record of a template (from 1) is kept: the first `keep`, then every second up to twice as many,
    every fourth up to four times as many, and so on. 0: all are."""
    if k <= keep or keep == 0:
        return True
    return k % (1 << ((k - 1) // keep).bit_length()) == 0
