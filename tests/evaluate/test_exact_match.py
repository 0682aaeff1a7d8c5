"""Exact match: what counts as the expected answer, and what does not."""

from __future__ import annotations

import pytest

from luthier.evaluate.exact_match import is_exact


@pytest.mark.parametrize(
    ("answer", "right"),
    [("8", True), (" 8\n", True), ("8.", False), ("8 9", False), ("08", False), ("", False)],
)
def test_only_white_space_around_an_answer_is_ignored(answer: str, right: bool) -> None:
    assert is_exact(answer, "8") == is_exact(answer, "\t8 ") == right


def test_case_and_white_space_inside_count() -> None:
    assert not is_exact("a", "A")
    assert not is_exact("55,  60", "55, 60")
    assert is_exact(" ", "")
