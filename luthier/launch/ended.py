"""How the processes of a run ended, and the one message that it comes to.

A process that fails leaves a report of its error; what it said is in its log. One that is killed leaves the log only.
The others fail in consequence, and what they say is not what a user needs: the causes are put into an order, and the
first one is the message.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from luthier.errors import LuthierError, RunError

_HINTS = {
    "SIGKILL": ", as the system does where memory runs out (dmesg tells), or somebody with kill -9",
    "SIGBUS": ", often because shared memory is full (df /dev/shm; for a container: --shm-size)",
    "SIGSEGV": ", a crash in native code",
}
# Libraries say in these ways that another process is gone, and not that anything is wrong here.
_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|socket timeout|gloo|nccl|remote process",
    re.IGNORECASE,
)
_LONGEST = 300
# The exit status of a run that was stopped, with a checkpoint, by a signal that this command has not got itself: on
# another machine, or to one process alone. Whoever waits for the command could not tell it from the run's end
# otherwise. (EX_TEMPFAIL of sysexits.h: try again.)
STOPPED_ELSEWHERE = 75


@dataclass(frozen=True)
class Report:
    """An error as the process that raised it tells it.

    Attributes:
        text: the message. status: what a single process would have exited with. time: in seconds since the epoch.
        consequence: whether it only says that another process is gone. trace: the traceback.
    """

    text: str
    status: int
    time: float
    consequence: bool = False
    trace: str = ""

    def write(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def read(cls, path: Path) -> Report | None:
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


@dataclass(frozen=True)
class Ended:
    """The end of one process.

    Attributes:
        code: exit status, or minus the signal that killed it. log: where what it said is. stopped: whether the launcher
            has ended it, since another one had failed or a signal was to end all.
    """

    rank: int
    process: int
    code: int
    log: Path
    report: Report | None = None
    stopped: bool = False

    @property
    def failed(self) -> bool:
        return self.code != 0 and not self.stopped

    @property
    def order(self) -> tuple[int, float, int]:
        """The most telling cause first. A process that a signal has killed could not say anything, and what others
        raise at once may be the consequence; SIGABRT is how NCCL's watchdog ends a process whose neighbours
        are gone."""
        time = self.report.time if self.report else 0.0
        if self.report is not None:
            return (3 if self.report.consequence else 1, time, self.rank)
        return (2 if self.code == -signal.SIGABRT else 0 if self.code < 0 else 1, time, self.rank)


def is_consequence(error: BaseException) -> bool:
    """Whether an error says no more than that another process is gone: by its class, or by the words of libraries whose
    class for it is RuntimeError."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"ProcessLost", "DistError"}:
        return True
    return isinstance(error, RuntimeError | ConnectionError) and bool(_LOST.search(str(error)))


def how_to_go_on(folder: Path) -> str:
    """What to do after a run in this folder has ended before its time."""
    again = "the same command with --resume_from_checkpoint auto"
    steps = [int(path.name[11:]) for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    if not steps:
        return f"There is no checkpoint yet: {again} begins anew"
    return f"{again[0].upper()}{again[1:]} goes on from checkpoint-{max(steps)}"


def failure(ends: Sequence[Ended], go_on: str) -> LuthierError:
    """The error that the ends of a run's processes come to; at least one of them has failed.

    Args:
        go_on: what to do, where the error does not say it.
    """
    failed = sorted((end for end in ends if end.failed), key=lambda end: end.order)
    first = failed[0]
    if first.report is not None:
        same = {end.rank for end in failed if end.report is not None and end.report.text == first.report.text}
        whose = f"rank {first.rank}: " if first.rank and len(same) == 1 else ""
        then = f". {go_on}" if first.report.consequence else ""
        error = RunError(f"{whose}{first.report.text}{then}")
        error.exit_status = first.report.status
        if first.report.trace:
            error.add_note(f"--- on rank {first.rank} ---\n{first.report.trace}")
        return error
    said, more = last_said(first.log)
    parts = [
        f"rank {first.rank} (process {first.process}) {_how(first.code)}",
        f"it said last: {said}" if said else "it had said nothing",
    ]
    if more and first.rank:  # all that the first one says is on the screen
        parts.append(f"all that it wrote is in {first.log}")
    return RunError(f"{'; '.join(parts)}. The other processes have been ended. {go_on}")


def stopped_elsewhere(go_on: str) -> LuthierError:
    """The error for processes that have all ended well, but before the run's last step and without a signal here."""
    error = RunError(f"a signal to another process has stopped the run before its last step. {go_on}")
    error.exit_status = STOPPED_ELSEWHERE
    return error


def _how(code: int) -> str:
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        return f"was ended by {signal.Signals(code - 128).name}"
    if code > 0:
        return f"ended with exit status {code} and without a message"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}{_HINTS.get(name, '')}"


def last_said(log: Path) -> tuple[str, bool]:
    """The last line of a log, or the line with which Python announces its end and where it was; and whether there is
    more in it."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", False
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return "", False
    said = lines[-1]
    fatal = [index for index, line in enumerate(lines) if line.startswith("Fatal Python error:")]
    if fatal:
        after = lines[fatal[-1] :]
        current = next((index for index, line in enumerate(after) if line.startswith("Current thread")), 0)
        where = next((line for line in after[current:] if line.startswith("File ")), "")
        said = f"{lines[fatal[-1]]} {where}".strip()
    return said[:_LONGEST], len(lines) > 1
