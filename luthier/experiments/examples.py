"""A few rows of an evaluation, with what the models answered to them: figures say how much, these say what."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from luthier.experiments.run_files import Row
from luthier.experiments.sections import Table, answer_cell, clipped, without_template

MOST_EXAMPLES = 8
# How what is asked, expected and answered may be called in rows.
_PROMPT = ("prompt", "question", "instruction", "input")
_EXPECTED = ("expected", "answer", "reference")
_SIDES = (("compare", "target"), ("before", "after"), ("base", "tuned"), ("b", "a"))


def examples_table(rows: Iterable[Row], other: str, own: str, *, judged: bool) -> Table | None:
    """A few rows with what was answered: those first whose answers differ.

    Args:
        other, own: what to call the models. judged: the rows say whose answer is the better one.
    """
    found = []
    for row in rows:
        prompt = next((str(row[name]) for name in _PROMPT if isinstance(row.get(name), str)), "")
        roles = next((names for names in _SIDES if all(_answer(row.get(name)) is not None for name in names)), None)
        if roles is None and _answer(row.get("target")) is not None:
            roles = ("", "target")
        if not prompt or roles is None:
            continue
        expected = next((str(row[name]) for name in _EXPECTED if isinstance(row.get(name), str)), "")
        answers = [_answer_cell(row[role], expected) for role in roles if role]
        found.append((prompt, expected, answers, str(row.get("outcome", ""))))
    if not found:
        return None
    changed = [each for each in found if len({text for text, _ in each[2]}) > 1] or found
    shown = [changed[place * len(changed) // MOST_EXAMPLES] for place in range(MOST_EXAMPLES)]
    shown = list({id(each): each for each in shown}.values()) if len(changed) >= MOST_EXAMPLES else changed
    two = len(shown[0][2]) == 2
    sides = [other, own] if two else [own]
    expects = any(each[1] for each in shown)
    choices = {"a": own, "b": other, "tie": "as good", "identical": "as good"}
    body = []
    names = without_template([prompt for prompt, *_ in shown])
    for name, (_, expected, answers, outcome) in zip(names, shown, strict=True):
        cells = [(name, "prompt")] + ([(clipped(expected), "expected")] if expects else []) + answers
        body.append(cells + ([(choices.get(outcome, "not counted"), "outcome")] if judged else []))
    which = "Rows whose answers differ" if two and changed is not found else "Some of the rows"
    head = ["question", *(["expected"] if expects else []), *sides, *(["better by the judge"] if judged else [])]
    return Table(head, body, which)


def _answer_cell(value: Any, expected: str) -> tuple[str, str]:
    text = _answer(value) or ""
    is_cut = isinstance(value, dict) and value.get("stopped") is False
    return (clipped(text.strip()), "cut") if is_cut else answer_cell(text, expected)


def _answer(value: Any) -> str | None:
    """What a model said: a text, or a mapping that has one."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        return None
    return next((value[name] for name in ("text", "answer", "output") if isinstance(value.get(name), str)), None)
