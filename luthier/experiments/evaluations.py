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
from luthier.experiments.examples import examples_table
from luthier.experiments.run_files import Row, Run, step_of
from luthier.experiments.sections import Table, base_name, clipped, short_path

KINDS = {
    "data": "Held-out data",
    "general": "The general set",
    "mmlu_pro": "MMLU-Pro",
    "judge": "A judge's choice",
    "harness": "Benchmarks",
}
_ABOUT_GENERAL = (
    "Short texts of several kinds that come with Luthier, each scored on its second part as plain text. It is a watch "
    "for forgetting, and no benchmark: what counts is the change."
)
# Kinds that look at what a run was not trained for.
BEYOND = ("general", "mmlu_pro", "harness")
NAMES = {
    "loss": "loss",
    "perplexity": "perplexity",
    "token_accuracy": "tokens predicted right",
    "exact_match": "exactly right answers",
    "stopped": "answers that end by themselves",
    "prefers_chosen": "pairs whose chosen answer is likelier",
    "desirable_logp": "log-prob of desirable answers",
    "undesirable_logp": "log-prob of undesirable answers",
    "desirable_reward": "reward of desirable answers",
    "undesirable_reward": "reward of undesirable answers",
    "reward_accuracy": "rewards as labelled",
    "reward_margin": "margin of rewards",
    "kl": "divergence from the base, in nats",
    "accuracy": "right answers",
    "accuracy_with_guess": "right answers, with a guess for no answer",
    "answered": "questions with an answer",
}
# A share is shown in percent.
SHARES = ("accuracy", "match", "stopped", "answered", "prefers", "share", "rate", "win", "consistent")
# Figures that are shown by group: the first of these that there is.
BY_GROUP = ("accuracy", "exact_match", "token_accuracy", "loss", "reward_accuracy", "prefers_chosen", "desirable_logp")
MOST_GROUPS, MOST_LINES, DEEPEST = 40, 60, 3


@dataclass
class Shown:
    """One result on a page. `examples`: rows of prompt, expected and answers, each cell (text, state)."""

    title: str
    about: str
    sentences: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    examples: Table | None = None
    stale: bool = False


def shown_evaluations(run: Run, *, beyond: bool = False) -> list[Shown]:
    """Results on the data that a run is about, or those `beyond` it."""
    return [
        _shown(run, name, result, rows)
        for name, result, rows in sorted((*run.evaluations, *run.parts), key=_is_opinion)
        if (result.get("kind") in BEYOND) == beyond
    ]


def _is_opinion(found: tuple[str, Row, list[Row]]) -> bool:
    """A judge's, which is shown after what was counted."""
    return found[1].get("kind") == "judge"


def flat_figures(result: Row) -> dict[str, tuple[str, Any]]:
    """All numbers of a result by their path, for setting runs side by side: name of the figure, and number."""
    return {" · ".join(path): (path[-1], value) for path, value in _leaves(result["figures"], ())}


def title_of(name: str, result: Row) -> str:
    """What a result of this name is called on a page."""
    kind = str(result.get("kind", ""))
    title = KINDS.get(kind, kind or "Evaluation")
    if kind == "judge" and result.get("judge"):
        return f"{title}: {result['judge']}"
    title = title if name == kind else f"{title}: {name}"
    return f"{title}, {own_model(result)}" if result.get("part") else title


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
    shown = Shown(title_of(name, result), about, stale=is_stale(run, result))
    if kind in ("data", "general") and isinstance(result["figures"].get("all"), dict):
        shown.tables = list(_data_tables(run, result))
        shown.sentences = [_ABOUT_GENERAL] if kind == "general" else []
    elif kind == "mmlu_pro" and isinstance(result["figures"].get("all"), dict):
        shown.tables = [mmlu_pro_table(run, result)]
    elif kind == "harness" and isinstance(result["figures"].get("tasks"), dict):
        shown.tables = [harness_table(run, result)]
    elif kind == "judge" and "score" in result["figures"]:
        shown.tables = [_judge_table(run, result)]
    else:
        shown.tables = list(_any_tables(result["figures"]))
    shown.examples = examples_table(
        rows, other_model(run, result), own_model(result), judged=result.get("kind") == "judge"
    )
    return shown


def _data_tables(run: Run, result: Row) -> Iterator[Table]:
    figures = result["figures"]
    whole = figures["all"]
    sides = ["compare", "target"] if "compare" in whole else ["target"]
    names = [other_model(run, result) if side == "compare" else own_model(result) for side in sides]
    head = ["", *names, *(["difference"] if "compare" in sides else [])]
    numeric = frozenset(range(1, len(head)))
    rows = []
    for figure in [name for name in NAMES if name in mapping(whole.get("target"))]:
        rows.append([NAMES[figure], *_sides(figure, whole, sides)])
    asked = whole.get("asked")
    caption = f"{whole.get('rows', 0):,} rows" + (f", {asked:,} of them asked for their answers" if asked else "")
    yield Table(head, rows, caption, numeric, ["Beside each figure its 95% interval."])
    for column, groups in mapping(figures.get("by")).items():
        for figure in ("loss",) if result.get("kind") == "general" else BY_GROUP:
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


