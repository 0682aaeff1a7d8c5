"""Drawings: thinning, axes, and what they say."""

import re

import pytest

from luthier.experiments.charts import MOST_POINTS, Axis, Chart, Mark, Series, histogram, line_chart, thinned
from tests.experiments.conftest import Page


def test_few_points_are_drawn_as_they_are():
    points = [(float(n), float(n % 3)) for n in range(MOST_POINTS)]
    assert thinned(points) == (points, [])


def test_many_points_become_means_within_their_bounds():
    points = [(float(n), float(n % 7)) for n in range(1, 100_001)]
    points[50_000] = (50_001.0, 99.0)
    line, band = thinned(points)
    assert len(line) == len(band) == MOST_POINTS
    assert (line[0][0], line[-1][0]) == (1.0, 100_000.0)
    assert [step for step, _ in line] == sorted(step for step, _ in line)
    assert all(low <= value <= high for (_, value), (_, low, high) in zip(line, band, strict=True))
    # Nothing is lost: a single spike is in the band, and the mean is that of all.
    assert max(high for *_, high in band) == 99.0 and min(low for _, low, _ in band) == 0.0
    mean = sum(value for _, value in points) / len(points)
    assert sum(value for _, value in line) / len(line) == pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize(
    ("values", "log"),
    [([0.1, 0.5], False), ([-3.0, -1.0], False), ([0.0, 0.0], False), ([5.0, 5.0], False), ([0.7, 0.7 + 1e-12], False),
     ([1e-9, 3e-9], False),
     ([0.001, 2.0], None), ([0.9, 1.1], None), ([-1.0, 900.0], None), ([1e-8, 1e6], None)],
)  # fmt: skip
def test_axes_hold_their_values(values: list[float], log: bool | None):
    axis = Axis.over(values, log=log, from_zero=False)
    assert all(-1e-9 <= axis.at(value) <= 1 + 1e-9 for value in [*values, *axis.ticks])
    assert 2 <= len(axis.ticks) <= 8
    assert axis.log == (log is None and min(values) > 0 and max(values) / min(values) >= 25)


def test_a_chart_says_what_it_shows():
    series = [Series("training <b>", [(1.0, 2.0), (2.0, 1.0)], "c1"), Series("none", [], "c2")]
    page = Page(line_chart(Chart("Loss", series, marks=[Mark(2.0, "best, step 2")])))
    (about,) = page.charts()
    assert "training <b> from 2 at step 1 to 1 at step 2" in about and "best, step 2" in about
    assert "none" not in page.text


@pytest.mark.parametrize("points", [[], [(1.0, 1.0)]])
def test_nothing_to_draw_is_no_chart(points: list[tuple[float, float]]):
    assert line_chart(Chart("Loss", [Series("training", points, "c1")])) == ""
    assert histogram([(1, 2, len(points))], "Lengths", "documents") == ""


def test_bars_are_as_high_as_their_counts():
    drawn = histogram([(1, 10, 4), (11, 20, 0), (21, 30, 8)], "Lengths", "documents")
    assert [float(height) for height in re.findall(r'<rect[^>]*height="([\d.]+)"', drawn)] == [500.0, 0.0, 1000.0]
    assert "21 to 30 tokens: 8 documents" in drawn
