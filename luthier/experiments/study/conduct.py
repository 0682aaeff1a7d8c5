"""A study from its beginning to its page: what is there is taken over, what is missing is run, and ends are written.

Where the runs come from is a `Work`: a list here, a sampler in `search`. The study folder is held by a lock of the
system's, so that two commands never run the same study at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from luthier.config.names import nearest
from luthier.errors import ConfigError, RunError
from luthier.experiments.run_files import read_run
from luthier.experiments.study.axes import Study
from luthier.experiments.study.book import Book, Record
from luthier.experiments.study.devices import slots
from luthier.experiments.study.expand import Planned
from luthier.experiments.study.results import RUNS, STUDY, Trial, figures_of, write_trials, write_whole
from luthier.experiments.study.runner import Child, Runner, Stopped, newest_step

log = logging.getLogger("luthier")

# Drawing the page takes at most this share of the time while runs go on.
_DRAWING_SHARE = 0.2
_CHECKPOINTS = ("checkpoint-*",)
_WEIGHTS = (
    "adapter_*", "model*.safetensors*", "tokenizer*", "chat_template*", "special_tokens_map.json", "config.json",
    "generation_config.json",
)  # fmt: skip


class Work(Protocol):
    """What is to be run."""

    notes: list[str]

    @property
    def records(self) -> list[Record]:
        """All runs of the study so far, in its order."""
        ...

    @property
    def total(self) -> int:
        """How many runs there will be."""
        ...

    def more(self) -> bool:
        """Whether another run is to be started."""
        ...

    def take(self, startable: Callable[[Record], bool]) -> tuple[Planned, Record] | None:
        """The next run to start; None while there is none."""
        ...

    def watch(self, child: Child, runner: Runner) -> None:
        """Look at a run under way."""

    def done(self, trial: Trial) -> None:
        """A run has ended."""


class Listed:
    """The runs that a study lists."""

    def __init__(self, runs: Sequence[Planned], book: Book, notes: Sequence[str], rerun_failed: bool) -> None:
        self.notes = list(notes)
        self._planned = {run.key: run for run in runs}
        self.records = [book.enter(run) for run in runs]
        for record in self.records:
            # What a search saw too little of is run to its end where it is listed.
            if record.status == "pruned" or (record.status == "failed" and rerun_failed):
                record.status = "waiting"
        self._queue = [record for record in self.records if record.status == "waiting"]

    @property
    def total(self) -> int:
        return len(self.records)

    def more(self) -> bool:
        return bool(self._queue)

    def take(self, startable: Callable[[Record], bool]) -> tuple[Planned, Record] | None:
        for record in self._queue:
            if startable(record):
                self._queue.remove(record)
                return self._planned[record.key], record
        return None

    def watch(self, child: Child, runner: Runner) -> None:
        pass

    def done(self, trial: Trial) -> None:
        pass


@contextlib.contextmanager
def opened(study: Study) -> Iterator[Book]:
    """The study's folder, for as long as the study goes.

    Raises:
        ConfigError: it holds something else. RunError: it cannot be written, or another command is at work in it.
    """
    folder = study.output_dir
    told = _told(folder)
    if told is not None and told.get("name") not in (None, study.name):
        raise ConfigError(
            f"output_dir: {folder} holds the study {told['name']}, and this one is {study.name}: choose another"
        )
    try:
        if told is None and folder.is_dir() and any(path.name != RUNS for path in folder.iterdir()):
            raise ConfigError(f"output_dir: {folder} holds something that is no study: choose another, or empty it")
        (folder / RUNS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"output_dir: {folder} cannot be written: {error.strerror or error}") from error
    with _alone_in(folder):
        yield Book(folder)


def conduct(
    study: Study,
    book: Book,
    work: Work,
    varied: Sequence[str],
    *,
    jobs: int | None = None,
    start: bool = True,
    configs: Sequence[Planned] = (),
) -> list[Trial]:
    """Run what is missing, and write down all there is; gives the rows.

    Args:
        jobs: runs at a time. start: false: nothing is run. configs: what says whether the runs use GPUs.

    Raises:
        Stopped: by a signal. ConfigError: the metric is none that the runs have.
    """
    desk = _Desk(study, book, work, varied)
    desk.open()
    if not start or not work.more():
        desk.close()
        return desk.trials
    asked = jobs or study.jobs
    at_once = min(asked, work.total) if asked else None
    places = slots(at_once, study.gpus, [planned.config for planned in configs])
    desk.say_what_begins(places[0].name, len(places), configs)
    runner = Runner(book, study.name, places)
    try:
        with runner.heeding_signals():
            while True:
                while runner.free and (job := work.take(runner.startable)) is not None:
                    child = runner.start(*job)
                    desk.started(child)
                if not runner.children and not work.more():
                    break
                for child in runner.ended():
                    work.done(desk.ended(child, runner))
                for child in runner.children:
                    work.watch(child, runner)
                runner.wait()
    finally:
        desk.close()
    return desk.trials


class _Desk:
    """Where ends are written down and said."""

    def __init__(self, study: Study, book: Book, work: Work, varied: Sequence[str]) -> None:
        self.study, self.book, self.work, self.varied = study, book, work, list(varied)
        self.rows: dict[str, Trial] = {}
        self.freed = 0
        self.took: list[float] = []
        self.places = 1
        self._drawn, self._drawing = 0.0, 0.0
        self._metric_seen = False

    @property
    def trials(self) -> list[Trial]:
        return [self._row(record) for record in self.work.records]

    def open(self) -> None:
        """Write down what is there; runs that ended while nobody looked lose what is not kept."""
        for record in self.work.records:
            self.book.save(record)
            if record.status == "finished":
                self._check_metric(self._row(record))
                self._drop(record)
        self._write()

    def say_what_begins(self, place: str, number: int, configs: Sequence[Planned]) -> None:
        """The first lines: how many runs, where, and what a kill would cost."""
        self.places = number
        done = sum(record.status == "finished" for record in self.work.records)
        there = f"; {done} of them finished before" if done else ""
        at_once = f", {number} at a time" if number > 1 else ""
        where = ("" if number > 1 else f" on {place}") if place else " on the CPU"
        runs = f"{self.work.total} runs{where}{at_once}{there}"
        log.info("study %s: %s; folder %s", self.study.name, runs, self.book.folder)
        if any(planned.config.output.save_steps is None for planned in configs):
            each = any(planned.config.output.saves_per_epoch == 0 for planned in configs)
            log.info(
                "save_steps is unset: a run that is killed goes back to %s (Ctrl-C saves first)",
                "its beginning" if each else "the end of its last epoch, or to its beginning",
            )
        if self.study.keep != "all":
            what = "checkpoints of finished runs" if self.study.keep == "results" else "weights of finished runs"
            log.info("%s are removed (keep: %s; `keep: all` keeps them)", what, self.study.keep)

    def started(self, child: Child) -> None:
        record = child.record
        step = newest_step(self.book.run_folder(record))
        what = f"goes on from step {step}" if step is not None else "begins"
        where = f" on {child.slot.name}" if child.slot.name else ""
        log.info("%s %s%s; log: %s", record.name, what, where, self.book.log_file(record))
        self.rows.pop(record.key, None)

    def ended(self, child: Child, runner: Runner) -> Trial:
        """A run's row, with what there is to say of it."""
        record = child.record
        self.rows.pop(record.key, None)
        trial = self._row(record)
        if record.status == "finished":
            self.took.append(record.seconds)
            self._check_metric(trial)
            self._drop(record)
        self._write()
        self._draw()
        log.info("%s", self._said_of(trial))
        return trial

    def close(self) -> None:
        """Everything as it is now, and the page."""
        self._write()
        self._draw(last=True)

    def _said_of(self, trial: Trial) -> str:
        ended = sum(record.status in ("finished", "failed", "pruned") for record in self.work.records)
        missing = self.work.total - ended
        left = ""
        if missing and self.took:
            seconds = sum(self.took) / len(self.took) * missing / min(self.places, missing)
            left = f"; about {in_words(seconds)} left"
        if trial.status == "finished":
            value = f"{self.study.metric} {trial.metric:.5g}" if trial.metric is not None else trial.error
            what = f"{value}, {in_words(trial.seconds or 0)}"
        elif trial.status == "failed":
            what = f"failed: {trial.error.splitlines()[0] if trial.error else ''}"
        else:
            what = "stopped, and not needed any more" if trial.status == "pruned" else "stopped"
        return f"[{ended}/{self.work.total}] {trial.name}: {what}{left}"

    def _row(self, record: Record) -> Trial:
        if record.status in ("waiting", "running"):
            return self.book.trial(record, self.study.metric)
        kept = self.rows.get(record.key)
        if kept is None:
            kept = self.rows[record.key] = self.book.trial(record, self.study.metric)
            if kept.status == "finished" and kept.metric is None:
                kept.error = f"{self.study.metric} is not there, or no finite number"
        return kept

    def _check_metric(self, trial: Trial) -> None:
        """Raises ConfigError where no run has the metric."""
        self._metric_seen |= trial.metric is not None
        if self._metric_seen or trial.status != "finished":
            return
        found = {*figures_of(read_run(self.book.run_folder(self.book.by_key[trial.key]))), *trial.figures}
        if self.study.metric in found:
            self._metric_seen = True
            return
        self._write()
        place = self.study.source.where(("metric",))
        raise ConfigError(
            f"{place}: metric: {self.study.metric} is no figure of a run.{nearest(self.study.metric, found)} "
            f"There are {', '.join(sorted(found))}. Finished runs stay: change metric and start again"
        )

    def _drop(self, record: Record) -> None:
        """Remove what the study does not keep of a finished run."""
        patterns = {"all": (), "results": _CHECKPOINTS, "figures": (*_CHECKPOINTS, *_WEIGHTS)}[self.study.keep]
        for path in [each for pattern in patterns for each in self.book.run_folder(record).glob(pattern)]:
            inside = [path, *path.rglob("*")] if path.is_dir() else [path]
            size = sum(each.stat().st_size for each in inside if each.is_file() and not each.is_symlink())
            try:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            except OSError as error:
                log.warning("%s cannot be removed: %s", path, error.strerror or error)
                continue
            self.freed += size

    def _write(self) -> None:
        study = self.study
        mine = {record.key for record in self.work.records}
        others = len([key for key in self.book.by_key if key not in mine])
        notes = list(self.work.notes)
        if others:
            notes.append(
                f"{others} {'run' if others == 1 else 'runs'} in the folder belong to an earlier form of the study and "
                "are not shown."
            )
        if study.keep != "all":
            notes.append(f"Of finished runs the study keeps {_KEPT[study.keep]} (keep: {study.keep}).")
        told: dict[str, Any] = {
            "name": study.name,
            "question": study.question,
            "metric": study.metric,
            "goal": study.goal,
            "varied": self.varied,
            "parts": study.subsets,
            "plots": study.plots,
            "search": study.search is not None,
            "notes": notes,
            "asked": study.told,
            "overrides": study.overrides,
        }
        head = "# Written by `luthier sweep`, which reads the study's own file and not this one.\n"
        text = yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=110)
        write_whole(self.book.folder / STUDY, head + text)
        write_trials(self.book.folder, self.trials, study.metric)

    def _draw(self, last: bool = False) -> None:
        """The study's page; a failure to draw it is said, and no end of the study."""
        if not last and time.monotonic() - self._drawn < self._drawing / _DRAWING_SHARE:
            return
        began = time.monotonic()
        try:
            from luthier.experiments.study.page import write_page

            write_page(self.book.folder)
        except Exception as error:  # the runs are worth more than their page, which can be drawn again
            log.warning(
                "no page was made: %s: %s; `luthier sweep ... --report-only` tries again", type(error).__name__, error
            )
        self._drawn = time.monotonic()
        self._drawing = self._drawn - began


_KEPT = {"results": "adapter or model, and no checkpoints", "figures": "figures and curves, and no weights"}


def in_words(seconds: float) -> str:
    """A duration for a line of text."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _told(folder: Path) -> dict[str, Any] | None:
    try:
        told = yaml.safe_load((folder / STUDY).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return told if isinstance(told, dict) else None


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Lock a folder; the lock ends with the process, however that ends."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"another `luthier sweep` is at work in {folder}; wait for its end") from error
        except OSError:
            log.info("%s cannot be locked on this file system: start the study only once", folder)
        yield
    finally:
        os.close(descriptor)


__all__ = ["Listed", "Stopped", "Work", "conduct", "in_words", "opened"]
