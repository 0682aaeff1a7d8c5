"""An entry of `datasets` as a stream: its rows from any position on, and the position behind each.

A position is a plain value that JSON can hold, so that a checkpoint can. Files say what they are by name, size and
time (or a storage's tag), since to hash them is to read them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from luthier.config import DatasetEntry
from luthier.data.files import KINDS, Row, kind_of, without_nulls
from luthier.data.hub import notice_missing_network
from luthier.data.readers import looks_like_a_hub_id, open_rows, parse_split, without_count
from luthier.data.stream.addresses import Stamp, find_files, is_address
from luthier.data.stream.files import Place, read_from
from luthier.errors import ConfigError, DataError

log = logging.getLogger("luthier")

Position = dict[str, Any]
Located = tuple[str, Row | DataError]
"""A row, or what is wrong with it, and where it is."""


class Cursor(Protocol):
    """Goes through a source's rows."""

    def __iter__(self) -> Iterator[Located]: ...
    def position(self) -> Position:
        """Behind the last row that was given."""


class Source(Protocol):
    """Rows of one entry, as they come.

    Attributes:
        shown: what messages call it. stamps: its files; of a hub dataset its name.
    """

    @property
    def shown(self) -> str: ...
    @property
    def stamps(self) -> list[Stamp]: ...
    def begin(self, position: Position | None) -> Cursor:
        """From a position on; None: from the first row."""


def open_source(entry: DatasetEntry) -> Source:
    """Find an entry's data; of the rows, none is read.

    Raises:
        DataError: there is none. ConfigError: the entry contradicts itself, or asks for what a stream cannot give.
    """
    path, count = without_count(entry.path)
    if is_address(path):
        return _at_an_address(entry, path, count)
    if looks_like_a_hub_id(path) and not Path(path).expanduser().exists() and path not in KINDS.values():
        return _on_the_hub(entry, path, count)
    rows = open_rows(entry)
    stamps = []
    for file, _ in rows.files:
        about = file.stat()
        stamps.append(Stamp(str(file), about.st_size, str(about.st_mtime_ns)))
    return Files(entry.path, stamps, [kind for _, kind in rows.files], rows.start, rows.stop)


def _stretch(entry: DatasetEntry, count: int | None) -> tuple[str, int, int | None]:
    """The split's name, and the first and last of its rows that are wanted."""
    name, start, stop = parse_split(entry.split)
    if "[" in name:
        raise ConfigError(
            f"datasets: split: {entry.split}: the length of a stream is not known before its end: count rows, as in "
            "`train[:1000]`."
        )
    if count is not None:
        stop = start + count if stop is None else min(stop, start + count)
    return name, start, stop


def _at_an_address(entry: DatasetEntry, path: str, count: int | None) -> Source:
    name, start, stop = _stretch(entry, count)
    if name != "train":
        raise ConfigError(f"datasets: split: {entry.split}: all of {path} is the split `train`: leave `split` out.")
    for key in ("name", "revision"):
        if getattr(entry, key):
            raise ConfigError(
                f"datasets: {key}: {getattr(entry, key)}: only a hub dataset has one, and {path} is an address."
            )
    patterns = [entry.data_files] if isinstance(entry.data_files, str) else list(entry.data_files or [])
    addresses = [f"{path.rstrip('/')}/{pattern}" for pattern in patterns] or [path]
    stamps = [stamp for address in addresses for stamp in find_files(address)]
    known, kinds = [], []
    for stamp in stamps:
        kind = entry.ds_type or kind_of(Path(stamp.path.partition("?")[0]))
        if kind is not None:
            known.append(stamp)
            kinds.append(kind)
    if not known:
        raise DataError(
            f"{path}: the name does not say what is in it. Known endings: {', '.join(sorted(KINDS))}; or say it with "
            "`ds_type: json` (or csv, parquet, arrow)."
        )
    if len(known) < len(stamps):
        others = [stamp.path for stamp in stamps if stamp not in known]
        log.info("%s: %d other file(s) there are not data: %s", path, len(others), ", ".join(others[:5]))
    return Files(entry.path, known, kinds, start, stop)


# --- files --------------------------------------------------------------------------------------------------


@dataclass
class Files:
    """Rows of files, one after another; `start` and `stop` are rows of all of them."""

    shown: str
    stamps: list[Stamp]
    kinds: list[str]
    start: int = 0
    stop: int | None = None

    def begin(self, position: Position | None) -> Cursor:
        return FileCursor(self, position or {})


class FileCursor:
    def __init__(self, files: Files, position: Position) -> None:
        self._files = files
        self._rows = position.get("rows", 0)
        self._file = position.get("file", 0)
        self._place = Place(**position.get("place", {}))

    def __iter__(self) -> Iterator[Located]:
        files = self._files
        while self._file < len(files.stamps) and (files.stop is None or self._rows < files.stop):
            path = files.stamps[self._file].path
            for number, row in read_from(path, files.kinds[self._file], self._place):
                self._rows += 1
                if self._rows > files.start:
                    yield f"{path}:{number}", row
                if self._rows == files.stop:
                    return
            self._file, self._place = self._file + 1, Place()

    def position(self) -> Position:
        return {"rows": self._rows, "file": self._file, "place": asdict(self._place)}


# --- the hub ------------------------------------------------------------------------------------------------


@dataclass
class HubDataset:
    """Rows of a hub dataset, which `datasets` streams; it knows where it stands."""

    shown: str
    entry: DatasetEntry
    name: str
    split: str
    start: int = 0
    stop: int | None = None

    @property
    def stamps(self) -> list[Stamp]:
        return [Stamp(f"{self.name} {self.entry.name or ''} {self.split}", -1, self.entry.revision or "")]

    def begin(self, position: Position | None) -> Cursor:
        return HubCursor(self, self.load(), position or {})

    def load(self) -> Any:
        import datasets
        from datasets.exceptions import DatasetsError

        notice_missing_network()
        try:
            return datasets.load_dataset(
                self.name,
                self.entry.name,
                split=self.split,
                revision=self.entry.revision,
                data_files=self.entry.data_files,
                streaming=True,
            )
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            said = " ".join(str(error).split())[:300]
            raise DataError(
                f"{self.name}: neither a file or folder here ({Path(self.name).resolve()}) nor a dataset that the hub "
                f"streams: {said}{'' if said.endswith('.') else '.'} Check the id, `name`, `split` and `revision`; a "
                "gated dataset needs `hf auth login`; without a network, only files here can be streamed."
            ) from error


class HubCursor:
    def __init__(self, source: HubDataset, loaded: Any, position: Position) -> None:
        self._source, self._loaded = source, loaded
        self._rows = position.get("rows", 0)
        if "state" in position:
            self._loaded.load_state_dict(position["state"])

    def __iter__(self) -> Iterator[Located]:
        source = self._source
        if source.stop is not None and self._rows >= source.stop:
            return
        rows = iter(self._loaded)
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # of fsspec, of a file format, of the hub's client: no class in common
                said = " ".join(str(error).split())[:300] or type(error).__name__
                raise DataError(f"{source.name}:{self._rows + 1}: cannot be read: {said}") from error
            if row is None:
                return
            self._rows += 1
            if self._rows > source.start:
                yield f"{source.name}:{self._rows}", without_nulls(row)
            if self._rows == source.stop:
                return

    def position(self) -> Position:
        return {"rows": self._rows, "state": self._loaded.state_dict()}


def _on_the_hub(entry: DatasetEntry, name: str, count: int | None) -> Source:
    split, start, stop = _stretch(entry, count)
    return HubDataset(entry.path, entry, name, split, start, stop)
