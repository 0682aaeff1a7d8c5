"""What became of the rows: how many were read, kept, left out and why, and what is odd about those that were
kept.

Nothing that changes the data happens without a count here, with the first places where it happened.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from luthier.data.mixed import MixReport
    from luthier.data.tokenise import Chunk

log = logging.getLogger("luthier")

BAD_ROW = "bad row"
TOO_LONG = "longer than sequence_len"
UNTRAINED = "no trained token"
IDENTICAL = "chosen and rejected are the same, so there is nothing to compare"
SAME_TOKENS = "chosen and rejected come out as the same tokens"
PROMPT_TOO_LONG = "prompt longer than max_prompt_len"
TRUNCATED = "rows truncated to sequence_len"
PROMPT_TRUNCATED = "prompts truncated to max_prompt_len"
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
    """Tokens of the longest document; of pairs, of the longest answer with its prompt."""
    unit: str = "documents"
    """What a row becomes: documents, pairs of answers, or answers."""
    dropped: Tallies = field(default_factory=dict)
    notes: Tallies = field(default_factory=dict)
    unused_columns: list[str] = field(default_factory=list)

    def count(self, chunk: Chunk) -> None:
        """Add what became of a chunk's rows."""
        self.rows += chunk.rows
        self.kept += len(chunk.documents)
        self.tokens += len(chunk.input_ids)
        self.trained_tokens += int(chunk.documents["trained"].sum())
        longest = chunk.documents["length"] if self.unit == "documents" else chunk.parts
        self.longest = max(self.longest, int(longest.max(initial=0)))
        merge_tallies(self.dropped, chunk.dropped)
        merge_tallies(self.notes, chunk.notes)
        self.unused_columns = sorted({*self.unused_columns, *chunk.columns})

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
            f"{self.path} ({self.type}): {self.rows:,} rows, {self.kept:,} {self.unit}, {self.tokens:,} tokens "
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
class Balance:
    """How many answers are desirable and how many are not, and what each weighs in the loss.

    Ethayarajh et al. 2024 (KTO, section 4.2) choose the weights so that the two sides weigh between 1:1 and 4:3.
    """

    desirable: int
    undesirable: int
    desirable_weight: float
    undesirable_weight: float

    def line(self) -> tuple[int, str]:
        """Log level and what to say of it."""
        counts = f"{self.desirable:,} desirable and {self.undesirable:,} undesirable answers"
        if not self.desirable or not self.undesirable:
            return logging.WARNING, f"{counts}: there is nothing to tell apart, as kto needs both labels"
        good, bad = self.desirable * self.desirable_weight, self.undesirable * self.undesirable_weight
        weigh = f"{counts}, which weigh {good / bad:.2f}:1 in the loss; kto's authors keep that between 1:1 and 4:3"
        if 0.9 * bad <= good <= 1.5 * bad:  # a few answers more or less are no reason to choose weights
            return logging.INFO, weigh
        if good > bad:
            low, high = good / self.undesirable * 3 / 4, good / self.undesirable
            change = f"kto_undesirable_weight between {low:.3g} and {high:.3g}"
        else:
            low, high = bad / self.desirable, bad / self.desirable * 4 / 3
            change = f"kto_desirable_weight between {low:.3g} and {high:.3g}"
        return logging.WARNING, f"{weigh}, which {change} would do"


