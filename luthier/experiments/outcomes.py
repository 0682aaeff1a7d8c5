"""What the evaluations of a run say of it, in words: better than its base or worse, on what, and by how much."""

from __future__ import annotations

from collections.abc import Iterator

from luthier.experiments.evaluations import (
    BEYOND,
    NAMES,
    is_better,
    is_stale,
    mapping,
    other_model,
    shown_figure,
)
from luthier.experiments.forgetting import forgetting
from luthier.experiments.run_files import Row, Run
from luthier.experiments.verdict import BAD, GOOD, OPEN, Verdict, verdicts

# Figures in words, the most telling first; and how many of those that got better.
TELLING = ("exact_match", "token_accuracy", "prefers_chosen", "desirable_logp", "undesirable_logp", "loss", "stopped")
MOST_BETTER = 2


def against_base(run: Run) -> list[Verdict]:
    """What the evaluations that set the run against another model say, one verdict for each other model. What got worse
    is said whole, what got better by its most telling figures."""
    found: dict[str, list[tuple[str, dict[bool | None, list[str]]]]] = {}
    for name, result, whole in _compared(run):
        said: dict[bool | None, list[str]] = {True: [], False: [], None: []}
        for figure in TELLING:
            difference = mapping(mapping(whole["difference"]).get(figure))
            was, now = (_value(whole, side, figure) for side in ("compare", "target"))
            if difference and was is not None and now is not None:
                text = f"{NAMES[figure]} {shown_figure(figure, was)} → {shown_figure(figure, now)}"
                said[is_better(figure, difference)].append(text)
        if any(said.values()):
            found.setdefault(other_model(run, result), []).append((name, said))
    return [
        *(_compared_verdict(other, said) for other, said in found.items()),
        *(verdict for _, result, _ in run.evaluations if (verdict := _judged(run, result))),
    ]


def endings_against_base(run: Run) -> str:
    """How many answers end by themselves, before and after, where an evaluation has asked both models."""
    found = []
    for name, result, whole in _compared(run):
        was, now = (_value(whole, side, "stopped") for side in ("compare", "target"))
        if was is not None and now is not None:
            found.append(f"On {name}: {was:.0%} of the answers of {other_model(run, result)}, {now:.0%} of this run's.")
    return " ".join(found)


def all_verdicts(run: Run) -> list[Verdict]:
    """All that there is to say of a run."""
    return verdicts(run, against_base(run), endings_against_base(run), [forgetting(run)])


def _compared(run: Run) -> Iterator[tuple[str, Row, Row]]:
    """Evaluations of the run as it is, on what it is about, with another model beside it: name, result, and figures
    over all rows."""
    for name, result, _ in run.evaluations:
        whole = mapping(result["figures"].get("all"))
        about_it = result.get("kind") not in BEYOND and not is_stale(run, result)
        if about_it and result.get("compare") and mapping(whole.get("difference")):
            yield name, result, whole


def _compared_verdict(other: str, found: list[tuple[str, dict[bool | None, list[str]]]]) -> Verdict:
    better, worse = (any(said[good] for _, said in found) for good in (True, False))
    sentences = []
    for name, said in found:
        if said[True]:
            sentences.append(f"On {name}: {', '.join(said[True][:MOST_BETTER])}.")
        if said[False]:
            sentences.append(f"Worse on {name}: {', '.join(said[False])}.")
        if not said[True] and not said[False] and said[None]:
            sentences.append(f"On {name} no difference beyond chance: {said[None][0]}.")
    start = "In part" if better and worse else "Yes" if better else "No" if worse else "No telling"
    mood = BAD if worse and not better else GOOD if better and not worse else OPEN
    short = f"got {'better' if better else 'worse'} than {other}{' in part' if better and worse else ''}"
    question = f"Better than {other}?"
    return Verdict(question, f"{start}. {' '.join(sentences)}", mood, short if better or worse else "")


def _value(whole: Row, side: str, figure: str) -> float | None:
    value = mapping(mapping(whole.get(side)).get(figure)).get("value")
    return value if isinstance(value, int | float) else None


def _judged(run: Run, result: Row) -> Verdict | None:
    """What a judge, or a person, said of pairs of answers; `a` is the run."""
    if result.get("kind") != "judge" or is_stale(run, result):
        return None
    figures, other = result["figures"], other_model(run, result)
    judge = str(result.get("judge") or "a judge")
    counts = {name: mapping(figures.get(name)).get("count", 0) for name in ("wins", "ties", "losses", "flips")}
    score, winner = figures.get("score"), figures.get("winner")
    question = f"Preferred to {other}?"
    if score is None:
        return Verdict(question, f"No pair of answers was judged alike in both orders by {judge}.", OPEN)
    start = {"a": "Yes", "b": "No"}.get(str(winner), "No telling")
    more = f", and {counts['flips']} pairs were not counted since the order decided them" if counts["flips"] else ""
    more += "; not all pairs have been judged yet" if figures.get("complete") is False else ""
    ends = figures.get("score_interval")
    within = f" (95% interval {ends[0]:.0%} to {ends[1]:.0%})" if isinstance(ends, list) and len(ends) == 2 else ""
    text = (
        f"{start}: by {judge}, {counts['wins']} wins, {counts['ties']} ties and {counts['losses']} losses, a score of "
        f"{score:.0%}{within}{more}."
    )
    short = {"a": f"is preferred to {other}", "b": f"is less liked than {other}"}.get(str(winner), "")
    return Verdict(question, text, {"a": GOOD, "b": BAD}.get(str(winner), OPEN), short)
