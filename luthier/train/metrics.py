"""What a run says while it goes: rows in `metrics.jsonl`, what is odd about them in `notes.jsonl`, and a bar or plain
lines.

A row is written and flushed at once; a resumed run drops the rows after its checkpoint, since it will write
them again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from luthier.errors import RunError
from luthier.train.checkpoint import State, Window

log = logging.getLogger("luthier")

METRICS, SAMPLES, NOTES = "metrics.jsonl", "samples.jsonl", "notes.jsonl"

# Everything that also wants the rows: (row, step).
Sink = Callable[[dict[str, Any], int], None]
# (sample rows, step)
SampleSink = Callable[[list[dict[str, Any]], int], None]


class Recorder:
    """Writes rows to a run folder and shows them.

    Args:
        folder: the run folder. total_steps: for the bar and the ETA. from_step: rows after it are dropped.
        sinks, sample_sinks: trackers. notice: what there is to say of a row, in sentences.
        on_step: told of every step. ended: why the run should end after this step, if it should.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        *,
        from_step: int = 0,
        sinks: Sequence[Sink] = (),
        sample_sinks: Sequence[SampleSink] = (),
        notice: Callable[[dict[str, Any]], list[str]] = lambda row: [],
        on_step: Callable[[int], None] = lambda step: None,
        ended: Callable[[], str] = lambda: "",
    ) -> None:
        self.total_steps = total_steps
        self.sinks = sinks
        self.sample_sinks = sample_sinks
        self.notice = notice
        self.on_step = on_step
        self.ended = ended
        for name in (METRICS, SAMPLES, NOTES):
            drop_rows_after(folder / name, from_step)
        self._metrics: TextIO = (folder / METRICS).open("a", encoding="utf-8")
        self._samples = folder / SAMPLES
        self._notes = folder / NOTES
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._from_step = from_step

    def __enter__(self) -> Recorder:
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[figures]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(
                "training", total=self.total_steps, completed=self._from_step, figures=""
            )
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()
        with contextlib.suppress(OSError):  # what a full disk did not take has been said
            self._metrics.close()

    def advance(self, step: int) -> None:
        """Move the bar; called every step."""
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=step)
        self.on_step(step)

    def row(self, row: dict[str, Any]) -> None:
        """Write a training row, show it, and hand it to the trackers."""
        self._write(row)
        speed, step = row["tokens_per_second"], row["step"]
        figures = (
            f"loss {row['loss']:.4f}  {_objective_figures(row)}{speed:,.0f} tokens/s"
            f"  ETA {_clock(row['eta_seconds'])}  {row['peak_memory_gib']:.2f} GiB"
        )
        if self._bar and self._task is not None:
            self._bar.update(self._task, figures=figures)
        else:
            self.say(
                f"step {step}/{self.total_steps}  epoch {row['epoch']:.2f}  {figures}  lr {row['learning_rate']:.2e}"
            )
        self._say_noticed(row)

    def evaluation(self, row: dict[str, Any]) -> None:
        """Write an evaluation row and show it."""
        self._write(row)
        shown = [f"eval loss {row['eval_loss']:.4f}"] if "eval_loss" in row else []
        shown += [f"perplexity {row['eval_perplexity']:.3f}"] if "eval_perplexity" in row else []
        self.say(f"step {row['step']}: " + "  ".join([*shown, _objective_figures(row, "eval_")]).rstrip())
        self._say_noticed(row)

    def samples(self, rows: list[dict[str, Any]]) -> None:
        """Write generated samples and show them."""
        with _writing(self._samples), self._samples.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        for sink in self.sample_sinks:
            sink(rows, int(rows[0]["step"]) if rows else 0)
        for row in rows:
            ended = "" if row["stopped"] else "  [cut off]"
            self.say(f"sample at step {row['step']}: {_short(row['prompt'])} -> {_short(row['text'])}{ended}")
        if rows:
            stopped = sum(bool(row["stopped"]) for row in rows)
            self._write({"step": rows[0]["step"], "samples_stopped": stopped / len(rows)})
            self.say(f"{stopped} of {len(rows)} samples ended by themselves")

    def say(self, line: str) -> None:
        """A line to the user, above the bar if there is one."""
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def _say_noticed(self, row: dict[str, Any]) -> None:
        for sentence in self.notice(row):
            self.say(f"warning: {sentence}")
            with _writing(self._notes), self._notes.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": row["step"], "note": sentence}, ensure_ascii=False) + "\n")

    def _write(self, row: dict[str, Any]) -> None:
        kept = {name: value for name, value in row.items() if name != "eta_seconds"}
        with _writing(Path(self._metrics.name)):
            self._metrics.write(json.dumps(kept) + "\n")
            self._metrics.flush()
        for sink in self.sinks:
            sink(kept, int(row["step"]))


