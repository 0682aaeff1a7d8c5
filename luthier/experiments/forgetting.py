"""What a run lost of what it was not trained for: the general set and benchmarks before and after, in words, and how
many answers end by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from luthier.experiments.charts import percent
from luthier.experiments.evaluations import BEYOND, figure_of, is_stale, mapping, other_model, shown_figure
from luthier.experiments.run_files import Row, Run
from luthier.experiments.sections import Table
from luthier.experiments.verdict import BAD, GOOD, OPEN, Verdict

QUESTION = "Did it forget?"
# A rise of loss that is worth a word, and a perplexity from which on a base knows too little to forget any of it.
_WORTH, _UNKNOWN = 0.01, 1000
_NOT_MEASURED = (
    "Not measured: `luthier evaluate RUN --general` sets the run against its base on what it was not trained for, "
    "`general_eval: true` does in training, and `--tasks ... --compare base` on benchmarks."
)


def forgetting(run: Run) -> Verdict:
    """What got worse of all that was not trained for."""
    general = next(_general(run), None)
    benchmarks = list(_benchmarks(run))
    if general is None and not benchmarks:
        return Verdict(QUESTION, _NOT_MEASURED, OPEN)
    start, mood, sentences = _of_general(run, *general) if general else ("", GOOD, [])
    worse = [text for text, good in benchmarks if good is False]
    better = [text for text, good in benchmarks if good]
    if worse:
        start, mood = "Yes", BAD
        sentences.append(f"Worse on benchmarks: {', '.join(worse)}.")
    elif benchmarks:
        start = start or "No"
        count = f"any of {len(benchmarks)} figures" if len(benchmarks) > 1 else "the one figure"
        sentences.append(f"Of benchmarks nothing got worse beyond chance, in {count}.")
    if better:
        sentences.append(f"Better on benchmarks: {', '.join(better)}.")
    text = " ".join(sentences)
    short = "got worse on what it was not trained for" if mood == BAD else ""
    return Verdict(QUESTION, f"{start}: {text[0].lower()}{text[1:]}", mood, short)


def general_losses(run: Run) -> tuple[float, float] | None:
    """Loss on the general set before and after the run, if it was measured."""
    for _, whole in _general(run):
        was, now = (_number(whole, side, "loss") for side in ("compare", "target"))
        if was is not None and now is not None:
            return was, now
    return None


def endings_table(run: Run) -> Table | None:
    """The share of answers that ended by themselves, before and after, wherever answers were asked for."""
    rows = []
    for name, result, _ in run.evaluations:
        whole = mapping(result["figures"].get("all"))
        was, now = (_number(whole, side, "stopped") for side in ("compare", "target"))
        if now is not None and not is_stale(run, result):
            other = f", of {other_model(run, result)}" if was is not None else ""
            rows.append([f"answers to {name}{other} and of this run", _share(was), _share(now)])
    if shares := run.points("samples_stopped"):
        (first, was), (last, now) = shares[0], shares[-1]
        steps = f"at step {first:,.0f} and at step {last:,.0f}" if len(shares) > 1 else f"at step {last:,.0f}"
        rows.append([f"samples {steps}", _share(was if len(shares) > 1 else None), _share(now)])
    if not rows:
        return None
    return Table(["", "before", "after"], rows, numeric=frozenset({1, 2}))


def _of_general(run: Run, result: Row, whole: Row) -> tuple[str, str, list[str]]:
    """The first word, the mood, and sentences."""
    was, now = (_number(whole, side, "loss") for side in ("compare", "target"))
    difference = mapping(mapping(whole.get("difference")).get("loss"))
    if was is None or now is None or not difference:
        return "No telling", OPEN, ["The general set has no figure of both models."]
    perplexity = _number(whole, "compare", "perplexity")
    if perplexity is None or perplexity > _UNKNOWN:
        known = "more than can be shown" if perplexity is None else f"{perplexity:,.0f}"
        how = f"a perplexity of {known} on the general set"
        return "No telling", OPEN, [f"such text is unknown to {other_model(run, result)} itself ({how})."]
    ends = ""
    if isinstance(low := difference.get("low"), float) and isinstance(high := difference.get("high"), float):
        ends = f", 95% interval {shown_figure('loss', low, '+')} to {shown_figure('loss', high, '+')}"
    against = "" if other_model(run, result) == "its base" else f" against {other_model(run, result)}"
    loss = (
        f"The loss on the general set{against} went from {shown_figure('loss', was)} to {shown_figure('loss', now)} "
        f"({shown_figure('loss', now - was, '+')}{ends})."
    )
    kinds = mapping(mapping(result["figures"].get("by")).get("category"))
    worse = sorted(_worse_kinds(kinds), reverse=True)
    named = ", ".join(f"{name} ({shown_figure('loss', rise, '+')})" for rise, name in worse)
    if _is_worse(difference):
        alone = f"Worse beyond chance: {named}." if named else "No kind of text by itself got worse beyond chance."
        small = now - was < _WORTH * was
        return ("Hardly", OPEN, [loss, alone]) if small else ("Yes", BAD, [loss, alone])
    if worse:
        alone = f" One of {len(kinds)} kinds may be chance." if len(worse) == 1 else ""
        return "In part", OPEN, [loss, f"Worse beyond chance: {named}.{alone}"]
    return "No", GOOD, [loss, "Nothing got worse beyond chance."]


def _worse_kinds(kinds: Row) -> Iterator[tuple[float, str]]:
    for name, group in kinds.items():
        difference = mapping(mapping(mapping(group).get("difference")).get("loss"))
        if _is_worse(difference):
            yield float(difference["value"]), str(name)


def _general(run: Run) -> Iterator[tuple[Row, Row]]:
    """Results of the general set with two models, of the run as it is: result, figures over all rows."""
    for _, result, _ in run.evaluations:
        whole = mapping(result["figures"].get("all"))
        if result.get("kind") == "general" and mapping(whole.get("difference")) and not is_stale(run, result):
            yield result, whole


def _benchmarks(run: Run) -> Iterator[tuple[str, bool | None]]:
    """Each figure of a benchmark that was asked of two models: what it was and is, and whether that is better."""
    for _, result, _ in run.evaluations:
        if result.get("kind") not in BEYOND or result.get("kind") == "general" or is_stale(run, result):
            continue
        figures = result["figures"]
        if result["kind"] == "mmlu_pro":
            groups: dict[str, tuple[Row, Sequence[str]]] = {"MMLU-Pro": (mapping(figures.get("all")), ("accuracy",))}
        else:
            groups = {
                str(task): (mapping(found), tuple(mapping(mapping(found).get("difference"))))
                for task, found in mapping(figures.get("tasks")).items()
            }
        for label, (group, metrics) in groups.items():
            for metric in metrics:
                difference = mapping(mapping(group.get("difference")).get(metric))
                was, now = (_number(group, side, metric) for side in ("compare", "target"))
                if difference and was is not None and now is not None:
                    good = bool(difference.get("better")) if difference.get("beyond_chance") else None
                    change = f"{shown_figure(figure_of(metric), was)} → {shown_figure(figure_of(metric), now)}"
                    yield f"{label} ({metric.replace('_', ' ')}) {change}", good


def _is_worse(difference: Row) -> bool:
    return bool(difference.get("beyond_chance")) and difference.get("better") is False


def _number(group: Row, side: str, figure: str) -> float | None:
    value = mapping(mapping(group.get(side)).get(figure)).get("value")
    return value if isinstance(value, int | float) else None


def _share(value: float | None) -> str:
    return "–" if value is None else percent(value)
