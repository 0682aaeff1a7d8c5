"""From a tokenised dataset to optimizer steps: which documents, in which order, cut into which passes.

A step is fixed as a whole before its first pass: its documents, its number of trained tokens, its cut. The
order follows from the seed and the epoch alone, so a position in it is two integers, and a run resumes by
asking for the step after its last.

Of several processes each makes the same steps, and passes of its own share of them only. Who has which share
follows from the lengths, so that nothing has to be asked or told.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from luthier.data.dataset import TokenDataset
from luthier.data.packing import best_fit, cut_into_passes, split_evenly
from luthier.data.tree import cut_by_beginning, plain_forest, shared_forest


@dataclass(frozen=True)
class Batch:
    """One forward pass; fields as `models.policy.FlatBatch` describes them."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    seeds: tuple[int, ...]
    position_N: torch.Tensor
    target_N: torch.Tensor
    weight_N: torch.Tensor


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        epoch: whole epochs done before this step. rows: the examples in it, indices into the dataset.
        passes: of this process, index lists into `rows`. tokens, trained_tokens: of the whole step.
    """

    epoch: int
    rows: tuple[int, ...]
    passes: tuple[tuple[int, ...], ...]
    tokens: int
    trained_tokens: int


class StepLoader:
    """Optimizer steps over a dataset.

    Args:
        rows_per_step: examples in a step (micro_batch_size x gradient_accumulation_steps x processes); with
            `packed_len`, packed rows of that many tokens.
        tokens_per_pass: token budget of a forward pass.
        alone: documents may not share a pass on this model.
        share: what documents of a pass begin with alike is computed once.
        rank, processes: this process, and how many there are.
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
        alone: bool = False,
        share: bool = False,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.dataset = dataset
        self.rows_per_step = rows_per_step
        self.tokens_per_pass = tokens_per_pass
        self.seed = seed
        self.shuffle = shuffle
        self.alone = alone
        self.share = share and not alone
        self.rank = rank
        self.processes = processes
        self._cached_order: tuple[int, np.ndarray] | None = None
        self._groups = (
            best_fit(dataset.lengths, packed_len) if packed_len else [[i] for i in range(len(dataset))]
        )
        self.fill = float(dataset.lengths.sum()) / (len(self._groups) * packed_len) if packed_len else None
        self.steps_per_epoch = math.ceil(len(self._groups) / rows_per_step)

    def step(self, index: int) -> Step:
        """The step of this number, counted from 0 over all epochs."""
        epoch, within = divmod(index, self.steps_per_epoch)
        order = self._order(epoch)[within * self.rows_per_step : (within + 1) * self.rows_per_step]
        rows = tuple(row for group in order for row in self._groups[group])
        lengths = [int(self.dataset.lengths[row]) for row in rows]
        passes = self._passes(rows, lengths, self.rank)
        trained = int(sum(int(self.dataset.trained[row]) for row in rows))
        return Step(epoch, rows, tuple(map(tuple, passes)), sum(lengths), trained)

    def passes_agreed(self, step: Step) -> int:
        """How many passes every process runs where a wrapper needs as many of each: those of the process that has
        most. The others fill up with passes of weight 0."""
        lengths = [int(self.dataset.lengths[row]) for row in step.rows]
        return max(len(self._passes(step.rows, lengths, rank)) for rank in range(self.processes))

    def batches(self, step: Step, device: torch.device) -> Iterator[Batch]:
        """The passes of a step, on the device."""
        for indices in step.passes:
            rows = [step.rows[i] for i in indices]
            seeds = [((self.seed * 1_000_003 + step.epoch) * 1_000_003 + row) % 2**40 for row in rows]
            yield make_batch(self.dataset, rows, seeds, device, share=self.share)

    def saving(self, steps: int = 16) -> float:
        """Share of the first steps' tokens that are not computed, since another document of the pass has them."""
        tokens = computed = 0
        for index in range(min(steps, self.steps_per_epoch) if self.share else 0):
            step = self.step(index)
            tokens += sum(int(self.dataset.lengths[step.rows[i]]) for indices in step.passes for i in indices)
            computed += sum(len(batch.input_ids) for batch in self.batches(step, torch.device("cpu")))
        return 1 - computed / tokens if tokens else 0.0

    def locations(self, step: Step) -> list[str]:
        """Where the rows of a step are, as file:line."""
        return [self.dataset.location(row) for row in step.rows]

    def _passes(self, rows: Sequence[int], lengths: Sequence[int], rank: int) -> list[list[int]]:
        """Of one process: index lists into `rows`."""
        share = split_evenly(lengths, self.processes)[rank]
        passes = self._cut([rows[i] for i in share], [lengths[i] for i in share])
        return [[share[i] for i in indices] for indices in passes]

    def _cut(self, rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        passes = cut_into_passes(lengths, self.tokens_per_pass, alone=self.alone)
        if not self.share or len(passes) == 1:
            return passes
        documents = [self.dataset[row] for row in rows]
        if any(document.lengths for document in documents):
            return passes  # what packed rows share is inside them; their order says nothing of it
        together = cut_by_beginning([document.input_ids for document in documents], self.tokens_per_pass)
        return together if len(together) <= len(passes) else passes

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self._groups))
        if self._cached_order is None or self._cached_order[0] != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self._groups))
            self._cached_order = (epoch, order)
        return self._cached_order[1]


