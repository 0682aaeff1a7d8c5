"""Results of evaluations as tables.

All results have one frame (`kind`, `target`, `compare`, `figures`, ...); what is in `figures` is the business of
each kind. Known kinds have tables of their own, and any other one is shown by its structure: numbers, intervals
(`value`, `low`, `high`) and groups of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from luthier.experiments.charts import number
from luthier.experiments.run_files import Row, Run
from luthier.experiments.sections import Table, base_name, clipped, short_path, without_shared_beginning

KINDS = {"data": "Held-out data", "mmlu_pro": "MMLU-Pro", "judge": "A judge's choice", "harness": "Benchmarks"}
NAMES = {
    "loss": "loss",
    "perplexity": "perplexity",
    "token_accuracy": "tokens predicted right",
    "exact_match": "exactly right answers",
    "stopped": "answers that end by themselves",
}
# A share is shown in percent.
SHARES = ("accuracy", "match", "stopped", "share", "rate", "win", "consistent")
MOST_EXAMPLES, MOST_GROUPS, MOST_LINES, DEEPEST = 8, 40, 60, 3
# How what is asked, expected and answered may be called in rows.
_PROMPT = ("prompt", "question", "instruction", "input")
_EXPECTED = ("expected", "answer", "reference")
_SIDES = (("compare", "target"), ("before", "after"), ("base", "tuned"), ("b", "a"))


@dataclass
class Shown:
    """One result on a page. `examples`: rows of prompt, expected and answers, each cell (text, state)."""

    title: str
    about: str
    sentences: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    examples: Table | None = None
    stale: bool = False


def shown_evaluations(run: Run) -> list[Shown]:
    return [_shown(run, name, result, rows) for name, result, rows in run.evaluations]


def flat_figures(result: Row) -> dict[str, tuple[str, Any]]:
    """All numbers of a result by their path, for setting runs side by side: name of the figure, and number."""
    return {" · ".join(path): (path[-1], value) for path, value in _leaves(result["figures"], ())}


def shown_number(name: str, value: Any) -> str:
    return _cell(name, value)


def _shown(run: Run, name: str, result: Row, rows: list[Row]) -> Shown:
    kind = str(result.get("kind", ""))
    about = ", ".join(
        part
        for part in (
            _described(result),
            f"against {other_model(run, result)}" if result.get("compare") else "",
            str(result.get("created", ""))[:10],
        )
        if part
    )
    title = KINDS.get(kind, kind or "Evaluation")
    shown = Shown(title if name == kind else f"{title}: {name}", about, stale=is_stale(run, result))
    if kind == "data" and isinstance(result["figures"].get("all"), dict):
        shown.tables = list(_data_tables(run, result))
    elif kind == "mmlu_pro" and "accuracy" in result["figures"]:
        shown.tables = [_mmlu_pro_table(result["figures"])]
    elif kind == "judge" and "score" in result["figures"]:
        shown.tables = [_judge_table(run, result)]
    else:
        shown.tables = list(_any_tables(result["figures"]))
    shown.examples = _examples(run, result, rows)
    return shown


def _data_tables(run: Run, result: Row) -> Iterator[Table]:
    figures = result["figures"]
    whole = figures["all"]
    sides = ["compare", "target"] if "compare" in whole else ["target"]
    names = [other_model(run, result) if side == "compare" else "this run" for side in sides]
    head = ["", *names, *(["difference"] if "compare" in sides else [])]
    numeric = frozenset(range(1, len(head)))
    rows = []
    for figure in [name for name in NAMES if name in mapping(whole.get("target"))]:
        rows.append([NAMES[figure], *_sides(figure, whole, sides)])
    asked = whole.get("asked")
    caption = f"{whole.get('rows', 0):,} rows" + (f", {asked:,} of them asked for their answers" if asked else "")
    yield Table(head, rows, caption, numeric, ["Beside each figure its 95% interval."])
    for column, groups in mapping(figures.get("by")).items():
        for figure in ("exact_match", "token_accuracy", "loss"):
            if figure not in mapping(whole.get("target")):
                continue
            body = [
                [f"{value} ({group.get('rows', 0):,})", *_sides(figure, group, sides)]
                for value, group in list(mapping(groups).items())[:MOST_GROUPS]
                if figure in mapping(group.get("target"))
            ]
            if len(groups) > 1 and body:
                left = [f"{MOST_GROUPS} of {len(groups):,} groups are shown."] if len(groups) > MOST_GROUPS else []
                yield Table([column, *head[1:]], body, f"{NAMES[figure]}, by {column}", numeric, left)
            break


def _sides(figure: str, group: Row, sides: list[str]) -> list[str]:
    cells = [_cell(figure, mapping(group.get(side)).get(figure)) for side in sides]
    if "compare" in sides:
        difference = mapping(mapping(group.get("difference")).get(figure))
        good = is_better(figure, difference) if difference else None
        word = "" if not difference else " no telling" if good is None else " better" if good else " worse"
        cells.append(_cell(figure, difference, "+") + word if difference else "")
    return cells


def _mmlu_pro_table(figures: Row) -> Table:
    def row(label: str, found: Row) -> list[str]:
        value, interval = found.get("accuracy"), found.get("interval")
        ends = dict(zip(("low", "high"), interval, strict=False)) if isinstance(interval, list) else {}
        return [
            label,
            _cell("questions", found.get("questions")),
            _cell("accuracy", {"value": value, **ends}),
            _cell("accuracy", found.get("accuracy_with_guess")),
            _cell("questions", found.get("no_answer")),
        ]

    rows = [row(str(name), mapping(found)) for name, found in mapping(figures.get("categories")).items()]
    rows = [*rows, row("all", figures)] if len(rows) > 1 else rows or [row("all", figures)]
    head = ("category", "questions", "right", "right, with a guess for no answer", "no answer")
    notes = ["Beside the share of right answers its 95% interval."]
    return Table(head, rows, numeric=frozenset(range(1, 5)), notes=notes)


def _judge_table(run: Run, result: Row) -> Table:
    figures, other = result["figures"], other_model(run, result)
    rows = []
    for name, label in (("wins", "this run's answer is better"), ("ties", "as good"), ("losses", f"{other} is better")):
        found = mapping(figures.get(name))
        ends = found.get("interval")
        share = {"value": found.get("share"), **dict(zip(("low", "high"), ends or (), strict=False))}
        rows.append([label, _cell("count", found.get("count")), _cell("share", share)])
    told = [f"Judge: {result['judge']}."] if result.get("judge") else []
    for name, words in (
        ("flips", "pairs were decided by the order they were shown in"),
        ("wavered", "pairs were a tie in one order only"),
    ):
        if count := mapping(figures.get(name)).get("count"):
            told.append(f"{count:,} {words}, and are not counted.")
    return Table(["", "pairs", "share"], rows, numeric=frozenset({1, 2}), notes=told)


def _any_tables(figures: Mapping[str, Any], title: str = "", depth: int = 0) -> Iterator[Table]:
    """Numbers as one table, and one of the groups that hold numbers, a row each; then what is inside of the groups."""
    own = [[_words(name), _cell(name, value)] for name, value in figures.items() if _is_leaf(value)]
    if own:
        yield Table(("", ""), own[:MOST_LINES], title, frozenset({1}), _cut(len(own)))
    groups = {str(name): value for name, value in figures.items() if isinstance(value, Mapping) and not _is_leaf(value)}
    columns = list(dict.fromkeys(key for group in groups.values() for key in group if _is_leaf(group[key])))
    if columns:
        rows = [
            [NAMES.get(name, name), *(_cell(column, group[column]) if column in group else "" for column in columns)]
            for name, group in groups.items()
            if any(column in group for column in columns)
        ]
        numeric = frozenset(range(1, len(columns) + 1))
        yield Table(["", *map(_words, columns)], rows[:MOST_LINES], title, numeric, _cut(len(rows)))
    if depth < DEEPEST:
        for name, group in list(groups.items())[:MOST_GROUPS]:
            inner = {key: value for key, value in group.items() if not _is_leaf(value)}
            yield from _any_tables(inner, f"{title}, {_words(name)}" if title else _words(name), depth + 1)


def _cut(rows: int) -> list[str]:
    return [f"{MOST_LINES} of {rows:,} rows are shown."] if rows > MOST_LINES else []


def _examples(run: Run, result: Row, rows: list[Row]) -> Table | None:
    """A few rows with what was answered: those first whose answers differ."""
    found = []
    for row in rows:
        prompt = next((str(row[name]) for name in _PROMPT if isinstance(row.get(name), str)), "")
        roles = next((names for names in _SIDES if all(_answer(row.get(name)) is not None for name in names)), None)
        if roles is None and _answer(row.get("target")) is not None:
            roles = ("", "target")
        if not prompt or roles is None:
            continue
        expected = next((str(row[name]) for name in _EXPECTED if isinstance(row.get(name), str)), "")
        answers = [_answer(row[role]) or "" for role in roles if role]
        found.append((prompt, expected, answers))
    if not found:
        return None
    changed = [each for each in found if len(set(each[2])) > 1] or found
    shown = [changed[place * len(changed) // MOST_EXAMPLES] for place in range(MOST_EXAMPLES)]
    shown = list({id(each): each for each in shown}.values()) if len(changed) >= MOST_EXAMPLES else changed
    expects = any(expected for _, expected, _ in shown)
    body = []
    names = without_shared_beginning([prompt for prompt, _, _ in shown])
    for name, (_, expected, answers) in zip(names, shown, strict=True):
        cells = [(name, "prompt")] + ([(clipped(expected), "expected")] if expects else [])
        cells += [(clipped(a), "right" if expected and a.strip() == expected.strip() else "ended") for a in answers]
        body.append(cells)
    two = len(shown[0][2]) == 2
    sides = [other_model(run, result), "this run"] if two else ["this run"]
    which = "Rows whose answers differ" if two and changed is not found else "Some of the rows"
    return Table(["question", *(["expected"] if expects else []), *sides], body, which)


def _described(result: Row) -> str:
    """On what a result was measured."""
    found = result.get("data") or mapping(result.get("settings")).get("data") or result.get("prompts")
    return short_path(found) if isinstance(found, str) and "\n" not in found and "/" in found else str(found or "")


def _answer(value: Any) -> str | None:
    """What a model said: a text, or a mapping that has one."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        return None
    return next((value[name] for name in ("text", "answer", "output") if isinstance(value.get(name), str)), None)


