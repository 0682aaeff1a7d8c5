"""Evaluations of several runs side by side: one table for each part of a measure, one column for each run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.experiments.evaluations import (
    BY_GROUP,
    NAMES,
    flat_figures,
    is_stale,
    mapping,
    other_model,
    shown_number,
    title_of,
)
from luthier.experiments.run_files import Row, Run
from luthier.experiments.sections import Table

MOST_FIGURES = 80

# Part of a measure -> what a row is called -> (name of the figure, its value).
Parts = dict[str, dict[str, tuple[str, Any]]]


def evaluation_tables(runs: Sequence[Run]) -> list[Table]:
    """Figures of evaluations that at least two of the runs have; and of the model that they are set against, where that
    is the same."""
    by_run = [{_measured(name, result): (name, result) for name, result, _ in run.evaluations} for run in runs]
    tables = []
    for measured in dict.fromkeys(key for found in by_run for key in found):
        there = [(run, *found[measured]) for run, found in zip(runs, by_run, strict=True) if measured in found]
        if len(there) > 1:
            of_runs = [_parts(found[measured][1], "target") if measured in found else {} for found in by_run]
            tables += _tables(runs, there, of_runs)
    return tables


def _tables(runs: Sequence[Run], there: Sequence[tuple[Run, str, Row]], of_runs: Sequence[Parts]) -> list[Table]:
    others = [_parts(result, "compare") for _, _, result in there]
    run, name, result = there[0]
    same = bool(others[0]) and all(each == others[0] for each in others)
    columns = [others[0], *of_runs] if same else list(of_runs)
    other = other_model(run, result)
    head = ["", *(["their base" if other == "its base" else other] if same else []), *(run.label for run in runs)]
    stale = [run.label for run, _, result in there if is_stale(run, result)]
    tables: list[Table] = []
    for part in dict.fromkeys(part for found in of_runs for part in found):
        labels = list(dict.fromkeys(label for found in of_runs for label in found.get(part, {})))
        cells = [[found.get(part, {}).get(label) for found in columns] for label in labels[:MOST_FIGURES]]
        rows = [
            [label, *("" if cell is None else shown_number(*cell) for cell in row)]
            for label, row in zip(labels, cells, strict=False)
        ]
        notes = [f"{MOST_FIGURES} of {len(labels)} figures are shown."] if len(labels) > MOST_FIGURES else []
        if stale and not tables:
            notes.append(f"Measured before training went on to where it is now: {', '.join(stale)}.")
        title = title_of(name, result)
        caption = f"{title}: {part}" if part else title
        tables.append(Table(head, rows, caption, frozenset(range(1, len(head))), notes))
    return tables


def _measured(name: str, result: Row) -> tuple[str, ...]:
    """What has to be the same for two results to be of one measure. The name of a judge's result tells the run's."""
    if result.get("kind") == "judge":
        return "judge", *(str(result.get(key)) for key in ("judge", "criteria", "prompts", "compare"))
    return str(result.get("kind")), name


def _parts(result: Row, side: str) -> Parts:
    """What a result says of one model: the run (`target`), or what it is set against (`compare`)."""
    kind, figures = result.get("kind"), result["figures"]
    if isinstance(figures.get("all"), dict):  # data, the general set, MMLU-Pro
        return _by_group(figures, side)
    if kind == "harness" and "tasks" in figures:
        return _whole(
            {
                f"{task}, {metric.replace('_', ' ')}": (metric, value)
                for task, found in mapping(figures["tasks"]).items()
                for metric, value in mapping(mapping(found).get(side)).items()
            }
        )
    if side == "compare":
        return {}
    if kind == "judge" and "score" in figures:
        ends = figures.get("score_interval")
        low, high = ends if isinstance(ends, list) and len(ends) == 2 else (None, None)
        counts = {name: ("count", mapping(figures.get(name)).get("count")) for name in ("wins", "ties", "losses")}
        return _whole({**counts, "score": ("share", {"value": figures["score"], "low": low, "high": high})})
    return _whole(flat_figures(result))


def _whole(rows: dict[str, tuple[str, Any]]) -> Parts:
    return {"": rows} if rows else {}


def _by_group(figures: Row, side: str) -> Parts:
    """All figures over all rows, and by group the most telling one."""
    whole = mapping(figures["all"].get(side))
    names = [*(name for name in NAMES if name in whole), *(name for name in whole if name not in NAMES)]
    if not names:
        return {}
    found = _whole({_words(name): (name, whole[name]) for name in names})
    telling = next(name for name in (*BY_GROUP, *names) if name in whole)
    for column, groups in mapping(figures.get("by")).items():
        if len(groups) > 1:
            found[f"{_words(telling)}, by {column}"] = {
                str(value): (telling, mapping(group.get(side))[telling])
                for value, group in groups.items()
                if telling in mapping(group.get(side))
            }
    return found


def _words(name: str) -> str:
    return NAMES.get(name, name.replace("_", " "))
