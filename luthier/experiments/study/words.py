"""Pieces of sentences about a study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from luthier.experiments.study.results import StudyResult
from luthier.experiments.study.settings import Setting
from luthier.experiments.verdict import OPEN


@dataclass(frozen=True)
class Finding:
    """A sentence or a few on one question. `mood`: as a verdict's: GOOD, BAD, or OPEN where there is no telling."""

    about: str
    text: str
    mood: str = OPEN


def amount(setting: Setting, form: Callable[[float], str]) -> str:
    """`1.203 ± 0.004`."""
    spread = f" ± {form(setting.spread)}" if setting.spread is not None else ""
    return form(setting.mean) + spread


def metric_name(result: StudyResult) -> str:
    return result.metric.replace("_", " ")


def extreme(result: StudyResult) -> str:
    return "highest" if result.goal == "max" else "lowest"


def article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def chance(luck: float) -> str:
    return "p < 0.001" if luck < 0.001 else f"p = {luck:.2g}" if luck < 0.995 else "p = 1"


def plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def enumerated(names: Sequence[str]) -> str:
    """Names one after the other, apart even where they hold commas."""
    return ("; " if any("," in name for name in names) else ", ").join(names)


def listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)
