"""What a run came to, in words: did it learn, did it overfit and from which step, did it get better than its base.

A verdict says what was measured and nothing else; what was not measured is named as such, with the key that would
have it measured. Overfitting is judged as in training (`train.metrics.overfitting_since`): eval loss has risen since
its best, while training loss went on falling. Training loss at an evaluation is the mean since the one before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite

from luthier.experiments.run_files import Points, Run

# A change of loss that is worth a word. Less than that between two evaluations is what a few steps do to and fro.
_WORTH = 0.01
# Rows at either end of a run whose mean is compared, as a share of all.
_END = 0.1

GOOD, BAD, OPEN = "good", "bad", "open"


@dataclass(frozen=True)
class Verdict:
    """The answer to one question. `mood`: GOOD, BAD, or OPEN where there is no telling; `short`: for a headline."""

    question: str
    answer: str
    mood: str
    short: str = ""


@dataclass(frozen=True)
class Overfitting:
    """How eval loss went on after its best.

    Attributes:
        kind: "rising" (it overfits), "unstable" (training loss rose too), "flat", or "falling" (the best is the last).
        step: of the best evaluation. best, last: eval losses.
    """

    kind: str
    step: float
    best: float
    last: float

    @property
    def rise(self) -> float:
        return self.last / self.best - 1 if self.best > 0 else self.last - self.best


def overfitting(run: Run) -> Overfitting | None:
    """None with fewer than two evaluations."""
    evaluated = run.points("eval_loss")
    if len(evaluated) < 2:
        return None
    between = dict(train_loss_between(run))
    best_step, best = min(evaluated, key=lambda point: point[1])
    last_step, last = evaluated[-1]
    if last_step == best_step:
        return Overfitting("falling", best_step, best, last)
    found = Overfitting("flat", best_step, best, last)
    if found.rise < _WORTH:
        return found
    fell = between.get(last_step, float("inf")) < between.get(best_step, float("inf"))
    return Overfitting("rising" if fell else "unstable", best_step, best, last)


def train_loss_between(run: Run) -> Points:
    """(step of an evaluation, mean training loss since the evaluation before it).

    A logged loss is the mean since the row before it, and counts for as many steps.
    """
    means: Points = []
    total = steps = before = 0.0
    for row in run.metrics:
        if isinstance(row.get("loss"), int | float) and isfinite(row["loss"]):
            total += row["loss"] * (row["step"] - before)
            steps += row["step"] - before
            before = row["step"]
        if "eval_loss" in row and steps:
            means.append((row["step"], total / steps))
            total = steps = 0.0
    return means


def verdicts(
    run: Run, against_base: list[Verdict], endings: str = "", beyond: Sequence[Verdict] = ()
) -> list[Verdict]:
    """All there is to say of a run. `against_base`, `endings`, `beyond`: what its evaluations say of its base, of its
    answers' ends, and of what it was not trained for."""
    found = [_learned(run), _overfitted(run)]
    found += against_base or [
        Verdict(
            "Better than its base?",
            "Not measured. `luthier evaluate` with `--compare base` puts both on the same questions.",
            OPEN,
        )
    ]
    found += beyond
    if ended := _endings(run, endings):
        found.append(ended)
    return found


def headline(run: Run, found: list[Verdict]) -> str:
    """One sentence, from what can be told."""
    good = _joined([verdict.short for verdict in found if verdict.short and verdict.mood != BAD])
    bad = _joined([verdict.short for verdict in found if verdict.short and verdict.mood == BAD])
    if not run.metrics:
        return "Nothing has been logged yet."
    progress = ""
    if not run.finished:
        of = f" of {run.total_steps:,}" if run.total_steps else ""
        progress = f" Unfinished: step {run.steps:,}{of}."
    if not good and not bad:
        if run.finished:
            return "The run ended; too little was measured to judge it."
        return f"It is too early to tell.{progress}"
    text = f"{good}, but {bad}" if good and bad else good or bad
    return f"It {text}.{progress}"


