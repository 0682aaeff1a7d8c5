"""What is said once: an argument that has no effect here, or something that is done otherwise; and that it is seen."""

from __future__ import annotations

import logging

log = logging.getLogger("luthier")

_said: set[str] = set()


def say_once(line: str, level: int = logging.INFO) -> None:
    """Log a line, if this process has not logged the same one."""
    if line not in _said:
        _said.add(line)
        log.log(level, "%s", line)


def speak() -> None:
    """Show what the logger `luthier` says, where nobody has set up logging, as in a fresh notebook.

    `logging.getLogger("luthier").setLevel("WARNING")` before or after it makes it quiet.
    """
    if log.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.propagate = False
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)


def forget() -> None:
    """Let every line be said again."""
    _said.clear()
