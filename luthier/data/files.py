"""From one file on disk to numbered rows: JSON, CSV, Parquet and Arrow.

Every reader yields `(number, row)`, where the number is the line (JSON, CSV) or the row (Parquet, Arrow)
counted from 1, and the row is a dict, or the `DataError` that says why this row is not one. A yielded error
concerns that row only and the reader goes on behind it, so that `skip_bad_rows` can count it; what makes the
rest of a file unreadable is raised.

JSON lines are split at b"\\n" and nowhere else: `str.splitlines` would also cut at U+2028, U+0085 and six
others, which JSON allows inside of strings, and which real datasets hold.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

from luthier.errors import DataError

log = logging.getLogger("luthier")

KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""What a file name's ending says about its content. `json` covers arrays and one object per line."""

COMPRESSED = (".gz", ".zst")
NEWLINE = "\n"
_SPACE = re.compile(r"[ \t\r\n]*")
_BATCH = 1000  # rows of a columnar file that are turned into Python objects at a time

Row = dict[str, Any]
NumberedRow = tuple[int, Row | DataError]


def kind_of(path: Path) -> str | None:
    """The kind that the name says, or None. Text formats may be compressed (`rows.jsonl.gz`)."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        kind = KINDS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return kind if kind in ("json", "csv") else None
    return KINDS.get(suffixes[-1]) if suffixes else None


def read_file(path: Path, kind: str) -> Iterator[NumberedRow]:
    """The rows of one file. Raises DataError where the file as a whole cannot be read."""
    readers = {"json": _read_json, "csv": _read_csv, "parquet": _read_parquet, "arrow": _read_arrow}
    try:
        yield from readers[kind](path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error


# --- JSON ---------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> Iterator[NumberedRow]:
    """An array of objects, one object per line, or objects one after another: the content says which."""
    with _open_bytes(path) as file:
        lines = _numbered_lines(file, path)
        first = next(((number, line) for number, line in lines if line.strip()), None)
        if first is None:
            return
        number, line = first
        opens_array = line.lstrip().startswith(b"[")
        # A first line that is no object begins an object that spans lines, unless the name promises
        # otherwise.
        promised = ".json" not in (suffix.lower() for suffix in path.suffixes)
        if not opens_array and (promised or not isinstance(object_of(line), DataError)):
            for number, line in chain([first], lines):
                if line.strip():
                    yield number, object_of(line)
            return
        text = b"".join([line, *(rest for _, rest in lines)])
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        at = number + text.count(b"\n", 0, error.start)
        raise DataError(f"{path}:{at}: not valid UTF-8 ({error.reason}). Save the file as UTF-8.") from error
    yield from _read_json_text(path, decoded, number)


def _read_json_text(path: Path, text: str, first_line: int) -> Iterator[NumberedRow]:
    """Rows of an array, or of objects that span lines."""

    def broken(at: int, message: str) -> DataError:
        return DataError(f"{path}:{first_line + text.count(NEWLINE, 0, at)}: not valid JSON: {message}.")

    decoder = json.JSONDecoder()
    at = _skip_space(text, 0)
    is_array = text[at] == "["
    if is_array:
        at = _skip_space(text, at + 1)
    line, counted = first_line, 0
    while at < len(text) and not (is_array and text[at] == "]"):
        line, counted = line + text.count(NEWLINE, counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise broken(
                getattr(error, "pos", at),
                f"{getattr(error, 'msg', error)}. What follows cannot be read either: mend the file, or keep "
                "one object per line, where a bad row costs only itself",
            ) from error
        yield line, _row_of(value)
        at = _skip_space(text, at)
        if is_array and at < len(text) and text[at] == ",":
            at = _skip_space(text, at + 1)
        elif is_array and at < len(text) and text[at] != "]":
            raise broken(at, "a comma is missing between two rows of the array")
    if not is_array:
        return
    if at >= len(text):
        raise broken(len(text.rstrip()), "the array is not closed")
    at = _skip_space(text, at + 1)
    if at < len(text):
        raise broken(at, "there is more text behind the end of the array")


def object_of(line: bytes) -> Row | DataError:
    """The row in a line of JSON."""
    try:
        return _row_of(json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return DataError(f"not valid UTF-8 ({error.reason} at byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return DataError(f"not valid JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:
        return DataError(f"not valid JSON: {error}")


def _row_of(value: Any) -> Row | DataError:
    if isinstance(value, dict):
        if value and all(isinstance(column, list) for column in value.values()) and _is_table(value):
            return DataError(
                f"this one object holds whole columns ({', '.join(value)}); save the table with one object "
                "per row"
            )
        return value
    return DataError(f"a row must be a JSON object with named fields, and this is {_json_name(value)}")


def _is_table(value: Row) -> bool:
    """Whether an object looks like a table saved by columns: text columns of one length, and many rows."""
    lengths = {len(column) for column in value.values()}
    return (
        len(value) > 1
        and len(lengths) == 1
        and all(column and all(isinstance(cell, str) for cell in column) for column in value.values())
    )


def _json_name(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None  # the pattern also matches nothing
    return match.end()


# --- CSV ----------------------------------------------------------------------------------------------------


def _read_csv(path: Path) -> Iterator[NumberedRow]:
    """CSV (or TSV) with a header. Every cell stays the text that it is; a number is the row's first line."""
    csv.field_size_limit(2**31 - 1)  # the module's own limit of 128 KiB is below what articles need
    with _open_bytes(path) as file:
        reader = csv.reader(_text_lines(file, path), delimiter=delimiter_of(path), strict=True)
        try:
            header = next((cells for cells in reader if cells), None)
            if header is None:
                return
            check_header(header, path, reader.line_num)
            while True:
                line = reader.line_num + 1
                cells = next(reader, None)
                if cells is None:
                    return
                if not cells:
                    continue
                if len(cells) != len(header):
                    yield line, DataError(f"{len(cells)} cells, where the header has {len(header)}")
                else:
                    yield line, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not valid CSV: {error}.") from error


