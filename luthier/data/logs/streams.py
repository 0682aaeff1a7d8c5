"""The bytes of a source, decompressed, in blocks.

What a file begins with says how it is compressed, not its name: rotated logs lose their ending. A compressed file
that breaks off, or is damaged further in, gives what comes before that, and it is counted.
"""

from __future__ import annotations

import bz2
import logging
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from luthier.data.logs import settings as bounds
from luthier.data.logs.counts import Counts
from luthier.data.logs.sources import Source
from luthier.errors import ConfigError, DataError

log = logging.getLogger("luthier")

MAGIC = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"), (b"\xfd7zXZ\x00", "xz"))
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # behind a byte 0x50 to 0x5f


def compression_of(head: bytes) -> str | None:
    """By the first bytes; None: as it is."""
    if head[1:4] == _ZSTD_SKIPPABLE and head[:1] and 0x50 <= head[0] <= 0x5F:
        return "zstd"
    return next((kind for magic, kind in MAGIC if head.startswith(magic)), None)


def blocks(source: Source, start: int, counts: Counts) -> Iterator[bytes]:
    """The stream from byte `start` of what is decompressed, in blocks of at most BLOCK bytes.

    Raises DataError: it cannot be read.
    """
    with source.open() as file:
        try:
            head = file.read(min(16, source.size))
            kind = compression_of(head)
            if kind is None and start >= len(head):
                file.seek(start)
                yield from _raw(file, source.size - start, b"")
                return
            raw = _raw(file, source.size - len(head), head)
            stream = raw if kind is None else _decompressed(raw, kind, source, counts)
            for block in stream:
                if start >= len(block):
                    start -= len(block)
                    continue
                yield block[start:] if start else block
                start = 0
        except (OSError, ValueError) as error:
            raise DataError(f"{source.name}: cannot be read further: {error}") from error


def size_of(source: Source) -> int:
    """Bytes of the stream: known, or counted by reading a compressed file once."""
    with source.open() as file:
        kind = compression_of(file.read(min(16, source.size)))
    return source.size if kind is None else sum(map(len, blocks(source, 0, Counts())))


def _raw(file: Any, left: int, head: bytes) -> Iterator[bytes]:
    if head:
        yield head
    while left > 0 and (block := file.read(min(bounds.BLOCK, left))):
        left -= len(block)
        yield block


class _Gzip:
    """zlib's decompressor with the interface that bz2 and lzma have."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)
        self._more = b""

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        out = self._inner.decompress(self._more + data, max(max_length, 0))
        self._more = self._inner.unconsumed_tail
        return out

    @property
    def needs_input(self) -> bool:
        return not self._more

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data


class _Zstd:
    """zstandard's, whose output cannot be bounded: little goes in at once, and a window of 128 MiB is the most."""

    def __init__(self) -> None:
        self._inner = _zstandard().ZstdDecompressor(max_window_size=1 << 27).decompressobj()
        self._more = b""

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        data = self._more + data
        # 2 KiB of zstd are some MB of the most repetitive text.
        first, self._more = data[:2048], data[2048:]
        return bytes(self._inner.decompress(first))

    @property
    def needs_input(self) -> bool:
        return not self._more

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._inner.unused_data) + self._more


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError("reading zstd needs the package zstandard: pip install 'luthier[logs]'") from error
    return zstandard


_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gzip": _Gzip,
    "zstd": _Zstd,
    "bzip2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
}


def _decompressed(raw: Iterator[bytes], kind: str, source: Source, counts: Counts) -> Iterator[bytes]:
    errors: tuple[type[Exception], ...] = (zlib.error, OSError, lzma.LZMAError, EOFError)
    if kind == "zstd":
        errors = (*errors, _zstandard().ZstdError)
    inner = _DECOMPRESSORS[kind]()
    fed = False  # whether this member (a file may be several, one behind the other) has got anything
    given = 0
    pending = b""
    while True:
        if not pending and (inner.needs_input or inner.eof):
            pending = next(raw, b"")
            if not pending:
                if fed and not inner.eof:
                    _breaks_off(source, kind, given, "it ends in the middle", counts)
                return
        if inner.eof:  # the next member; zeros behind the last one are padding
            pending = pending.lstrip(b"\x00")
            if not pending:
                continue
            if compression_of(pending) != kind and len(pending) >= 4:
                _breaks_off(source, kind, given, "something else follows", counts)
                return
            inner, fed = _DECOMPRESSORS[kind](), False
        try:
            block = inner.decompress(pending, bounds.BLOCK)
        except errors as error:
            _breaks_off(source, kind, given, str(error), counts)
            return
        pending, fed = b"", True
        for at in range(0, len(block), bounds.BLOCK):
            yield block[at : at + bounds.BLOCK]
        given += len(block)
        if inner.eof:
            pending = inner.unused_data


def _breaks_off(source: Source, kind: str, given: int, why: str, counts: Counts) -> None:
    counts["truncated"] += 1
    log.warning("%s: damaged %s (%s): the first %s bytes of the text are used", source.name, kind, why, f"{given:,}")
