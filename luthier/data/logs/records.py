"""Lines -> records: what was logged at once, with the lines that go on with it (a stack trace, a message of several
lines).

Where a file's lines begin with a time (or with a pattern of one's own), what does not begin so belongs to the record
before. Where they do not, a line is a record unless it looks like the middle of one: indented, or one of the words
in which stack traces go on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from luthier.data.logs.counts import Counts
from luthier.data.logs.decode import Lines
from luthier.data.logs.settings import MAX_RECORD_CHARACTERS, MAX_RECORD_LINES
from luthier.errors import ConfigError

_MONTH = "(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)"
_DAY = "(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)"
_CLOCK = r"\d\d?:\d\d(?::\d\d(?:[.,:]\d+)?)?"
_ZONE = r"(?: ?(?:Z|UTC|GMT|[+-]\d\d:?\d\d))?"
_LEVELS = "(?:TRACE|DEBUG|INFO|NOTICE|WARN|WARNING|ERROR|CRITICAL|FATAL|SEVERE|FINE|FINER|FINEST)"
_TIMES = (
    rf"\d{{4}}[-/.]\d\d[-/.]\d\d(?:[T _-]{_CLOCK})?{_ZONE}",  # ISO 8601 and its neighbours
    rf"{_MONTH} +\d{{1,2}}(?:,? \d{{4}},?)? {_CLOCK}(?: [AP]M)?",  # syslog, java.util.logging
    rf"{_DAY},? (?:{_MONTH} +\d{{1,2}}|\d{{1,2}} {_MONTH}(?: \d{{4}})?) {_CLOCK}(?: [A-Z]{{3,4}})?(?: \d{{4}})?",
    rf"\d{{1,2}}[-/ ]{_MONTH}[-/ ]\d{{2,4}}[ :T]{_CLOCK}{_ZONE}",
    rf"\d{{1,2}}[-/.]\d{{1,2}}[-/.]\d{{2,4}},? {_CLOCK}(?: [AP]M)?",
    rf"\d\d-\d\d {_CLOCK}",  # Android
    r"\d{6} \d{6}(?= )",  # HDFS
    r"\d{10}(?:\.\d+|\d{3})?(?=[ ,:\]])",  # seconds or milliseconds since 1970
    r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+",  # glog, klog
    rf"\d\d:\d\d:\d\d(?:[.,]\d+)?{_ZONE}",
    r" *\d+\.\d{6}(?=\])",  # the kernel
)
_TIME = "(?:" + "|".join(_TIMES) + ")"
# What may stand before the time: a priority, a bracket, a level, a host or address as web servers write it.
LEAD = re.compile(
    rf"(?:<\d{{1,3}}>\d? ?)?(?:[\[(\"'|]? ?{_TIME}|\[?{_LEVELS}\]?[ :|-]+[\[(]?{_TIME}|\S+ \S+ \S+ \[{_TIME}"
    rf"|\S{{1,3}} \d{{10}} {_TIME})[\])\"'|]?",
    re.ASCII,
)
_GOES_ON = re.compile(
    r"\s|Caused by:|Suppressed:|at [\w.$<>/]+\(|\.\.\. \d+ (?:more|common)|During handling of the above|"
    r"The above exception was|Traceback \(most recent|[})\]]+[,;]?$"
)
_ENDS_TRACEBACK = re.compile(r"[A-Za-z_][\w.]*(?:Error|Exception|Warning|Interrupt|Exit|Iteration)\b(?::|$)")


class Record(NamedTuple):
    """Attributes:
    start, end: bytes of the stream. line: number of its first line, from 1. lines: how many it has.
    """

    text: str
    start: int
    end: int
    line: int
    lines: int


@dataclass(frozen=True)
class Starts:
    """How a source's records begin: `pattern` matches at the beginning of a line, or None: by what goes on."""

    pattern: re.Pattern[str] | None


def own_start(text: str) -> re.Pattern[str]:
    """Raises ConfigError: no regular expression, or one that matches any line."""
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise ConfigError(f"--record-start {text!r} is no regular expression: {error}") from error
    if pattern.match(""):
        raise ConfigError(f"--record-start {text!r} matches an empty line, so that every line would begin a record")
    return pattern


def starts_of(sample: Iterable[str]) -> Starts:
    """By a source's first lines: whether it is led by times."""
    lines = [line for line in sample if line.strip()]
    outer = [line for line in lines if not _GOES_ON.match(line)]
    # A log of long stack traces has few lines with a time, but then the first one has it.
    led = sum(bool(LEAD.match(line)) for line in outer)
    if outer and (led >= 0.5 * len(outer) or (LEAD.match(outer[0]) and led >= 0.02 * len(outer) and led > 1)):
        return Starts(LEAD)
    return Starts(None)


class Joiner:
    """One source's. `records` may be called block by block; `last` gives what is left at the end."""

    def __init__(self, starts: Starts, counts: Counts, at: int = 0) -> None:
        """`at`: the byte of the stream at which the lines begin."""
        self._begins = starts.pattern.match if starts.pattern is not None else None
        self._counts = counts
        self._at = self._start = self._end = at
        self._line = self._first = self._last = 0
        self._length = 0
        self._texts: list[str] = []
        self._traceback = self._key = False

    def records(self, lines: Lines) -> list[Record]:
        """Those that have ended, which is known when the next one begins."""
        found: list[Record] = []
        begins, texts = self._begins, self._texts
        at, line = self._at, self._line
        for text, size in lines:
            line += 1
            if not text or text.isspace():
                at += size
                continue
            new = begins(text) is not None if begins is not None else self._looks_new(text)
            if texts and (new or len(texts) >= MAX_RECORD_LINES or self._length > MAX_RECORD_CHARACTERS):
                self._counts["records_split"] += not new
                found.append(self._record())
            if not texts:
                self._start, self._first, self._length = at, line, 0
            texts.append(text)
            self._length += len(text)
            at += size
            self._end, self._last = at, line
        self._counts["lines"] += line - self._line
        self._at, self._line = at, line
        return found

    def last(self) -> list[Record]:
        return [self._record()] if self._texts else []

    def _record(self) -> Record:
        texts = self._texts
        self._counts["lines_joined"] += len(texts) - 1
        text = "\n".join(texts) if len(texts) > 1 else texts[0]
        texts.clear()
        return Record(text, self._start, self._end, self._first, self._last - self._first + 1)

    def _looks_new(self, text: str) -> bool:
        if self._key or ("PRIVATE KEY-----" in text and "-----BEGIN" in text):
            new, self._key = not self._key, "-----END" not in text
            return new
        new = _GOES_ON.match(text) is None
        if self._traceback and new and _ENDS_TRACEBACK.match(text):
            self._traceback = False
            return False
        if new or text.startswith("Traceback ("):
            # A traceback goes on with the record before it, and ends with the name of the error.
            self._traceback = text.startswith("Traceback (")
        return new

    def state(self) -> dict[str, Any]:
        """For `restore`; JSON."""
        return {name: getattr(self, name) for name in _STATE}

    def restore(self, state: dict[str, Any]) -> None:
        for name in _STATE:
            setattr(self, name, state[name])


_STATE = ("_at", "_start", "_end", "_line", "_first", "_last", "_length", "_texts", "_traceback", "_key")
