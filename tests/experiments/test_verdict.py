"""Verdicts: what is said of curves whose answer is known."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from luthier.experiments.outcomes import all_verdicts
from luthier.experiments.run_files import read_run
from luthier.experiments.verdict import headline, overfitting, train_loss_between
from luthier.train.checkpoint import State
from luthier.train.metrics import overfitting_since
from tests.experiments.conftest import FALLS, RISES, TRAIN, MakeRun, curve, write_rows

DONE = {"steps": 60, "kept_step": 60, "finished": "2026-01-01T00:00:00+00:00"}


def answers(folder: Path) -> dict[str, tuple[str, str]]:
    return {verdict.question: (verdict.answer, verdict.mood) for verdict in all_verdicts(read_run(folder))}


@pytest.mark.parametrize(
    ("train", "evaluated", "kind", "step", "words"),
    [
        (TRAIN, RISES, "rising", 30, "Yes, from step 30 (epoch 1.5) on: since then eval loss rose from 1.2000 to 1.8"),
        (TRAIN, [1.9, 1.5, 1.2, 1.21, 1.22, 1.23], "rising", 30, "eval loss rose from 1.2000 to 1.2300 (+3%)"),
        (TRAIN, FALLS, "falling", 60, "No: eval loss was lowest at its last evaluation, step 60 (epoch 3). It was"),
        (TRAIN, [1.9, 1.2, 1.2, 1.2, 1.2, 1.205], "flat", 20, "No: eval loss has been flat since its best at step 20"),
        ([2.0, 1.4, 1.0, 1.4, 2.0, 2.5], RISES, "unstable", 30, "and training loss did not fall either"),
        # It rose as much in between as at the end.
        (TRAIN, [1.3, 2.0, 1.2, 1.3, 1.5, 1.8], "rising", 30, "Probably, from step 30"),
    ],
)
def test_overfitting_in_words(
    make_run: MakeRun, train: Sequence[float], evaluated: Sequence[float], kind: str, step: int, words: str
):
    run = read_run(make_run(metrics=curve(train, evaluated), files={"summary.json": DONE}))
    found = overfitting(run)
    assert found is not None and (found.kind, found.step) == (kind, step)
    answer, mood = answers(run.folder)["Did it overfit?"]
    assert words in answer
    assert mood == ("bad" if kind in ("rising", "unstable") else "good")


def test_when_extra_epochs_began_to_hurt_and_what_is_kept(make_run: MakeRun):
    run = make_run(metrics=curve(TRAIN, RISES), files={"summary.json": DONE})
    answer, _ = answers(run)["Did it overfit?"]
    assert "Of 3 epochs over the same data, those after 1.5 made it worse." in answer
    assert "`load_best_model_at_end: true` would have kept those of step 30" in answer
    (run / "checkpoint-30").mkdir()
    assert "those of the best step are in its `checkpoint-30`" in answers(run)["Did it overfit?"][0]
    kept = make_run("kept", curve(TRAIN, RISES), {"summary.json": {**DONE, "kept_step": 30}})
    assert "holds the weights of step 30, the best" in answers(kept)["Did it overfit?"][0]


def test_an_eval_loss_that_never_fell_is_not_said_to_have_gone_anywhere(make_run: MakeRun):
    answer, _ = answers(make_run(metrics=curve(TRAIN, [1.2, 1.3, 1.5, 1.8, 1.9, 2.0])))["Did it learn?"]
    assert "Eval loss was never below its first, 1.2000." in answer and "went from 1.2" not in answer
    answer, _ = answers(make_run("fell", curve(TRAIN, RISES)))["Did it learn?"]
    assert "Eval loss went from 1.9000 to 1.2000 at its best." in answer


def test_the_verdict_is_that_of_training(make_run: MakeRun):
    """On curves of every kind: the step is the one that training names, unless the rise is below a hundredth."""
    draw = random.Random(0)
    seen = set()
    folder = make_run()
    for _ in range(40):
        train = [draw.uniform(0.2, 2) for _ in range(6)]
        evaluated = [draw.uniform(0.5, 2) for _ in range(6)]
        write_rows(folder / "metrics.jsonl", curve(train, evaluated))
        run = read_run(folder)
        between = train_loss_between(run)
        assert [loss for _, loss in between] == pytest.approx(train)
        best = min(range(6), key=lambda place: evaluated[place])
        state = State(best_step=10 * best + 10)
        state.evaluations = [[10 * n + 10, evaluated[n], between[n][1]] for n in range(6)]
        found = overfitting(run)
        assert found is not None
        said = found.step if found.kind == "rising" else None
        if found.kind != "flat":
            assert said == overfitting_since(state)
        seen.add(found.kind)
    assert {"rising", "unstable", "falling"} <= seen


@pytest.mark.parametrize(
    ("train", "mood", "word"),
    [(TRAIN, "good", "Yes"), ([1, 0.8, 1.2, 1, 0.9, 0.995], "bad", "Hardly"), ([1, 1.1, 1.2, 2, 2, 3], "bad", "No")],
)
def test_learning_in_words(make_run: MakeRun, train: Sequence[float], mood: str, word: str):
    answer, found = answers(make_run(metrics=curve(train)))["Did it learn?"]
    assert found == mood and answer.startswith(word)


@pytest.mark.parametrize(("accuracy", "margin", "mood"), [(0.9, 1.0, "good"), (0.5, 0.01, "bad"), (0.2, -1.0, "bad")])
def test_preferences_in_words(make_run: MakeRun, accuracy: float, margin: float, mood: str):
    rows = curve(TRAIN, FALLS, eval_rewards__accuracies=[accuracy] * 6, eval_rewards__margins=[margin] * 6)
    answer, found = answers(make_run(metrics=rows, rl="dpo"))["Did it learn?"]
    assert found == mood
    assert f"{accuracy:.0%} of the held-out pairs are ranked as labelled" in answer


@pytest.mark.parametrize(
    ("metrics", "files", "said"),
    [
        ([], {}, "Nothing has been logged yet."),
        (curve([2.0])[:1], {}, "It is too early to tell. Unfinished: step 5."),
        (curve(TRAIN, RISES), {"environment.json": {"total_steps": 90}},
         "It learned, but overfitted from step 30 on. Unfinished: step 60 of 90."),
        (curve(TRAIN, FALLS), {"summary.json": DONE}, "It learned."),
        (curve([1, 1.5, 2, 2, 3, 4]), {"summary.json": DONE}, "It did not learn."),
    ],
)  # fmt: skip
def test_headlines(make_run: MakeRun, metrics: list[dict[str, Any]], files: Mapping[str, Any], said: str):
    run = read_run(make_run(metrics=metrics, files=files))
    assert headline(run, all_verdicts(run)) == said


def test_what_was_not_measured_is_said(make_run: MakeRun):
    found = answers(make_run(metrics=curve()))
    assert found["Did it overfit?"] == ("No telling: nothing was held out (val_set_size, test_datasets).", "open")
    assert "Not measured" in found["Better than its base?"][0]
    assert "Do its answers end?" not in found
