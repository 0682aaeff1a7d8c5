"""Prompts with answers to score, as passes of a model: what several of them begin with is there once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from luthier.data.batches import Batch
from luthier.data.packing import cut_into_passes
from luthier.data.tree import cut_by_beginning, plain_forest, shared_forest


@dataclass(frozen=True)
class Scored:
    """Tokens of which the last `answer` are scored."""

    ids: list[int]
    answer: int

    @property
    def inputs(self) -> np.ndarray:
        """What runs through the model: nothing is predicted from the last token."""
        return np.asarray(self.ids[:-1], np.int64)


def cut_into(inputs: Sequence[np.ndarray], budget: int, *, share: bool, alone: bool = False) -> list[list[int]]:
    """Which documents go into one pass of up to `budget` tokens, by their places; `alone`: one each."""
    if share:
        return cut_by_beginning(inputs, budget)
    return cut_into_passes([len(each) for each in inputs], budget, alone=alone)


def batch_of(documents: Sequence[Scored], device: torch.device, *, share: bool) -> tuple[Batch, np.ndarray]:
    """Documents as one pass, and for each scored token, document by document, its place among the pass's labels.

    With `share`, what documents begin with alike is there once. Answers of one token to one prompt are then that prompt
    and nothing else.
    """
    inputs = [document.inputs for document in documents]
    forest = shared_forest(inputs) if share else plain_forest([len(each) for each in inputs])
    segments = list(zip(forest.owners, forest.starts, forest.lengths, strict=True))
    scored = list(zip(documents, forest.places, strict=True))
    places = np.concatenate([place[-document.answer :] for document, place in scored])
    targets = np.concatenate([np.asarray(document.ids[-document.answer :], np.int64) for document in documents])
    labels, entries = np.unique(places << 32 | targets, return_inverse=True)

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    batch = Batch(
        input_ids=put(np.concatenate([inputs[owner][start : start + n] for owner, start, n in segments])),
        position_ids=put(np.concatenate([np.arange(start, start + n) for _, start, n in segments])),
        cu_seqlens=put(np.cumsum([0, *forest.lengths]).astype(np.int32)),
        lengths=forest.lengths,
        parents=forest.parents,
        drawn=forest.lengths,
        seeds=(0,) * len(forest.lengths),
        position_N=put(labels >> 32),
        target_N=put(labels & 0xFFFFFFFF),
        weight_N=torch.ones(len(labels), device=device),
    )
    return batch, entries