def mmlu_pro_table(run: Run, result: Row) -> Table:
    """Right answers by category and over all of them; with another model, of both and their difference in words."""
    figures, settings = result["figures"], mapping(result.get("settings"))
    whole = mapping(figures["all"])
    paired = bool(mapping(whole.get("compare")))
    groups = {str(name): mapping(group) for name, group in mapping(mapping(figures.get("by")).get("category")).items()}
    rows = []
    for label, group in [*(groups.items() if len(groups) > 1 else ()), ("all", whole)]:
        row = [next(iter(groups)) if len(groups) == 1 else label, _cell("count", group.get("rows"))]
        row += [_cell("accuracy", mapping(group.get(side)).get("accuracy")) for side in _roles(paired)]
        if paired:
            row.append(difference_in_words("accuracy", mapping(mapping(group.get("difference")).get("accuracy"))))
        else:
            guessed = mapping(mapping(group.get("target")).get("accuracy_with_guess")).get("value")
            row += [_cell("accuracy", guessed), _cell("count", _no_answer(group, "target"))]
        rows.append(row)
    notes = ["Beside each share of right answers its 95% interval; a question without an answer is wrong."]
    if settings.get("mode") == "loglik":
        notes.append("The likeliest letter, without reasoning: another measure than that of published accuracies.")
    if not paired:
        head = ["category", "questions", "right", "right, with a guess for no answer", "no answer"]
        return Table(head, rows, numeric=frozenset(range(1, 5)), notes=notes)
    other, own = other_model(run, result), own_model(result)
    notes.append(f"No answer: {_no_answer(whole, 'compare')} of {other}, {_no_answer(whole, 'target')} of {own}.")
    return Table(["category", "questions", other, own, "difference"], rows, numeric=frozenset({1, 2, 3}), notes=notes)


def _no_answer(group: Row, side: str) -> Any:
    return mapping(mapping(group.get("counts")).get(side)).get("no_answer")


def harness_table(run: Run, result: Row) -> Table:
    """Every metric of every task; with another model, of both and their difference in words."""
    paired = bool(result.get("compare"))
    rows = []
    for task, found in mapping(result["figures"]["tasks"]).items():
        group = mapping(found)
        shots = group.get("shots")
        asked = [f"{group['questions']:,} questions"] if group.get("questions") else []
        asked += [f"{shots} examples"] if shots else []
        label = f"{task} ({', '.join(asked)})" if asked else str(task)
        for metric in mapping(group.get("target")):
            name = figure_of(metric)
            row = [label, metric.replace("_", " ")]
            row += [_cell(name, mapping(group.get(side)).get(metric)) for side in _roles(paired)]
            if paired:
                row.append(difference_in_words(name, mapping(mapping(group.get("difference")).get(metric))))
            rows.append(row)
            label = ""
    models = [other_model(run, result), own_model(result)] if paired else [own_model(result)]
    head = ["task", "metric", *models, *(["difference"] if paired else [])]
    numeric = frozenset(range(2, 2 + len(models)))
    return Table(head, rows[:MOST_LINES], "", numeric, ["Beside each figure its 95% interval.", *_cut(len(rows))])


def figure_of(metric: str) -> str:
    """What a metric of the harness is called here, where accuracies have their whole name."""
    return "accuracy" if metric.split(",")[0] in ("acc", "acc_norm") else metric


def _roles(paired: bool) -> tuple[str, ...]:
    return ("compare", "target") if paired else ("target",)


def difference_in_words(figure: str, difference: Row) -> str:
    """Better or worse and by how much; nothing where there is no difference to speak of."""
    if difference.get("value") is None:
        return "–"
    good, signed = is_better(figure, difference), _cell(figure, difference, "+")
    if good is None:
        return f"no telling: {signed}"
    ends = [end for name in ("low", "high") if (end := difference.get(name)) is not None]
    if len(ends) < 2 or ends[0] * ends[1] < 0:
        return f"{'better' if good else 'worse'}: {signed}"
    low, high = sorted(abs(end) for end in ends)
    found = {"value": abs(difference["value"]), "low": low, "high": high}
    return f"{'better' if good else 'worse'} by {_cell(figure, found, '+').replace('+', '')}"


def _judge_table(run: Run, result: Row) -> Table:
    figures, other = result["figures"], other_model(run, result)
    rows = []
    own = own_model(result)
    for name, label in (("wins", f"{own}'s answer is better"), ("ties", "as good"), ("losses", f"{other} is better")):
        found = mapping(figures.get(name))
        ends = found.get("interval")
        share = {"value": found.get("share"), **dict(zip(("low", "high"), ends or (), strict=False))}
        rows.append([label, _cell("count", found.get("count")), _cell("share", share)])
    told = []
    if result.get("self_judging"):
        told.append("The judge is one of the two, or of their family: models prefer their own answers.")
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


def _described(result: Row) -> str:
    """On what a result was measured."""
    found = result.get("data") or mapping(result.get("settings")).get("data") or result.get("prompts")
    return short_path(found) if isinstance(found, str) and "\n" not in found and "/" in found else str(found or "")


def other_model(run: Run, result: Row) -> str:
    """What to call the model that a run is set against."""
    other = str(result.get("compare") or "")
    is_base = other == "base" or other == str(run.config.get("base_model"))
    return "its base" if is_base else short_path(other) or base_name(run)


def own_model(result: Row) -> str:
    """What to call the model that a result is of: the run, or which part of it."""
    part = str(result.get("part") or "")
    step = step_of(part)
    return f"step {step:,}" if step is not None else f"the {part} model" if part else "this run"


def is_stale(run: Run, result: Row) -> bool:
    """Made before the run's training went on to where it is now. A checkpoint stays what it is."""
    if step_of(str(result.get("part") or "")) is not None:
        return False
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
        return f"{value:.3g}" if value < 999.5 or value >= 1e9 else f"{value:,.0f}"
    if abs(value) < 100:
        return f"{value:{sign}.{4 if abs(value) < 10 else 2}f}"
    return (sign if value > 0 else "") + number(value)


def _is_share(name: str) -> bool:
    return any(word in name for word in SHARES)


def _words(name: str) -> str:
    return NAMES.get(name, str(name).replace("_", " "))


def mapping(value: Any) -> Row:
    return value if isinstance(value, dict) else {}
