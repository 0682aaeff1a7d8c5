"""Exact match: whether an answer is the expected text, whole and letter for letter.

Only white space around them is ignored. A stricter measure than any other, and the one that cannot flatter:
right for tasks with one right answer.
"""

from __future__ import annotations


def is_exact(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one, white space around both aside."""
    return answer.strip() == expected.strip()
