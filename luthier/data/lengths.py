"""Limits of lengths for answers to compare: which rows go beyond them, and what is cut off.

Each answer with its prompt is bound by `sequence_len`, the prompt by `max_prompt_len`. What is cut off is cut off the
beginning of the prompt first, since the last turns are what the answers are about, and is the same for both answers,
which must follow the same prompt; only then do the answers lose their ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from luthier.data.report import PROMPT_TOO_LONG, TOO_LONG

Ints = npt.NDArray[np.int32]


def too_long(prompt: int, lengths: Sequence[int], limit: int, max_prompt: int | None) -> tuple[str, str]:
    """Which limit a row goes beyond, and by what; empty texts where it does not."""
    if max_prompt is not None and prompt > max_prompt:
        return PROMPT_TOO_LONG, f"{prompt:,} tokens in the prompt"
    return (TOO_LONG, f"{max(lengths):,} tokens") if max(lengths) > limit else ("", "")


def cut_answers(
    ids: Ints,
    labels: Ints,
    lengths: Sequence[int],
    prompt: int,
    opening: int,
    limit: int,
    max_prompt: int | None,
) -> tuple[Ints, Ints, list[int], int]:
    """The parts within the limits, and what is left of the prompt, all in tokens.

    The prompt gives way down to half of `limit`. `opening` are tokens at its beginning (BOS) that stay.
    """
    kept = prompt if max_prompt is None else min(prompt, max_prompt)
    excess = max(lengths) - (prompt - kept) - limit
    if excess > 0:
        kept -= min(excess, kept - min(kept, max(limit // 2, 1)))
    opening = min(opening, kept)
    place = np.concatenate([np.arange(opening), np.arange(prompt - (kept - opening), max(lengths))])[:limit]
    parts = []
    start = 0
    for length in lengths:
        inside = start + place[place < length]
        parts.append((ids[inside], labels[inside]))
        start += length
    return (
        np.concatenate([part for part, _ in parts]),
        np.concatenate([part for _, part in parts]),
        [len(part) for part, _ in parts],
        min(kept, limit),
    )
