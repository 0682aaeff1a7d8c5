"""Blocks of bytes -> lines of text, with the bytes that each takes in the stream.

Most blocks are UTF-8 without anything odd, and are decoded and split as a whole. Only where a block holds other bytes
are its lines looked at one by one: a line that is no UTF-8 is read as Windows-1252, control characters and the
colours of terminals are removed, and a line that is mostly neither text nor control characters known in text is
binary and skipped.
"""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Iterable
from typing import Any

from luthier.data.logs.counts import Counts
from luthier.errors import ConfigError

log = logging.getLogger("luthier")

Lines = list[tuple[str, int]]
"""Text without its line end, and its bytes with it. Empty text stands for what was skipped, too."""

SNIFFED = 65536
_CONTROL = bytes(n for n in range(32) if n not in b"\t\n\r") + b"\x7f"
_ODD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]")
_COLOURS = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[()][A-Z0-9])")
_NOT_CP1252 = (0x81, 0x8D, 0x8F, 0x90, 0x9D)
_LINE_END = re.compile(rb"\r\n|\n|\r")
_WIDE_END = re.compile("\r\n|\n|\r")
_KINDS = (
    (b"\x7fELF", "programs"), (b"MZ", "programs"),
    (b"\x89PNG", "images"), (b"\xff\xd8\xff", "images"), (b"GIF8", "images"),
    (b"PK\x03\x04", "zip archives (unpack them first)"), (b"%PDF", "PDFs"), (b"SQLite format 3", "databases"),
    (b"PAR1", "parquet files"), (b"LPKSHHRH", "journals of systemd (journalctl writes them as text)"),
    (b"7z\xbc\xaf", "7z archives (unpack them first)"), (b"Rar!", "rar archives (unpack them first)"),
)  # fmt: skip


def encoding_of(head: bytes, asked: str | None) -> tuple[str, int]:
    """The encoding of a text by its first bytes, and the bytes of its mark (BOM)."""
    marks = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
    for mark, name in marks:
        if head.startswith(mark):
            return name, len(mark)
    if asked:
        return asked, 0
    # UTF-16 without a mark: every other byte of text in Latin letters is zero.
    even, odd = head[0::2].count(0), head[1::2].count(0)
    half = len(head) // 2
    if half >= 8 and odd > 0.6 * half and even < 0.05 * half:
        return "utf-16-le", 0
    if half >= 8 and even > 0.6 * half and odd < 0.05 * half:
        return "utf-16-be", 0
    return "utf-8", 0


def binary_kind(head: bytes) -> str | None:
    """What a file is that is no text, by its first bytes; None: text, or mostly. For what is not UTF-16."""
    for magic, kind in _KINDS:
        if head.startswith(magic) and is_binary(head[:512]):
            return kind
    if head[257:262] == b"ustar":
        return "tar archives (unpack them first)"
    lines = [line for line in head.split(b"\n") if line]
    bad = sum(len(line) for line in lines if is_binary(line))
    return "binary" if bad > 0.5 * len(head) else None


def is_binary(line: bytes) -> bool:
    """Whether bytes are no text: control characters, or bytes that no UTF-8 has and hardly a Windows-1252 text."""
    control = len(line) - len(line.translate(None, _CONTROL))
    if not control:
        return False
    # A text with zeros before or behind it (a preallocated file) is a text.
    stripped = line.strip(b"\x00")
    if not stripped:
        return True
    if len(stripped) < len(line):
        return is_binary(stripped)
    escapes = line.count(b"\x1b")
    high = len(line) - len(line.translate(None, bytes(range(128, 256))))
    try:
        line.decode("utf-8")
        high = 0
    except UnicodeDecodeError:
        pass
    return (control - escapes) > 0.1 * len(line) or (control > escapes and control + high > 0.3 * len(line))


def _mostly_high(line: bytes) -> bool:
    """What a short piece of a blob between two line ends looks like: hardly any of it is ASCII."""
    return 0 < len(line) < 32 and len(line) - len(line.translate(None, bytes(range(128, 256)))) > 0.3 * len(line)


