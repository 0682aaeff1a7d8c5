"""Putting documents together: best-fit packing into rows, a step's shares of several processes, and its passes.

All are bin packing by tokens. Rows (`sample_packing`) decide what an optimizer step contains; shares and passes
only decide where and how it is computed, and any cut gives the same gradients.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapreplace

import numpy as np


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Bins of at most `capacity` tokens, by best-fit decreasing; items longer than that get a bin each.

    Returns:
        Indices into `lengths`, bin by bin. At most 11/9 of the fewest bins possible, plus one (Johnson 1973);
        on instruction data within a percent of it.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for index in order:
        length = int(lengths[index])
        place = bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, chosen = rooms.pop(place)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(int(index))
        if room > length:
            insort(rooms, (room - length, chosen))
    return bins


def split_evenly(lengths: Sequence[int] | np.ndarray, parts: int) -> list[list[int]]:
    """Shares of about as many tokens each: the longest document first, to the share that has least so far.

    Returns:
        Indices into `lengths`, share by share, each in ascending order; none empty while there are as many documents
        as shares. The largest has at most 4/3 of the tokens that the best split gives it (Graham 1969).
    """
    if parts == 1:
        return [list(range(len(lengths)))]
    shares: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0, part) for part in range(parts)]  # a heap
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        load, part = loads[0]
        heapreplace(loads, (load + int(lengths[index]), part))
        shares[part].append(index)
    return [sorted(share) for share in shares]


def cut_into_passes(lengths: Sequence[int], budget: int, *, alone: bool = False) -> list[list[int]]:
    """The documents of one step, cut into as few passes as a token budget allows.

    Args:
        budget: tokens a pass may hold; a longer document has a pass to itself.
        alone: one document per pass, for models whose documents may not share one.

    Returns:
        Indices into `lengths`, pass by pass, each in ascending order.
    """
    if alone:
        return [[index] for index in range(len(lengths))]
    return [sorted(bin_) for bin_ in best_fit(lengths, budget)]
