"""From a tokenised dataset to optimizer steps: which documents, in which order, cut into which passes.

A step is fixed as a whole before its first pass: its documents, its number of trained tokens, its cut. The
order follows from the seed and the epoch alone, so a position in it is two integers, and a run resumes by
asking for the step after its last.

Of several processes each makes the same steps, and passes of its own share of them only. Who has which share
follows from the lengths, so that nothing has to be asked or told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from luthier.data.batches import Batch, Part, batch_of, make_batch, spare
from luthier.data.dataset import TokenDataset
from luthier.data.mixing import Mix
from luthier.data.order import Order
from luthier.data.packing import cut_into_passes, split_evenly
from luthier.data.tree import MIN_SHARED, Sharing, cut_by_beginning


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        epoch: whole epochs done before this step. rows: the examples in it, indices into the dataset.
        passes: of this process, index lists into `rows`. tokens, trained_tokens: of the whole step.
        chosen_tokens: trained tokens of chosen answers, where rows are pairs.
        copies: of each row, how often the epoch had it before; empty where none comes twice.
    """

    epoch: int
    rows: tuple[int, ...]
    passes: tuple[tuple[int, ...], ...]
    tokens: int
    trained_tokens: int
    chosen_tokens: int = 0
    copies: tuple[int, ...] = ()


