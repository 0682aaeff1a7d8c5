"""Exact match: the share of answers that are the expected text, whole and letter for letter.

Only white space around them is ignored. A stricter measure than any other, and the one that cannot flatter:
right for tasks with one right answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Score:
    """Right answers of all."""

    right: int
    total: int

    @property
    def accuracy(self) -> float:
        """0 of none."""
        return self.right / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} ({self.right}/{self.total})"


@dataclass(frozen=True)
class ExactMatch:
    """Scores over all answers and by group, in the order in which the groups came; places of the misses."""

    overall: Score
    groups: dict[str, Score] = field(default_factory=dict)
    wrong: list[int] = field(default_factory=list)


def is_exact(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one, white space around both aside."""
    return answer.strip() == expected.strip()


def exact_match(
    answers: Sequence[str], expected: Sequence[str], groups: Sequence[str] | None = None
) -> ExactMatch:
    """Score answers against what was expected; `groups` names the kind of each."""
    kinds = groups if groups is not None else ["all"] * len(answers)
    hits: dict[str, list[bool]] = defaultdict(list)
    wrong = []
    for place, (answer, right, kind) in enumerate(zip(answers, expected, kinds, strict=True)):
        hit = is_exact(answer, right)
        hits[kind].append(hit)
        if not hit:
            wrong.append(place)
    scores = (
        {kind: Score(sum(found), len(found)) for kind, found in hits.items()} if groups is not None else {}
    )
    return ExactMatch(Score(len(answers) - len(wrong), len(answers)), scores, wrong)
