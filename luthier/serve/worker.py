"""The one thread that computes: texts join its loop between two steps, and what each step gives goes back in one call.

Everything else, reading requests and writing answers, is done by the event loop. The two meet in a list of commands
and in `deliver`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from luthier.generate.continuous import Loop
from luthier.generate.rows import Completion, Row
from luthier.models.memory import free_unused, is_out_of_memory

log = logging.getLogger("luthier")

# Keys and values that at least one text has room for, however often memory has ended.
LEAST_CACHED_TOKENS = 64
# Steps that may fail one after another, for another reason than memory, before the server says that it is ill.
ILL_AFTER = 3


@dataclass(frozen=True, slots=True)
class Event:
    """News of a row: a piece of text, its whole answer, or why there is none ("memory" or "failure")."""

    row: Row
    piece: str = ""
    completion: Completion | None = None
    problem: str | None = None

    @property
    def last(self) -> bool:
        return self.completion is not None or self.problem is not None


class Worker:
    """Runs a loop.

    Args:
        deliver: takes the events of a step; called in the worker's thread.
        idle_seconds: after which keys and values that only a next turn could use are given back.
    """

    def __init__(
        self, loop: Loop, device: torch.device, deliver: Callable[[list[Event]], None], idle_seconds: float = 60.0
    ) -> None:
        self.loop, self.device, self._deliver, self._idle = loop, device, deliver, idle_seconds
        self.failures = 0  # steps that failed one after another
        self._live: dict[Row, Any] = {}  # row -> the tokenizer of its text
        self._begun: set[Row] = set()
        self._commands: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._stopped = False
        # A daemon: whoever presses Ctrl-C twice does not wait for a step.
        self._thread = threading.Thread(target=self._run, name="luthier-loop", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and self.failures < ILL_AFTER

    def submit(self, rows: Iterable[Row], tokenizer: Any) -> None:
        """Have rows answered; each one's last event has its completion or its problem."""
        rows = list(rows)
        self._command(lambda: self._take(rows, tokenizer))

    def cancel(self, rows: Iterable[Row]) -> None:
        """Nobody wants these any more; no event comes of what is taken out."""
        rows = list(rows)
        self._command(lambda: self._drop(rows))

    def stop(self, seconds: float = 10.0) -> None:
        """End after the step that runs."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    # --- in the thread ----------------------------------------------------------------------------------------

    def _take(self, rows: list[Row], tokenizer: Any) -> None:
        self._live.update((row, tokenizer) for row in rows)
        self.loop.submit(rows)

    def _drop(self, rows: list[Row]) -> None:
        for row in rows:
            if self._live.pop(row, None) is not None:
                self._begun.discard(row)
                self.loop.cancel(row)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._commands or self._live or self._stopped):
                    if not self._wake.wait(self._idle):
                        self.loop.clear()
                        self._wake.wait_for(lambda: self._commands or self._stopped)
                if self._stopped:
                    return
                commands, self._commands = self._commands, []
            for command in commands:
                command()
            if self._live:
                self._step()

    def _step(self) -> None:
        try:
            events = [event for row in self.loop.step() if (event := self._event(row)) is not None]
        except Exception as error:
            memory = is_out_of_memory(error)
            if not memory:
                log.exception("a step failed; what ran in it is answered with an error, and the server goes on")
        else:
            self.failures = 0
            self._deliver(events)
            return
        # Outside of the except block: while there is a traceback, its frames hold the pass.
        self._recover(memory)

    def _event(self, row: Row) -> Event | None:
        """What there is to tell of a row that has got a token."""
        if row.done:
            self._begun.discard(row)
            return Event(row, row.piece, row.completion(self._live.pop(row)))
        if row.piece or row not in self._begun:
            self._begun.add(row)
            return Event(row, row.piece)
        return None

    def _recover(self, memory: bool) -> None:
        """What ran is lost, what waits goes on waiting."""
        waiting = [row for row in self.loop.waiting if row in self._live]
        kept = set(waiting)
        lost = [row for row in self._live if row not in kept]
        self.loop.clear()
        if memory:
            free_unused(self.device)
            before = self.loop.max_cached_tokens
            self.loop.max_cached_tokens = max(before // 2, LEAST_CACHED_TOKENS)
            log.warning(
                "out of memory with keys and values of up to %d tokens: %d answers are lost; going on with %d",
                before,
                len(lost),
                self.loop.max_cached_tokens,
            )
        else:
            self.failures += 1
        self.loop.submit(waiting)
        for row in lost:
            del self._live[row]
            self._begun.discard(row)
        self._deliver([Event(row, problem="memory" if memory else "failure") for row in lost])