def delimiter_of(path: Path) -> str:
    return "\t" if ".tsv" in (suffix.lower() for suffix in path.suffixes) else ","


def check_header(header: list[str], path: Path | str, line: int) -> None:
    """Raises DataError where two columns have one name."""
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}:{line}: the header names a column twice: {', '.join(map(repr, twice))}.")


def _text_lines(file: IO[bytes], path: Path) -> Iterator[str]:
    for number, line in _numbered_lines(file, path):
        yield utf8_line(line, path, number)


def utf8_line(line: bytes, path: Path | str, number: int) -> str:
    """A line of CSV as text."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        # A cell may span lines, so there is no telling where the next row begins.
        raise DataError(
            f"{path}:{number}: not valid UTF-8 ({error.reason} at byte {error.start + 1} of the line). "
            "Save the file as UTF-8."
        ) from error


# --- bytes --------------------------------------------------------------------------------------------------


@contextmanager
def _open_bytes(path: Path) -> Iterator[IO[bytes]]:
    if path.suffix.lower() == ".gz":
        with gzip.open(path, "rb") as unpacked:
            try:
                yield io.BufferedReader(unpacked)
            except (EOFError, gzip.BadGzipFile) as error:
                raise DataError(f"{path}: not a complete gzip file: {error}.") from error
    elif path.suffix.lower() == ".zst":
        import pyarrow as pa

        with pa.OSFile(str(path)) as raw, pa.CompressedInputStream(raw, "zstd") as stream:
            yield io.BufferedReader(stream)
    else:
        with path.open("rb") as file:
            yield file


def _numbered_lines(file: IO[bytes], path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their ends, split at b"\\n" only, without a byte order mark (which is said)."""
    for number, line in enumerate(file, start=1):
        yield number, text_start(line, path) if number == 1 else line


def text_start(line: bytes, path: Path | str) -> bytes:
    """The first line of a text without a byte order mark."""
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}: this is UTF-16 text. Save the file as UTF-8.")
    if line.startswith(codecs.BOM_UTF8):
        log.info("%s begins with a byte order mark, which is left out", path)
        return line[len(codecs.BOM_UTF8) :]
    return line


# --- columnar files -----------------------------------------------------------------------------------------


def _read_parquet(path: Path) -> Iterator[NumberedRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, without_nulls(row)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}.") from error


def _read_arrow(path: Path) -> Iterator[NumberedRow]:
    """Arrow's file format, or its stream format, which `datasets` writes."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            number = 0
            for batch in _file_batches(source) if is_file else pa.ipc.open_stream(source):
                for start in range(0, batch.num_rows, _BATCH):
                    for row in batch.slice(start, _BATCH).to_pylist():
                        number += 1
                        yield number, without_nulls(row)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Arrow file: {error}.") from error


def _file_batches(source: Any) -> Iterator[Any]:
    import pyarrow as pa

    reader = pa.ipc.open_file(source)
    for i in range(reader.num_record_batches):
        yield reader.get_batch(i)


def without_nulls(row: Row) -> Row:
    """The row, where nulls inside nested objects are left out.

    Arrow gives every object of a column the fields of all of them, with null where one has none: a message
    without tool calls would come back with `tool_calls: null`. Nulls of the columns themselves stay.
    """
    return {name: _pruned(value) for name, value in row.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _pruned(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [_pruned(inner) for inner in value]
    return value
