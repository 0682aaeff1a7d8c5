"""`luthier sweep study.yml`: a study from the command line."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.config.arguments import OverridesArgument
from luthier.errors import ConfigError
from luthier.experiments.study.axes import Study
from luthier.experiments.study.book import Book
from luthier.experiments.study.conduct import Listed, Stopped, conduct, opened
from luthier.experiments.study.expand import Planned, check_space, expand, varied_in
from luthier.experiments.study.results import Trial
from luthier.experiments.study.spec import read

log = logging.getLogger("luthier")

_MOST_SHOWN = 5


def command(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="A YAML file.", show_default=False)],
    overrides: OverridesArgument = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Runs at a time. Default: one on each visible GPU, one on a CPU.", show_default=False
        ),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The study's folder.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all runs and list them; start none.")] = False,
    rerun_failed: Annotated[bool, typer.Option("--rerun-failed", help="Try failed runs again.")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write results and page from what is there; start nothing.")
    ] = False,
) -> int:
    """Run a study: one config with many settings, each in a process of its own, and a page that compares them.

    Overrides are for keys of the study's base. The same command goes on with a study that was stopped.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs: at least 1, found {jobs}")
    asked = read(study, overrides or [], output_dir)
    if asked.search is not None:
        return _search(asked, jobs, dry_run, rerun_failed, report_only)
    found = expand(asked)
    for note in found.notes:
        log.info("%s", note)
    if dry_run:
        _list(asked, found.runs)
        return 0
    with opened(asked) as book:
        work = Listed(found.runs, book, found.notes, rerun_failed)
        varied = varied_in(asked.axes, found.runs)
        try:
            trials = conduct(asked, book, work, varied, jobs=jobs, start=not report_only, configs=found.runs)
        except Stopped as stopped:
            return _stopped(stopped, [book.trial(record, asked.metric) for record in work.records])
        return _tell(asked, book, trials, report_only)


def _search(study: Study, jobs: int | None, dry_run: bool, rerun_failed: bool, report_only: bool) -> int:
    from luthier.experiments.study.search import Searched

    looked = check_space(study)
    if dry_run:
        assert study.search is not None
        print(f"{study.name}: a search of {study.search.trials} runs; all choices and the ends of ranges are valid")
        return 0
    with opened(study) as book:
        work = Searched(study, book, rerun_failed)
        try:
            trials = conduct(study, book, work, work.varied, jobs=jobs, start=not report_only, configs=looked)
        except Stopped as stopped:
            return _stopped(stopped, [book.trial(record, study.metric) for record in work.records])
        return _tell(study, book, trials, report_only)


def _stopped(stopped: Stopped, trials: Sequence[Trial]) -> int:
    done = sum(trial.status == "finished" for trial in trials)
    log.info("stopped by %s: %d of %d runs are finished; the same command goes on", stopped, done, len(trials))
    return 128 + stopped.number


def _tell(study: Study, book: Book, trials: Sequence[Trial], report_only: bool) -> int:
    """The end in a few lines; 1 where a run failed, or was stopped."""
    for line in best_lines(study, trials):
        print(line)
    for path in ("report.html", "results.csv"):
        if (book.folder / path).is_file():
            print(f"{path.split('.')[0]}: {book.folder / path}")
    failed = [trial for trial in trials if trial.status == "failed"]
    waiting = [trial for trial in trials if trial.status == "waiting"]
    if failed:
        log.warning("%d of %d runs failed; --rerun-failed tries them again:", len(failed), len(trials))
        for trial in failed[:_MOST_SHOWN]:
            log.info("  %s: %s", trial.name, trial.error.replace("\n", "\n    "))
        if len(failed) > _MOST_SHOWN:
            log.info("  and %d more", len(failed) - _MOST_SHOWN)
    if waiting:
        log.info("%d of %d runs are not finished; the same command goes on", len(waiting), len(trials))
    return int(bool(failed or (waiting and not report_only)))


def best_lines(study: Study, trials: Sequence[Trial]) -> list[str]:
    """The best setting by its mean over seeds, and the run with it."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.metric is not None and trial.status == "finished":
            groups.setdefault(json.dumps(trial.settings, sort_keys=True, default=str), []).append(trial)
    if not groups:
        return []
    means = {name: statistics.fmean(trial.metric or 0.0 for trial in group) for name, group in groups.items()}
    best = min(means, key=means.__getitem__) if study.goal == "min" else max(means, key=means.__getitem__)
    group = groups[best]
    seeds = f", the mean of {len(group)} seeds" if len(group) > 1 else ""
    settings = ", ".join(f"{key}: {_shown(value)}" for key, value in group[0].settings.items()) or group[0].name
    return [f"best: {settings} with {study.metric} {means[best]:.5g}{seeds}"]


def _list(study: Study, runs: Sequence[Planned]) -> None:
    """The runs as a table, each with what tells it from the others."""
    varied = varied_in(study.axes, runs)
    head = ["run", *varied, *(["seed"] if study.seeds else [])]
    rows = [
        [run.name, *(_shown(run.settings.get(key, "")) for key in varied), *([str(run.seed)] if study.seeds else [])]
        for run in runs
    ]
    widths = [min(60, max(len(row[column]) for row in [head, *rows])) for column in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"{len(runs)} runs, all valid; nothing was started")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)
