"""One process of a run: `python -m luthier.launch.worker FOLDER`, as `launch.processes` starts it.

It takes the config from the folder, trains, and leaves a report there if that fails: the launcher makes one message of
what its processes report. The first process has the terminal to itself; of the others only warnings and errors get
there, with their rank, and all else that they and their libraries write goes to a log.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import pickle
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from luthier.cli import Plain, explained
from luthier.config import Config
from luthier.launch.ended import Report, is_consequence

JOB = "job.pickle"
# A process whose launcher is gone ends as by SIGTERM, with a checkpoint; one that hangs in a network call cannot.
_ORPHANS_LIFE_SECONDS = 600.0
_POLL_SECONDS = 1.0

log = logging.getLogger("luthier")


@dataclass(frozen=True)
class Job:
    """What the launcher hands to its processes: the config, checked, its own process id, and how it was called."""

    config: Config
    launcher: int
    command: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        (folder / JOB).write_bytes(pickle.dumps(self))


def log_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.log"


def report_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def stopped_of(folder: Path) -> Path:
    """The file that is there if a signal has stopped the run before its last step."""
    return folder / "stopped"


def main(folder: Path) -> int:
    """Run the job of a folder as one of its processes; gives the exit status."""
    job: Job = pickle.loads((folder / JOB).read_bytes())
    rank = int(os.environ["RANK"])
    sys.argv[:] = job.command or sys.argv  # which the run keeps, as what makes it again
    threading.Thread(target=_end_after, args=(job.launcher,), daemon=True).start()
    with _said(rank, log_of(folder, rank)):
        try:
            from luthier.train.run import train

            if not train(job.config).finished:
                stopped_of(folder).touch()
            status = 0
        except BaseException as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is left to do is to say so
            status = _report(error, report_of(folder, rank))
    if os.getppid() != job.launcher:
        shutil.rmtree(folder, ignore_errors=True)  # as the launcher would have
    return status


def _report(error: BaseException, path: Path) -> int:
    """Leave an error for the launcher; gives the exit status."""
    while isinstance(error, SystemExit) and error.__context__ is not None:
        error = error.__context__  # the launcher's SIGTERM found it on its way out
    if isinstance(error, SystemExit | KeyboardInterrupt):
        return 130 if isinstance(error, KeyboardInterrupt) else int(error.code or 0)
    heading, text, status = explained(error, debug=True)
    if heading != "error":
        text = f"{heading}: {text} (--debug shows where; please report it)"
    trace = "".join(traceback.format_exception(error))
    Report(text, status, time.time(), is_consequence(error), trace).write(path)
    return status


def _end_after(launcher: int) -> None:
    """Wait until the launcher is gone, which is only noticed by the process having another parent; then stop."""
    while os.getppid() == launcher:
        time.sleep(_POLL_SECONDS)
    if os.environ["RANK"] == "0":
        log.error("the process that has started this run is gone: stopping")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_ORPHANS_LIFE_SECONDS)
    os._exit(1)


@contextlib.contextmanager
def _said(rank: int, path: Path) -> Iterator[None]:
    """While entered, what this process says goes where it belongs; everything of it is in its log, but for what the
    first one's libraries write to the terminal themselves."""
    logger = logging.getLogger("luthier")
    with path.open("a", encoding="utf-8", buffering=1) as written:
        terminal: TextIO = sys.stderr
        if rank:
            terminal = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace", buffering=1)
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os.dup2(written.fileno(), 1)
            os.dup2(written.fileno(), 2)
        faulthandler.enable(written)
        shown, kept = logging.StreamHandler(terminal), logging.StreamHandler(written)
        for handler in (shown, kept):
            handler.setFormatter(Plain("%(message)s"))
            handler.addFilter(_of_one)
            logger.addHandler(handler)
        if rank:
            shown.setLevel(logging.WARNING)
            shown.addFilter(_Named(rank))
        logger.setLevel(logging.INFO)
        logger.propagate = False
        try:
            yield
        finally:
            for handler in (shown, kept):
                logger.removeHandler(handler)
            faulthandler.disable()


def _of_one(record: logging.LogRecord) -> bool:
    """Not what the launcher says for all of its processes."""
    return not getattr(record, "for_all", False)


class _Named(logging.Filter):
    """With the rank before it, unless it is there."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.prefix = f"rank {rank}: "

    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith(self.prefix):
            record.msg = f"{self.prefix}{record.msg}"
        return True


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
