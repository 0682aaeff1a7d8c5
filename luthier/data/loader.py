"""From a tokenised dataset to optimizer steps: which documents, in which order, cut into which passes.

A step is fixed as a whole before its first pass: its documents, its number of trained tokens, its cut. The
order follows from the seed and the epoch alone, so a position in it is two integers, and a run resumes by
asking for the step after its last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from luthier.data.dataset import TokenDataset
from luthier.data.packing import best_fit, cut_into_passes


@dataclass(frozen=True)
class Batch:
    """One forward pass; fields as `models.policy.FlatBatch` describes them."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]
    seeds: tuple[int, ...]
    position_N: torch.Tensor
    target_N: torch.Tensor
    weight_N: torch.Tensor


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        epoch: whole epochs done before this step. rows: the examples in it, indices into the dataset.
        passes: index lists into `rows`. tokens, trained_tokens: of the whole step.
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
    ) -> None:
        self.dataset = dataset
        self.rows_per_step = rows_per_step
        self.tokens_per_pass = tokens_per_pass
        self.seed = seed
        self.shuffle = shuffle
        self.alone = alone
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
        passes = cut_into_passes(lengths, self.tokens_per_pass, alone=self.alone)
        trained = int(sum(int(self.dataset.trained[row]) for row in rows))
        return Step(epoch, rows, tuple(map(tuple, passes)), sum(lengths), trained)

    def batches(self, step: Step, device: torch.device) -> Iterator[Batch]:
        """The passes of a step, on the device."""
        for indices in step.passes:
            rows = [step.rows[i] for i in indices]
            seeds = [((self.seed * 1_000_003 + step.epoch) * 1_000_003 + row) % 2**40 for row in rows]
            yield make_batch(self.dataset, rows, seeds, device)

    def locations(self, step: Step) -> list[str]:
        """Where the rows of a step are, as file:line."""
        return [self.dataset.location(row) for row in step.rows]

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self._groups))
        if self._cached_order is None or self._cached_order[0] != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self._groups))
            self._cached_order = (epoch, order)
        return self._cached_order[1]


def make_batch(
    dataset: TokenDataset, rows: Sequence[int], seeds: Sequence[int], device: torch.device
) -> Batch:
    """Rows of a dataset end to end. A row that was packed elsewhere counts as the documents inside it."""
    ids, labels, lengths, document_seeds = [], [], [], []
    for row, seed in zip(rows, seeds, strict=True):
        document = dataset[row]
        inside = document.lengths or (len(document.input_ids),)
        ids.append(np.asarray(document.input_ids, np.int64))
        labels.append(np.asarray(document.labels, np.int64))
        lengths += list(inside)
        document_seeds += [seed + (n << 40) for n in range(len(inside))]
    flat_ids, flat_labels = np.concatenate(ids), np.concatenate(labels)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(len(flat_ids)) - np.repeat(cu_seqlens[:-1], lengths)
    # A label stands at its own token and is predicted from the one before it; a first token from none.
    labelled = np.flatnonzero((flat_labels >= 0) & (positions > 0))
    return Batch(
        input_ids=torch.from_numpy(flat_ids).to(device),
        position_ids=torch.from_numpy(positions).to(device),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)).to(device),
        lengths=tuple(int(n) for n in lengths),
        seeds=tuple(document_seeds),
        position_N=torch.from_numpy(labelled - 1).to(device),
        target_N=torch.from_numpy(flat_labels[labelled]).to(device),
        weight_N=torch.ones(len(labelled), dtype=torch.float32, device=device),
    )
