"""A study folder as it is read and written: one row for each run, and what the study asked.

    study.yaml      the study as it was asked (STUDY), with what follows from it: `varied`, `goal`, `notes`
    results.jsonl   one row for each run, in the order of the study; rewritten whole when a run ends
    results.csv     the same for a spreadsheet
    runs/NAME/      the run folders, beside them NAME.yml (what was started) and NAME.log (what it said)

Figures come from what a run leaves in its folder (`figures_of`). The last row of each figure counts, and of `eval_loss`
the one of the weights that the run kept.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from luthier.errors import RunError
from luthier.experiments.run_files import Run, read_run

STUDY, RESULTS, TABLE, RUNS = "study.yaml", "results.jsonl", "results.csv", "runs"

Status = Literal["finished", "failed", "waiting", "pruned"]
Goal = Literal["min", "max"]


@dataclass
class Trial:
    """One run of a study.

    Attributes:
        name: that of its folder. settings: what tells it from other runs, as a table shows it: varied keys (a `name`
            where the study gives one to several keys together), but not the seed. changed: the keys of the config that
            the study sets in this run, the seed among them.
        key: hash of the resolved settings. folder: the run folder, relative to the study's.
        status: pruned is a run that the search stopped early. metric: at the run's end; None while there is none.
        seconds: wall clock of the process, all its starts together. train_seconds: of the steps alone.
        tokens_per_second: tokens read in training for each second of it. figures: every number that the run left.
        error: the last lines of what a failed run said.
    """

    name: str
    settings: dict[str, Any]
    seed: int | None = None
    folder: str = ""
    status: Status = "waiting"
    metric: float | None = None
    seconds: float | None = None
    train_seconds: float | None = None
    peak_memory_gib: float | None = None
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    tokens_per_second: float | None = None
    error: str = ""
    key: str = ""
    changed: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


@dataclass
class StudyResult:
    """What a study asked, and its runs.

    Attributes:
        varied: names in the runs' `settings`, in the order of the study. subsets: of a key that was varied as a subset,
            the parts that were in or out, each a list of values.
        folder: the study's. notes: what has to be known beside the figures, in sentences.
        plots: what the study asked to be drawn; empty: whatever there is.
    """

    name: str
    question: str
    metric: str
    goal: Goal
    varied: list[str]
    trials: list[Trial]
    folder: Path
    notes: list[str] = field(default_factory=list)
    subsets: dict[str, list[list[Any]]] = field(default_factory=dict)
    plots: list[str] = field(default_factory=list)
    search: bool = False

    @property
    def finished(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.status == "finished"]

    @property
    def seeds(self) -> list[int]:
        return sorted({trial.seed for trial in self.trials if trial.seed is not None})

    def run_of(self, trial: Trial) -> Run:
        """The run folder of a trial. Raises RunError where there is none (yet)."""
        return read_run(self.folder / trial.folder)


def read_study(folder: str | Path) -> StudyResult:
    """Read a study folder.

    Raises:
        RunError: it is none, or its study.yaml cannot be read.
    """
    folder = Path(folder).expanduser()
    path = folder / STUDY
    if not path.is_file():
        raise RunError(f"{folder} is no study folder: it has no {STUDY}, which `luthier sweep` writes")
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(told, dict):
        raise RunError(f"{path} is no study: it has to be keys and values")
    return StudyResult(
        name=str(told.get("name") or folder.resolve().name),
        question=str(told.get("question") or ""),
        metric=str(told.get("metric") or "eval_loss"),
        goal="max" if told.get("goal") == "max" else "min",
        varied=[str(name) for name in told.get("varied") or []],
        trials=read_trials(folder),
        folder=folder,
        notes=[str(note) for note in told.get("notes") or []],
        subsets=told.get("parts") or {},
        plots=[str(plot) for plot in told.get("plots") or []],
        search=bool(told.get("search")),
    )


def read_trials(folder: Path) -> list[Trial]:
    """The rows of `results.jsonl`; none where it is missing, and lines that are broken are left out."""
    try:
        lines = (folder / RESULTS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    names = set(Trial.__dataclass_fields__)
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"name", "settings"} <= row.keys() and row.get("status") in get_args(Status):
            found.append(Trial(**{name: value for name, value in row.items() if name in names}))
    return found


def write_trials(folder: Path, trials: list[Trial], metric: str) -> None:
    """Write `results.jsonl` and `results.csv`, each whole or not at all."""
    rows = [json.dumps(asdict(trial), ensure_ascii=False, default=str) for trial in trials]
    write_whole(folder / RESULTS, "".join(row + "\n" for row in rows))
    write_whole(folder / TABLE, _csv(trials, metric))


def _csv(trials: list[Trial], metric: str) -> str:
    """One line for each run: its settings as columns, then what it came to."""
    varied = list(dict.fromkeys(name for trial in trials for name in trial.settings))
    figures = (
        "seconds", "train_seconds", "peak_memory_gib", "trainable_parameters", "total_parameters",
        "tokens_per_second", "error",
    )  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *varied, "seed", "status", metric, *figures])
    for trial in trials:
        values = [_cell(trial.settings.get(name)) for name in varied]
        rest = [_cell(getattr(trial, name)) for name in figures]
        writer.writerow([trial.name, *values, _cell(trial.seed), trial.status, _cell(trial.metric), *rest])
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text under another name, then put it in its place. Raises RunError."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        partial.write_bytes(text.encode("utf-8", errors="replace"))
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def figures_of(run: Run) -> dict[str, float]:
    """Every number that a run left, by name: the last of each figure of its rows, `NAME_best` beside an `eval_` one,
    its summary's, and those of its evaluations as `FILE.NAME`.

    `eval_loss` and its like are those of the weights that the run kept, where that step was measured. What is not
    finite is here as nan.
    """
    found: dict[str, float] = {}
    best: dict[str, float] = {}
    kept = run.summary.get("kept_step")
    settled: set[str] = set()
    for row in run.metrics:
        for name, value in row.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            number = float(value) if math.isfinite(value) else math.nan
            if name.startswith("eval_") and math.isfinite(number):
                choose = max if goal_of(name) == "max" else min
                best[f"{name}_best"] = choose(best.get(f"{name}_best", number), number)
            if name not in settled:
                found[name] = number
            if name.startswith("eval_") and row["step"] == kept:
                settled.add(name)
    numbers = {
        name: float(value)
        for name, value in run.summary.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    for stem, result, _ in run.evaluations:
        for name, value in result["figures"].items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                numbers[f"{stem}.{name}"] = float(value)
    return found | best | numbers


_SMALL = ("loss", "perplexity", "seconds", "memory", "peak", "parameters", "error", "kl", "entropy", "bits")
_LARGE = ("accuracy", "margin", "per_second", "exact", "match", "score", "win", "f1", "rewards/chosen", "accuracies")


def goal_of(metric: str) -> Goal | None:
    """Whether a known figure is better small or large; None for one that is not known."""
    name = metric.lower()
    if any(part in name for part in _LARGE):
        return "max"
    return "min" if any(part in name for part in _SMALL) else None


# Columns of the table, which go before figures of the same name in the run's own files.
OWN_FIGURES = ("seconds", "train_seconds", "peak_memory_gib", "tokens_per_second")


# What runs leave; other figures are those of an objective, or of evaluations.
KNOWN_FIGURES = (
    "eval_loss", "eval_loss_best", "eval_perplexity", "eval_perplexity_best", "eval_token_accuracy",
    "eval_token_accuracy_best", "loss", "final_loss", "token_accuracy", "grad_norm", "trainable_parameters",
    "total_parameters", *OWN_FIGURES,
)  # fmt: skip


def fill(trial: Trial, run: Run, metric: str) -> None:
    """Take what a run came to into its row."""
    summary, found = run.summary, figures_of(run)
    seconds, tokens = summary.get("seconds"), summary.get("tokens")
    trial.train_seconds = seconds
    trial.tokens_per_second = tokens / seconds if tokens and seconds else found.get("tokens_per_second")
    trial.peak_memory_gib = summary.get("measured_peak_gib") or found.get("peak_memory_gib")
    trial.trainable_parameters = summary.get("trainable_parameters")
    trial.total_parameters = summary.get("total_parameters")
    own = {name: getattr(trial, name) for name in OWN_FIGURES}
    found |= {name: float(value) for name, value in own.items() if value is not None}
    trial.figures = {name: value for name, value in found.items() if math.isfinite(value)}
    trial.metric = trial.figures.get(metric)
