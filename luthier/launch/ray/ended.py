"""How workers of Ray ended, and what is said of it.

A worker that fails tells its error itself; of one that is gone, Ray knows a little. The others fail in consequence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.errors import LuthierError, RunError
from luthier.launch.ended import Ended, Report, failure, how_to_go_on

# Of Ray's texts only the sentences with which it says what happened; a class -> what it means here.
_KILLED = (
    "was killed, or has crashed in native code: the system kills where memory runs out (dmesg tells), somebody with "
    "kill -9"
)
_OF_RAY: dict[str, str] = {
    "OutOfMemoryError": "was ended by Ray, since the memory of its machine was nearly full",
    "NodeDiedError": "is lost with its machine",
    "ActorUnavailableError": "cannot be reached",
    "WorkerHealthCheckTimeoutError": "does not answer any more",
}
_NODE_DIED = re.compile(r"\bnode\b.{0,80}\b(died|dead|terminated|preempt)", re.IGNORECASE | re.DOTALL)
_OUT_OF_MEMORY = re.compile(r"running low on memory|due to high memory usage on|memory monitor", re.IGNORECASE)


@dataclass(frozen=True)
class Failure:
    """The end of one worker.

    Attributes:
        report: its error as it tells it; None: it is gone, and `lost` says how.
        again: whether beginning again may help.
    """

    rank: int
    report: Report | None = None
    lost: str = ""
    again: bool = True

    @property
    def order(self) -> tuple[int, float, int]:
        """The most telling cause first: those who lost others say so only in consequence."""
        if self.report is None:
            return 0, 0.0, self.rank
        return 2 if self.report.consequence else 1, self.report.time, self.rank


def how_it_was_lost(kind: str, text: str) -> str:
    """What an error of Ray's about a worker means.

    Args:
        kind: the name of its class. text: what it says.
    """
    if kind in _OF_RAY:
        return _OF_RAY[kind]
    # An actor's death is one class, whatever the cause; it ends with a list of causes that are common.
    said = text.split("Some common causes")[0]
    if _OUT_OF_MEMORY.search(said):
        return _OF_RAY["OutOfMemoryError"]
    return _OF_RAY["NodeDiedError"] if _NODE_DIED.search(said) else _KILLED


def in_short(failures: Sequence[Failure], places: Mapping[int, str]) -> str:
    """One clause on what ended the workers.

    Args:
        failures: of an attempt, at least one. places: rank -> process and machine.
    """
    first = min(failures, key=lambda each: each.order)
    where = f" ({places[first.rank]})" if first.rank in places else ""
    if first.report is None:
        return f"rank {first.rank}{where} {first.lost}"
    return f"rank {first.rank}{where}: {first.report.text}"


def final(
    failures: Sequence[Failure], places: Mapping[int, str], folder: Path, attempt: int, max_failures: int
) -> LuthierError:
    """The error of a run that does not begin again.

    Args:
        failures: of the last attempt, whose number is `attempt`, from 1.
    """
    used_up = max_failures and attempt > max_failures and all(each.again for each in failures)
    attempts = f"--max-failures {max_failures} is used up. " if used_up else ""
    go_on = attempts + how_to_go_on(folder)
    if not max_failures:
        go_on += "; --max-failures N does so by itself, N times"
    first = min(failures, key=lambda each: each.order)
    if first.report is None:
        return RunError(f"{in_short(failures, places)}. The other workers have been ended. {go_on}")
    ends = [Ended(each.rank, 0, 1, folder, each.report) for each in failures if each.report is not None]
    error = failure(ends, go_on)
    if attempts and not first.report.consequence:
        told = RunError(f"{error}. {go_on}")
        told.exit_status = error.exit_status
        for note in getattr(error, "__notes__", []):
            told.add_note(note)
        return told
    return error
