"""The folder of a preparation that is under way: rows so far, and a note of how far it went.

A note is written at places of the input (`settings.CHECKPOINT`) and holds all that the stages know; the rows of that
moment are on the disk before it. A run that is killed at any moment goes on from the last note: rows behind it are
cut off, and what follows is what an undisturbed run would have written, to the byte. The note has a fingerprint of
settings and sources.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

from luthier.errors import RunError

ROWS = {"train": "rows.jsonl", "validation": "validation.jsonl"}
_NOTE = "progress.json"


class Progress:
    """A folder, locked while this object is used."""

    def __init__(self, folder: Path, overwrite: bool, fingerprint: dict[str, Any], what: str) -> None:
        """Raises RunError: another process works there, or what is there was begun with other settings or sources and
        is not to be overwritten."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise RunError(f"{what} is being written by another process") from error
        self._fingerprint = fingerprint
        self.note = self._read(overwrite, what)
        self._number = self.note["number"] if self.note else 0
        self._files: dict[str, IO[bytes]] = {}
        for part, name in ROWS.items():
            file = (folder / name).open("ab")
            # What came behind the note is written again.
            file.truncate(self.note["sizes"][part] if self.note else 0)
            file.seek(0, os.SEEK_END)
            self._files[part] = file

    def _read(self, overwrite: bool, what: str) -> dict[str, Any] | None:
        path = self.folder / _NOTE
        if not path.is_file():
            return None
        note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name, told in (("options", "with other options"), ("sources", "from sources that have changed since")):
            if note["fingerprint"][name] == self._fingerprint[name]:
                continue
            if not overwrite:
                self._lock.close()
                raise RunError(
                    f"{what} was begun {told} and is not finished ({self.folder}): run the command that began it to go "
                    "on, or add --overwrite to begin anew"
                )
            path.unlink()
            for row_file in ROWS.values():  # another name of a file that is in its place already must not lose its rows
                (self.folder / row_file).unlink(missing_ok=True)
            return None
        return note

    def write(self, part: str, line: bytes) -> None:
        self._files[part].write(line)

    def save(self, state: dict[str, Any], seen: bytes | memoryview) -> None:
        """A note, behind which nothing that was written so far is lost."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._number += 1
        sizes = {part: file.tell() for part, file in self._files.items()}
        note = {"fingerprint": self._fingerprint, "number": self._number, "sizes": sizes, "state": state}
        _write_synced(self.folder / f"seen-{self._number}.bin", seen)
        partial = self.folder / f".{_NOTE}"
        _write_synced(partial, json.dumps(note).encode())
        os.replace(partial, self.folder / _NOTE)
        for old in self.folder.glob("seen-*.bin"):
            if old.name != f"seen-{self._number}.bin":
                old.unlink()

    def seen(self) -> Path:
        return self.folder / f"seen-{self._number}.bin"

    def rows(self, part: str) -> Path:
        """The file of a part's rows, with all of them in it."""
        self._files[part].flush()
        return self.folder / ROWS[part]

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._lock.close()

    def remove(self) -> None:
        self.close()
        shutil.rmtree(self.folder)


def _write_synced(path: Path, data: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
