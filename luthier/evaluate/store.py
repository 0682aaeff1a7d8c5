"""Answers on disk as they come, so that an evaluation that ends early goes on where it stopped.

A file is of one model in one setting, which its first line names and its name is a hash of: other weights have a file
of their own. In it every answer lies under a hash of all else that it depends on: what asks the same again finds it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from luthier.errors import RunError

log = logging.getLogger("luthier")


class Store:
    """The JSONL of one model in one setting: a first line that says which, then a row for each answer, as they come.

    Raises:
        RunError: the file is of another model or setting, or cannot be read or written.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("ab+")
            self._read(json.loads(json.dumps(header)))
        except OSError as error:
            raise RunError(f"{path}: cannot be read or written: {error.strerror or error}") from error

    def _read(self, header: Mapping[str, Any]) -> None:
        self._file.seek(0)
        whole, end = [], 0
        for line in self._file:
            if not line.endswith(b"\n"):  # the process ended in the middle of this line
                log.warning("%s: the last line is not whole, and is left out", self.path)
                self._file.truncate(end)
                break
            end += len(line)
            whole.append(line)
        if not whole:
            self._append({"header": header})
            return
        try:
            first, *rows = (json.loads(line) for line in whole)
            found = first["header"]
            self.rows = {row["key"]: row for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self.path}: not the answers of an evaluation; move it away: {error!r}") from error
        if found != header:
            differ = ", ".join(name for name in header if found.get(name) != header[name])
            raise RunError(f"{self.path}: these answers were measured otherwise ({differ}); name another --output")

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row; `key` says what it is the answer to."""
        self._append(row)
        self.rows[row["key"]] = row

    def _append(self, row: Mapping[str, Any]) -> None:
        try:
            self._file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            self._file.flush()
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def close(self) -> None:
        self._file.close()
