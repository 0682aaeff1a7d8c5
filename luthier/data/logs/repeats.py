"""What is left out because it says nothing new: exact duplicates, and most records of a template that has very many.

Both keep as much memory as is stated and no more. Duplicates are found by a hash of 64 bits in a table of buckets
(that one of 100 million different records is taken for another has a chance below 1 in 1,000). A bucket that is full
forgets its oldest record, and counts it; a duplicate of what was forgotten is kept.
"""

from __future__ import annotations

from array import array

import xxhash

from luthier.data.logs.settings import SEEN_SLOTS

_BUCKET = 8


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
        at = number & (len(slots) - _BUCKET)
        bucket = slots[at : at + _BUCKET]
        if number in bucket:
            return False
        if bucket[-1]:
            if len(slots) < self._most:
                self._grow()
                return self.first(text)
            self.forgotten += 1
        slots[at + 1 : at + _BUCKET] = bucket[:-1]
        slots[at] = number
        return True

    def _grow(self) -> None:
        """Twice the slots. What shared a bucket still does or is in the one half as far, so that each has room."""
        old, self._slots = self._slots, array("Q", bytes(16 * len(self._slots)))
        for number in reversed(old):
            if number:
                at = number & (len(self._slots) - _BUCKET)
                self._slots[at + 1 : at + _BUCKET] = self._slots[at : at + _BUCKET - 1]
                self._slots[at] = number

    def dump(self) -> bytes:
        return self._slots.tobytes()

    def load(self, data: bytes, forgotten: int) -> None:
        self._slots = array("Q")
        self._slots.frombytes(data)
        self.forgotten = forgotten


def is_kept(k: int, keep: int) -> bool:
    """Whether the k-th record of a template (from 1) is kept: the first `keep`, then every second up to twice as many,
    every fourth up to four times as many, and so on. 0: all are."""
    if k <= keep or keep == 0:
        return True
    return k % (1 << ((k - 1) // keep).bit_length()) == 0