class Decoder:
    """One source's. `lines` may be called block by block; `last` gives what is left at the end."""

    def __init__(self, encoding: str, max_line: int, counts: Counts) -> None:
        """Raises ConfigError: no such encoding."""
        try:
            self._encoding = codecs.lookup(encoding).name
        except LookupError as error:
            raise ConfigError(f"--encoding {encoding}: Python knows no such encoding") from error
        self._wide = self._encoding.startswith("utf-16")
        self._max = max_line - max_line % 2
        self._counts = counts
        self._rest = b""
        self._held: bytes | None = None  # the beginning of a line that is too long and has not ended yet
        self._dropped = 0  # bytes of it
        self._in_blob = False

    def lines(self, block: bytes) -> Lines:
        """Those that end in this block."""
        data = self._rest + block
        end = self._last_end(data)
        if end == 0:
            self._rest = data
            return self._bounded()
        whole, self._rest = data[:end], data[end:]
        found = self._wide_lines(whole) if self._wide else self._split(whole)
        return self._after_a_cut(found)

    def last(self) -> Lines:
        """The line that has no end."""
        data, self._rest = self._rest, b""
        if not data and self._held is None:
            return []
        found = self._wide_lines(data) if self._wide else self._split(data)
        return self._after_a_cut(found or [("", 0)])

    def state(self) -> dict[str, Any]:
        """For `restore`; JSON."""
        held = None if self._held is None else self._held.decode("latin-1")
        return {"rest": self._rest.decode("latin-1"), "held": held, "dropped": self._dropped, "blob": self._in_blob}

    def restore(self, state: dict[str, Any]) -> None:
        self._rest = state["rest"].encode("latin-1")
        self._held = None if state["held"] is None else state["held"].encode("latin-1")
        self._dropped, self._in_blob = state["dropped"], state["blob"]

    # --- line ends

    def _last_end(self, data: bytes) -> int:
        """Where the last line that is whole ends. A \\r at the very end may be half of \\r\\n."""
        if self._wide:
            return self._last_wide_end(data)
        end = data.rfind(b"\n") + 1
        if end == 0 or b"\r" in data[end:]:
            end = max(end, data.rfind(b"\r", 0, len(data) - 1) + 1)
        return end

    def _last_wide_end(self, data: bytes) -> int:
        """As `_last_end`, in units of two bytes."""
        even = len(data) - len(data) % 2
        end = self._behind_last("\n", data, even)
        return max(end, self._behind_last("\r", data, even - 2))

    def _behind_last(self, character: str, data: bytes, at: int) -> int:
        mark = character.encode(self._encoding)
        while (at := data.rfind(mark, 0, max(at, 0))) >= 0:
            if at % 2 == 0:
                return at + 2
            at += 1
        return 0

    def _bounded(self) -> Lines:
        """A line that has grown too long without an end: what it may be long is kept, the rest passed over."""
        size = len(self._rest) - (len(self._rest) % 2 if self._wide else 0)
        if size <= 2 * self._max:
            return []
        dropped = size
        if self._held is None:
            self._held, self._dropped = self._rest[: self._max], 0
            self._counts["lines_cut"] += 1
            dropped -= self._max
        self._dropped += dropped
        self._counts["bytes_cut"] += dropped
        self._rest = self._rest[size:]
        return []

    def _after_a_cut(self, found: Lines) -> Lines:
        """The first line of these is the end of one that was cut before."""
        if self._held is None:
            return found
        size = found[0][1]
        self._counts["bytes_cut"] += size
        text = self._held.decode(self._encoding, "replace") if self._wide else self._text(self._held)
        total = len(self._held) + self._dropped + size
        self._held = None
        return [(text, total), *found[1:]]

    # --- decoding

    def _split(self, data: bytes) -> Lines:
        sizes: Iterable[int]
        if b"\r" not in data:
            parts = data.split(b"\n")
            sizes = [len(part) + 1 for part in parts]
        elif data.count(b"\r") == data.count(b"\r\n"):
            parts = data.split(b"\n")
            sizes = [len(part) + 1 for part in parts]
            parts = [part[:-1] if part.endswith(b"\r") else part for part in parts]
        else:
            parts, sizes = _split_anywhere(data)
        if not parts[-1]:
            parts, sizes = parts[:-1], list(sizes)[:-1]
        elif not data.endswith((b"\n", b"\r")):
            sizes = [*list(sizes)[:-1], len(parts[-1])]
        return list(zip(self._decoded(parts, data), sizes, strict=True))

    def _decoded(self, parts: list[bytes], data: bytes) -> list[str]:
        plain = len(data.translate(None, _CONTROL)) == len(data)
        if plain and max(map(len, parts), default=0) <= self._max:
            self._in_blob = False
            try:
                joined = b"\n".join(parts).decode(self._encoding)
            except UnicodeDecodeError:
                pass
            else:
                # Other encodings than UTF-8 may have line ends of their own; then the numbers differ.
                texts = joined.split("\n")
                if len(texts) == len(parts) and (joined.isascii() or not _ODD.search(joined)):
                    return texts
        return [self._text(part) for part in parts]

    def _text(self, line: bytes) -> str:
        """One line that may have anything in it."""
        counts = self._counts
        if is_binary(line) or (self._in_blob and _mostly_high(line)):
            counts["binary_blobs"] += not self._in_blob
            counts["binary_bytes"] += len(line)
            self._in_blob = True
            return ""
        self._in_blob = self._in_blob and not line
        if len(line) > self._max:
            counts["lines_cut"] += 1
            counts["bytes_cut"] += len(line) - self._max
            line = line[: self._max]
            while self._encoding == "utf-8" and line and line[-1] & 0xC0 == 0x80:  # not in the middle of a character
                line = line[:-1]
            if self._encoding == "utf-8" and line and line[-1] >= 0xC0:
                line = line[:-1]
        try:
            text = line.decode(self._encoding)
        except UnicodeDecodeError:
            counts["lines_fallback"] += 1
            # Five bytes mean nothing in Windows-1252; a text with one of them is Latin-1.
            text = line.decode("latin-1" if any(byte in line for byte in _NOT_CP1252) else "cp1252")
        return self._clean(text)

    def _clean(self, text: str) -> str:
        if _ODD.search(text):
            cleaned = _ODD.sub("", _COLOURS.sub("", text))
            self._counts["control_characters"] += len(text) - len(cleaned)
            return cleaned
        return text

    def _wide_lines(self, data: bytes) -> Lines:
        text = data.decode(self._encoding, "replace")
        self._counts["characters_replaced"] += text.count("\ufffd")
        lines: Lines = []
        at = 0
        for found in _WIDE_END.finditer(text):
            end = found.start()
            lines.append(self._wide_line(text[at:end], found.end() - end))
            at = found.end()
        if at < len(text):
            lines.append(self._wide_line(text[at:], 0))
        return lines

    def _wide_line(self, text: str, units: int) -> tuple[str, int]:
        """`units`: of two bytes, of its end."""
        size = 2 * (len(text) + units + (0 if text.isascii() else sum(ch > "\uffff" for ch in text)))
        if len(text) > self._max:
            self._counts["lines_cut"] += 1
            self._counts["bytes_cut"] += 2 * (len(text) - self._max)
            text = text[: self._max]
        return self._clean(text), size


def _split_anywhere(data: bytes) -> tuple[list[bytes], list[int]]:
    """At \\r\\n, \\n and \\r alike."""
    parts, sizes, at = [], [], 0
    for found in _LINE_END.finditer(data):
        parts.append(data[at : found.start()])
        sizes.append(found.end() - at)
        at = found.end()
    return [*parts, data[at:]], [*sizes, len(data) - at + 1]
