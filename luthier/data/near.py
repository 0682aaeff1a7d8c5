"""Documents that are nearly the same: MinHash and locality-sensitive hashing, and each hit verified.

A document is the set of its shingles, the runs of five tokens (or words) in it; two documents are as alike as their
sets overlap, |A and B| / |A or B| (Jaccard). The least of a set's values under a random permutation is the same for
two sets with just that probability (Broder 1997), so a document's least values under 128 permutations, taken in bands,
put alike documents into one bucket of some band. Bands are chosen so that 99 of 100 pairs at the threshold meet, and
whoever meets is compared in full: what is found is right, and one in a hundred at the very threshold may be missed.

Memory, for D documents and B bands (21 at a threshold of 0.8): 8 B D bytes of keys, in a temporary file beyond
256 MiB; 16 D bytes while a band is sorted; 16 bytes for each bucket that a document shares with another. 10 million
documents: 1.7 GB on disk, 160 MB in memory, and 340 MB more for every million of them that have a twin in all bands.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

SHINGLE = 5
"""Tokens or words of a shingle: order counts within, and a changed word changes five shingles."""
MOST_COMPARED = 64
"""Documents that one is compared with at most, those first that share most buckets with it."""

_PERMUTATIONS = 128
_FOUND = 0.99
_IN_MEMORY = 1 << 28  # bytes of keys
_TOGETHER = 1 << 19  # values that are hashed at once
_PRIME = np.uint64(0x9E3779B97F4A7C15)


@dataclass(slots=True)
class Near:
    """Which documents are left out for which others, by number; and how many were not compared with all that they
    shared a bucket with."""

    twins: dict[int, int] = field(default_factory=dict)
    unsure: int = 0


def find_near(
    count: int,
    values: Callable[[int], Hashes],
    alike: Callable[[int, int], bool],
    threshold: float,
    fixed: int = 0,
    length: int = SHINGLE,
) -> Near:
    """Go through documents 0 ... count - 1 and leave out each that is alike to one before it that stayed.

    Args:
        values: what a document consists of, in order: token ids, or hashes of words.
        alike: whether two documents that share a bucket are near, in full.
        threshold: Jaccard similarity, which sets the bands.
        fixed: so many documents at the beginning stay, whatever they are alike to.
        length: values of a shingle; 1 where they are shingles already.
    """
    bands, rows = bands_of(threshold)
    found = Near()
    if count < 2:
        return found
    with _Keys(bands, rows, count, values, length) as keys:
        members = _members(keys.array)
    stayed: dict[int, list[int]] = {}
    for document, group in groupby(members, key=lambda member: member[0]):
        buckets = [bucket for _, bucket in group]
        if document >= fixed:
            shared = Counter(other for bucket in buckets for other in stayed.get(bucket, ()))
            order = sorted(shared, key=lambda other: (other >= fixed, -shared[other], other))
            twin = next((other for other in order[:MOST_COMPARED] if alike(document, other)), None)
            if twin is not None:
                found.twins[document] = twin
                continue
            full = any(len(stayed.get(bucket, ())) >= MOST_COMPARED for bucket in buckets)
            found.unsure += full or len(order) > MOST_COMPARED
        for bucket in buckets:
            there = stayed.setdefault(bucket, [])
            if len(there) < MOST_COMPARED:
                there.append(document)
    return found


def bands_of(threshold: float) -> tuple[int, int]:
    """Bands, and permutations in each: as many in each as still find 99 % of pairs at the threshold."""
    for rows in range(_PERMUTATIONS, 1, -1):
        bands = _PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= _FOUND:
            return bands, rows
    return _PERMUTATIONS, 1


# --- sets ---------------------------------------------------------------------------------------------------


def hash_runs(values: npt.NDArray[np.integer], length: int) -> Hashes:
    """A hash of each run of so many values; none where there are fewer."""
    mixed = _mix(values.astype(np.uint64))
    hashed: Hashes = np.zeros(max(0, len(mixed) - length + 1), np.uint64)
    for at in range(length if len(hashed) else 0):
        hashed = hashed * _PRIME + mixed[at : at + len(hashed)]
    return _mix(hashed)


def runs_of(pieces: Sequence[npt.NDArray[np.integer]], length: int) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """`hash_runs` of each of these, end to end, and how many each has."""
    sizes = np.array([len(piece) for piece in pieces], dtype=np.int64)
    counts = np.maximum(0, sizes - length + 1)
    if not counts.any():
        return np.zeros(0, np.uint64), counts
    hashed = hash_runs(np.concatenate(pieces), length)
    # A run that begins less than `length` before the end of its piece goes on into the next one.
    inside = np.arange(sizes.sum()) < np.repeat(np.cumsum(sizes) - length + 1, sizes)
    return hashed[inside[: len(hashed)]], counts


def shingles(values: npt.NDArray[np.integer], length: int = SHINGLE) -> Hashes:
    """The set of a document's shingles, ascending. One that is shorter than a shingle is a shingle as a whole."""
    return np.unique(hash_runs(values, min(length, len(values)))) if len(values) else np.zeros(0, np.uint64)


