"""Putting documents together: best-fit packing into rows, and cutting a step into forward passes.

Both are bin packing by tokens. Rows (`sample_packing`) decide what an optimizer step contains; passes only
decide how it is computed, and any cut gives the same gradients.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

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
