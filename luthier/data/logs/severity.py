"""How bad a record says that it is, and the record without that word: the question of the `severity` rows.

The label is what stands in the head of a record, where loggers write it. What is asked about has no word of any
level left, wherever it stood: each is <LEVEL>, so that neither the word nor its absence gives the answer away.
"""

from __future__ import annotations

import re

_LEVELS = {
    "trace": "TRACE", "finest": "TRACE", "finer": "TRACE", "verbose": "TRACE",
    "debug": "DEBUG", "fine": "DEBUG", "dbg": "DEBUG",
    "info": "INFO", "information": "INFO", "informational": "INFO", "inf": "INFO",
    "notice": "NOTICE",
    "warn": "WARNING", "warning": "WARNING", "wrn": "WARNING",
    "error": "ERROR", "err": "ERROR", "severe": "ERROR",
    "critical": "CRITICAL", "crit": "CRITICAL", "fatal": "CRITICAL", "emerg": "CRITICAL", "emergency": "CRITICAL",
    "alert": "CRITICAL", "panic": "CRITICAL",
}  # fmt: skip
_KLOG = {"I": "INFO", "W": "WARNING", "E": "ERROR", "F": "CRITICAL"}
_WORD = "|".join(sorted(_LEVELS, key=len, reverse=True))
_HEAD = 160  # characters in which a level is looked for
_NAMED = re.compile(
    rf"(?i:\b(?:level|severity|lvl|loglevel|log_level|priority)[\"']?\s?[=:]\s?[\"']?)(?P<level>(?i:{_WORD}))\b"
)
_BRACKETS = re.compile(rf"[\[<(|]\s*(?:[a-z_]+:)?(?P<level>(?i:{_WORD}))\s*(?::[^\]>)|]*)?[\]>)|]")
_CAPITALS = re.compile(rf"(?<![\w$.-])(?P<level>{_WORD.upper()})(?![\w$.-])")
_BEFORE_COLON = re.compile(rf"(?:^|\s)(?P<level>(?i:{_WORD})):\s")
_GLOG = re.compile(r"(?P<level>[IWEF])\d{4} \d\d:\d\d:\d\d")
_ANY = re.compile(rf"(?<![A-Za-z0-9])(?i:{_WORD}|errors|warnings)(?![A-Za-z0-9])")


def severity_of(text: str) -> str | None:
    """Its level, of seven; None: it says none."""
    head = text[:_HEAD].partition("\n")[0]
    if found := _GLOG.match(head):
        return _KLOG[found["level"]]
    for pattern in (_NAMED, _BRACKETS, _CAPITALS, _BEFORE_COLON):
        if found := pattern.search(head):
            return _LEVELS[found["level"].lower()]
    return None


def without_severity(text: str) -> str:
    if _GLOG.match(text):
        text = f"<LEVEL>{text[1:]}"
    return _ANY.sub("<LEVEL>", text)
