"""A stretch of the stream at a time: read, tokenised in memory, shuffled, and cut into steps.

A block is `shuffle_buffer_size` rows, or as many more as a step needs, and ends where a round of the data ends. What
is left over behind its last whole step is trained first in the block after; at the end of a round it is a smaller step
of its own, as at the end of an epoch. So a block depends on where the sources stand at its beginning and on what the
one before left over, and that one's left-overs are rows of its own: two blocks are enough to go on from anywhere. A
buffer that holds all of the data gives the steps of a run that reads it whole.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from luthier.config import Config
from luthier.config.preference import unit_of
from luthier.data.cache import Writer
from luthier.data.dataset import TokenDataset, name_of_type
from luthier.data.packing import best_fit
from luthier.data.report import SourceReport, merge_tallies
from luthier.data.stream.mix import Mix
from luthier.data.stream.sources import Position, Source
from luthier.data.stream.tokens import Maker
from luthier.data.tokenise import Chunk, ReadRow
from luthier.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

@dataclass
class Start:
    """Where a block begins: all that it depends on but what the one before left over. JSON can hold it.

    Attributes:
        block, step: how many blocks and steps are before it. round: how often the data was gone through. within: how
            many blocks of that round are before it.
        mix: where the sources stand. rows, documents: read and kept before it, of documents those of the round. whole:
            documents of a round, once one is through.
        carried: examples (packed rows) that the block before left over.
        reports: of each source, as JSON has it, what became of the rows before it.
    """

    block: int = 0
    step: int = 0
    round: int = 0
    within: int = 0
    mix: Position = field(default_factory=dict)
    rows: int = 0
    documents: int = 0
    whole: int = 0
    carried: int = 0
    reports: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Carry:
    """What a block leaves over: groups of documents, each an example or a packed row, and the documents' numbers."""

    chunk: Chunk
    groups: list[int]
    numbers: npt.NDArray[np.int64]


@dataclass
class Block:
    """Some steps of a run, and their documents.

    Attributes:
        numbers: of each document, its place among those of the round. steps: documents of each, by index.
        reports: of each source, what became of its rows in here. after: where the next block begins.
        ends_round: the data was at its end.
    """

    start: Start
    dataset: TokenDataset
    numbers: npt.NDArray[np.int64]
    steps: list[tuple[int, ...]]
    fill: float | None
    reports: list[SourceReport]
    carry: Carry | None
    after: Start
    ends_round: bool

    def digest(self) -> str:
        """Hash of the documents and of the steps that they are in."""
        content = hashlib.sha256(self.dataset.digests.tobytes() + self.dataset.trained.tobytes())
        content.update(repr(self.steps).encode())
        return content.hexdigest()


class Streamed(NamedTuple):
    """A stream that is opened, and its first block."""

    blocks: Blocks
    first: Block


