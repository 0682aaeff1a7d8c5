"""The rows of a file as questions to a model: what of a row is asked, and what is carried along.

A row is asked as the model's own format says: by the columns that its training read, and where a row lacks these, by
the usual ones. What is no row, or has nothing to ask in it, is an error with its place; what is empty, or what a
template refuses, is a question without an answer.
"""

from __future__ import annotations

import json
import logging
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.files import kind_of, read_file
from luthier.errors import ConfigError, DataError

if TYPE_CHECKING:
    from luthier.data.examples import Example
    from luthier.generate.asking import Asking

log = logging.getLogger("luthier")

Row = dict[str, Any]

TEXTS = ("instruction", "prompt", "question", "text")  # in this order, where the format names no column of its own
MESSAGES = ("messages", "conversations")
SHOWN = 5  # bad rows that an error names


@dataclass(frozen=True)
class Place:
    """What a command says of where the question is. `field`: its column. `system`: for rows that have none."""

    field: str | None = None
    raw: bool = False
    system: str | None = None


@dataclass(frozen=True)
class Question:
    """A row of the file. `ids`: what the model goes on from; none if there is a reason, `why_not`."""

    row: Row
    ids: array[int]
    why_not: str | None = None


def read_rows(path: Path, skip_bad: bool = False) -> list[tuple[str, Row]]:
    """The rows of a JSON, JSONL, CSV, TSV, Parquet or Arrow file with their places, as JSON has them; of any other
    file its lines, each the `prompt` of a row.

    Raises:
        DataError: no such file, no row in it, or lines that are no rows, unless `skip_bad`.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    kind = kind_of(path)
    found, bad, unsaid = [], Bad(skip_bad), 0
    for number, row in _lines(path) if kind is None else read_file(path, kind):
        where = f"{path}:{number}"
        if isinstance(row, DataError):
            bad.add(where, str(row))
            continue
        try:
            json.dumps(row)
        except TypeError:
            unsaid += 1
            row = json.loads(json.dumps(row, default=str))
        found.append((where, row))
    bad.settle()
    if unsaid:
        log.info("%s: rows with values that JSON has no form for (dates, ...), carried as text: %d", path, unsaid)
    if not found:
        raise DataError(f"{path}: there is no row in it")
    return found


def _lines(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows marks the beginning of a file
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid UTF-8 ({error.reason}). Save the file as UTF-8") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, {"prompt": line.removesuffix("\r")}


class Bad:
    """Rows that are none: an error that names the first of them, or, if they are to be skipped, a warning."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.found: list[str] = []

    def add(self, where: str, reason: str) -> None:
        self.found.append(f"{where}: {reason}")

    def settle(self) -> None:
        if not self.found:
            return
        more = f"\n  and {len(self.found) - SHOWN} more" if len(self.found) > SHOWN else ""
        named = "\n  ".join(self.found[:SHOWN]) + more
        if not self.skip:
            few = f"{named}\n" if len(self.found) == 1 else f"bad rows: {len(self.found)}\n  {named}\n"
            raise DataError(f"{few}mend them, or leave them out with --skip-bad-rows")
        log.warning("left out, %d bad rows:\n  %s", len(self.found), named)


def questions(rows: list[tuple[str, Row]], asking: Asking, place: Place, skip_bad: bool = False) -> list[Question]:
    """A question for each row.

    Raises:
        ConfigError: the command asks for what the format cannot do.
        DataError: rows in which there is nothing to ask, by place, unless `skip_bad`.
    """
    if asking.kind == "tokens" and not place.raw:
        raise ConfigError(
            f"{asking.entry.path}: the run was trained on ready-made tokens, which do not say how a prompt is "
            "written: --raw takes the text as it is"
        )
    found, bad = [], Bad(skip_bad)
    reader = _Reader(asking, place)
    for where, row in rows:
        try:
            found.append(reader.question(row))
        except DataError as error:
            bad.add(where, str(error))
    bad.settle()
    if not found:
        raise DataError("there is no row that could be asked")
    if reader.kept_system:
        log.info("rows with a system text of their own, which --system does not replace: %d", reader.kept_system)
    return found