def make_batch(
    dataset: TokenDataset,
    rows: Sequence[int],
    seeds: Sequence[int],
    device: torch.device,
    *,
    share: bool = False,
) -> Batch:
    """Rows of a dataset as one pass. A row that was packed elsewhere counts as the documents inside it.

    With `share`, what documents begin with alike is there once (`data.tree`), and a label that several of them
    have at the same token once with the sum of their weights.
    """
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    document_seeds: list[int] = []
    for row, seed in zip(rows, seeds, strict=True):
        document = dataset[row]
        ends = np.cumsum(document.lengths or (len(document.input_ids),))[:-1]
        ids += np.split(np.asarray(document.input_ids, np.int64), ends)
        labels += np.split(np.asarray(document.labels, np.int64), ends)
        document_seeds += [seed + (n << 40) for n in range(len(ends) + 1)]
    forest = shared_forest(ids) if share else plain_forest([len(document) for document in ids])
    segments = list(zip(forest.owners, forest.starts, forest.lengths, strict=True))
    positions = np.concatenate([np.arange(start, start + length) for _, start, length in segments])
    # A label stands at its own token and is predicted from the one before it; a first token from none.
    flat_labels = np.concatenate([document[1:] for document in labels])
    labelled = flat_labels >= 0
    places = np.concatenate([places[:-1] for places in forest.places])[labelled]
    targets, weights = flat_labels[labelled], np.ones(int(labelled.sum()), np.float32)
    if len(positions) < sum(map(len, ids)):
        pairs, counts = np.unique(places << 32 | targets, return_counts=True)
        places, targets, weights = pairs >> 32, pairs & 0xFFFFFFFF, counts.astype(np.float32)
    return Batch(
        input_ids=_put(np.concatenate([ids[o][a : a + n] for o, a, n in segments]), device),
        position_ids=_put(positions, device),
        cu_seqlens=_put(np.cumsum([0, *forest.lengths]).astype(np.int32), device),
        lengths=forest.lengths,
        parents=forest.parents,
        seeds=tuple(document_seeds[owner] for owner in forest.owners),
        position_N=_put(places, device),
        target_N=_put(targets, device),
        weight_N=_put(weights, device),
    )


def _put(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    # Out of pinned memory the copy does not make the host wait; torch keeps the buffer until it is done.
    return tensor.pin_memory().to(device, non_blocking=True)