# What is shown of an objective's figures, and how.
_SHOWN = (
    ("token_accuracy", "accuracy {:.3f}"),
    ("rewards/accuracies", "accuracy {:.3f}"),
    ("rewards/margins", "margin {:.4f}"),
    ("kl", "KL {:.3f}"),
)


def _objective_figures(row: dict[str, Any], prefix: str = "") -> str:
    return "".join(
        form.format(row[prefix + name]) + "  " for name, form in _SHOWN if prefix + name in row
    )


class Silent(Recorder):
    """The recorder of a process that does not report: the first one does."""

    def __init__(self) -> None:
        self.ended = lambda: ""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def row(self, row: dict[str, Any]) -> None:
        pass

    def evaluation(self, row: dict[str, Any]) -> None:
        pass

    def samples(self, rows: list[dict[str, Any]]) -> None:
        pass

    def say(self, line: str) -> None:
        pass


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written: {error.strerror or error}; the run's checkpoints are whole: make room, "
            "then go on with the same command and --resume_from_checkpoint auto"
        ) from error


def count_step(state: State, trained_tokens: int, tokens: int, seconds: float) -> None:
    """Add a step to the windows since the last row and the last evaluation."""
    state.seconds += seconds
    for window in (state.window, state.between):
        window.steps += 1
        window.trained_tokens += trained_tokens
        window.tokens += tokens
        window.seconds += seconds


def training_row(
    state: State,
    total_steps: int,
    epoch: float,
    figures: dict[str, float],
    rate: float,
    norm: float,
    peak: float,
) -> dict[str, Any]:
    """What is logged after a step: means since the last row, the objective's `figures` among them, and sums since the
    beginning."""
    window = state.window
    per_step = state.seconds / state.step
    return {
        "step": state.step,
        "epoch": epoch,
        "loss": window.loss / window.steps,
        **figures,
        "learning_rate": rate,
        "grad_norm": norm,
        "tokens": state.tokens,
        "computed_tokens": state.computed_tokens,
        "trained_tokens": state.trained_tokens,
        "tokens_per_second": window.tokens / window.seconds,
        "seconds": state.seconds,
        "peak_memory_gib": peak,
        "eta_seconds": per_step * (total_steps - state.step),
    }


# A rise of less than a hundredth is what a held-out set does by itself.
_RISE = 0.01


def note_evaluation(state: State, figures: dict[str, float], recorder: Recorder) -> bool:
    """Record an evaluation; says when eval loss has turned while train loss goes on falling."""
    recorder.evaluation({"step": state.step, **figures})
    loss = figures["eval_loss"]
    train_loss = state.between.loss / state.between.steps
    state.between = Window()
    improved = state.best_loss is None or loss < state.best_loss
    if improved:
        state.best_loss, state.best_step, state.evaluations_since_best = loss, state.step, 0
    else:
        state.evaluations_since_best += 1
    state.evaluations.append([state.step, loss, train_loss])
    said = overfitting_since(state, state.evaluations[:-1])
    if (since := overfitting_since(state)) is not None and since != said:
        recorder.say(f"overfitting since step {since}: eval loss rose to {loss:.4f} while train loss fell")
    return improved


def overfitting_since(state: State, evaluations: Sequence[Sequence[Any]] | None = None) -> int | None:
    """The step of the best evaluation, if eval loss has risen since by `_RISE` while train loss fell; else None.

    Args:
        evaluations: some of the state's; all of them if unset.
    """
    evaluations = state.evaluations if evaluations is None else evaluations
    best = next((row for row in evaluations if row[0] == state.best_step), None)
    if best is None:
        return None
    last = evaluations[-1]
    return best[0] if last[1] - best[1] >= _RISE * abs(best[1]) and last[2] < best[2] else None


def drop_rows_after(path: Path, step: int) -> None:
    """Keep the rows of a JSONL up to a step; a last line cut off by a kill goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("step", 0) <= step and step > 0:
            kept.append(line + "\n")
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _short(text: str, limit: int = 100) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else "…" + flat[-limit:]
