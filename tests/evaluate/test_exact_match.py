"""Exact match."""

import pytest

from luthier.evaluate.exact_match import Score, exact_match


def test_whole_answers_are_compared_white_space_around_them_aside() -> None:
    result = exact_match([" 8\n", "8.", "8 9", "a", ""], ["8", "8", "8", "A", " "])
    assert result.overall == Score(2, 5)
    assert result.wrong == [1, 2, 3]
    assert result.groups == {}


def test_groups_have_scores_of_their_own_in_the_order_in_which_they_came() -> None:
    result = exact_match(["1", "x", "2", "y"], ["1", "x", "3", "z"], ["sum", "copy", "sum", "copy"])
    assert list(result.groups.items()) == [("sum", Score(1, 2)), ("copy", Score(1, 2))]
    assert str(result.overall) == "50.0% (2/4)"


def test_nothing_is_no_accuracy() -> None:
    assert exact_match([], []).overall.accuracy == 0.0


def test_answers_and_expectations_must_belong_together() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        exact_match(["1"], ["1", "2"])
