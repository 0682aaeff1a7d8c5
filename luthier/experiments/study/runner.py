"""Runs as processes of their own: started where there is room, watched, asked to stop, and written down as they end.

One thread does all of it, and looks at the processes several times a second. A run is started with
`resume_from_checkpoint: auto`, so that starting it again is going on with it. Each has a session of its own, so that
Ctrl-C reaches the study alone, which then asks its runs to stop: they finish their step and save. If the study is
killed, Linux asks them for it. What is still writing afterwards holds its folder's lock, and is waited for.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from luthier.errors import RunError
from luthier.experiments.run_files import CHECKPOINT, step_of
from luthier.experiments.study.book import Book, Record
from luthier.experiments.study.devices import Slot
from luthier.experiments.study.expand import Planned

log = logging.getLogger("luthier")

# What a run's config file is appended to.
TRAIN = (sys.executable, "-m", "luthier", "train")
_LOOK_SECONDS = 0.1
# After which a run that was asked to stop, and does not, is said to be waited for.
_PATIENCE_SECONDS = 20.0
_PR_SET_PDEATHSIG = 1


@dataclass
class Child:
    """A run under way. `asked`: it was told to stop; `pruned`: because a search has seen enough of it."""

    record: Record
    process: subprocess.Popen[bytes]
    slot: Slot
    began: float
    asked: bool = False
    pruned: bool = False


class Stopped(Exception):
    """The study was asked to end by a signal; its runs have ended."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Runner:
    """Starts runs and settles what they come to.

    Args:
        study: its name, for the runs' files. slots: where runs go, one at a time in each.
    """

    def __init__(self, book: Book, study: str, slots: Sequence[Slot]) -> None:
        self.book, self.study = book, study
        self.free = list(slots)
        self.children: list[Child] = []
        self.signal: int | None = None
        self._said: set[str] = set()

    @contextlib.contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """While entered, SIGINT and SIGTERM end the study in order; on the way out no run is left behind."""
        numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            try:
                self._end_all()
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            for child in self.children:
                _kill(child.process)
        self.signal = number

    def startable(self, record: Record) -> bool:
        """Whether nobody writes into the run's folder: what a killed study left may still be ending."""
        if _is_free(self.book.run_folder(record)):
            return True
        if record.name not in self._said:
            self._said.add(record.name)
            log.info("%s: a process of an earlier start is still writing; its end is waited for", record.name)
        return False

    def start(self, planned: Planned, record: Record) -> Child:
        """Start a run, or go on with it, in a free place."""
        slot = self.free.pop(0)
        folder, path = self.book.run_folder(record), self.book.config_file(record)
        path.write_text(planned.text(folder, self.study), encoding="utf-8")
        record.status, record.began, record.error = "running", time.time(), ""
        self.book.save(record)
        environment = {**os.environ, **slot.environment}
        try:
            with self.book.log_file(record).open("ab") as output:
                process = subprocess.Popen(
                    [*TRAIN, str(path)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=_ends_with_its_parent(),  # noqa: PLW1509 - there is one thread
                )
        except OSError as error:
            raise RunError(f"{record.name} cannot be started: {error.strerror or error}") from error
        child = Child(record, process, slot, time.monotonic())
        self.children.append(child)
        return child

    def ended(self) -> Iterator[Child]:
        """The runs that have ended since, one after the other as they are settled: their records say how."""
        for child in [child for child in self.children if child.process.poll() is not None]:
            self.children.remove(child)
            self.free.append(child.slot)
            self._settle(child)
            yield child

    def wait(self) -> None:
        """Look again in a moment. Raises Stopped after a signal, with all runs at their end."""
        if self.signal is not None:
            self._end_all()
            raise Stopped(self.signal)
        time.sleep(_LOOK_SECONDS)

    def ask_to_stop(self, child: Child, *, pruned: bool = False) -> None:
        """Ask a run to end after its step."""
        child.asked, child.pruned = True, pruned
        with contextlib.suppress(ProcessLookupError):
            child.process.send_signal(signal.SIGTERM)

    def _settle(self, child: Child) -> None:
        record, status = child.record, child.process.returncode
        record.seconds += time.monotonic() - child.began
        if status == 0 and self.book.has_ended(record):
            record.status = "finished"
        elif child.pruned:
            record.status = "pruned"
        elif child.asked or status in (0, -signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGINT, 130):
            record.status = "waiting"
            if not child.asked:
                log.warning("%s was stopped from outside; the same command goes on with it", record.name)
        else:
            record.status, record.error = "failed", self.book.error_of(record, status)
        self.book.save(record)

    def _end_all(self) -> None:
        for child in self.children:
            if not child.asked:
                self.ask_to_stop(child)
        if self.children:
            number = len(self.children)
            asked = "1 run is" if number == 1 else f"{number} runs are"
            log.info("%s asked to stop: the step in hand is finished and saved", asked)
        began, said = time.monotonic(), False
        while self.children:
            for _ in self.ended():
                pass
            time.sleep(_LOOK_SECONDS)
            if not said and time.monotonic() - began > _PATIENCE_SECONDS and self.children:
                said = True
                names = ", ".join(child.record.name for child in self.children)
                log.info("still waiting for %s; Ctrl-C again ends them at once", names)


def newest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint in a run folder."""
    steps = [step_of(path.name) for path in folder.glob(f"{CHECKPOINT}*")]
    return max((step for step in steps if step is not None), default=None)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _ends_with_its_parent() -> Callable[[], None] | None:
    """For a new process on Linux: it gets SIGTERM when the study is gone, however that ended."""
    if not sys.platform.startswith("linux"):
        return None
    return functools.partial(_ask_for_a_signal, ctypes.CDLL(None, use_errno=True), os.getpid())


def _ask_for_a_signal(system: Any, parent: int) -> None:
    system.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it ended before it was asked
        os._exit(128 + signal.SIGTERM)


def _is_free(folder: Path) -> bool:
    """Whether no run holds a folder (`train.folder` locks it)."""
    if sys.platform == "win32" or not folder.is_dir():
        return True
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return True
