"""From the command line to rows: a config's datasets, or files whose type is given or guessed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from luthier.config import Config, DatasetEntry
from luthier.config.convert.command import config_of
from luthier.config.datasets import PREFERENCE_NAMES
from luthier.data.files import Row
from luthier.data.formats import kind_of_entry
from luthier.data.inspect.guess import guess
from luthier.data.readers import open_rows
from luthier.data.tokenizer import is_chat
from luthier.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("luthier")

CONFIGS = (".yml", ".yaml")
LINES = (".log", ".txt")
UNREAD = 10**9  # a sequence_len that leaves nothing out


@dataclass(frozen=True)
class Material:
    """What is inspected.

    Attributes:
        config: of a run over these rows; made up, but for what was given, where files are inspected.
        is_config: whether it is the user's. tokenizer: None where there is none, and tokens are estimated.
        said: what was assumed, a sentence each.
    """

    config: Config
    is_config: bool
    tokenizer: PreTrainedTokenizerBase | None
    said: list[str] = field(default_factory=list)

    @property
    def entries(self) -> list[tuple[DatasetEntry, bool]]:
        """Each dataset, and whether it is for validation."""
        data = self.config.data
        return [*((entry, False) for entry in data.datasets), *((entry, True) for entry in data.test_datasets)]


def material_of(
    sources: Sequence[str],
    *,
    type: str | None = None,
    rl: str | None = None,
    tokenizer: str | None = None,
    sequence_len: int | None = None,
    validation: Sequence[str] = (),
) -> Material:
    """A config with overrides behind it, or files, folders and hub ids.

    Raises:
        ConfigError, DataError: no such source, a type that is none, rows that look like nothing known.
    """
    if Path(sources[0]).suffix.lower() in CONFIGS:
        given = {"--type": type, "--rl": rl, "--validation": validation}
        if wrong := [name for name, value in given.items() if value]:
            raise ConfigError(f"{', '.join(wrong)}: {sources[0]} is a config, which says that itself.")
        extra = [f"tokenizer_config={tokenizer}"] if tokenizer else []
        extra += [f"sequence_len={sequence_len}"] if sequence_len else []
        config = config_of(sources[0], [*sources[1:], *extra])
        return _with_tokenizer(config, True, [])
    if misplaced := [source for source in sources if Path(source).suffix.lower() in CONFIGS]:
        raise ConfigError(f"{misplaced[0]} is a config, and is inspected alone.")
    return _of_files(sources, type, rl, tokenizer, sequence_len, validation)


def _of_files(
    sources: Sequence[str],
    type: str | None,
    rl: str | None,
    tokenizer: str | None,
    sequence_len: int | None,
    validation: Sequence[str],
) -> Material:
    said: list[str] = []
    entries = [_entry(source, type, rl, said) for source in (*sources, *validation)]
    methods = {method for _, method in entries}
    if len(methods) > 1 and rl is None:
        raise ConfigError(
            "some of these are preference data and some are not: inspect them apart, or say with --rl and "
            "--type what "
            "they are."
        )
    flat: dict[str, Any] = {
        "base_model": tokenizer or "none",
        "datasets": [entry for entry, _ in entries[: len(sources)]],
        "rl": rl or methods.pop(),
        "sequence_len": sequence_len or 2048,
        "skip_bad_rows": True,
    }
    if validation:
        flat["test_datasets"] = [entry for entry, _ in entries[len(sources) :]]
    if sequence_len is None:
        said.append("sequence_len is taken as 2,048, its default; --sequence-len says another")
    config = Config.from_flat({name: value for name, value in flat.items() if value is not None})
    if tokenizer is None:
        said.append("tokens are estimated, as 4 bytes of text each: --tokenizer MODEL counts them")
        return Material(config, False, None, said)
    return _with_tokenizer(config, False, said)


def _entry(source: str, type: str | None, rl: str | None, said: list[str]) -> tuple[dict[str, Any], str | None]:
    """A dataset entry for a source, and the method that its rows are for."""
    entry: dict[str, Any] = {"path": source}
    kind: Any = type
    if type is not None and type.lstrip().startswith("{"):
        try:
            kind = yaml.safe_load(type)
        except yaml.YAMLError as error:
            raise ConfigError(f"--type: {type} is no mapping: {' '.join(str(error).split())}") from error
    if Path(source).suffix.lower() in LINES and kind in (None, "completion"):
        said.append(f"{source}: plain text, each line taken as a row; `luthier prepare logs` makes rows of logs")
        return {**entry, "type": "completion"}, None
    where, row = _first_row(DatasetEntry(path=source))
    if kind is not None:
        if kind in PREFERENCE_NAMES and rl is None:
            rl = "kto" if isinstance(row.get("label"), bool) and "chosen" not in row else "dpo"
        return {**entry, "type": kind}, rl
    found = guess(row, where)
    untyped = {"dpo": "pairs of answers", "kto": "answers with a label"}.get(found.rl or "", "tokens")
    shown = found.entry.get("type") or untyped
    shown = "question and answer" if isinstance(shown, dict) else shown
    method = rl or found.rl
    said.append(
        f"{source}: taken as {shown}{f', for rl: {method}' if method else ''}, for its columns "
        f"{', '.join(found.columns)}; --type says another"
    )
    return {**entry, **found.entry}, method


def _first_row(entry: DatasetEntry) -> tuple[str, Row]:
    """The first row that can be read."""
    first: tuple[str, DataError] | None = None
    for location, row in rows_of(entry):
        if not isinstance(row, DataError):
            return location, row
        first = first or (location, row)
    if first is not None:
        raise DataError(f"{entry.path}: no row of it can be read; the first is {first[0]}: {first[1]}.")
    raise DataError(f"{entry.path}: there are no rows in it.")


def rows_of(entry: DatasetEntry, streamed: int | None = None) -> Iterator[tuple[str, Row | DataError]]:
    """An entry's rows with their places; of plain text a row for each line that is not empty.

    `streamed`: it is a stream, whose first rows these are, so many at most.
    """
    if streamed is not None or "://" in entry.path:
        from luthier.data.stream.sources import open_source

        yield from islice(iter(open_source(entry).begin(None)), streamed)
        return
    path = Path(entry.path).expanduser()
    if path.suffix.lower() not in LINES or not path.is_file():
        yield from open_rows(entry).scan()
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.decode("utf-8", "replace").removesuffix("\n")
            if text.strip():
                yield f"{path}:{number}", {"text": text}


def _with_tokenizer(config: Config, is_config: bool, said: list[str]) -> Material:
    """Load the tokenizer, or say why tokens are estimated."""
    from luthier.data.tokenizer import load_tokenizer

    try:
        return Material(config, is_config, load_tokenizer(config), said)
    except ModelError as error:
        if not is_config:
            raise
        said.append(f"tokens are estimated, as 4 bytes of text each: {error}")
        return Material(config, is_config, None, said)
    except ConfigError:
        chats = [entry for entry in config.data.datasets if is_chat(entry.type)]
        if is_config or not chats:
            raise
    said.append("the tokenizer has no chat template; chatml is taken")
    config = config.replace("inspect", chat_template="chatml")
    return Material(config, is_config, load_tokenizer(config), said)


def check_type(entry: DatasetEntry, rl: str | None, problems: Sequence[str]) -> None:
    """Raises DataError where no row fits the type: that is a wrong type, and no property of the data."""
    raise DataError(
        f"{entry.path}: none of its rows can be read as {entry.type or 'rows without a type'} "
        f"({kind_of_entry(entry, rl)}): {problems[0].rstrip('.')}. Say with --type what they are."
    )