class StepLoader:
    """Optimizer steps over a dataset.

    Args:
        rows_per_step: examples in a step (micro_batch_size x gradient_accumulation_steps x processes); with
            `packed_len`, packed rows of that many tokens.
        tokens_per_pass: token budget of a forward pass.
        sequence_len: longest document that may be made of two rows (`mismatched`).
        alone: documents may not share a pass on this model.
        share: which documents' common beginnings are computed once: "all" of a pass, those of the answers in each of
            its "rows" (the prompt, over which they draw dropout alike), or none, "".
        rank, processes: this process, and how many there are.
        mix: which documents an epoch holds. None: all of them, once.
        epochs: those of the run.

    Attributes:
        steps_per_epoch: on average over the run, where they differ. fill: share of the first epoch's packed rows that
            is tokens; None without packing.
        lockstep: every process runs as many passes of a step as the one that has most, with spare ones at the end:
            where weights are spread over processes, a pass of one needs the others.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        rows_per_step: int,
        tokens_per_pass: int,
        seed: int,
        shuffle: bool,
        packed_len: int | None = None,
        sequence_len: int | None = None,
        alone: bool = False,
        share: Sharing = "",
        rank: int = 0,
        processes: int = 1,
        mix: Mix | None = None,
        epochs: float = 1.0,
    ) -> None:
        self.dataset = dataset
        self.rows_per_step = rows_per_step
        self.tokens_per_pass = tokens_per_pass
        self.seed = seed
        self.shuffle = shuffle
        self.sequence_len = sequence_len
        self.alone = alone
        pairs = bool(dataset.chosen.any())
        self.share: Sharing = "" if alone or (share == "rows" and not pairs) else share
        self.rank = rank
        self.processes = processes
        self.lockstep = False
        self.order = Order(
            dataset.lengths,
            rows_per_step=rows_per_step,
            seed=seed,
            shuffle=shuffle,
            packed_len=packed_len,
            mix=mix,
        )
        self.steps_per_epoch = self.order.steps_per_epoch(epochs)
        first = self.order.epoch(0)
        tokens = float(dataset.lengths[first.documents].sum())
        self.fill = tokens / (len(first.groups) * packed_len) if packed_len else None

    @property
    def first(self) -> int:
        """The first step that can be asked for."""
        return 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the training; a stream reads ahead inside of it."""
        yield

    def standing(self, step: int) -> dict[str, Any]:
        """What a checkpoint after so many steps has to know of the data beside their number: of a stream only."""
        return {}

    def figures(self) -> dict[str, float]:
        """What is logged of the data as it is read."""
        return {}

    def epochs_before(self, step: int) -> float:
        """Epochs that so many steps make, for the log."""
        return self.order.epochs_before(step)

    def step(self, index: int) -> Step:
        """The step of this number, counted from 0 over all epochs."""
        epoch, documents, copies = self.order.step(index)
        rows = tuple(documents)
        passes = self._passes(rows, self.rank)
        trained, chosen = (int(column[list(rows)].sum()) for column in (self.dataset.trained, self.dataset.chosen))
        tokens = int(self.dataset.lengths[list(rows)].sum())
        again = tuple(copies) if any(copies) else ()
        return Step(epoch, rows, tuple(map(tuple, passes)), tokens, trained, chosen, again)

    def go_on(self, standing: dict[str, Any]) -> None:
        """Take up where `standing` was written; by its number any step can be had."""

    def examples(self) -> int:
        """Documents of the data."""
        return len(self.dataset)

    def say_what_was_read(self) -> None:
        """Log what became of rows that were read while training; all were before."""

    def total_steps(self, epochs: float) -> int:
        """Steps of so many epochs, up to the next whole one."""
        return self.order.total_steps(epochs)

    def lengths_held(self) -> np.ndarray:
        """Tokens of all documents that an epoch may hold, as often as it may."""
        mix = self.order.mix
        return self.dataset.lengths if mix is None else np.repeat(self.dataset.lengths, mix.most_copies())

    def per_step(self, column: np.ndarray) -> float:
        """The sum over a step of what each document has of something, on average over the first epoch."""
        return float(column[self.order.epoch(0).documents].sum()) / self.order.steps_in(0)

    def once(self) -> StepLoader:
        """This loader with every document once in an epoch."""
        if self.order.mix is None:
            return self
        plain = copy(self)
        plain.order = self.order.once()
        plain.steps_per_epoch = plain.order.steps_per_epoch(1)
        return plain

    def passes_agreed(self, step: Step) -> int:
        """How many passes every process runs in lockstep: those of the process that has most."""
        others = (rank for rank in range(self.processes) if rank != self.rank)
        return max([len(step.passes), *(len(self._passes(step.rows, rank)) for rank in others)])

    def batches(self, step: Step, device: torch.device) -> Iterator[Batch]:
        """The passes of a step, on the device."""
        for indices in step.passes:
            rows = [step.rows[i] for i in indices]
            # A document that comes again draws dropout anew.
            drawn = [step.rows[i] + (step.copies[i] * len(self.dataset) if step.copies else 0) for i in indices]
            seeds = [((self.seed * 1_000_003 + step.epoch) * 1_000_003 + each) % 2**40 for each in drawn]
            yield make_batch(self.dataset, rows, seeds, device, share=self.share)
        if self.lockstep:
            shortest = min(step.rows, key=lambda row: int(self.dataset.lengths[row]))
            for _ in range(self.passes_agreed(step) - len(step.passes)):
                yield spare(make_batch(self.dataset, [shortest], [0], device))

    def mismatched(self, step: Step, device: torch.device) -> Iterator[Batch]:
        """Passes of this process in which each answer of a step stands behind the prompt of the row after it, and the
        last one's behind the first (Ethayarajh et al. 2024, section 4.1); cut off at `sequence_len`. None where the
        dataset has one row: its own answer would be no mismatch."""
        if len(self.dataset) == 1:
            return
        others = [
            other if other != row else (row + len(self.dataset) // 2) % len(self.dataset)
            # A step of one row, or a row beside its own copy: its own answer would be no mismatch.
            for row, other in zip(step.rows, (*step.rows[-1:], *step.rows[:-1]), strict=True)
        ]
        documents = []
        for row, other in zip(step.rows, others, strict=True):
            before, behind = self.dataset[row], self.dataset[other]
            ids = np.concatenate([before.input_ids[: before.prompt], behind.input_ids[behind.prompt :]])
            labels = np.concatenate([np.full(before.prompt, -100), behind.labels[behind.prompt :]])
            n = self.sequence_len
            documents.append(Part(ids[:n].astype(np.int64), labels[:n].astype(np.int64), 0, before.prompt))
        lengths = [len(document.ids) for document in documents]
        shares = split_evenly(lengths, self.processes)
        passes = [
            [[share[i] for i in indices] for indices in self._cut_plainly([lengths[i] for i in share])]
            for share in (shares if self.lockstep else shares[self.rank : self.rank + 1])
        ]
        own = passes[self.rank] if self.lockstep else passes[0]
        for chosen in own:
            yield batch_of([documents[i] for i in chosen], [step.rows[i] for i in chosen], device, share=self.share)
        for _ in range(max(map(len, passes)) - len(own)):
            yield spare(batch_of(documents[:1], step.rows[:1], device, share=""))

    def saving(self, steps: int = 16) -> float:
        """Share of the first steps' tokens that are not computed, since another document of the pass has them."""
        tokens = computed = 0
        for index in range(min(steps, self.order.steps_in(0)) if self.share else 0):
            step = self.step(index)
            tokens += sum(int(self.dataset.lengths[step.rows[i]]) for indices in step.passes for i in indices)
            computed += sum(len(batch.input_ids) for batch in self.batches(step, torch.device("cpu")))
        return 1 - computed / tokens if tokens else 0.0

    def locations(self, step: Step) -> list[str]:
        """Where the rows of a step are, as file:line."""
        return [self.dataset.location(row) for row in step.rows]

    def _passes(self, rows: Sequence[int], rank: int) -> list[list[int]]:
        """Of one process: index lists into `rows`."""
        lengths = self.computed(rows)
        share = split_evenly(lengths, self.processes)[rank]
        passes = self._cut([rows[i] for i in share], [lengths[i] for i in share])
        return [[share[i] for i in indices] for indices in passes]

    def _cut_plainly(self, lengths: Sequence[int]) -> list[list[int]]:
        return cut_into_passes(lengths, self.tokens_per_pass, alone=self.alone)

    def _cut(self, rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        passes = self._cut_plainly(lengths)
        if self.share != "all" or len(passes) < 2:
            return passes  # rows share nothing with each other
        documents = [self.dataset[row] for row in rows]
        if any(document.lengths and not document.pair for document in documents):
            return passes  # what packed rows share is inside them; their order says nothing of it
        # A pair goes where its chosen answer does; the rejected one comes with it, less the prompt.
        firsts = [(document.lengths or (len(document.input_ids),))[0] for document in documents]
        heads = [document.input_ids[:first] for document, first in zip(documents, firsts, strict=True)]
        beside = [length - first for length, first in zip(lengths, firsts, strict=True)]
        together = cut_by_beginning(heads, self.tokens_per_pass, beside)
        return together if len(together) <= len(passes) else passes

    def computed(self, rows: Sequence[int]) -> list[int]:
        """Tokens of each row that are computed, if nothing but the prompt of a pair is shared."""
        chosen = list(rows)
        lengths, prompts = self.dataset.lengths[chosen], self.dataset.prompts[chosen]
        if self.share:
            shared = (self.dataset.chosen[chosen] > 0) & (prompts >= MIN_SHARED)
            lengths = lengths - np.where(shared, prompts, 0)
        return [int(length) for length in lengths]
