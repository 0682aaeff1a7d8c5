"""What a preference run is told about its figures: each sentence is provoked, and a healthy run hears none."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from math import log
from pathlib import Path
from typing import Any

import pytest

from luthier.config import Config
from luthier.train.preference_watch import RULES, PreferenceWatch
from luthier.train.run import train

Row = dict[str, Any]
Shape = Callable[[float], float]  # progress of the run, 0 to 1 -> a figure
MakeConfig = Callable[..., Config]

PAIRS = 16  # of a step


def watch_of(rl: str = "dpo", state: dict[str, Any] | None = None, **changes: Any) -> PreferenceWatch:
    options: dict[str, Any] = dict(
        beta=2.0 if rl == "simpo" else 0.1,
        answers_per_step=PAIRS,
        held_out_answers=200,
        warmup_steps=20,
        total_steps=400,
    )
    return PreferenceWatch(rl, state={} if state is None else state, **{**options, **changes})


def made(
    chosen: Shape, rejected: Shape, accuracy: Shape, *, every: int = 1, held_out: bool = False, seed: int = 0,
    steps: int = 400, **more: Shape,
) -> Iterator[Row]:  # fmt: skip
    """Rows of a run: figures that follow a shape, with the noise of sixteen pairs a step, whose rewards spread about as
    far as they have moved from where they began; none of it in evaluations."""
    draw = random.Random(seed)
    prefix = "eval_" if held_out else ""
    pairs = PAIRS * every
    for step in range(every, steps + 1, every):
        at = step / steps
        c, r, right = chosen(at), rejected(at), accuracy(at)
        if not held_out:
            c, r = (x + draw.gauss(0, 1.5 * abs(x - f(0)) / pairs**0.5) for x, f in ((c, chosen), (r, rejected)))
            right = sum(draw.random() < right for _ in range(pairs)) / pairs
        figures = {"loss": 0.7, "rewards/chosen": c, "rewards/rejected": r, "rewards/margins": c - r}
        figures |= {"rewards/accuracies": right, **{name: f(at) for name, f in more.items()}}
        yield {"step": step, **{prefix + name: value for name, value in figures.items()}}


def line(begin: float, end: float) -> Shape:
    return lambda at: begin + (end - begin) * at


def said(watch: PreferenceWatch, rows: Iterator[Row]) -> list[str]:
    return [sentence for row in rows for sentence in watch.notice(row)]


UP = line(0.5, 0.75)
HEALTHY: dict[str, tuple[str, dict[str, Shape]]] = {
    "dpo": ("dpo", dict(chosen=line(0, 0.4), rejected=line(0, -1.5), accuracy=UP)),
    "dpo, chosen a little lower": ("dpo", dict(chosen=line(0, -0.35), rejected=line(0, -2.5), accuracy=UP)),
    "dpo, nearly all from rejected": ("dpo", dict(chosen=line(0, -0.8), rejected=line(0, -6), accuracy=line(0.5, 0.9))),
    "dpo, no more than a little": ("dpo", dict(chosen=line(0, 0.3), rejected=line(0, -0.3), accuracy=line(0.5, 0.56))),
    "orpo": ("orpo", dict(chosen=line(-0.2, -0.12), rejected=line(-0.19, -0.16), accuracy=line(0.42, 0.7))),
    "simpo": ("simpo", dict(chosen=line(-3, -3.3), rejected=line(-2.9, -5), accuracy=line(0.45, 0.8))),
    "orpo, from below": ("orpo", dict(chosen=line(-0.2, -0.12), rejected=line(-0.15, -0.16), accuracy=line(0.2, 0.7))),
    "kto": ("kto", dict(chosen=line(0, 0.8), rejected=line(0, -1), accuracy=UP, kl=line(0, 12))),
    "kto, back from afar": ("kto", dict(chosen=line(0, 8), rejected=line(0, 5), accuracy=UP, kl=line(120, 60))),
    "kto, no divergence": ("kto", dict(chosen=line(0, 0.8), rejected=line(0, -1), accuracy=UP, kl=line(0, 0))),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_hears_nothing(name: str) -> None:
    rl, shapes = HEALTHY[name]
    for seed in range(10):
        for every in (1, 7, 40):
            assert said(watch_of(rl), made(**shapes, every=every, seed=seed)) == []
    assert said(watch_of(rl), made(**shapes, every=40, held_out=True)) == []


# Name of the rule, method, shapes, and what the sentence must hold.
FALLS = dict(chosen=line(0, -4), rejected=line(0, -8), accuracy=UP)
ILL: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
    ("stuck", "dpo", dict(chosen=line(0, 0), rejected=line(0, 0), accuracy=line(0.5, 0.5), loss=lambda _: log(2)),
     ("log 2", "hardly anything has been learned in", "Raise learning_rate")),
    ("stuck", "dpo", dict(chosen=line(0, 0.3), rejected=line(0, 0.3), accuracy=line(0, 0)), ("by the same", "preview")),
    ("stuck", "dpo", dict(chosen=line(0, 0), rejected=line(0, 0), accuracy=line(0, 0), grad_norm=line(0, 0)),
     ("gradient is zero",)),
    ("stuck", "ipo", dict(chosen=line(0, 2e-3), rejected=line(0, -2e-3), accuracy=line(0.9, 0.9)),
     ("direction is right",)),
    ("stuck", "kto", dict(chosen=line(0, 1e-3), rejected=line(0, 0), accuracy=UP, learning_rate=line(5e-7, 5e-7)),
     ("Raise learning_rate (5.0e-07)", "the loss is 0.7000:")),
    ("reversed", "orpo", dict(chosen=line(-0.2, -0.2), rejected=line(-0.15, -0.15), accuracy=line(0.3, 0.3)),
     ("30%" , "swapped")),
    ("reversed", "dpo", dict(chosen=line(0, -0.4), rejected=line(0, 0.4), accuracy=line(0.4, 0.1)), ("swapped",)),
    ("collapsed", "dpo", dict(chosen=lambda t: 1 - abs(2 * t - 1), rejected=line(0, 0),
                              accuracy=lambda t: 0.5 + 0.3 * (1 - abs(2 * t - 1))), ("back at", "learning_rate")),
    ("collapsed", "simpo", dict(chosen=lambda t: -3 + max(0, 1 - abs(3 * t - 1)), rejected=line(-3, -3),
                                accuracy=lambda t: 0.5 + 0.3 * max(0, 1 - abs(3 * t - 1))), ("the margin, once",)),
    ("collapsed", "dpo", dict(chosen=line(0, 0.2), rejected=line(0, 0.0), accuracy=lambda t: 0.8 if t < 0.5 else 0.45),
     ("the accuracy, once 0.8",)),
    ("ran_away", "dpo", dict(chosen=line(0, -30), rejected=line(0, -31), accuracy=UP), ("run away", "rpo_alpha")),
    ("ran_away", "simpo", dict(chosen=line(-4, -14), rejected=line(-4, -15), accuracy=UP), ("a token", "cpo_alpha")),
    ("chosen_falls", "dpo", FALLS,
     ("times less likely", "margin of", "rpo_alpha", "lower learning_rate", "higher rl_beta")),
    ("chosen_falls", "ipo", FALLS, ("rpo_alpha",)),
    ("chosen_falls", "kto", FALLS, ("kto_desirable_weight",)),
    ("chosen_falls", "simpo", dict(chosen=line(-3, -5), rejected=line(-3, -7), accuracy=UP),
     ("nats a token", "cpo_alpha")),
    ("chosen_falls", "orpo", dict(chosen=line(-0.2, -0.3), rejected=line(-0.2, -0.4), accuracy=UP), ("rl_beta",)),
    ("kl_at_zero", "kto", dict(chosen=line(0, -0.4), rejected=line(0, -0.5), accuracy=UP, kl=line(0, 0)),
     ("cut off at 0", "kto_desirable_weight")),
    ("kl_explodes", "kto", dict(chosen=line(0, 9), rejected=line(0, 7), accuracy=UP, kl=line(0, 120)),
     ("nats and rises", "rl_beta")),
]  # fmt: skip


def test_every_rule_is_provoked() -> None:
    assert {rule for rule, *_ in ILL} == set(RULES)


@pytest.mark.parametrize("held_out", [False, True], ids=["training", "held-out"])
@pytest.mark.parametrize(("rule", "rl", "shapes", "words"), ILL, ids=[f"{case[0]}-{case[1]}" for case in ILL])
def test_an_ill_run_hears_it_once(
    rule: str, rl: str, shapes: dict[str, Any], words: tuple[str, ...], held_out: bool
) -> None:
    watch = watch_of(rl)
    heard = said(watch, made(**shapes, every=10 if held_out else 1, held_out=held_out))
    assert rule in watch.state["said"] and len(heard) == len(set(watch.state["said"]))
    sentence = heard[watch.state["said"].index(rule)]
    assert sentence.startswith("step ") and ("held-out" in sentence.split(":")[0]) == held_out
    advice = {"reversed", "collapsed"} if held_out else set()  # which is another there
    assert rule in advice or all(word in sentence for word in words), sentence


def test_nothing_is_said_of_warm_up_or_of_too_little() -> None:
    stuck = dict(chosen=line(0, 0), rejected=line(0, 0), accuracy=line(0.5, 0.5))
    assert said(watch_of(warmup_steps=400), made(**stuck)) == []
    assert said(watch_of(), made(**stuck, steps=50)) == []
    assert said(watch_of(), made(**stuck, steps=100)) != []
    few = watch_of(answers_per_step=1, total_steps=100)  # a hundred answers are one point
    assert said(few, made(**stuck, steps=100)) == []


def test_a_slow_beginning_is_stuck_only_in_a_short_run() -> None:
    """The same four hundred steps, of as many and of four thousand."""
    for total, finds in ((400, True), (4000, False)):
        rows = made(chosen=line(0, 0.012), rejected=line(0, -0.004), accuracy=UP)
        assert bool(said(watch_of(total_steps=total), rows)) == finds


def test_a_row_counts_by_its_steps() -> None:
    watch = watch_of(warmup_steps=0)
    said(watch, iter({"step": step, "rewards/chosen": value} for step, value in ((1, 9.0), (10, 1.0))))
    assert watch.state["training"]["points"] == [{"step": 10, "rewards/chosen": pytest.approx(1.8)}]


def test_an_accuracy_over_few_pairs_is_no_finding() -> None:
    shapes = dict(chosen=line(0, -0.2), rejected=line(0, 0.2), accuracy=line(0.44, 0.44))
    for pairs, finds in ((9, False), (2000, True)):
        watch = watch_of(held_out_answers=pairs)
        said(watch, made(**shapes, every=40, held_out=True))
        assert ("reversed" in watch.state.get("said", [])) == finds


def test_apo_down_is_meant_to_lower_chosen_answers() -> None:
    assert said(watch_of(kind="apo_down"), made(**FALLS)) == []


def test_a_resumed_run_neither_repeats_nor_forgets() -> None:
    """Cut anywhere, its state kept as JSON, it says what the whole run said, at the same steps."""
    shapes = dict(chosen=line(0, -30), rejected=line(0, -60), accuracy=UP)
    whole = said(watch_of(), made(**shapes))
    assert len(whole) == 2
    for cut in (3, 35, 41, 77, 150, 390):
        rows = list(made(**shapes))
        first = watch_of()
        before = said(first, iter(rows[:cut]))
        kept = json.loads(json.dumps(first.state))
        assert before + said(watch_of(state=kept), iter(rows[cut:])) == whole


def test_rows_of_other_kinds_and_numbers_that_are_none() -> None:
    watch = watch_of("kto")
    assert watch.notice({"step": 3, "samples_stopped": 0.5}) == []
    assert watch.notice({"step": 4, "eval_loss": 2.0, "eval_perplexity": 7.0}) == []
    one_side = ({"step": n, "loss": 0.5, "rewards/chosen": 0.1 * n, "kl": float("nan")} for n in range(5, 200))
    assert said(watch, one_side) == []
    json.dumps(watch.state, allow_nan=False)


def _write_pairs(path: Path, count: int, *, swapped: bool = False) -> Path:
    draw = random.Random(count)
    with path.open("w") as file:
        for _ in range(count):
            a, b = draw.randrange(50), draw.randrange(50)
            good, bad = f"It is {a + b}.", f"No idea, {a}."
            answers = (bad, good) if swapped else (good, bad)
            file.write(json.dumps({"prompt": f"{a} and {b}?\n", "chosen": answers[0], "rejected": answers[1]}) + "\n")
    return path


def _write_answers(path: Path, count: int) -> Path:
    """Seven of eight undesirable, the others no better than they."""
    draw = random.Random(count)
    with path.open("w") as file:
        for n in range(count):
            prompt, answer = f"{draw.randrange(50)}?\n", f"It is {draw.randrange(50)}."
            file.write(json.dumps({"prompt": prompt, "completion": answer, "label": n % 8 == 0}) + "\n")
    return path


def _of_a_run(
    make: MakeConfig, folder: Path, rl: str, data: Path, held_out: Path, rate: float = 1e-3
) -> list[str]:
    """What is said of the rows that a run of the toy model wrote, to one who reads them afterwards."""
    config = make(
        datasets=[{"path": str(data)}], test_datasets=[{"path": str(held_out)}], eval_steps=10, rl=rl,
        micro_batch_size=PAIRS, gradient_accumulation_steps=1, max_steps=40, num_epochs=10, warmup_steps=5,
        learning_rate=rate, output_dir=str(folder),
    )  # fmt: skip
    train(config)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    watch = watch_of(rl, held_out_answers=48, warmup_steps=5, total_steps=40)
    return said(watch, (json.loads(text) for text in lines))


def test_a_real_run_that_learns_hears_nothing(run_config: MakeConfig, tmp_path: Path) -> None:
    data, held_out = _write_pairs(tmp_path / "a.jsonl", 160), _write_pairs(tmp_path / "b.jsonl", 48)
    assert _of_a_run(run_config, tmp_path / "run", "dpo", data, held_out) == []


@pytest.mark.slow
@pytest.mark.parametrize("rl", ["orpo", "simpo"])
def test_real_runs_without_a_reference_hear_nothing(run_config: MakeConfig, tmp_path: Path, rl: str) -> None:
    data, held_out = _write_pairs(tmp_path / "a.jsonl", 160), _write_pairs(tmp_path / "b.jsonl", 48)
    assert _of_a_run(run_config, tmp_path / "run", rl, data, held_out) == []


@pytest.mark.slow
def test_real_runs_that_are_ill_say_so_while_they_go(
    run_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, held_out = _write_pairs(tmp_path / "a.jsonl", 160), _write_pairs(tmp_path / "b.jsonl", 48)
    swapped = _write_pairs(tmp_path / "c.jsonl", 48, swapped=True)
    answers, others = _write_answers(tmp_path / "d.jsonl", 160), _write_answers(tmp_path / "e.jsonl", 48)
    for n, (rl, rows, validation, rate, part) in enumerate(
        [
            ("dpo", data, held_out, 1e-6, "steps are too small"),
            ("dpo", data, swapped, 1e-3, "the other way round"),
            ("kto", answers, others, 1e-2, "the KL estimate is cut off at 0"),
        ]
    ):
        (sentence,) = _of_a_run(run_config, tmp_path / str(n), rl, rows, validation, rate)
        assert part in sentence
        assert capsys.readouterr().err.count(sentence) == 1
