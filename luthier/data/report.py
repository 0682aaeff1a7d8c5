"""What became of the rows: how many were read, kept, left out and why, and what is odd about those that were
kept.

Nothing that changes the data happens without a count here, with the first places where it happened.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

log = logging.getLogger("luthier")

BAD_ROW = "bad row"
TOO_LONG = "longer than sequence_len"
UNTRAINED = "no trained token"
TRUNCATED = "rows truncated to sequence_len"
SPLIT = "texts split into documents of sequence_len"

_SHOWN = 3


@dataclass(slots=True)
class Tally:
    """How often something happened, and where first: pairs of location and detail."""

    count: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)

    def add(self, location: str, detail: str = "", count: int = 1) -> None:
        self.count += count
        if len(self.first) < _SHOWN:
            self.first.append((location, detail))

    def merge(self, other: Tally) -> None:
        self.count += other.count
        self.first = (self.first + other.first)[:_SHOWN]

    def where(self) -> str:
        """For messages: "first: rows.jsonl:17 (3,105 tokens), :40"; a file is named once."""
        places, file = [], ""
        for location, detail in self.first:
            name, _, line = location.rpartition(":")
            place = f":{line}" if name == file else location
            places.append(f"{place} ({detail})" if detail else place)
            file = name
        return "first: " + ", ".join(places) if places else ""


Tallies = dict[str, Tally]


def merge_tallies(into: Tallies, other: Mapping[str, Tally]) -> None:
    for reason, tally in other.items():
        into.setdefault(reason, Tally()).merge(tally)


@dataclass(slots=True)
class SourceReport:
    """One entry of `datasets` (or `test_datasets`)."""

    path: str
    type: str
    fingerprint: str
    """Hash of the data files' content."""
    rows: int = 0
    kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    dropped: Tallies = field(default_factory=dict)
    notes: Tallies = field(default_factory=dict)
    unused_columns: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SourceReport:
        def tallies(name: str) -> Tallies:
            return {
                reason: Tally(tally["count"], [(place, detail) for place, detail in tally["first"]])
                for reason, tally in value[name].items()
            }

        return cls(**{**value, "dropped": tallies("dropped"), "notes": tallies("notes")})

    def lines(self) -> Iterable[tuple[int, str]]:
        """Log level and text of each thing to say."""
        left = sum(tally.count for tally in self.dropped.values())
        yield (
            logging.INFO,
            f"{self.path} ({self.type}): {self.rows:,} rows, {self.kept:,} documents, {self.tokens:,} tokens "
            f"({self.trained_tokens:,} trained), the longest {self.longest:,}; {left:,} left out",
        )
        for reason, tally in self.dropped.items():
            yield (
                logging.WARNING,
                f"{self.path}: {tally.count:,} ({tally.count / self.rows:.1%}) left out: {reason}; "
                f"{tally.where()}",
            )
        for note, tally in self.notes.items():
            yield logging.INFO, f"{self.path}: {tally.count:,} {note}; {tally.where()}"
        if self.unused_columns:
            yield logging.INFO, f"{self.path}: columns that are not read: {', '.join(self.unused_columns)}"


@dataclass(slots=True)
class DataReport:
    """The whole of a run's data. Counts of rows and drops are over `datasets`, before validation is split
    off."""

    sources: list[SourceReport]
    test_sources: list[SourceReport]
    cache_hit: bool
    seconds: float
    train_documents: int = 0
    validation_documents: int = 0
    duplicates: int = 0
    """Documents of the training data that are there already, token for token."""
    overlap: int = 0
    """Documents of the validation data that are in the training data as well."""
    histogram: list[tuple[int, int, int]] = field(default_factory=list)
    """Lengths of training documents: shortest and longest of the bin, and how many."""

    @property
    def rows(self) -> int:
        return sum(source.rows for source in self.sources)

    @property
    def kept(self) -> int:
        return sum(source.kept for source in self.sources)

    @property
    def tokens(self) -> int:
        return sum(source.tokens for source in self.sources)

    @property
    def trained_tokens(self) -> int:
        return sum(source.trained_tokens for source in self.sources)

    @property
    def longest(self) -> int:
        return max((source.longest for source in self.sources), default=0)

    @property
    def dropped(self) -> Tallies:
        total: Tallies = {}
        for source in self.sources:
            merge_tallies(total, source.dropped)
        return total

    def lines(self) -> list[str]:
        """All there is to say, one fact a line."""
        return [text for _, text in self._levels_and_lines()]

    def log(self) -> None:
        """Say it: what was lost as warnings, the rest as information."""
        for level, text in self._levels_and_lines():
            log.log(level, text)

    def describe(self) -> dict[str, Any]:
        """The same for machines: plain values that JSON can hold."""
        return asdict(self)

    def _levels_and_lines(self) -> list[tuple[int, str]]:
        lines = [line for source in [*self.sources, *self.test_sources] for line in source.lines()]
        parts = f"{self.train_documents:,} documents to train on"
        if self.validation_documents:
            parts += f", {self.validation_documents:,} for validation"
        how = "from the cache" if self.cache_hit else "tokenised"
        lines.append((logging.INFO, f"{parts} ({how}, {self.seconds:.1f} s)"))
        if self.duplicates:
            lines.append((logging.INFO, f"{self.duplicates:,} training documents are repeats of others"))
        if self.overlap:
            lines.append(
                (
                    logging.WARNING,
                    f"{self.overlap:,} of {self.validation_documents:,} validation documents are in the "
                    "training data too, token for token: the validation loss is too good by that",
                )
            )
        return lines


def length_histogram(lengths: npt.NDArray[Any], bins: int = 12) -> list[tuple[int, int, int]]:
    """Bins of equal width in whole tokens, as (shortest, longest, count)."""
    if not len(lengths):
        return []
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // bins))
    counts = np.bincount((np.asarray(lengths, dtype=np.int64) - low) // width)
    return [
        (low + i * width, min(high, low + (i + 1) * width - 1), int(count)) for i, count in enumerate(counts)
    ]
