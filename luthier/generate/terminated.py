"""SIGTERM as an exception, so that what a long command has is kept and said, as after Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is what Ctrl-C is where there is no keyboard."""


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """While entered, SIGTERM raises `Terminated`: whatever Ctrl-C does happens then too."""

    def end(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # elsewhere Python cannot set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