class _Reader:
    def __init__(self, asking: Asking, place: Place) -> None:
        self.asking, self.place = asking, place
        self.notes: Counter[str] = Counter()  # of the data's own readers; the rows are carried as they are
        self.kept_system = 0

    def question(self, row: Row) -> Question:
        example = self._example(row)
        if isinstance(example, str):
            return Question(row, array("i"), example)
        try:
            return Question(row, array("i", self.asking.ids(example)))
        except DataError as error:
            return Question(row, array("i"), str(error))

    def _example(self, row: Row) -> Example | str:
        """What is asked, or why nothing is. DataError: there is no column for it, or something else in it."""
        entry = self.asking.entry
        column = self._column(row)
        value = row[column]
        if value is None or value == "" or value == []:
            return f"`{column}` is empty"
        if isinstance(value, str) and value.lstrip().startswith("[") and column in (entry.field_messages, *MESSAGES):
            value = _list_of(value, column)  # a cell of a CSV
        if isinstance(value, list):
            return self._conversation(row, column, value)
        if not isinstance(value, str):
            raise DataError(f"`{column}` must be text or a list of messages, and is {value!r:.60}")
        if not value.strip():
            return f"`{column}` is empty"
        given, system = "", None
        if not self.place.raw:
            system = self._system(row)
            given = self._text(row, self._input()) if self.place.field is None else ""
        return self.asking.example(value, given, system)

    def _column(self, row: Row) -> str:
        """Where the question is."""
        usual = TEXTS if self.place.raw else (*MESSAGES, *TEXTS)
        wanted = [self.place.field] if self.place.field else [*self._own(), *usual]
        column = next((name for name in wanted if name in row), None)
        if column is None:
            named = " or ".join(f"`{name}`" for name in dict.fromkeys(wanted))
            hint = "" if self.place.field else "; --field names another"
            raise DataError(f"there is nothing to ask: no {named}; the row has {', '.join(row) or 'nothing'}{hint}")
        return column

    def _own(self) -> list[str]:
        """The columns that the run's data has its prompts in."""
        from luthier.config.preference_types import preference_type
        from luthier.data.formats import prompt_format, text_column

        entry = self.asking.entry
        if self.place.raw or self.asking.kind == "completion":
            return [text_column(entry)]
        if self.asking.kind == "prompt":
            return [prompt_format(entry).field_instruction]
        if self.asking.kind == "chat_template":
            return [entry.field_messages] if entry.field_messages else []
        if self.asking.kind == "preference":
            kind = preference_type(entry)
            named = [name for name in (entry.field_prompt, entry.field_messages) if name]
            return named or list(kind.prompt if kind is not None else ())
        return []

    def _input(self) -> str:
        from luthier.data.formats import prompt_format

        return prompt_format(self.asking.entry).field_input if self.asking.kind == "prompt" else "input"

    def _system(self, row: Row) -> str | None:
        from luthier.data.formats import prompt_format

        entry = self.asking.entry
        name = prompt_format(entry).field_system if self.asking.kind == "prompt" else entry.field_system or "system"
        own = self._text(row, name)
        self.kept_system += bool(own and self.place.system)
        return own or self.place.system

    @staticmethod
    def _text(row: Row, column: str) -> str:
        value = row.get(column)
        if value is not None and not isinstance(value, str):
            raise DataError(f"`{column}` must be text, and is {value!r:.60}")
        return value or ""

    def _conversation(self, row: Row, column: str, given: list[Any]) -> Example | str:
        from luthier.data.conversations import put_system, read_messages, tools_of
        from luthier.data.examples import ChatExample

        if self.place.raw:
            raise DataError(f"`{column}` is a conversation, and --raw takes text")
        entry = self.asking.entry
        messages = read_messages(given, column, entry, self.notes)
        while messages and messages[-1]["role"] == "assistant":  # the answers of the data, not asked for here
            messages.pop()
        if not messages:
            return f"`{column}` has no turn that an answer could follow"
        first = messages[0]["role"] in ("system", "developer")
        own = self._text(row, entry.field_system or "system")
        if first or own:
            self.kept_system += bool(self.place.system)
        if own or (self.place.system and not first):
            put_system(messages, own or self.place.system or "", entry.field_system or "system")
        if self.asking.is_chat:
            return ChatExample(messages, tools_of(row, entry.field_tools or "tools"))
        system = messages.pop(0)["content"] if messages[0]["role"] in ("system", "developer") else None
        if [message["role"] for message in messages] != ["user"]:
            return f"`{column}` is not a single question, and the model's format has no place for more"
        return self.asking.example(messages[0]["content"], "", system)


def _list_of(text: str, column: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"`{column}` is text that is not valid JSON ({error})") from error
