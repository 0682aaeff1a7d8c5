"""Documents of a dataset as the tensors of one forward pass.

A pass is a flat run of tokens with boundaries. Where documents begin alike, what they share may be there once
(`data.tree`); a label that several of them have at the same token is then one with the sum of their weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from luthier.data.dataset import TokenDataset
from luthier.data.tree import Sharing, plain_forest, shared_forest


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
    return batch_of(documents, rows, device, share=share)


def spare(batch: Batch) -> Batch:
    """The same pass, counting for nothing."""
    return replace(batch, weight_N=torch.zeros_like(batch.weight_N), spare=True)


@dataclass(frozen=True)
class Part:
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


def _parts(dataset: TokenDataset, row: int, seed: int) -> Iterator[Part]:
    """The documents inside a row."""
    document = dataset[row]
    ends = np.cumsum(document.lengths or (len(document.input_ids),))[:-1]
    ids = np.split(np.asarray(document.input_ids, np.int64), ends)
    labels = np.split(np.asarray(document.labels, np.int64), ends)
    for n in range(len(ids)):
        chosen = document.pair and n == 0
        desirable = chosen if document.pair else document.desirable
        if document.pair:
            yield Part(ids[n], labels[n], seed, document.prompt, chosen, desirable, seed + (n + 1 << 40))
        else:
            yield Part(ids[n], labels[n], seed + (n << 40), document.prompt, chosen, desirable)


def batch_of(documents: Sequence[Part], rows: Sequence[int], device: torch.device, *, share: Sharing) -> Batch:
    """Documents as one pass; `share` as for `make_batch`."""
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


def _groups(documents: Sequence[Part]) -> list[tuple[int, int]]:
    """For each document the index of the first whose dropout begins with the same masks, and over how many tokens."""
    groups = []
    for index, document in enumerate(documents):
        pair = document.answer_seed is not None
        first = index - 1 if pair and not document.chosen else index  # the rejected answer follows the chosen one
        groups.append((first, document.prompt if pair else 0))
    return groups


def _completions(
    documents: Sequence[Part], labelled: np.ndarray, entries: np.ndarray, labels: int, device: torch.device
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
