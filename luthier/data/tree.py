"""Documents that begin alike, laid out as a forest: what several of them begin with is there once.

Instruction data repeats itself at the start: a template's preamble, a system prompt, the question that several
answers share. In a causal model the hidden states of such a prefix are the same in each document, so one
computation serves all, and the gradients that the documents send back to it add up by themselves. It is
exact, so long as nothing tells two documents' prefixes apart. Dropout does, but for answers to one prompt that draw
its masks alike: then the documents of such a group share the prompt and nothing else.

    rows      P P P a a        segments      P P P        parent -1
              P P P b                              a a    parent 0
              P P P c c c                          b      parent 0
                                                   c c c  parent 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

# Tokens that two documents must have in common for it to pay. A branch costs its attention a mask and a copy of
# the prefix's keys and values: at the shape of a 135M model on a CPU about 0.2 ms in each layer, which is what one
# token costs there. A smaller model's tokens are cheaper, hence the distance.
MIN_SHARED = 8


# What may be shared: nothing, the prompt of a row's answers, or what any documents of a pass begin with.
Sharing = Literal["", "rows", "all"]


@dataclass(frozen=True)
class Forest:
    """The segments of some documents, T tokens in all, each parent followed at once by its first child.

    Attributes:
        lengths: tokens of each segment. parents: index of the segment it goes on from, -1 for none.
        owners: the document that each segment's tokens are read from; starts: its first token's index there.
        places: for each document the index among the T tokens of each of its own.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    owners: tuple[int, ...]
    starts: tuple[int, ...]
    places: tuple[npt.NDArray[np.int64], ...]


def plain_forest(lengths: Sequence[int]) -> Forest:
    """Every document for itself, in the order given."""
    ends = np.cumsum(lengths)
    places = tuple(np.arange(end - n, end) for n, end in zip(lengths, ends, strict=True))
    n = len(lengths)
    return Forest(tuple(lengths), (-1,) * n, tuple(range(n)), (0,) * n, places)


def shared_forest(
    documents: Sequence[npt.NDArray[np.integer]], groups: Sequence[tuple[int, int]] | None = None
) -> Forest:
    """The forest of token sequences in which what two or more begin with is one segment, where it pays.

    A document that is another's beginning, or its equal, needs no segment of its own.

    Args:
        groups: for each document the number of its group, and how many first tokens it may share with others of that
            group, which is the same for all of them; None lets all share all.
    """
    order, common = sorted_by_beginning(documents, groups)
    if not any(common):
        return plain_forest([len(document) for document in documents])
    lengths: list[int] = []
    parents: list[int] = []
    owners: list[int] = []
    starts: list[int] = []
    places: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)] * len(documents)
    path: list[tuple[int, int]] = []  # segments of the document before, and where in it each ends
    before, total = np.empty(0, np.int64), 0
    for rank, index in enumerate(order):
        start, length = common[rank], len(documents[index])
        while path and path[-1][1] > start:
            path.pop()
        begin = start
        for end in (*_splits(common, rank), length):
            if end > begin:
                parents.append(path[-1][0] if path else -1)
                path.append((len(lengths), end))
                lengths.append(end - begin)
                owners.append(index)
                starts.append(begin)
                begin = end
        own = np.arange(total, total + length - start)
        total += len(own)
        before = places[index] = np.concatenate([before[:start], own])
    return Forest(tuple(lengths), tuple(parents), tuple(owners), tuple(starts), tuple(places))


def cut_by_beginning(
    documents: Sequence[npt.NDArray[np.integer]], budget: int, beside: Sequence[int] | None = None
) -> list[list[int]]:
    """Passes of at most `budget` tokens that are computed, of documents that begin alike as far as it goes.

    Args:
        beside: tokens that come with each document, beside its own.

    Returns:
        Indices into `documents`, pass by pass, each in ascending order; a longer document is a pass by itself.
    """
    order, common = sorted_by_beginning(documents)
    passes: list[list[int]] = []
    room = -1
    for index, shared in zip(order, common, strict=True):
        tokens = len(documents[index]) + (beside[index] if beside else 0)
        if tokens - shared > room:
            passes.append([])
            room, shared = budget, 0
        passes[-1].append(index)
        room -= tokens - shared
    return [sorted(pass_) for pass_ in passes]


def sorted_by_beginning(
    documents: Sequence[npt.NDArray[np.integer]], groups: Sequence[tuple[int, int]] | None = None
) -> tuple[list[int], list[int]]:
    """Indices in lexicographic order, group by group, and how many first tokens each shares with the one before it.

    Fewer than `MIN_SHARED` count as none. In this order the documents that share a beginning are neighbours,
    and two of them share the least of what neighbours between them do.
    """
    keys = [np.asarray(document).astype(">i4").tobytes() for document in documents]
    if groups is None:
        groups = [(0, max(map(len, documents), default=0))] * len(documents)
    order = sorted(range(len(documents)), key=lambda index: (groups[index][0], keys[index]))
    common = [0]
    for one, other in pairwise(order):
        n = min(len(documents[one]), len(documents[other]), groups[other][1])
        if groups[one][0] != groups[other][0]:
            n = 0
        differ = np.flatnonzero(documents[one][:n] != documents[other][:n])
        shared = int(differ[0]) if len(differ) else n
        common.append(shared if shared >= MIN_SHARED else 0)
    return order, common


def _splits(common: Sequence[int], rank: int) -> list[int]:
    """Where in its own part (behind `common[rank]`) later documents branch off from a document, ascending."""
    found: list[int] = []
    for shared in common[rank + 1 :]:
        if shared <= common[rank]:
            break
        if not found or shared < found[-1]:
            found.append(shared)
    return found[::-1]