def _joined(texts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(text for text in (", ".join(texts[:-1]), *texts[-1:]) if text)


def _learned(run: Run) -> Verdict:
    question = "Did it learn?"
    losses = run.points("loss")
    if len(losses) < 2:
        return Verdict(question, "Too few steps were logged to tell.", OPEN)
    count = max(1, int(len(losses) * _END))
    first = sum(value for _, value in losses[:count]) / count
    last = sum(value for _, value in losses[-count:]) / count
    fell = f"training loss went from {_loss(first)} to {_loss(last)}"
    if run.config.get("rl"):
        return _learned_preferences(run, question, fell)
    if last > first * (1 + _WORTH) if first > 0 else last > first:
        return Verdict(question, f"No: {fell}. Lower learning_rate, or look at the data.", BAD, "did not learn")
    if last > first * (1 - _WORTH):
        return Verdict(question, f"Hardly: {fell}.", BAD, "hardly learned")
    accuracy = run.last("eval_token_accuracy")
    more = f" It predicts {accuracy:.1%} of the held-out tokens." if accuracy is not None else ""
    evaluated = run.points("eval_loss")
    if len(evaluated) > 1 and evaluated[0][1] > 0:
        first_eval, best = evaluated[0][1], min(value for _, value in evaluated)
        went = f"went from {_loss(first_eval)} to {_loss(best)} at its best"
        more = f" Eval loss {went if best < first_eval else f'was never below its first, {_loss(best)}'}.{more}"
    return Verdict(question, f"Yes: {fell}.{more}", GOOD, "learned")


def _learned_preferences(run: Run, question: str, fell: str) -> Verdict:
    held_out = run.last("eval_rewards/accuracies")
    prefix, where = ("eval_", "held-out") if held_out is not None else ("", "training")
    accuracy, margin = run.last(prefix + "rewards/accuracies"), run.last(prefix + "rewards/margins")
    if accuracy is None:
        return Verdict(question, f"{fell[0].upper()}{fell[1:]}.", OPEN)
    valued = "answers are valued" if run.config.get("rl") == "kto" else "pairs are ranked"
    figures = f"{accuracy:.0%} of the {where} {valued} as labelled"
    figures += f", with a margin of {margin:.2f}" if margin is not None else ""
    if accuracy > 0.55 and (margin is None or margin > 0 or run.config.get("rl") == "kto"):
        return Verdict(question, f"Yes: {figures}; {fell}.", GOOD, "learned what is preferred")
    return Verdict(question, f"Hardly: {figures}; {fell}.", BAD, "hardly learned what is preferred")


def _overfitted(run: Run) -> Verdict:
    question = "Did it overfit?"
    found = overfitting(run)
    if found is None:
        once = bool(run.points("eval_loss"))
        why = "there was one evaluation only" if once else "nothing was held out (val_set_size, test_datasets)"
        return Verdict(question, f"No telling: {why}.", OPEN)
    at = f"step {found.step:,.0f}{_epoch(run, found.step)}"
    held_out = run.data.get("validation_documents")
    small = f" There are {held_out} held-out {run.data.get('unit', 'documents')} only: a rough measure." * bool(
        isinstance(held_out, int) and 0 < held_out < 50
    )
    if found.kind == "falling":
        evaluated = run.points("eval_loss")
        still = evaluated[-2][1] - found.last > _WORTH * abs(evaluated[-2][1])
        more = " It was still falling: more steps may help." if still else ""
        return Verdict(question, f"No: eval loss was lowest at its last evaluation, {at}.{more}{small}", GOOD)
    if found.kind == "flat":
        return Verdict(
            question,
            f"No: eval loss has been flat since its best at {at}: {_loss(found.best)} there, {_loss(found.last)} at "
            f"the end.{small}",
            GOOD,
        )
    rose = f"eval loss rose from {_loss(found.best)} to {_loss(found.last)} ({found.rise:+.0%})"
    if found.kind == "unstable":
        return Verdict(
            question,
            f"No, but it got worse: since {at} {rose}, and training loss did not fall either. A lower learning_rate "
            f"may help.{small}",
            BAD,
            f"got worse after step {found.step:,.0f}",
        )
    sure, more = "Yes", ""
    if _to_and_fro(run, found):
        sure, more = "Probably", " It had risen as much before and come back, so the step is uncertain."
    return Verdict(
        question,
        f"{sure}, from {at} on: since then {rose} while training loss fell.{_extra_epochs(run, found)}{more} "
        f"{_kept(run, found)}{small}",
        BAD,
        f"{'' if sure == 'Yes' else 'probably '}overfitted from step {found.step:,.0f} on",
    )


def _extra_epochs(run: Run, found: Overfitting) -> str:
    """When the extra epochs over the same data began to hurt."""
    best, end = run.epoch_of(found.step), run.epoch_of(run.steps)
    if best is None or end is None or end <= 1.05:
        return ""
    if end - best < 0.5:
        return f" The end of the {end:.3g} epochs over the same data was too much."
    return f" Of {end:.3g} epochs over the same data, those after {best:.3g} made it worse."


def _to_and_fro(run: Run, found: Overfitting) -> bool:
    """Whether the best came after an earlier rise as high as the last: then the last may be noise too."""
    values = [value for step, value in run.points("eval_loss") if step <= found.step]
    rises = [later - min(values[: place + 1]) for place, (_, later) in enumerate(pairwise(values))]
    return bool(rises) and max(rises) >= found.last - found.best


def _kept(run: Run, found: Overfitting) -> str:
    kept = run.summary.get("kept_step")
    if kept is None:
        return f"The weights of step {found.step:,.0f} are those to keep."
    if kept == found.step:
        return f"The folder holds the weights of step {kept:,}, the best."
    best = f"checkpoint-{found.step:.0f}"
    if (run.folder / best).is_dir():
        return f"The folder holds the weights of step {kept:,}; those of the best step are in its `{best}`."
    return (
        f"The folder holds the weights of step {kept:,}; `load_best_model_at_end: true` would have kept those of step "
        f"{found.step:,.0f}."
    )


def _endings(run: Run, measured: str) -> Verdict | None:
    """Whether samples end by themselves. `measured`: what evaluations say of it, in sentences."""
    question = "Do its answers end?"
    shares = run.points("samples_stopped")
    if not shares:
        return Verdict(question, measured, OPEN) if measured else None
    first, last = shares[0], shares[-1]
    went = f"{last[1]:.0%} at step {last[0]:,.0f}"
    if len(shares) > 1:
        went = f"{first[1]:.0%} at step {first[0]:,.0f}, {went}"
    mood = GOOD if last[1] >= 0.9 else BAD if last[1] < 0.5 else OPEN
    return Verdict(question, f"Share of samples that ended by themselves: {went}. {measured}".strip(), mood)


def _epoch(run: Run, step: float) -> str:
    epoch = run.epoch_of(step)
    return f" (epoch {epoch:.3g})" if epoch is not None else ""


def _loss(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
