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
from dataclasses import dataclass, replace

import numpy as np
import torch

from luthier.data.dataset import TokenDataset
from luthier.data.packing import best_fit, cut_into_passes, split_evenly
from luthier.data.tree import MIN_SHARED, Sharing, cut_by_beginning, plain_forest, shared_forest


@dataclass(frozen=True)
class Completions:
    """The answers in a pass, whose log-probs are compared. C answers with M labels among them; of a pair the chosen
    one comes first and the rejected one next.

    Attributes:
        entry_M: int64, each label's place among the N labels of the pass; where answers share tokens, several have one.
        completion_M: int64, the answer that each label belongs to, ascending.
        tokens_C: fp32, labels of each answer. desirable_C: boolean.
        nll_weight_N: fp32, how many chosen answers have this label, or of `orpo` the prompts before them.
    """

    entry_M: torch.Tensor
    completion_M: torch.Tensor
    tokens_C: torch.Tensor
    desirable_C: torch.Tensor
    nll_weight_N: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """One forward pass; fields as `models.policy.FlatBatch` describes them.

    Attributes:
        rows: the dataset's documents in it, by index. completions: None where they are no answers to compare.
        spare: it is run for the sake of other processes (`StepLoader.lockstep`), and counts for nothing: its labels
            weigh 0, and whoever makes something else of it has to leave that out.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    drawn: tuple[int, ...]
    seeds: tuple[int, ...]
    position_N: torch.Tensor
    target_N: torch.Tensor
    weight_N: torch.Tensor
    rows: tuple[int, ...] = ()
    completions: Completions | None = None
    spare: bool = False


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        epoch: whole epochs done before this step. rows: the examples in it, indices into the dataset.
        passes: of this process, index lists into `rows`. tokens, trained_tokens: of the whole step.
        chosen_tokens: trained tokens of chosen answers, where rows are pairs.
    """

    epoch: int
    rows: tuple[int, ...]
    passes: tuple[tuple[int, ...], ...]
    tokens: int
    trained_tokens: int
    chosen_tokens: int = 0


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

    Attributes:
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
        passes = self._passes(rows, self.rank)
        trained, chosen = (int(column[list(rows)].sum()) for column in (self.dataset.trained, self.dataset.chosen))
        tokens = int(self.dataset.lengths[list(rows)].sum())
        return Step(epoch, rows, tuple(map(tuple, passes)), tokens, trained, chosen)

    def passes_agreed(self, step: Step) -> int:
        """How many passes every process runs in lockstep: those of the process that has most."""
        others = (rank for rank in range(self.processes) if rank != self.rank)
        return max([len(step.passes), *(len(self._passes(step.rows, rank)) for rank in others)])

    def batches(self, step: Step, device: torch.device) -> Iterator[Batch]:
        """The passes of a step, on the device."""
        for indices in step.passes:
            rows = [step.rows[i] for i in indices]
            seeds = [((self.seed * 1_000_003 + step.epoch) * 1_000_003 + row) % 2**40 for row in rows]
            yield make_batch(self.dataset, rows, seeds, device, share=self.share)
        if self.lockstep:
            shortest = min(step.rows, key=lambda row: int(self.dataset.lengths[row]))
            for _ in range(self.passes_agreed(step) - len(step.passes)):
                yield spare(make_batch(self.dataset, [shortest], [0], device))

    def mismatched(self, step: Step, device: torch.device) -> Iterator[Batch]:
        """Passes of this process in which each answer of a step stands behind the prompt of the row after it, and the
        last one's behind the first (Ethayarajh et al. 2024, section 4.1); cut off at `sequence_len`."""
        others = (*step.rows[-1:], *step.rows[:-1])
        if len(step.rows) == 1:  # what is left of an epoch: its own answer would be no mismatch
            others = ((step.rows[0] + len(self.dataset) // 2) % len(self.dataset),)
        documents = []
        for row, other in zip(step.rows, others, strict=True):
            before, behind = self.dataset[row], self.dataset[other]
            ids = np.concatenate([before.input_ids[: before.prompt], behind.input_ids[behind.prompt :]])
            labels = np.concatenate([np.full(before.prompt, -100), behind.labels[behind.prompt :]])
            n = self.sequence_len
            documents.append(_Part(ids[:n].astype(np.int64), labels[:n].astype(np.int64), 0, before.prompt))
        lengths = [len(document.ids) for document in documents]
        shares = split_evenly(lengths, self.processes)
        passes = [
            [[share[i] for i in indices] for indices in self._cut_plainly([lengths[i] for i in share])]
            for share in (shares if self.lockstep else shares[self.rank : self.rank + 1])
        ]
        own = passes[self.rank] if self.lockstep else passes[0]
        for chosen in own:
            yield _batch([documents[i] for i in chosen], [step.rows[i] for i in chosen], device, share=self.share)
        for _ in range(max(map(len, passes)) - len(own)):
            yield spare(_batch(documents[:1], step.rows[:1], device, share=""))

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
    share: Sharing = "",
) -> Batch:
    """Rows of a dataset as one pass. A row that was packed elsewhere counts as the documents inside it.

    With `share`, what documents begin with alike is there once (`data.tree`), and a label that several of them
    have at the same token once with the sum of their weights. Dropout is drawn by document, and for a pair alike over
    the prompt: "all" is for passes without dropout, "rows" for those with it.
    """
    documents = [part for row, seed in zip(rows, seeds, strict=True) for part in _parts(dataset, row, seed)]
    return _batch(documents, rows, device, share=share)


def spare(batch: Batch) -> Batch:
    """The same pass, counting for nothing."""
    return replace(batch, weight_N=torch.zeros_like(batch.weight_N), spare=True)


@dataclass(frozen=True)
class _Part:
    """A document on its way into a batch.

    Attributes:
        seed: of its dropout; answer_seed: of that behind the prompt, where the other answer of a pair draws the
            prompt's masks with the same seed.
        prompt: tokens before its answer, if it is one; 0 if not. chosen: its labels count for the likelihood of
            chosen answers. desirable: what its answer is.
    """

    ids: np.ndarray
    labels: np.ndarray
    seed: int
    prompt: int = 0
    chosen: bool = False
    desirable: bool = True
    answer_seed: int | None = None

    def drawn(self, start: int, length: int) -> list[tuple[int, int]]:
        """Tokens and seed of each stretch of dropout in a segment of it."""
        if self.answer_seed is None:
            return [(length, self.seed)]
        before = max(0, min(self.prompt - start, length))
        return [(n, seed) for n, seed in ((before, self.seed), (length - before, self.answer_seed)) if n]


def _parts(dataset: TokenDataset, row: int, seed: int) -> Iterator[_Part]:
    """The documents inside a row."""
    document = dataset[row]
    ends = np.cumsum(document.lengths or (len(document.input_ids),))[:-1]
    ids = np.split(np.asarray(document.input_ids, np.int64), ends)
    labels = np.split(np.asarray(document.labels, np.int64), ends)
    for n in range(len(ids)):
        chosen = document.pair and n == 0
        desirable = chosen if document.pair else document.desirable
        if document.pair:
            yield _Part(ids[n], labels[n], seed, document.prompt, chosen, desirable, seed + (n + 1 << 40))
        else:
            yield _Part(ids[n], labels[n], seed + (n << 40), document.prompt, chosen, desirable)


def _batch(documents: Sequence[_Part], rows: Sequence[int], device: torch.device, *, share: Sharing) -> Batch:
    ids = [document.ids for document in documents]
    groups = _groups(documents) if share == "rows" else None
    forest = shared_forest(ids, groups) if share else plain_forest([len(document) for document in ids])
    segments = list(zip(forest.owners, forest.starts, forest.lengths, strict=True))
    drawn = [stretch for owner, start, n in segments for stretch in documents[owner].drawn(start, n)]
    positions = np.concatenate([np.arange(start, start + length) for _, start, length in segments])
    # A label stands at its own token and is predicted from the one before it; a first token from none.
    flat_labels = np.concatenate([document.labels[1:] for document in documents])
    labelled = flat_labels >= 0
    places = np.concatenate([places[:-1] for places in forest.places])[labelled]
    targets, weights = flat_labels[labelled], np.ones(int(labelled.sum()), np.float32)
    entries = np.arange(len(targets))
    if len(positions) < sum(map(len, ids)):
        pairs, entries, counts = np.unique(places << 32 | targets, return_inverse=True, return_counts=True)
        places, targets, weights = pairs >> 32, pairs & 0xFFFFFFFF, counts.astype(np.float32)
    return Batch(
        input_ids=_put(np.concatenate([ids[o][a : a + n] for o, a, n in segments]), device),
        position_ids=_put(positions, device),
        cu_seqlens=_put(np.cumsum([0, *forest.lengths]).astype(np.int32), device),
        lengths=forest.lengths,
        parents=forest.parents,
        drawn=tuple(n for n, _ in drawn),
        seeds=tuple(seed for _, seed in drawn),
        position_N=_put(places, device),
        target_N=_put(targets, device),
        weight_N=_put(weights, device),
        rows=tuple(rows),
        completions=_completions(documents, labelled, entries, len(targets), device),
    )


def _groups(documents: Sequence[_Part]) -> list[tuple[int, int]]:
    """For each document the index of the first whose dropout begins with the same masks, and over how many tokens."""
    groups = []
    for index, document in enumerate(documents):
        pair = document.answer_seed is not None
        first = index - 1 if pair and not document.chosen else index  # the rejected answer follows the chosen one
        groups.append((first, document.prompt if pair else 0))
    return groups


def _completions(
    documents: Sequence[_Part], labelled: np.ndarray, entries: np.ndarray, labels: int, device: torch.device
) -> Completions | None:
    """Which labels belong to which answer.

    Args:
        labelled: for all tokens but first ones, whether there is a label. entries: for each label that there is, its
            place among the `labels` of the pass.
    """
    if not any(document.prompt for document in documents):
        return None
    owner = np.repeat(np.arange(len(documents)), [len(document.ids) - 1 for document in documents])[labelled]
    index = np.concatenate([np.arange(1, len(document.ids)) for document in documents])[labelled]
    answer = index >= np.array([document.prompt for document in documents])[owner]
    chosen = np.array([document.chosen for document in documents])[owner]
    completion = owner[answer]
    return Completions(
        entry_M=_put(entries[answer], device),
        completion_M=_put(completion, device),
        tokens_C=_put(np.bincount(completion, minlength=len(documents)).astype(np.float32), device),
        desirable_C=_put(np.array([document.desirable for document in documents]), device),
        nll_weight_N=_put(np.bincount(entries[chosen], minlength=labels).astype(np.float32), device),
    )


def _put(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    # Out of pinned memory the copy does not make the host wait; torch keeps the buffer until it is done.
    return tensor.pin_memory().to(device, non_blocking=True)
