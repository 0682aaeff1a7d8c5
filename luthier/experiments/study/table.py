"""The tables of a study's page: settings with their seeds together, all runs, and what did not end well."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from luthier.experiments.report import REPORT
from luthier.experiments.run_files import Run
from luthier.experiments.sections import clipped
from luthier.experiments.study.noise import Comparison
from luthier.experiments.study.results import RUNS, StudyResult, Trial
from luthier.experiments.study.settings import Setting, form_of, has_figure, value, varying
from luthier.experiments.study.words import amount, metric_name

# Of an error, what stands in the table; its log has the rest.
_MOST_ERROR = 1500
# Characters of a value that needs room.
_WORDS = 12


@dataclass(frozen=True)
class Cell:
    """`sort`: what the column is sorted by, where it is not the text. `kind`: a class. `link`: relative to the page."""

    text: str
    sort: float | None = None
    numeric: bool = False
    kind: str = ""
    title: str = ""
    link: str = ""


@dataclass
class Grid:
    """A table whose columns can be sorted. `head`: (words, whether numeric)."""

    label: str
    head: list[tuple[str, bool]]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)


def settings_table(result: StudyResult, compared: Comparison) -> Grid:
    """One row for each setting, the best first, with its difference to the best."""
    group, settings = compared.group, compared.settings
    form = group.form
    costs = [cost for cost in COLUMNS if any(cost.of(setting) is not None for setting in settings)]
    seeds = any(len(setting.trials) > 1 for setting in settings)
    rows = []
    for place, setting in enumerate(settings, 1):
        row = [Cell(str(place), place, True)]
        row += [key_cell(setting.values.get(key)) for key in group.keys]
        row.append(_metric_cell(setting, form, place == 1))
        if seeds:
            row.append(Cell(str(len(setting.trials)), len(setting.trials), True))
            low, high = min(setting.numbers), max(setting.numbers)
            row.append(Cell(f"{form(low)} to {form(high)}" if low < high else form(low), low, True))
        row.append(_difference_cell(compared, setting, form, place == 1))
        row += [_figure_cell(cost.of(setting), cost.form) for cost in costs]
        rows.append(row)
    head = [("", True), *((key, _numbers(settings, key)) for key in group.keys)]
    head += [(metric_name(result), True)]
    head += [("seeds", True), ("lowest to highest", True)] if seeds else []
    head += [("behind the best", True), *((cost.name, True) for cost in costs)]
    label = f"Settings with {group.why}" if group.why else "Settings, best first"
    return Grid(label, head, rows, _legend(compared, seeds))


def trials_table(result: StudyResult, runs: Mapping[str, Run]) -> Grid:
    """Every run as it is, in the order of the study."""
    keys = varying(result.varied, result.trials)
    seeded = any(trial.seed is not None for trial in result.trials)
    form = form_of([Setting({}, [trial]) for trial in result.trials if has_figure(trial)])
    costs = [cost for cost in COLUMNS if any(cost.of(Setting({}, [trial])) is not None for trial in result.trials)]
    rows = []
    for trial in result.trials:
        row = [Cell(trial.name, link=_link(trial, runs))]
        row += [key_cell(trial.settings.get(key)) for key in keys]
        row += [Cell("" if trial.seed is None else str(trial.seed), trial.seed, True)] if seeded else []
        row += [Cell(trial.status), _figure_cell(trial.metric if has_figure(trial) else None, form)]
        row += [_figure_cell(cost.of(Setting({}, [trial])), cost.form) for cost in costs]
        rows.append(row)
    head = [("run", False), *((key, _numbers([Setting(t.settings, []) for t in result.trials], key)) for key in keys)]
    head += [("seed", True)] if seeded else []
    head += [("status", False), (metric_name(result), True), *((cost.name, True) for cost in costs)]
    return Grid("All runs", head, rows)


def unranked_table(result: StudyResult, runs: Mapping[str, Run]) -> Grid | None:
    """Runs without a figure: failed, stopped, still to do, or diverged."""
    rows = []
    keys = varying(result.varied, result.trials)
    for trial in result.trials:
        if has_figure(trial):
            continue
        state = f"ended without a finite {result.metric}" if trial.status == "finished" else trial.status
        why = clipped(trial.error.strip(), _MOST_ERROR)
        row = [Cell(trial.name, link=_link(trial, runs)), *(key_cell(trial.settings.get(key)) for key in keys)]
        kind = "bad" if trial.status in ("failed", "finished") else ""
        rows.append([*row, Cell(state, kind=kind), Cell(why, kind="said")])
    if not rows:
        return None
    numbers = [Setting(trial.settings, []) for trial in result.trials]
    head = [("run", False), *((key, _numbers(numbers, key)) for key in keys)]
    head += [("status", False), ("what it said", False)]
    return Grid("Runs without a figure", head, rows)


def key_cell(given: Any) -> Cell:
    number = isinstance(given, int | float) and not isinstance(given, bool)
    text = value(given)
    return Cell(text, float(given) if number else None, number, "words" if len(text) > _WORDS else "")


@dataclass(frozen=True)
class Column:
    """A cost. `of`: a setting's, as a mean over its runs."""

    name: str
    of: Callable[[Setting], float | None]
    form: Callable[[float], str]


