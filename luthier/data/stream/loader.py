"""Optimizer steps over a stream: those of the block at hand, while the next one is made in a thread.

A step has its number as everywhere, but can be had only in order: a run that goes on says where (`go_on`), in the words
that `standing` wrote into its checkpoint.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from luthier.config.preference import unit_of
from luthier.data.batches import Batch, make_batch, spare
from luthier.data.loader import Step, StepLoader
from luthier.data.report import SourceReport
from luthier.data.stream.blocks import Block, Blocks, Carry, Start, add_up
from luthier.data.stream.tokens import Stopped
from luthier.errors import DataError, RunError

log = logging.getLogger("luthier")

_SHOWN = 5  # files that are named


@dataclass(frozen=True)
class StreamStep(Step):
    """A step whose documents may be gone when somebody asks for their `places`."""

    places: tuple[str, ...] = ()


class StreamLoader(StepLoader):
    """Steps of the blocks of a stream, in order.

    Args:
        first: the block that the stream begins with. total_steps: of the run. agree: is told what the rows of each
            block are, and raises where other processes have others.
        settings: those of `StepLoader`.

    Attributes:
        block: at hand.
    """

    def __init__(
        self,
        blocks: Blocks,
        first: Block,
        *,
        total_steps: int,
        agree: Callable[[str, str], None] = lambda what, digest: None,
        **settings: Any,
    ) -> None:
        super().__init__(first.dataset, rows_per_step=blocks.rows_per_step, packed_len=blocks.packed_len, **settings)
        self.blocks, self.block = blocks, first
        self.steps_per_epoch = total_steps  # at least as long as is known: an epoch's own number is not
        self.fill = first.fill
        self._total_steps, self._agree = total_steps, agree
        self._before: Start | None = None
        self._next: Future[Block] | None = None
        self._running = False
        self._said = 0
        self._digest = first.digest()
        self._standing: dict[str, Any] = {}

    # --- steps --------------------------------------------------------------------------------------------------

    @property
    def first(self) -> int:
        return self.block.start.step

    def step(self, index: int) -> Step:
        """The step of this number, which is that of the block at hand or follows it.

        Raises:
            RunError: the rows that it needs are bad or cannot be read.
        """
        while index >= self.block.after.step:
            self._advance()
        if index < self.block.start.step:
            raise IndexError(f"step {index} of a stream that is at {self.block.start.step}")
        rows = self.block.steps[index - self.block.start.step]
        own = list(rows)
        passes = tuple(tuple(indices) for indices in self._passes(rows, self.rank))
        return StreamStep(
            self.block.start.round,
            rows,
            passes,
            int(self.dataset.lengths[own].sum()),
            int(self.dataset.trained[own].sum()),
            int(self.dataset.chosen[own].sum()),
            places=tuple(self.dataset.location(row) for row in rows),
        )

    def batches(self, step: Step, device: torch.device) -> Iterator[Batch]:
        """The passes of a step, on the device. Dropout goes by the document's number in the round."""
        numbers = self.block.numbers
        for indices in step.passes:
            rows = [step.rows[i] for i in indices]
            seeds = [((self.seed * 1_000_003 + step.epoch) * 1_000_003 + int(numbers[row])) % 2**40 for row in rows]
            yield make_batch(self.dataset, rows, seeds, device, share=self.share)
        if self.lockstep:
            shortest = min(step.rows, key=lambda row: int(self.dataset.lengths[row]))
            for _ in range(self.passes_agreed(step) - len(step.passes)):
                yield spare(make_batch(self.dataset, [shortest], [0], device))

    def locations(self, step: Step) -> list[str]:
        assert isinstance(step, StreamStep)
        return list(step.places)

    def epochs_before(self, step: int) -> float:
        """How often the data was gone through before the block at hand: a whole number, since nobody knows how much
        of the present round is done."""
        return self.block.start.round

    def lengths_held(self) -> np.ndarray:
        """As long as documents may be: those that are to come are not known."""
        config = self.blocks.config
        sides = 2 if unit_of(config.preference.rl) == "pairs" else 1
        longest = max(sides * config.data.sequence_len, int(self.dataset.lengths.max(initial=0)))
        return np.full(self.rows_per_step, longest)

    def per_step(self, column: np.ndarray) -> float:
        """The mean over the steps of the block at hand."""
        used = [row for step in self.block.steps for row in step]
        return float(column[used].sum()) / len(self.block.steps)

    def saving(self, steps: int = 16) -> float:
        tokens = computed = 0
        for index in range(min(steps, len(self.block.steps)) if self.share else 0):
            step = self.step(self.first + index)
            tokens += sum(int(self.dataset.lengths[step.rows[i]]) for indices in step.passes for i in indices)
            computed += sum(len(batch.input_ids) for batch in self.batches(step, torch.device("cpu")))
        return 1 - computed / tokens if tokens else 0.0

    # --- where it stands ----------------------------------------------------------------------------------------

    def standing(self, step: int) -> dict[str, Any]:
        """Where the stream stands after so many steps, for `go_on`: where the block at hand begins, and the one before,
        if that left something over; what is known of the files."""
        if not self._standing:
            before = asdict(self._before) if self._before is not None and self.block.start.carried else None
            stamps = [list(map(list, source.stamps)) for source in self.blocks.sources]
            start = asdict(self.block.start)
            self._standing = {"start": start, "before": before, "rows": self._digest, "files": stamps}
        return self._standing

    def go_on(self, standing: dict[str, Any]) -> None:
        """Make the block that a run was in the middle of.

        Raises:
            RunError: its rows are not those that they were. DataError: they cannot be read any more.
        """
        start = Start(**standing["start"])
        self._say_changes(standing["files"])
        if start.block != self.block.start.block:
            self.blocks.go_to(Start(**standing["before"]) if standing["before"] else start)
            carry = None
            if standing["before"]:
                self._before = Start(**standing["before"])
                carry = self.blocks.make(self._before, None).carry
            self._take(self.blocks.make(start, carry))
            log.info("stream: going on at row %s, without reading those before it", f"{start.rows + 1:,}")
        if self._digest != standing["rows"]:
            raise RunError(
                f"the rows from {start.rows + 1:,} on of {', '.join(s.shown for s in self.blocks.sources)} are not "
                "those that this run was trained on when it stopped, so that it cannot go on with them: begin a new "
                "run, or put the files back"
            )

    def _say_changes(self, before: list[list[Any]]) -> None:
        for source, then in zip(self.blocks.sources, before, strict=True):
            now = [list(stamp) for stamp in source.stamps]
            names = [path for path, *_ in now]
            changed = [path for path, *_ in then if path not in names]
            changed += [path for path, *rest in now if [path, *rest] not in then]
            if changed:
                shown = ", ".join(changed[:_SHOWN]) + (", ..." if len(changed) > _SHOWN else "")
                log.warning(
                    "%s: changed since the run stopped (size, time, or which files there are): %s. The rows that it "
                    "was in the middle of are compared; of those to come nobody knows",
                    source.shown,
                    shown,
                )

    # --- blocks -------------------------------------------------------------------------------------------------

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the block after the one at hand is made beside training."""
        self._running = True
        self._begin_next()
        try:
            yield
        finally:
            self._running = False
            self.blocks.close()

    def _advance(self) -> None:
        try:
            block = self._next.result() if self._next is not None else _with_steps(self.blocks, self.block)
        except DataError as error:
            raise RunError(
                f"{error} What was trained up to the last checkpoint is not lost: with --resume_from_checkpoint auto "
                "the same command goes on from there, once that is mended or `skip_bad_rows: true` is set"
            ) from error
        self._next = None
        self._before = self.block.start
        self._take(block)
        self._agree("the rows of the stream", self._digest)
        self._say_left_out()
        self._begin_next()

    def _take(self, block: Block) -> None:
        self.block, self.dataset, self._digest = block, block.dataset, block.digest()
        self._standing = {}

    def _begin_next(self) -> None:
        if not self._running or self._next is not None or self.block.after.step >= self._total_steps:
            return
        self._next = Future()
        parts = (self._next, self.blocks, self.block.after, self.block.carry)
        # A daemon: an interpreter that ends does not wait for rows that nobody needs.
        threading.Thread(target=_make_into, args=parts, name="stream", daemon=True).start()

    # --- what became of the rows --------------------------------------------------------------------------------

    def reports(self) -> list[SourceReport]:
        """Of each source, what became of the rows up to the end of the block at hand."""
        return add_up(self.block.start.reports, self.block.reports)

    def examples(self) -> int:
        """Documents of the data, as far as it was read."""
        return self.block.after.whole or self.block.after.documents

    def say_what_was_read(self) -> None:
        """Log what became of all rows so far."""
        log.info("stream: up to the end of the rows at hand, of which the last may not be trained yet:")
        for report in self.reports():
            if not report.rows:
                log.warning("%s: no row of it was reached", report.path)
            for level, line in report.lines() if report.rows else ():
                log.log(level, "%s", line)

    def figures(self) -> dict[str, float]:
        """For the log: rows up to the end of the block at hand, and how many of them were left out."""
        reports = self.reports()
        left = sum(tally.count for report in reports for tally in report.dropped.values())
        return {"rows_read": sum(report.rows for report in reports), "rows_left_out": left}

    def _say_left_out(self) -> None:
        """Once there are twice as many as when it was said last."""
        reports = self.reports()
        left = sum(tally.count for report in reports for tally in report.dropped.values())
        if left and left >= 2 * self._said:
            self._said = left
            for report in reports:
                for reason, tally in report.dropped.items():
                    log.warning(
                        "%s: %s of %s rows so far left out: %s, %s",
                        report.path, f"{tally.count:,}", f"{report.rows:,}", reason, tally.where(),
                    )  # fmt: skip


def _with_steps(blocks: Blocks, before: Block) -> Block:
    return _make(blocks, before.after, before.carry)


def _make(blocks: Blocks, start: Start, carry: Carry | None) -> Block:
    """The next block that has a step; one that only finds the data at its end, and nothing left over, has none."""
    block = blocks.make(start, carry)
    while not block.steps:
        block = blocks.make(block.after, block.carry)
    return block


def _make_into(made: Future[Block], blocks: Blocks, start: Start, carry: Carry | None) -> None:
    try:
        made.set_result(_make(blocks, start, carry))
    except Stopped:
        made.cancel()
    except BaseException as error:  # for the thread that waits for it
        made.set_exception(error)


