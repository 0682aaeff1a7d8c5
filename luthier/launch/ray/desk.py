"""What passes between the command and the workers, as an actor of Ray's."""

from __future__ import annotations

from typing import Any


class Desk:
    """Workers lay down what is to be said, the command fetches it and leaves wishes.

    Attributes:
        attempts: how often the workers have begun. before: the stamp of an earlier run in the folder, when they first
            did.
    """

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.signal = 0
        self.attempts = 0
        self.before: tuple[int, int] | None = None

    def put(self, *event: Any) -> None:
        self.events.append(event)

    def take(self) -> list[tuple[Any, ...]]:
        taken, self.events = self.events, []
        return taken

    def ask(self, number: int) -> None:
        """Ask the workers to stop as by a signal."""
        self.signal = number

    def asked(self) -> int:
        return self.signal

    def begin(self, stamp: tuple[int, int] | None) -> tuple[int, tuple[int, int] | None]:
        """Number of this attempt, from 1, and the stamp that the first one gave."""
        self.attempts += 1
        if self.attempts == 1:
            self.before = stamp
        return self.attempts, self.before
