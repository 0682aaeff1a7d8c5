"""A judgement: a name, how serious it is, one sentence with the figures, and the figures for machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["bad", "look", "fine"]
LEVELS: tuple[Level, ...] = ("bad", "look", "fine")


@dataclass(slots=True)
class Verdict:
    """`name` is the question (duplicated, too long ...); `more` are further facts, a line each."""

    name: str
    level: Level
    text: str
    figures: dict[str, Any] = field(default_factory=dict)
    more: list[str] = field(default_factory=list)


def worst(levels: Sequence[Level]) -> Level:
    """The most serious of these."""
    return min(levels, key=LEVELS.index, default="fine")


def share(count: int, of: int) -> str:
    """"12 (0.3 %)"."""
    return f"{count:,} ({percent(count, of)})"


def percent(count: int, of: int) -> str:
    """A share that is not 0 is never shown as 0."""
    value = 100 * count / max(1, of)
    return f"{value:.0f} %" if value >= 10 or not value else f"{value:.1f} %" if value >= 0.1 else f"{value:.2g} %"