def jaccard(one: Hashes, other: Hashes, least: float = 0.0) -> float:
    """Of two ascending sets; two empty ones are the same. 0 where their sizes say that it cannot reach `least`."""
    small, large = sorted((len(one), len(other)))
    if not small:
        return float(not large)
    if small < least * large:
        return 0.0
    both = np.concatenate([one, other])
    both.sort(kind="stable")  # merges two ascending halves
    common = int(np.count_nonzero(both[1:] == both[:-1]))
    return common / (len(one) + len(other) - common)


def _mix(values: Hashes) -> Hashes:
    """Bits of each value spread over all of it (the last steps of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


# --- buckets ------------------------------------------------------------------------------------------------


class _Keys:
    """Keys of all documents, (bands, documents), in memory or in a temporary file that is gone afterwards."""

    def __init__(self, bands: int, rows: int, count: int, values: Callable[[int], Hashes], length: int) -> None:
        self._file = tempfile.TemporaryFile() if 8 * bands * count > _IN_MEMORY else None  # noqa: SIM115
        shape = (bands, count)
        self.array: Hashes = (
            np.zeros(shape, np.uint64)
            if self._file is None
            else np.memmap(self._file, dtype=np.uint64, mode="w+", shape=shape)
        )
        draw = np.random.default_rng(0)
        odd = draw.integers(0, 2**63, (bands, rows), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        for first, flat, starts in _chunks(count, values, length):
            for band in range(bands):
                key = np.zeros(len(starts), np.uint64)
                for factor in odd[band]:
                    key = _mix(key * _PRIME + np.minimum.reduceat(flat * factor, starts))
                self.array[band, first : first + len(starts)] = key

    def __enter__(self) -> _Keys:
        return self

    def __exit__(self, *exception: object) -> None:
        del self.array
        if self._file is not None:
            self._file.close()


def _chunks(
    count: int, values: Callable[[int], Hashes], length: int
) -> Iterator[tuple[int, Hashes, npt.NDArray[np.int64]]]:
    """Shingles of documents end to end: number of the first document, the shingles, where each document's begin."""
    pieces: list[Hashes] = []
    first = size = 0
    for number in range(count):
        value = values(number)
        if len(value) < length:  # a shingle as a whole; an empty document is in buckets of its own
            one = hash_runs(value, len(value)) if len(value) else _mix(np.array([number], np.uint64))
            value = np.repeat(one, length)
        pieces.append(value)
        size += len(value)
        if size >= _TOGETHER or number == count - 1:
            hashed, counts = runs_of(pieces, length)
            yield first, hashed, np.cumsum(counts) - counts
            first, size, pieces = number + 1, 0, []


def _members(keys: Hashes) -> Iterator[tuple[int, int]]:
    """Document and bucket for each document in a bucket with another one, by document."""
    documents, buckets = [], []
    known = 0
    for band in keys:
        order = np.argsort(band, kind="stable")
        same = np.diff(band[order]) == 0
        shared = np.concatenate([same, [False]]) | np.concatenate([[False], same])
        bucket = np.cumsum(np.concatenate([[True], ~same]))[: len(order)]
        documents.append(order[shared])
        buckets.append(bucket[shared] + known)
        known += len(order)
    all_documents, all_buckets = np.concatenate(documents), np.concatenate(buckets)
    order = np.argsort(all_documents, kind="stable")
    return zip(all_documents[order].tolist(), all_buckets[order].tolist(), strict=True)