def other_model(run: Run, result: Row) -> str:
    """What to call the model that a run is set against."""
    other = str(result.get("compare") or "")
    is_base = other == "base" or other == str(run.config.get("base_model"))
    return "its base" if is_base else short_path(other) or base_name(run)


def is_stale(run: Run, result: Row) -> bool:
    """Made before the run's training went on to where it is now."""
    try:
        made, ended = (datetime.fromisoformat(str(each)) for each in (result["created"], run.summary["finished"]))
        return made < ended
    except (KeyError, ValueError, TypeError):
        return False


def is_better(figure: str, difference: Row) -> bool | None:
    """None where chance explains a difference."""
    if difference.get("better") is not None or "beyond_chance" in difference:
        return difference.get("better")
    low, high, value = (difference.get(name) for name in ("low", "high", "value"))
    if low is None or high is None or value is None or low <= 0 <= high:
        return None
    return bool((value < 0) == (figure in ("loss", "perplexity")))


def _leaves(figures: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in figures.items():
        if _is_leaf(value):
            yield (*path, str(name)), value
        elif isinstance(value, Mapping):
            yield from _leaves(value, (*path, str(name)))


def _is_leaf(value: Any) -> bool:
    """A number, a text, an interval, or a number with its interval."""
    if isinstance(value, Mapping):
        return "value" in value and set(value) <= {"value", "low", "high", "beyond_chance", "better"}
    if isinstance(value, list):
        return len(value) == 2 and all(isinstance(each, int | float) for each in value)
    return value is None or (isinstance(value, int | float | str) and not isinstance(value, bool))


def _cell(name: str, value: Any, sign: str = "") -> str:
    if isinstance(value, Mapping):
        if value.get("value") is None:
            return "–"
        text = shown_figure(name, value["value"], sign)
        points = " points" if sign and _is_share(name) else ""
        if value.get("low") is None or value.get("high") is None:
            return text + points
        return f"{text} [{shown_figure(name, value['low'], sign)}, {shown_figure(name, value['high'], sign)}]{points}"
    if isinstance(value, list):
        return f"[{shown_figure(name, value[0], sign)}, {shown_figure(name, value[1], sign)}]"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return shown_figure(name, value, sign)
    return "–" if value is None else clipped(str(value), 200)


def shown_figure(name: str, value: float, sign: str = "") -> str:
    if isinstance(value, int):
        return f"{value:{sign},}"
    if _is_share(name) and abs(value) <= 1:
        return f"{100 * value:{sign}.1f}" + ("" if sign else "%")
    if name == "perplexity":
        return f"{value:.3g}"
    return f"{value:{sign}.4f}" if abs(value) < 10 else (sign if value > 0 else "") + number(value)


def _is_share(name: str) -> bool:
    return any(word in name for word in SHARES)


def _words(name: str) -> str:
    return NAMES.get(name, str(name).replace("_", " "))


def mapping(value: Any) -> Row:
    return value if isinstance(value, dict) else {}