@dataclass(slots=True)
class Repeats:
    """Documents of the training data that are there before, or in the validation data too, and whether they were left
    out (`data.duplicates`). Details of the tallies say which document each is the same as, or near to."""

    removed: bool
    threshold: float | None = None
    """Jaccard similarity from which documents are near; None: only equal ones were looked for."""
    exact: Tally = field(default_factory=Tally)
    near: Tally = field(default_factory=Tally)
    contaminating: Tally = field(default_factory=Tally)
    """Equal to a validation document."""
    near_contaminating: Tally = field(default_factory=Tally)
    in_validation: int = 0
    """Validation documents that are there before; they stay."""
    unsure: int = 0
    """Documents that stayed, and had more likely twins than they were compared with."""
    between: list[tuple[str, str, int]] = field(default_factory=list)
    """(dataset of the repeat, dataset of what it repeats, how many)."""
    shared_text: int = 0
    """Validation documents that have a long run of tokens in common with training documents that are left."""
    run_length: int = 0
    looked_through: float = 0.0
    """Share of the training tokens that was searched for such runs."""

    def lines(self, unit: str, validation: int, sources: int) -> Iterable[tuple[int, str]]:
        """Log level and text of each thing to say."""
        near = f"nearly (Jaccard {self.threshold:g})" if self.threshold is not None else ""
        for tally, where in (
            (self.contaminating, "in the validation data, token for token"),
            (self.near_contaminating, f"in the validation data, {near}"),
            (self.exact, "repeats of others"),
            (self.near, f"repeats of others, {near}"),
        ):
            if tally.count and self.removed:
                yield logging.INFO, f"{tally.count:,} training {unit} left out, which are {where}; {tally.where()}"
        if self.between and sources > 1:
            pairs = "; ".join(
                f"{count:,} of {one} in {'itself' if one == other else other}" for one, other, count in self.between
            )
            yield logging.INFO, f"repeats by dataset: {pairs}"
        if self.unsure:
            yield (
                logging.WARNING,
                f"{self.unsure:,} training {unit} may be repeats all the same: they have more likely twins "
                "than each is compared with",
            )
        if self.in_validation:
            yield logging.INFO, f"{self.in_validation:,} validation {unit} are repeats of others there, and stay"
        if self.shared_text:
            whole = self.looked_through > 0.995
            searched = "" if whole else f" (in {self.looked_through:.0%} of them, drawn at random)"
            yield (
                logging.INFO,
                f"{self.shared_text:,} of {validation:,} validation {unit} have {self.run_length} tokens in a "
                f"row (about 13 words) in common with training {unit}{searched}: `luthier inspect data` shows them",
            )


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
    """Lengths of training documents (of pairs, of each answer with its prompt): shortest and longest of the bin, and
    how many."""
    unit: str = "documents"
    """What a row is to the run: documents, pairs of answers, or answers."""
    tokens_in_pairs: int = 0
    """Tokens of the training data's pairs, each answer with its prompt."""
    prompt_tokens: int = 0
    """Tokens of the prompts of those pairs, counted once for both answers."""
    stream: str = ""
    """Of a stream: what is known of it, and which rows the rest of this is about."""
    balance: Balance | None = None
    """Labels of the training data, where answers are desirable or not."""
    mix: MixReport | None = None
    """What the run's steps hold of each dataset; known once there are steps."""
    repeats: Repeats | None = None
    """What repeats, and what of it was left out. `duplicates` and `overlap` are what is left of both."""

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
        lines = [(logging.INFO, self.stream)] if self.stream else []
        lines += [line for source in [*self.sources, *self.test_sources] for line in source.lines()]
        parts = f"{self.train_documents:,} {self.unit} to train on"
        if self.validation_documents:
            parts += f", {self.validation_documents:,} for validation"
        how = "from the cache" if self.cache_hit else "tokenised"
        lines.append((logging.INFO, f"{parts} ({how}, {self.seconds:.1f} s)"))
        if self.tokens_in_pairs:
            lines.append(
                (
                    logging.INFO,
                    f"{self.prompt_tokens:,} tokens of prompts stand before both answers of a pair: as many of "
                    f"{self.tokens_in_pairs:,} ({self.prompt_tokens / self.tokens_in_pairs:.0%}) need not be "
                    "computed twice",
                )
            )
        if self.balance is not None:
            lines.append(self.balance.line())
        if self.duplicates:
            lines.append((logging.INFO, f"{self.duplicates:,} training {self.unit} are repeats of others"))
        if self.overlap:
            lines.append(
                (
                    logging.WARNING,
                    f"{self.overlap:,} of {self.validation_documents:,} validation {self.unit} are in the "
                    "training data too, token for token: the validation loss is too good by that. "
                    "`dataset_exact_deduplication: true` leaves them out of the training data",
                )
            )
        if self.repeats is not None:
            lines += self.repeats.lines(self.unit, self.validation_documents, len(self.sources))
        if self.mix is not None:
            lines += self.mix.lines()
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
