"""How far a long command is: a line that is written over in a terminal, and a few lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

log = logging.getLogger("luthier")

EVERY = 0.2  # seconds between two states of the line in a terminal
PARTS = 10  # lines elsewhere


class Progress:
    """`advance(tokens)` after each of `total` answers, of which `done` are there from before."""

    def __init__(self, total: int, done: int = 0) -> None:
        self.total, self.done, self.before = total, done, done
        self.tokens = 0
        self._terminal = sys.stderr.isatty()
        self._began = time.monotonic()
        self._shown = 0.0

    def advance(self, tokens: int) -> None:
        self.done += 1
        self.tokens += tokens
        now, asked = time.monotonic(), self.total - self.before
        if self._terminal:
            if now - self._shown >= EVERY:
                self._shown = now
                self._write(f"\r{self._state(now)}\x1b[K")
        elif (self.done - self.before) % -(-asked // PARTS) == 0 or self.done == self.total:
            log.info("%s", self._state(now))

    def _state(self, now: float) -> str:
        seconds = max(now - self._began, 1e-9)
        left = int(seconds * (self.total - self.done) / (self.done - self.before))
        eta = f"  ETA {left // 60}:{left % 60:02d}" if self.done < self.total else ""
        return f"{self.done:,} of {self.total:,} answers  {self.tokens / seconds:,.1f} tokens/s{eta}"

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal and self._shown:
            self._write("\r\x1b[K")
