"""Each row's own log-likelihood, in passes that memory holds.

`loss.evaluate_loss` says one figure of a dataset while a run trains. Here every row keeps its sums, so that rows can be
grouped, compared between two models and drawn again for an interval.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from luthier.data.batches import Batch, make_batch
from luthier.data.dataset import TokenDataset
from luthier.data.packing import best_fit, cut_into_passes
from luthier.errors import RunError
from luthier.models.memory import PROBE_TOKENS, Budget, choose_budget, free_unused, is_out_of_memory
from luthier.models.policy import Policy

log = logging.getLogger("luthier")

Floats = npt.NDArray[np.float64]

# What `--dtype` may be; None: as the weights are.
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class DocumentScores:
    """Sums over the trained tokens of each of N documents: negative log-likelihood in nats, tokens whose likeliest
    prediction is right, and how many there are."""

    nll: Floats
    correct: Floats
    tokens: Floats


@torch.no_grad()
def find_budget(policy: Policy, dataset: TokenDataset, device: torch.device) -> Budget:
    """Most tokens of a pass without gradients: what training does with them, less all that it keeps for its backward
    pass. So whatever document training had room for, there is room for here."""
    longest = int(dataset.lengths.max())
    if not policy.flat:
        return Budget(longest, "one document in each")

    def run_pass() -> int:
        policy.eval()
        rows = best_fit(dataset.lengths, PROBE_TOKENS)[0]
        batch = make_batch(dataset, rows, [0] * len(rows), device)
        policy(batch)
        return len(batch.input_ids)

    everything = int(dataset.lengths.sum())
    budget = choose_budget(policy.model, device, longest=longest, step_tokens=everything, run_pass=run_pass)
    return Budget(everything, "all of the data") if budget.tokens == everything else budget


def score_documents(
    policy: Policy,
    dataset: TokenDataset,
    device: torch.device,
    *,
    tokens_per_pass: int,
    on_done: Callable[[int], None] = lambda documents: None,
) -> DocumentScores:
    """Score every document of a dataset; see `in_passes`."""
    nll, correct = np.zeros(len(dataset)), np.zeros(len(dataset))

    def score(rows: npt.NDArray[np.int64], batch: Batch) -> None:
        logps, hits = policy(batch)
        # Nothing is shared between documents: then the labels come row after row, and each is one row's.
        owner = np.repeat(np.arange(len(rows)), dataset.trained[rows])
        for values, kept in ((-logps, nll), (hits, correct)):
            kept[rows] = np.bincount(owner, values.double().cpu().numpy(), minlength=len(rows))

    in_passes(policy, dataset, device, score, tokens_per_pass=tokens_per_pass, on_done=on_done)
    warn_of_infinite(dataset, nll)
    return DocumentScores(nll, correct, dataset.trained.astype(np.float64))


def warn_of_infinite(dataset: TokenDataset, values: Floats) -> None:
    """Say which documents (N,) have log-probs that are no numbers: what is a sum over them is none either."""
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        log.warning(
            "%s: the model's log-probs are infinite or no numbers in %s of %s documents, so that there are no figures "
            "over them; in fp16 large activations overflow: --dtype bf16 or fp32",
            dataset.location(int(bad[0])),
            f"{len(bad):,}",
            f"{len(dataset):,}",
        )


@torch.no_grad()
def in_passes(
    policy: Policy,
    dataset: TokenDataset,
    device: torch.device,
    score: Callable[[npt.NDArray[np.int64], Batch], None],
    *,
    tokens_per_pass: int,
    on_done: Callable[[int], None] = lambda documents: None,
) -> None:
    """Do something with every document of a dataset, in passes. One that memory does not hold is cut in two, and so are
    those after it.

    Args:
        score: called with the documents of a pass, by index, and their batch. on_done: told how many they were.

    Raises:
        RunError: memory does not hold a single document.
    """
    policy.eval()
    waiting = np.arange(len(dataset))
    while len(waiting):
        # The longest pass first: what is too large for the memory fails at once.
        cut = cut_into_passes(dataset.lengths[waiting].tolist(), tokens_per_pass, alone=not policy.flat)
        passes = sorted((waiting[pass_] for pass_ in cut), key=lambda rows: -int(dataset.lengths[rows].sum()))
        scored: list[npt.NDArray[np.int64]] = []
        largest = 0
        for rows in passes:
            try:
                score(rows, make_batch(dataset, rows.tolist(), [0] * len(rows), device))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(rows) == 1:
                    raise RunError(_too_long(dataset, int(rows[0]))) from error
                largest = int(dataset.lengths[rows].sum())
            if largest:
                break
            scored.append(rows)
            on_done(len(rows))
        waiting = np.setdiff1d(waiting, np.concatenate(scored)) if scored else waiting
        if largest:
            # Outside of the except block: while there is a traceback, its frames hold the pass's activations.
            free_unused(device)
            smaller = max(1, min(tokens_per_pass, largest) // 2)
            log.warning("out of memory with passes of up to %d tokens: going on with %d", tokens_per_pass, smaller)
            tokens_per_pass = smaller


def _too_long(dataset: TokenDataset, row: int) -> str:
    return (
        f"{dataset.location(row)}: out of memory in one document of {dataset.lengths[row]:,} tokens, so that no cut "
        "helps: --dtype bf16 halves the weights, and a smaller sequence_len (in a config) leaves such rows out"
    )
