"""SIGINT and SIGTERM as a wish to stop: the step in hand is finished and saved first."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

log = logging.getLogger("luthier")

# Those that are entered: in a process whose main thread is somebody else's no signal gets to them.
_entered: list[Interrupt] = []


def request(number: int) -> bool:
    """Ask the run of this process to stop, as that signal would; gives whether it is in its steps.

    For a launcher that trains in a thread (Ray)."""
    for each in _entered:
        each.signal = signal.Signals(number)
    return bool(_entered)


@contextmanager
def terminated_with_a_message() -> Iterator[None]:
    """Outside of the steps, where there is nothing to finish, SIGTERM ends the process with a message and the
    status that a shell gives it, 143; what the run holds is let go. An `Interrupt` entered inside goes first."""
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a worker that was forked meanwhile: it ends as if nothing were here
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        log.warning(
            "stopped by SIGTERM outside of training; nothing was trained since the last checkpoint, if any",
            extra={"for_all": True},  # of several processes one says so
        )
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Interrupt:
    """While entered, the first signal is noted and a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python cannot set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        _entered.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _entered.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
