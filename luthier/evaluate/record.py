"""One table of results for any number of models: a CSV to which every evaluation adds its row.

A row belongs to a model and the setting that it was measured in. Measured again, it takes the place of the old one.
Rows and columns that others put there, such as published figures of larger models, stay as they are.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from luthier.errors import DataError, RunError

Row = dict[str, str]


@dataclass
class Record:
    """The table as it is on disk; `key`: the columns that say which model and setting a row is of."""

    path: Path
    key: Sequence[str]
    columns: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, key: Sequence[str]) -> Record:
        """The table in a file, an empty one where there is no file yet.

        Raises:
            DataError: the file is no such table.
        """
        record = cls(path, key)
        if path.is_dir() or not path.parent.is_dir():
            what = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise DataError(f"{path}: the table of results cannot be written there: {what}.")
        if not path.exists():
            return record
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as a table of results (CSV in UTF-8): {error}.") from error
        reader = csv.reader(io.StringIO(text, newline=""))
        record.columns = next(reader, [])
        if text.strip() and key[0] not in record.columns:
            raise DataError(
                f"{path}: this CSV has no column `{key[0]}`, so it is not a table of results and is left as it is. It "
                f"has: {', '.join(record.columns[:8])}. Name another file."
            )
        for number, values in enumerate(reader, start=2):
            if len(values) > len(record.columns):
                raise DataError(f"{path}: row {number} has {len(values)} values for {len(record.columns)} columns.")
            if any(values):
                record.rows.append(dict(zip(record.columns, values, strict=False)))
        return record

    def add(self, row: Mapping[str, object]) -> bool:
        """Put a row in, and write the table: whole, or not at all. The file is read again before, since another
        evaluation may have added to it meanwhile.

        Returns:
            Whether it took the place of an earlier row.

        Raises:
            RunError: the file cannot be written.
        """
        now = Record.open(self.path, self.key)
        self.columns, self.rows = now.columns, now.rows
        new = {name: "" if value is None else str(value) for name, value in row.items()}
        self.columns += [name for name in new if name not in self.columns]
        same = [at for at, old in enumerate(self.rows) if all(old.get(k, "") == new.get(k, "") for k in self.key)]
        if same:
            self.rows[same[0]] = {**self.rows[same[0]], **new}
            self.rows = [old for at, old in enumerate(self.rows) if at not in same[1:]]
        else:
            self.rows.append(new)
        written = io.StringIO(newline="")
        writer = csv.DictWriter(written, self.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        partial = self.path.with_name(f".partial-{os.getpid()}-{self.path.name}")
        try:
            partial.write_text(written.getvalue(), encoding="utf-8", newline="")
            os.replace(partial, self.path)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        finally:
            partial.unlink(missing_ok=True)
        return bool(same)


def as_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns: the first one to the left, the others to the right."""
    lines = [columns, *rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(columns))]
    cells = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in cells)
