"""Rows that are in their file as soon as they are known.

What was paid for, in time or in money, is not lost with the process: one that is killed leaves at most half a line,
which is cut off when the file is opened again.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from luthier.errors import DataError, RunError

log = logging.getLogger("luthier")


class Rows:
    """A JSONL file that this process alone writes to. `stored`: the rows that were there when it was opened.

    `synced`: each row is on the disk when `append` returns, whatever happens to the machine.

    Raises:
        RunError: another process is writing to it. DataError: a line in the middle is no JSON object.
    """

    def __init__(self, path: Path, *, synced: bool = True) -> None:
        self.path, self.synced = path, synced
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        self._lock = threading.Lock()
        try:
            _hold(self._file.fileno(), path)
            self._file.seek(0)
            content = self._file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                log.info("%s: its last line is cut off, and is dropped", path)
                self._file.truncate(whole)
            self.stored = _parse(content[:whole], path)
        except BaseException:
            self._file.close()
            raise

    def append(self, row: dict[str, Any]) -> None:
        """Write one row. May be called from any thread."""
        with self._lock:
            self._file.write(line_of(row))
            self._file.flush()
            if self.synced:
                os.fsync(self._file.fileno())

    def clear(self) -> None:
        """Forget what is stored."""
        self._file.truncate(0)
        self.stored = []

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def __enter__(self) -> Rows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def line_of(row: dict[str, Any]) -> bytes:
    """A row as a line of the file."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair in a text: an escape says it
        return (json.dumps(row) + "\n").encode()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that another command may be writing to."""
    content = path.read_bytes()
    return _parse(content[: content.rfind(b"\n") + 1], path)


def _parse(content: bytes, path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not valid JSON ({error}); mend or remove that line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: not a JSON object; mend or remove that line")
        rows.append(row)
    return rows


def _hold(descriptor: int, path: Path) -> None:
    """The system's lock on the file, which ends with the process, however that ends."""
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(f"{path}: another command is writing to it; wait for its end") from error
    except OSError:
        log.info("%s cannot be locked on this file system: start no second command on it", path)