class Blocks:
    """Makes the blocks of a stream, one from the other.

    Args:
        sources: of the config's `datasets`. starts: where each begins in every round.
        rows_per_step: examples in a step; packed rows, with `sample_packing`.
        processes: of the run, each of which tokenises.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        sources: Sequence[Source],
        starts: Sequence[Position | None],
        rows_per_step: int,
        processes: int = 1,
    ) -> None:
        data = config.data
        self.config, self.sources, self.starts, self.rows_per_step = config, sources, starts, rows_per_step
        self.packed_len = data.sequence_len if data.sample_packing else None
        self.stopped = threading.Event()
        self._maker = Maker(config, tokenizer, data.datasets, processes, self.stopped)
        self._mix: Mix | None = None

    def empty_reports(self) -> list[SourceReport]:
        rl = self.config.preference.rl
        return [
            SourceReport(source.shown, name_of_type(entry, rl), fingerprint_of(source), unit=unit_of(rl))
            for entry, source in zip(self.config.data.datasets, self.sources, strict=True)
        ]

    def go_to(self, start: Start) -> None:
        """Let the next block begin elsewhere than behind the last one that was made."""
        data = self.config.data
        weights = [entry.weight or 1.0 for entry in data.datasets] if data.mix_strategy == "interleave" else None
        at_first = data.mix_stopping == "first_exhausted"
        self._mix = Mix(self.sources, self.starts, weights, round_at_first=at_first, position=start.mix)

    def make(self, start: Start, carry: Carry | None) -> Block:
        """The block that begins at `start`, behind the last one that was made or where `go_to` went; it may have no
        step, if a round ends before its first row.

        Raises:
            DataError: a row is bad, or a source cannot be read. Stopped.
        """
        if self._mix is None:
            self.go_to(start)
        assert self._mix is not None
        mix, size = self._mix, self.config.data.shuffle_buffer_size
        reports = self.empty_reports()
        rows = start.rows
        with Writer(None) as writer:
            carried = 0
            if carry is not None:
                writer.add(carry.chunk)
                carried = len(carry.chunk.documents)
            numbered, lengths = [], []
            while True:
                read = _Reading(mix, rows, size)
                for index, chunk in self._maker.chunks(read):
                    reports[index].count(chunk)
                    writer.add(chunk)
                    numbered.append(chunk.documents["row"])
                    lengths.append(chunk.documents["length"])
                rows, ended = read.rows, read.ended
                if not start.documents and not any(map(len, lengths)):
                    raise DataError(_nothing_kept(reports))
                if ended or self._is_enough(lengths):
                    break
            store = writer.finish({})
        own = np.argsort(np.concatenate([np.zeros(0, np.int64), *numbered]), kind="stable")
        dataset = TokenDataset(store, np.concatenate([np.arange(carried), carried + own]))
        return self._cut(start, carry, dataset, reports, mix, rows, ended)

    def _is_enough(self, lengths: Sequence[npt.NDArray[Any]]) -> bool:
        if self.packed_len:
            return sum(int(each.sum()) for each in lengths) >= self.rows_per_step * self.packed_len
        return sum(map(len, lengths)) >= self.rows_per_step

    def _cut(
        self,
        start: Start,
        carry: Carry | None,
        dataset: TokenDataset,
        reports: list[SourceReport],
        mix: Mix,
        rows: int,
        ended: bool,
    ) -> Block:
        """Documents that are there into steps, and what is left over."""
        carried = carry.groups if carry is not None else []
        first = sum(carried)
        count = len(dataset) - first
        numbers = start.documents + np.arange(count)
        if carry is not None:
            numbers = np.concatenate([carry.numbers, numbers])
        ends = np.cumsum([0, *carried]).tolist()
        groups = [list(range(a, b)) for a, b in pairwise(ends)]
        lengths = dataset.lengths[first:]
        own = best_fit(lengths, self.packed_len) if self.packed_len else [[i] for i in range(count)]
        order: Any = range(len(own))
        if self.config.data.shuffle:
            seed = (self.config.training.seed, start.round, start.within)
            order = np.random.default_rng(seed).permutation(len(own))
        groups += [[first + i for i in own[group]] for group in order]
        n = self.rows_per_step
        # Where a block before this one was only counted, its left-overs take their place here too.
        missing = start.carried - len(carried)
        whole = len(groups) if ended else (missing + len(groups)) // n * n - missing
        cuts = [0, *range(n - missing, whole, n), whole] if whole else [0]
        steps = [tuple(row for group in groups[a:b] for row in group) for a, b in pairwise(cuts)]
        left = groups[whole:]
        rest = [row for group in left for row in group]
        after = Start(
            block=start.block + 1,
            step=start.step + len(steps),
            round=mix.round,
            within=0 if mix.round != start.round else start.within + 1,
            mix=mix.position(),
            rows=rows,
            documents=0 if ended else start.documents + count,
            whole=start.documents + count if ended else start.whole,
            carried=len(left),
            reports=[asdict(total) for total in add_up(start.reports, reports)],
        )
        fill = float(lengths.sum()) / (len(own) * self.packed_len) if self.packed_len and own else None
        carry = Carry(dataset.chunk(rest), [len(group) for group in left], numbers[rest]) if left else None
        return Block(start, dataset, numbers, steps, fill, reports, carry, after, ended)

    def close(self) -> None:
        self.stopped.set()
        self._maker.close()


def fingerprint_of(source: Source) -> str:
    """Hash of what is known of a source without reading it."""
    return hashlib.sha256(repr([tuple(stamp) for stamp in source.stamps]).encode()).hexdigest()


def add_up(before: Sequence[dict[str, Any]], more: Sequence[SourceReport]) -> list[SourceReport]:
    """Reports of sources up to a place, and of what follows, as reports of both."""
    if not before:
        return [SourceReport.from_json(asdict(report)) for report in more]
    totals = []
    for said, report in zip(before, more, strict=True):
        total = SourceReport.from_json(said)
        for name in ("rows", "kept", "tokens", "trained_tokens"):
            setattr(total, name, getattr(total, name) + getattr(report, name))
        total.longest = max(total.longest, report.longest)
        merge_tallies(total.dropped, report.dropped)
        merge_tallies(total.notes, report.notes)
        total.unused_columns = sorted({*total.unused_columns, *report.unused_columns})
        totals.append(total)
    return totals


def _nothing_kept(reports: Sequence[SourceReport]) -> str:
    rows = sum(report.rows for report in reports)
    if not rows:
        return f"{', '.join(report.path for report in reports)}: there are no rows in it to train on."
    reasons = "; ".join(
        f"{report.path}: {tally.count:,} {reason}, {tally.where()}"
        for report in reports
        for reason, tally in report.dropped.items()
    )
    return f"nothing in the first {rows:,} rows can be trained: all are left out ({reasons})."


class _Reading:
    """The next rows of a mix, each with the number of its dataset.

    Attributes:
        rows: number of the row after the last one that was read. ended: a round of the data ended before as many rows
            as were wanted.
    """

    def __init__(self, mix: Mix, rows: int, wanted: int) -> None:
        self._mix, self.rows, self._until, self.ended = mix, rows, rows + wanted, False

    def __iter__(self) -> Iterator[tuple[int, ReadRow]]:
        while self.rows < self._until:
            found = self._mix.next()
            if found is None:
                self.ended = True
                return
            index, location, row = found
            self.rows += 1
            yield index, (self.rows - 1, location, row)
