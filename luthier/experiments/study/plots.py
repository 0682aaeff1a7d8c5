"""The drawings of a study's page: the metric against what was varied, costs, and the curves of all runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from markupsafe import Markup

from luthier.experiments.charts import Chart, Series, line_chart, number
from luthier.experiments.run_files import Points, Run
from luthier.experiments.study.noise import Comparison, Factor
from luthier.experiments.study.results import StudyResult
from luthier.experiments.study.settings import (
    Setting,
    has_figure,
    is_numeric,
    levels,
    plain,
    value,
)
from luthier.experiments.study.strips import Strip, strips
from luthier.experiments.study.words import metric_name

# Colours of the style sheet, and what is drawn in where there are not enough of them.
COLOURS, GREY = 8, "grey"
# Dots that have their name beside them; of more, only the best and the cheapest.
MOST_LABELS = 8
# Values of a key that can each have a number beneath the axis.
_MOST_TICKS = 9
# From this ratio of largest to smallest on a key or a cost has a logarithmic axis.
_SPANS = 8
# Figures whose curves of all runs are laid over each other.
_CURVES = (("eval_loss", "Evaluation loss", True), ("loss", "Training loss", False))


@dataclass(frozen=True)
class Heat:
    """Two keys and the mean of the metric where they meet: (words, how good from 0 to 1; None where nothing is)."""

    across: str
    down: str
    columns: list[str]
    rows: list[tuple[str, list[tuple[str, float | None]]]]


def key_plots(result: StudyResult, compared: Comparison) -> list[Markup]:
    """The metric against each key, and for subsets what each member adds."""
    group, settings = compared.group, compared.settings
    keys = [key for key in group.dials if key not in result.subsets]
    if result.plots:
        keys = [key for key in result.plots if key in settings[0].values and key not in result.subsets]
    drawn = []
    for key in keys:
        there = levels(key, settings)
        if len(there) < 2:
            continue
        numeric = is_numeric(key, settings)
        drawn.append(_against(result, compared, key, there) if numeric else _by_value(result, compared, key, there))
    if any(factor.part for factor in compared.factors):
        drawn.append(_members(result, compared))
    return [each for each in drawn if each]


def _against(result: StudyResult, compared: Comparison, key: str, there: Sequence[Any]) -> Markup:
    """Means over the rest, a curve for each value of another key, and a dot for each run."""
    settings = compared.settings
    split = _split(compared, key)
    parts = levels(split, settings) if split else [None]
    series = []
    repeated = len(there) <= len(settings) / 2 or len(compared.group.dials) == 1
    for place, part in enumerate(parts):
        own = [s for s in settings if not split or plain(s.values.get(split)) == plain(part)]
        name = f"{split} {value(part)}" if split else ""
        colour = f"c{place % COLOURS + 1}"
        if repeated:
            line, spans = _means(own, key)
            series.append(Series(name, line, colour, dots=bool(split), spans=spans))
        if not split or not repeated:
            dots = [(float(s.values[key]), y, _hover(compared, s, y, seed)) for s in own for y, seed in _runs(s)]
            series.append(Series("", [(x, y) for x, y, _ in dots], colour, True, False, [n for *_, n in dots]))
    log = min(there) > 0 and max(there) / min(there) >= _SPANS
    ticks = [float(each) for each in there] if len(there) <= _MOST_TICKS and (log or _evenly(there)) else []
    rest = [each for each in compared.group.dials if each not in (key, split)]
    note = []
    if repeated and any(each.spans for each in series):
        averaged = any(len(_at(settings, key, x, split, part)) > 1 for x in there for part in parts)
        ends = "from the lowest to the highest setting" if averaged else "one standard deviation over seeds"
        note.append(f"Bars are {ends}.")
    if rest and repeated:
        note.append(f"Means over {', '.join(rest)}.")
    title = f"{metric_name(result).capitalize()} against {key}"
    legend = [(f"c{place % COLOURS + 1}", f"{split} {value(part)}") for place, part in enumerate(parts)]
    chart = Chart(
        title, series, log=None, x=key, x_log=log, x_ticks=ticks, note=" ".join(note), legend=legend if split else (),
        about=f"{title}: " + "; ".join(_told(settings, key, x, compared) for x in there[:20]),
    )  # fmt: skip
    return line_chart(chart)


def _split(compared: Comparison, key: str) -> str | None:
    """The key whose values get a curve each: another number first, else one of words."""
    others = [
        each
        for each in compared.factors
        if each.name != key and not each.part and 2 <= len(each.levels) <= COLOURS
        and each.name in compared.settings[0].values
    ]  # fmt: skip
    others.sort(key=lambda each: not each.numeric)
    return others[0].name if others else None


def _means(settings: Sequence[Setting], key: str) -> tuple[Points, list[tuple[float, float, float]]]:
    line, spans = [], []
    for x in levels(key, settings):
        there = [setting for setting in settings if setting.values[key] == x]
        mean = fmean(setting.mean for setting in there)
        line.append((float(x), mean))
        if len(there) > 1:
            spans.append((float(x), min(s.mean for s in there), max(s.mean for s in there)))
        elif there[0].spread:
            spans.append((float(x), mean - there[0].spread, mean + there[0].spread))
    return line, spans


def _at(settings: Sequence[Setting], key: str, x: Any, split: str | None, part: Any) -> list[Setting]:
    return [
        s for s in settings
        if s.values[key] == x and (not split or plain(s.values.get(split)) == plain(part))
    ]  # fmt: skip


def _told(settings: Sequence[Setting], key: str, x: Any, compared: Comparison) -> str:
    form = compared.group.form
    return f"{value(x)} {form(fmean(s.mean for s in settings if s.values[key] == x))}"


def _runs(setting: Setting) -> list[tuple[float, int | None]]:
    return [(trial.metric, trial.seed) for trial in setting.trials if trial.metric is not None]


def _hover(compared: Comparison, setting: Setting, y: float, seed: int | None) -> str:
    seeded = f", seed {seed}" if seed is not None else ""
    return f"{compared.group.name_of(setting)}{seeded}: {compared.group.form(y)}"


def _evenly(there: Sequence[Any]) -> bool:
    """Whether numbers beneath a straight axis would not run into each other."""
    width = max(there) - min(there)
    return all(b - a > width / 12 for a, b in pairwise(there))


def _by_value(result: StudyResult, compared: Comparison, key: str, there: Sequence[Any]) -> Markup:
    """A row of dots for each value, best first, a dot for each run."""
    rows = []
    for each in there:
        own = [setting for setting in compared.settings if plain(setting.values.get(key)) == plain(each)]
        dots = [(y, _hover(compared, setting, y, seed)) for setting in own for y, seed in _runs(setting)]
        rows.append(Strip(value(each), fmean(setting.mean for setting in own), dots))
    rows.sort(key=lambda row: row.middle, reverse=result.goal == "max")
    title = f"{metric_name(result).capitalize()} by {key}"
    return strips(title, rows, compared.group.form, "A dot is a run, the bar their mean.")


def _members(result: StudyResult, compared: Comparison) -> Markup:
    """By how much each part of a subset changes the metric."""
    rows = []
    for effect in compared.effects:
        if effect.factor.part:
            change = effect.means[1] - effect.means[0]
            least = max(effect.least, default=0.0)
            told = f"with {effect.factor.name}: {change:+.4g}" + (f" (± {least:.2g})" if least else "")
            ends = (change - least, change + least) if least else None
            rows.append(Strip(effect.factor.name, change, [(change, told)], ends))
    rows.sort(key=lambda row: row.middle, reverse=result.goal == "max")
    form = compared.group.form
    note = "The mean of runs with a member less that of runs without it, the others the same" + (
        "; lines are 95% intervals." if any(row.ends for row in rows) else "."
    )
    return strips(f"What each member changes in {metric_name(result)}", rows, form, note, zero=True)


def heat(result: StudyResult, compared: Comparison) -> Heat | None:
    """Of the first two keys of numbers with three values or more."""
    settings = compared.settings
    found: list[Factor] = [each for each in compared.factors if each.numeric and len(each.levels) > 2]
    if len(found) < 2:
        return None
    down, across = found[:2]
    form = compared.group.form
    means: dict[tuple[int, int], float] = {}
    for i in range(len(down.levels)):
        for j in range(len(across.levels)):
            there = [s.mean for s, a, b in zip(settings, down.codes, across.codes, strict=True) if (a, b) == (i, j)]
            if there:
                means[i, j] = fmean(there)
    low, high = min(means.values()), max(means.values())

    def cell(i: int, j: int) -> tuple[str, float | None]:
        if (i, j) not in means:
            return "", None
        share = (means[i, j] - low) / (high - low) if high > low else 0.0
        return form(means[i, j]), share if result.goal == "max" else 1 - share

    rows = [(level, [cell(i, j) for j in range(len(across.levels))]) for i, level in enumerate(down.levels)]
    return Heat(across.name, down.name, across.levels, rows)


def cost_plots(result: StudyResult, comparisons: Sequence[Comparison]) -> list[Markup]:
    """Time against memory, and the metric against what it costs."""
    drawn = []
    settings = [(compared, setting) for compared in comparisons for setting in compared.settings]
    figures = ("seconds", "peak_memory_gib")
    drawn.append(_scatter("Peak memory (GiB) against time", "seconds", settings, *figures, from_zero=True))
    if len(comparisons) == 1:
        metric = metric_name(result)
        own = [key for key in result.plots if key not in settings[0][1].values] if settings else []
        for cost in [*dict.fromkeys(["seconds", "trainable_parameters", *own])]:
            name = cost.replace("_", " ")
            drawn.append(_scatter(f"{metric.capitalize()} against {name}", name, settings, cost, ""))
    return [each for each in drawn if each]


def _scatter(
    title: str, x_name: str, settings: Sequence[tuple[Comparison, Setting]], x: str, y: str, *, from_zero: bool = False
) -> Markup:
    """A dot for each setting. `x`, `y`: figures of a run; empty: the metric."""
    points = []
    for compared, setting in settings:
        at = _figure(setting, x), _figure(setting, y) if y else setting.mean
        if at[0] is not None and at[1] is not None:
            name = compared.group.name_of(setting)
            points.append((at[0], at[1], name, setting is compared.settings[0]))
    if len({x for x, *_ in points}) < 2 or len({y for _, y, *_ in points}) < 2:
        return Markup("")
    labels = [(x, y, name) for x, y, name, _ in _by_importance(points)]
    series = [
        Series("best" if best else "other settings", [(x, y) for x, y, _, b in points if b == best],
               "c2" if best else "c1", True, False,
               [f"{name}: {x_name} {number(x)}, {number(y)}" for x, y, name, b in points if b == best])
        for best in (False, True)
    ]  # fmt: skip
    xs = [x for x, *_ in points]
    log = min(xs) > 0 and max(xs) / min(xs) >= _SPANS
    about = f"{title}: " + "; ".join(f"{name} {number(y)} at {number(x)}" for x, y, name, _ in points[:20])
    return line_chart(
        Chart(
            title, series, log=False if from_zero else None, x=x_name, x_log=log, from_zero=from_zero, labels=labels,
            about=about,
        )
    )


def _by_importance(points: Sequence[tuple[float, float, str, bool]]) -> list[tuple[float, float, str, bool]]:
    """The points whose names are wanted, first the best; of many, it and the ends."""
    best = [point for point in points if point[3]]
    ends = [min(points), max(points), min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])]
    return list(dict.fromkeys([*best, *(ends if len(points) > MOST_LABELS else points)]))


def _figure(setting: Setting, name: str) -> float | None:
    if hasattr(setting.trials[0], name):
        return setting.cost(name)
    found = [trial.figures[name] for trial in setting.trials if name in trial.figures]
    return fmean(found) if found else None


def curves(result: StudyResult, runs: Mapping[str, Run]) -> list[Markup]:
    """The curves of all runs, in the colours of the values of the first key; grey where they are too many."""
    there = [(trial, runs[trial.name]) for trial in result.trials if trial.name in runs]
    settings = [Setting(trial.settings, [trial]) for trial, _ in there]
    keys = [key for key in result.varied if len(levels(key, settings)) > 1] if settings else []
    key = keys[0] if keys else None
    values = [plain(each) for each in levels(key, settings)] if key else []
    coloured = 1 < len(values) <= COLOURS
    drawn = []
    for figure, title, dots in _CURVES:
        series = []
        for trial, run in there:
            colour = f"c{values.index(plain(trial.settings.get(key))) + 1}" if key and coloured else GREY
            series.append(Series(trial.name, run.points(figure), colour, dots and len(there) <= COLOURS))
        series = [each for each in series if len(each.points) > 1]
        legend = []
        if key and coloured:
            legend = [(f"c{place + 1}", f"{key} {value(each)}") for place, each in enumerate(levels(key, settings))]
        ends = [each.points[-1][1] for each in series]
        about = f"{title} of {len(series)} runs over the steps" + (
            f"; they end between {min(ends):.4g} and {max(ends):.4g}" if ends else ""
        )
        chart = Chart(title, series, log=None, legend=legend or [(GREY, "each run")], about=about)
        drawn.append(line_chart(chart))
    return [each for each in drawn if each]


def best_so_far(result: StudyResult) -> Markup:
    """How a search went: each trial, and the best until then."""
    done = [(float(place), trial) for place, trial in enumerate(result.trials, 1) if has_figure(trial)]
    points = [(place, trial.metric) for place, trial in done if trial.metric is not None]
    best: Points = []
    for place, metric in points:
        better = not best or (metric > best[-1][1] if result.goal == "max" else metric < best[-1][1])
        best.append((place, metric if better else best[-1][1]))
    names = [f"{trial.name}: {trial.metric:.6g}" for _, trial in done]
    if len(best) < 2:
        return Markup("")
    name = metric_name(result).capitalize()
    series = [Series("each trial", points, "c1", True, False, names), Series("best so far", best, "c2")]
    about = f"{name} over {len(points)} trials; the best went from {best[0][1]:.4g} to {best[-1][1]:.4g}"
    return line_chart(Chart(f"{name} over the trials", series, x="trial", about=about))
