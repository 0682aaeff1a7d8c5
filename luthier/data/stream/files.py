"""One file, here or at an address, from any row on: JSON lines, CSV, Parquet and Arrow.

A reader keeps its `Place` up to date: behind the row that it gave last. Given one, it goes on there. Plain text is
sought by bytes; of compressed text, lines are passed over without being parsed; Parquet passes over whole row groups.
Rows, their numbers and their errors are those of `data.files`.
"""

from __future__ import annotations

import csv
import gzip
import io
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from luthier.data.files import (
    COMPRESSED,
    NumberedRow,
    check_header,
    delimiter_of,
    object_of,
    text_start,
    utf8_line,
    without_nulls,
)
from luthier.data.stream.addresses import is_address, open_address
from luthier.errors import DataError

log = logging.getLogger("luthier")

_BATCH = 1000  # rows of a columnar file that are turned into Python objects at a time
_BUFFER = 2**20  # bytes that are read of a text at a time


@dataclass
class Place:
    """How far a file is read: rows, and of a text lines and bytes (as it is on disk, if it is not compressed)."""

    row: int = 0
    line: int = 0
    byte: int = 0


def read_from(path: str, kind: str, place: Place) -> Iterator[NumberedRow]:
    """The rows of a file behind a place, which moves along.

    Raises:
        DataError: it cannot be read, or is shorter than the place says; a JSON file is no JSON lines.
    """
    readers = {"json": _json, "csv": _csv, "parquet": _parquet, "arrow": _arrow}
    try:
        yield from readers[kind](path, place)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not a complete gzip file: {error}.") from error
    except ImportError as error:  # a compression that needs a package
        raise DataError(f"{path}: cannot be read: {error}.") from error


# --- text ---------------------------------------------------------------------------------------------------


class _Lines:
    """Lines with their ends, split at newlines only, and the place behind the last one."""

    def __init__(self, file: IO[bytes], path: str) -> None:
        self._file, self._path = file, path
        self.line = self.byte = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> bytes:
        line = self._file.readline()
        if not line:
            raise StopIteration
        self.line += 1
        self.byte += len(line)
        return text_start(line, self._path) if self.line == 1 else line

    def go_to(self, place: Place) -> None:
        """Forward to a place."""
        if place.line <= self.line:
            return
        if not _packed(self._path) and self._file.seekable():
            if (size := self._file.seek(0, io.SEEK_END)) < place.byte:
                raise DataError(
                    f"{self._path}: has {size:,} bytes, and was read up to byte {place.byte:,}: it is not the file "
                    "that this run began with."
                )
            self._file.seek(place.byte)
            self.line, self.byte = place.line, place.byte
            return
        while self.line < place.line:
            if not self._file.readline():
                raise DataError(
                    f"{self._path}: ends at line {self.line:,}, and was read up to line {place.line:,}: it is not the "
                    "file that this run began with."
                )
            self.line += 1


def _json(path: str, place: Place) -> Iterator[NumberedRow]:
    with opened(path) as file:
        lines = _Lines(file, path)
        first = place.row == 0
        lines.go_to(place)
        for line in lines:
            if not line.strip():
                continue
            row = object_of(line)
            if first:
                _check_lines(path, line, isinstance(row, DataError))
                first = False
            place.row, place.line, place.byte = place.row + 1, lines.line, lines.byte
            yield lines.line, row


def _check_lines(path: str, first: bytes, no_object: bool) -> None:
    """Raises DataError where a file's first line says that rows are not lines."""
    # As in reading whole: a name that promises lines has bad ones rather than objects over several lines.
    promised = ".json" not in (suffix.lower() for suffix in Path(path).suffixes)
    if first.lstrip().startswith(b"["):
        what = "is a JSON array, which has to be read whole"
    elif no_object and not promised:
        what = "has objects that span lines"
    else:
        return
    raise DataError(
        f"{path}: {what}. A stream needs JSON lines, one object per line (`jq -c '.[]' rows.json > rows.jsonl` makes "
        "them of an array); or leave out `streaming`."
    )


def _csv(path: str, place: Place) -> Iterator[NumberedRow]:
    csv.field_size_limit(2**31 - 1)
    with opened(path) as file:
        lines = _Lines(file, path)
        texts = (utf8_line(line, path, lines.line) for line in lines)
        reader = csv.reader(texts, delimiter=delimiter_of(Path(path)), strict=True)
        try:
            header = next((cells for cells in reader if cells), None)
            if header is None:
                return
            check_header(header, path, lines.line)
            lines.go_to(place)
            while True:
                first = lines.line + 1
                cells = next(reader, None)
                if cells is None:
                    return
                if not cells:
                    continue
                place.row, place.line, place.byte = place.row + 1, lines.line, lines.byte
                if len(cells) != len(header):
                    yield first, DataError(f"{len(cells)} cells, where the header has {len(header)}")
                else:
                    yield first, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}:{lines.line}: not valid CSV: {error}.") from error


# --- columnar files -----------------------------------------------------------------------------------------


def _parquet(path: str, place: Place) -> Iterator[NumberedRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with opened(path) as raw, pq.ParquetFile(raw) as file:
            before = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if before + rows > place.row:
                    yield from _rows_behind(file.iter_batches(batch_size=_BATCH, row_groups=[group]), before, place)
                before += rows
            _check_end(path, before, place)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}.") from error


def _arrow(path: str, place: Place) -> Iterator[NumberedRow]:
    """Arrow's file format, or its stream format, which `datasets` writes."""
    import pyarrow as pa

    def batches(source: Any, is_file: bool) -> Iterator[Any]:
        if is_file:
            reader = pa.ipc.open_file(source)
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i)
        else:
            yield from pa.ipc.open_stream(source)

    try:
        with ExitStack() as stack:
            if is_address(path):
                source = pa.PythonFile(stack.enter_context(opened(path)), "r")
            else:
                source = stack.enter_context(pa.memory_map(path))
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            yield from _rows_behind(batches(source, is_file), 0, place)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Arrow file: {error}.") from error


def _rows_behind(batches: Iterator[Any], before: int, place: Place) -> Iterator[NumberedRow]:
    """Args:
    before: rows of the file in front of these batches.
    """
    for batch in batches:
        start = max(0, place.row - before)
        for low in range(start, batch.num_rows, _BATCH):
            for row in batch.slice(low, _BATCH).to_pylist():
                place.row += 1
                yield place.row, without_nulls(row)
        before += batch.num_rows


def _check_end(path: str, rows: int, place: Place) -> None:
    if rows < place.row:
        raise DataError(f"{path}: has {rows:,} rows, and was read up to row {place.row:,}.")


# --- bytes --------------------------------------------------------------------------------------------------


def _packed(path: str) -> bool:
    return path.lower().endswith(COMPRESSED)


@contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, here or at an address, unpacked if its name says that it is packed."""
    with ExitStack() as stack:
        raw: Any
        if is_address(path):
            raw = io.BufferedReader(stack.enter_context(open_address(path)), _BUFFER)
        else:
            raw = stack.enter_context(Path(path).open("rb", buffering=_BUFFER))
        if path.lower().endswith(".gz"):
            raw = io.BufferedReader(stack.enter_context(gzip.open(raw, "rb")), _BUFFER)
        elif path.lower().endswith(".zst"):
            import pyarrow as pa

            stream = stack.enter_context(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"))
            raw = io.BufferedReader(stream, _BUFFER)
        yield raw