def _share(setting: Setting) -> float | None:
    count, total = setting.cost("trainable_parameters"), setting.cost("total_parameters")
    return None if count is None or not total else 100 * count / total


def _seconds(number: float) -> str:
    return f"{number:,.1f}" if number < 100 else f"{number:,.0f}"


COLUMNS = (
    Column("seconds", lambda setting: setting.cost("seconds"), _seconds),
    Column("peak GiB", lambda setting: setting.cost("peak_memory_gib"), lambda number: f"{number:.2f}"),
    Column("trainable", lambda setting: setting.cost("trainable_parameters"), lambda number: f"{number:,.0f}"),
    Column("% of all", _share, lambda number: f"{number:.3g}"),
    Column("tokens/s", lambda setting: setting.cost("tokens_per_second"), lambda number: f"{number:,.0f}"),
)  # fmt: skip


def _metric_cell(setting: Setting, form: Callable[[float], str], best: bool) -> Cell:
    each = ", ".join(f"{form(trial.metric or 0.0)} (seed {trial.seed})" for trial in setting.trials)
    title = each if len(setting.trials) > 1 else ""
    return Cell(amount(setting, form), setting.mean, True, "best" if best else "", title)


def _difference_cell(compared: Comparison, setting: Setting, form: Callable[[float], str], best: bool) -> Cell:
    if best:
        return Cell("–", 0.0, True)
    found = compared.difference(setting)
    if found.beyond is None:
        return Cell(form(found.size), found.size, True)
    title = f"it takes {form(found.least)} to be beyond the noise" if found.least is not None else ""
    mark = "" if found.beyond else "≈ "
    return Cell(f"{mark}{form(found.size)}", found.size, True, "worse" if found.beyond else "", title)


def _legend(compared: Comparison, seeds: bool) -> list[str]:
    told = "± is the standard deviation over seeds. " * seeds
    if compared.noise.source in ("none", "rest"):
        return [f"{told}With one seed for each setting, no difference here can be told from luck."]
    return [
        f"{told}≈ is a difference to the best within the noise; without it, beyond. Costs are means over seeds, peak "
        "memory is the largest."
    ]


def _figure_cell(number: float | None, form: Callable[[float], str]) -> Cell:
    return Cell("", None, True) if number is None else Cell(form(number), number, True)


def _numbers(settings: Sequence[Setting], key: str) -> bool:
    found = [setting.values.get(key) for setting in settings if setting.values.get(key) is not None]
    return bool(found) and all(isinstance(each, int | float) and not isinstance(each, bool) for each in found)


def _link(trial: Trial, runs: Mapping[str, Run]) -> str:
    """To the run's own page or, where it has none, to what it said."""
    run = runs.get(trial.name)
    if run is not None and (run.folder / REPORT).is_file():
        return quote(f"{trial.folder}/{REPORT}")
    return quote(f"{RUNS}/{trial.name}.log") if trial.status == "failed" else ""
