"""MMLU-Pro's figures, of one model or of two on the same questions, and their table.

A question without an answer is wrong in `accuracy`. The published scripts guess there, and in two ways: both figures
stand beside it, under names of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from luthier.evaluate.figures import RowFigures, all_figures
from luthier.evaluate.mmlu_pro.data import guessed_index, guessed_letter
from luthier.evaluate.record import as_table

Row = Mapping[str, Any]

ROLES = ("target", "compare")


def figures_of(sides: Sequence[Sequence[Row]], seed: int = 0) -> dict[str, Any]:
    """Figures over all questions, and by category.

    Args:
        sides: of each of one or two models the same questions, each with `category`, `prediction`, `answer`,
            `answer_index`, `options` (their number), `stage`, `shots`, `finish`. seed: of the intervals.

    Returns:
        As `figures.all_figures`, under `all` and `by.category.NAME`: `rows` (questions), of each model and for the
        difference `accuracy` (no answer counts as wrong), `accuracy_with_guess` (as `evaluate_from_local.py` guesses),
        `accuracy_with_letter` (as `compute_accuracy.py` does) and `answered`; and in `counts` of each model `right`,
        `no_answer`, `cut_off`: outputs that ended at the longest length, `skipped`: questions that did not fit the
        context, `stages` and `shots`: how many rows of each.
    """
    categories = [row["category"] for row in sides[0]]
    by_row = [_by_row(rows) for rows in sides]
    figures = all_figures(by_row[0], by_row[1] if len(sides) > 1 else None, {"category": categories}, seed)
    _count(figures["all"], sides)
    for name, group in figures["by"]["category"].items():
        _count(group, [[row for row in rows if row["category"] == name] for rows in sides])
    return figures


def _by_row(rows: Sequence[Row]) -> RowFigures:
    def column(values: Iterable[bool]) -> tuple[np.ndarray, None]:
        return np.array(list(values), dtype=np.float64), None

    columns = {
        "accuracy": column(row["prediction"] == row["answer"] for row in rows),
        "accuracy_with_guess": column(
            row["prediction"] == row["answer"]
            if row["prediction"]
            else guessed_index(row["options"]) == row["answer_index"]
            for row in rows
        ),
        "accuracy_with_letter": column((row["prediction"] or guessed_letter()) == row["answer"] for row in rows),
        "answered": column(bool(row["prediction"]) for row in rows),
    }
    return RowFigures(np.zeros(len(rows)), columns)


def _count(group: dict[str, Any], sides: Sequence[Sequence[Row]]) -> None:
    for name in ("asked", "tokens"):  # of other evaluations
        group.pop(name, None)
    group["counts"] = {
        role: {
            "right": sum(row["prediction"] == row["answer"] for row in rows),
            "no_answer": sum(not row["prediction"] for row in rows),
            "cut_off": sum(row["finish"] == "length" for row in rows),
            "skipped": sum(row["finish"] == "skipped" for row in rows),
            "stages": _counted(row["stage"] for row in rows),
            "shots": _counted(row["shots"] for row in rows),
        }
        for role, rows in zip(ROLES, sides, strict=False)
    }


def _counted(values: Iterable[int]) -> dict[str, int]:
    return {str(value): number for value, number in sorted(Counter(values).items(), reverse=True)}


def shown(result: Mapping[str, Any]) -> str:
    """The table for people."""
    figures, names, settings = result["figures"], result["names"], result["settings"]
    cot, paired = settings["mode"] == "cot", names["compare"] is not None
    groups = [*figures["by"]["category"].items(), ("all", figures["all"])]
    if cot:
        how = f"{settings['shots']} worked examples, chain of thought, greedy"
        note = "accuracy: no answer is wrong; with guess: a seeded guess in its place, as in the published tables"
    else:
        how = f"{settings['shots']} examples, likeliest letter"
        note = "the likeliest letter without reasoning: another measure than the published one, do not compare the two"
    roles = [("compare", names["compare"]), ("target", names["target"])] if paired else [("target", names["target"])]
    columns = ["subject", "questions"]
    for _, name in roles:
        columns += [f"{name}, accuracy" if paired else "accuracy", *(["with guess", "no answer"] if cot else [])]
    rows = []
    for label, group in groups:
        row = [label, str(group["rows"])]
        for role, _ in roles:
            row.append(_cell(group[role]["accuracy"]))
            if cot:
                guessed = f"{100 * group[role]['accuracy_with_guess']['value']:.1f}"
                row += [guessed, str(group["counts"][role]["no_answer"])]
        if paired:
            difference = group["difference"]["accuracy"]
            row.append(_cell(difference, "+") + ("*" if difference["beyond_chance"] else " "))
        rows.append(row)
    columns += ["difference"] if paired else []
    interval = "[ ] 95% interval, in percent" + ("; * beyond chance" if paired else "")
    lines = [f"MMLU-Pro, {how}: {names['target']}", as_table(columns, rows), f"{interval}\n({note})"]
    return "\n".join([*lines, *([_sentence(figures["all"]["difference"]["accuracy"], names)] if paired else [])])


def _sentence(difference: Mapping[str, Any], names: Mapping[str, str]) -> str:
    value, low, high = (100 * difference[end] for end in ("value", "low", "high"))
    if not difference["beyond_chance"]:
        return f"\nNo difference in accuracy beyond chance ({value:+.1f} points, {low:.1f} to {high:.1f})."
    word = "better" if difference["better"] else "worse"
    low, high = sorted((abs(low), abs(high)))
    by = f"{abs(value):.1f} points ({low:.1f} to {high:.1f})"
    return f"\n{names['target']} is {word} than {names['compare']} by {by}."


def _cell(figure: Mapping[str, Any], sign: str = "") -> str:
    value, low, high = (100 * figure[end] for end in ("value", "low", "high"))
    return f"{value:{sign}.1f} [{low:.1f} {high:.1f}]"
