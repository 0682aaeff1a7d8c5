"""Files that are either whole or not there: written under another name, flushed to the disk, renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file beside `path`, then put it in its place. OSError: it could not; `path` is as
    before.
    """
    # The ending stays, for writers that choose a format by it.
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write UTF-8 text with plain line ends."""

    def write(partial: Path) -> None:
        partial.write_bytes(text.encode("utf-8"))

    write_atomic(path, write)


def write_json_atomic(path: Path, value: Any) -> None:
    """Write readable JSON; what JSON has no word for (a path, a dtype) becomes its text."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")
