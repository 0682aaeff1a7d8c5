"""A file of answers: a line for each as soon as it ends, and what makes it safe to go on with the file later.

Beside the file lies one with all that its answers depend on: the model's files and how it was asked. A file that was
made otherwise is refused, with what differs. So is one whose rows are not those of the prompts: a line carries the
columns of its row.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from luthier.errors import ConfigError, DataError, RunError
from luthier.generate.jsonl import Rows, line_of

log = logging.getLogger("luthier")

Row = dict[str, Any]

# Columns of an answer. `sample` counts the answers to one prompt from 0, `index` the rows of the file, in its order.
OWN = ("answer", "finish_reason", "skipped", "prompt_tokens", "answer_tokens", "model", "index", "sample")
ENDINGS = (".jsonl", ".json", ".ndjson")
QUESTIONS = ("prompt", "question", "instruction", "messages", "conversations")  # where `luthier judge` looks


def carried(row: Row, field: str | None) -> Row:
    """What of a row goes into the line of its answer: all of it, and what was asked under a name that `luthier judge`
    knows. A column that has the name of one of ours has `given_` before it."""
    found = {_free(name, row): value for name, value in row.items()}
    if not any(name in found for name in QUESTIONS):
        column = field if field in row else "text"
        if isinstance(row.get(column), str):
            found["prompt"] = row[column]
    return found


def _free(name: str, row: Row) -> str:
    if name not in OWN:
        return name
    while (name := f"given_{name}") in row:
        pass
    return name


def settings_path(path: Path) -> Path:
    return path.with_name(path.name + ".settings")  # no .json: in a model's folder it would count as one of its files


def check_name(path: Path) -> None:
    """ConfigError: the name is not that of a JSONL."""
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(f"--output {path}: JSON lines are written: call it {path.with_suffix('.jsonl').name}")


class AnswerFile:
    """The file that a command writes, and goes on with.

    Attributes:
        there: (index, sample) of the answers that it has. settings: what they depend on; a seed of None is that of the
            answers that are there, or a new one.

    Raises:
        RunError: it holds answers that were made otherwise, or somebody else is writing to it. DataError: it is no
            JSONL.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], rows: Sequence[Row], samples: int, overwrite: bool = False
    ) -> None:
        self.path, self.rows = path, rows
        self.settings = json.loads(json.dumps(settings))
        self.skipped = self.cut = 0
        if not overwrite and path.exists() and path.stat().st_size:
            self._match()  # before the file is opened, which mends its end: it may be somebody else's
        if self.settings["seed"] is None:
            self.settings["seed"] = random.SystemRandom().getrandbits(32)
        self._file = Rows(path, synced=False)
        try:
            if overwrite:
                self._file.clear()
            self.there = {self._place_of(line, row, samples) for line, row in enumerate(self._file.stored, start=1)}
            for row in self._file.stored:
                self._count(row)
            if not self.there:
                _write(settings_path(path), json.dumps(self.settings, indent=2, ensure_ascii=False).encode() + b"\n")
        except BaseException:
            self.close()
            raise

    def _match(self) -> None:
        """Refuse a file of other settings, and take over the seed of one with the same."""
        anew = "name another --output, or start anew with --overwrite"
        beside = settings_path(self.path)
        try:
            found = json.loads(beside.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(f"{self.path}: there is no {beside.name} beside it, which would say what its answers depend "
                           f"on; {anew}") from None  # fmt: skip
        except ValueError as error:
            raise RunError(f"{beside}: not valid JSON ({error}); {anew}") from error
        if not isinstance(found, dict):
            raise RunError(f"{beside}: not the settings of a file of answers; {anew}")
        if self.settings["seed"] is None:
            self.settings["seed"] = found.get("seed")
        differ = [name for name in {**found, **self.settings} if found.get(name) != self.settings.get(name)]
        if differ:
            said = ", ".join(f"{name} ({_short(found.get(name))} there, {_short(self.settings.get(name))} now)"
                             for name in differ)  # fmt: skip
            raise RunError(f"{self.path}: its answers were made otherwise: {said}; {anew}")

    def _place_of(self, line: int, row: Row, samples: int) -> tuple[int, int]:
        index, sample = row.get("index"), row.get("sample")
        if not isinstance(index, int) or not isinstance(sample, int):
            raise DataError(f"{self.path}:{line}: not an answer of this command; name another --output")
        own = self.rows[index] if 0 <= index < len(self.rows) else None
        asked = {name: value for name, value in row.items() if name not in OWN}
        if own is None or line_of(asked) != line_of(own):  # as lines, in which what is no number equals itself
            raise RunError(
                f"{self.path}:{line}: its prompt is not that of row {index + 1} of the data, which has changed since; "
                "rows may be added at the end only: name another --output, or start anew with --overwrite"
            )
        if sample >= samples:
            raise RunError(f"{self.path}:{line}: there are more answers to a prompt than --num-samples {samples}")
        return index, sample

    def keep(self, index: int, sample: int, values: Row) -> None:
        """Write an answer; `values` are of `OWN`, in this order."""
        row = {**self.rows[index], **values, "index": index, "sample": sample}
        self._file.append(row)
        self.there.add((index, sample))
        self._count(row)

    def _count(self, row: Row) -> None:
        self.skipped += bool(row.get("skipped"))
        self.cut += row.get("finish_reason") == "length"

    def finish(self) -> None:
        """All is there: put the lines into the order of the rows."""
        lines = list(self.lines())
        places = [(row["index"], row["sample"]) for row in lines]
        if places != sorted(places):
            lines.sort(key=lambda row: (row["index"], row["sample"]))
            _write(self.path, b"".join(line_of(row) for row in lines))

    def lines(self) -> Iterator[Row]:
        for line in self.path.read_bytes().split(b"\n"):
            if line:
                yield json.loads(line)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
