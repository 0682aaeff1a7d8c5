"""Bootstrap intervals against what statistics says without drawing."""

import numpy as np
import pytest

from luthier.evaluate.intervals import beyond_chance, bootstrap, bootstrap_difference


def test_a_mean_has_the_interval_of_the_normal_theory() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    half = 1.96 * values.std() / 20
    assert bootstrap(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)


def test_a_ratio_has_the_interval_of_the_delta_method_and_not_that_of_the_mean_of_ratios() -> None:
    generator = np.random.default_rng(2)
    weights = generator.integers(1, 50, 500).astype(float)
    values = weights * generator.normal(2.0, 0.5, 500)
    ratio = values.sum() / weights.sum()
    half = 1.96 * np.sqrt(((values - ratio * weights) ** 2).sum()) / weights.sum()
    assert bootstrap(values, weights) == pytest.approx((ratio - half, ratio + half), abs=0.15 * half)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    held = 0
    for _ in range(200):
        low, high = bootstrap(generator.normal(0.0, 1.0, 60), resamples=300)
        held += low < 0.0 < high
    assert 0.88 <= held / 200 <= 0.99


def test_the_same_rows_under_two_models_are_compared_row_by_row() -> None:
    generator = np.random.default_rng(4)
    hard = generator.normal(0.0, 10.0, 200)  # what is hard is so for both
    before, after = hard + generator.normal(0, 0.5, 200), hard - 1.0 + generator.normal(0, 0.5, 200)
    low, high = bootstrap_difference(before, after)
    difference = after - before
    half = 1.96 * difference.std() / np.sqrt(200)
    assert (low, high) == pytest.approx((difference.mean() - half, difference.mean() + half), abs=0.2 * half)
    apart = bootstrap(before), bootstrap(after)
    assert apart[0][0] < apart[1][1]  # by themselves the two say nothing
    assert high < 0


def test_each_model_may_have_weights_of_its_own() -> None:
    values, weights = np.array([4.0, 6.0, 8.0] * 20), np.array([2.0, 3.0, 4.0] * 20)
    # The same text in twice as many tokens: 2 a token under one, 1 under the other, in every draw.
    assert bootstrap_difference(values, values, weights, 2 * weights) == pytest.approx((-1.0, -1.0))


def test_many_rows_are_drawn_in_parts_with_the_same_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.evaluate import intervals

    values = np.random.default_rng(5).normal(size=90)
    whole = bootstrap(values)
    monkeypatch.setattr(intervals, "_DRAWS_AT_ONCE", 1000)
    assert bootstrap(values) == whole
    assert bootstrap(values, seed=1) != whole


@pytest.mark.parametrize("rows", [1, 12, 200])
def test_rows_that_are_all_alike_leave_room_for_others(rows: int) -> None:
    low, high = bootstrap(np.zeros(rows))
    # A share of `high` gives nothing but zeros in one of 40 samples.
    assert low == 0.0 and (1 - high) ** rows == pytest.approx(0.025)
    assert bootstrap(np.ones(rows)) == pytest.approx((1 - high, 1.0))


def test_a_difference_of_rows_that_all_go_one_way_leaves_room_for_others_as_well() -> None:
    zeros, ones = np.zeros(40), np.ones(40)
    low = bootstrap(ones)[0]
    assert bootstrap_difference(zeros, ones) == (low, 1.0)
    assert bootstrap_difference(ones, zeros) == (-1.0, -low)
    assert bootstrap_difference(ones, ones) == pytest.approx((low - 1, 1 - low))
    # Counts of tokens that are right: shares, if that is said.
    tokens = np.arange(1.0, 41.0)
    assert bootstrap(tokens, tokens, share=True) == (low, 1.0)
    assert bootstrap(tokens, tokens) == (1.0, 1.0)
    assert bootstrap_difference(zeros, tokens, tokens, tokens, share=True) == (low, 1.0)
    # What is no share and 0 in every row is 0.
    assert bootstrap(zeros, share=False) == (0.0, 0.0)


def test_no_rows_no_interval() -> None:
    assert all(np.isnan(bootstrap([])))
    with pytest.raises(ValueError, match="same rows"):
        bootstrap_difference([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("interval", "differing", "expected"),
    [
        ((0.1, 0.3), 6, True),
        ((-0.3, -0.1), 100, True),
        ((0.0, 0.3), 100, False),
        ((-0.1, 0.3), 100, False),
        ((0.1, 0.3), 5, False),
    ],
)
def test_beyond_chance(interval: tuple[float, float], differing: int, expected: bool) -> None:
    assert beyond_chance(interval, differing) is expected
