"""The end of a run: what it leaves at the top of its folder, and what it came to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from luthier.config import Config
from luthier.errors import RunError
from luthier.experiments.report import draw_report
from luthier.plan.measured import Peak
from luthier.train import checkpoint
from luthier.train.artifacts import plot_losses, write_model_card
from luthier.train.checkpoint import Checkpoints, State
from luthier.train.engine import Engine
from luthier.train.files import write_json_atomic
from luthier.train.folder import SUMMARY, publish
from luthier.train.metrics import Recorder, overfitting_since


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        finished: false if a signal ended it before its last step.
        state: where it stands. summary: the figures of the model card.
    """

    output_dir: Path
    finished: bool
    state: State
    summary: dict[str, Any] = field(default_factory=dict)


def finish(
    config: Config,
    folder: Path,
    state: State,
    checkpoints: Checkpoints,
    kept: int,
    weights: dict[str, torch.Tensor] | None,
    recorder: Recorder,
    examples: int,
    peak: Peak | None = None,
    measure_general: Callable[[], None] | None = None,
    mix: dict[str, Any] | None = None,
    parameters: tuple[int, int] | None = None,
) -> RunResult:
    """The result at the top of the run folder: adapter or model, tokenizer, card, plot, summary, report.

    Args:
        kept: the step whose weights the model has. weights: those, where no process holds them (`train.fsdp`).
        peak: memory as it was predicted and measured, where both are known. measure_general: measures what was not
            trained for, with the weights that are kept. mix: what the steps had of each dataset.
        parameters: how many are trained, and how many there are.
    """
    summary = {
        "steps": state.step,
        "kept_step": kept,
        "tokens": state.tokens,
        "computed_tokens": state.computed_tokens,
        "trained_tokens": state.trained_tokens,
        "seconds": state.seconds,
        "examples": examples,
        "best_eval_loss": state.best_loss,
        "best_step": state.best_step,
        "overfitting_since": overfitting_since(state),
        "final_loss": last_loss(folder),
        **(dict(zip(("trainable_parameters", "total_parameters"), parameters, strict=True)) if parameters else {}),
        **(peak.summary() if peak is not None else {}),
        **({"mix": mix} if mix is not None else {}),
    }
    if peak is not None:
        recorder.say(str(peak))
    try:
        publish(folder, lambda partial: checkpoints.write_model(partial, weights))
        write_model_card(folder, config, summary)
        plot_losses(folder)
        ended = {"finished": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json_atomic(folder / SUMMARY, summary | ended)
    except OSError as error:
        last = checkpoint.latest(folder)
        raise RunError(f"{folder}: the result cannot be written: {error}; it is whole in {last}") from error
    if measure_general is not None:  # after the summary: what is older than that is of an earlier training
        measure_general()
    draw_report(folder)
    what = "adapter" if config.adapter.adapter else "model"
    recorder.say(
        f"done: {state.step} steps, {state.trained_tokens:,} trained tokens; the {what} is in {folder}"
    )
    return RunResult(folder, True, state, summary)


def keep_best(config: Config, folder: Path, state: State, engine: Engine, recorder: Recorder) -> int:
    """Put the weights with the lowest eval loss back, if the config asks for them; returns the step that they are of.

    In lockstep all processes call it.
    """
    if not config.output.load_best_model_at_end or state.best_step in (None, state.step):
        return state.step
    best, problem = folder / f"checkpoint-{state.best_step}", ""
    what = f"the model of step {state.best_step}"
    if engine.processes.main:
        problem = checkpoint.damage(best)
    if engine.lockstep and any(engine.processes.gather([float(bool(problem))])[0]):
        problem = problem or "damaged"
    if problem:
        recorder.say(f"warning: {what} was the best and cannot be kept, the last one is: {best}: {problem}")
        return state.step
    engine.load_masters(best)
    recorder.say(f"{what} is kept: it had the lowest eval loss ({state.best_loss:.4f})")
    assert state.best_step is not None
    return state.best_step


def stop(folder: Path, state: State) -> RunResult:
    """The end that a signal made: nothing is put at the top of the folder, but what there is of it is on a page."""
    draw_report(folder)
    return RunResult(folder, False, state)


@contextmanager
def report_of_a_failure(folder: Path | None) -> Iterator[None]:
    """A run that ends by an error has its curves up to there on a page too (None: on no page); the error goes on."""
    try:
        yield
    except RunError:
        if folder is not None:
            draw_report(folder)
        raise


def last_loss(folder: Path) -> float | None:
    last = None
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        last = row.get("loss", last)
    return last
