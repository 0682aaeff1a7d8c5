"""Answers that are each labelled desirable or not (`rl: kto`): how likely a model finds them, and how much likelier
than the model before its tuning.

The figures of the run's own log, answer by answer: a log-prob is the sum over an answer's tokens, its reward beta times
how far that is above the reference's. The reward is on its side if it is above, or for an undesirable answer not above,
beta times the divergence: how far model and reference are apart on answers to other prompts, one number for all rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from luthier.data.batches import Batch
from luthier.data.dataset import TokenDataset
from luthier.data.loader import StepLoader
from luthier.errors import RunError
from luthier.evaluate.figures import RowFigures
from luthier.evaluate.intervals import Floats, bootstrap
from luthier.evaluate.measure import in_passes, warn_of_infinite
from luthier.generate.text import decode
from luthier.models.memory import free_unused, is_out_of_memory
from luthier.models.policy import Policy

log = logging.getLogger("luthier")


@dataclass(frozen=True)
class LabelledScores:
    """Of N answers: summed log-probs (N,), tokens (N,), and log-probs of the answer to another prompt behind each one's
    prompt (N,)."""

    logps: Floats
    tokens: Floats
    mismatched: Floats


@dataclass(frozen=True)
class Labelled:
    """What is known of N answers under a model. `reward` (N,) and `right` (N,), whether it is on its side, and `kl`
    with its interval, in nats: None without a reference."""

    scores: LabelledScores
    desirable: npt.NDArray[np.bool_]
    reward: Floats | None = None
    right: npt.NDArray[np.bool_] | None = None
    kl: dict[str, float] | None = None


def score_labelled(
    policy: Policy,
    dataset: TokenDataset,
    device: torch.device,
    *,
    tokens_per_pass: int,
    sequence_len: int,
    on_done: Callable[[int], None] = lambda documents: None,
) -> LabelledScores:
    """Score every answer of a dataset; see `measure.in_passes`.

    Args:
        sequence_len: longest document that is made of a prompt and another's answer.
    """
    found = LabelledScores(*(np.zeros(len(dataset)) for _ in range(3)))

    def score(rows: npt.NDArray[np.int64], batch: Batch) -> None:
        found.logps[rows] = _answers(policy, batch)
        assert batch.completions is not None
        found.tokens[rows] = batch.completions.tokens_C.double().cpu().numpy()

    in_passes(policy, dataset, device, score, tokens_per_pass=tokens_per_pass, on_done=on_done)
    _score_mismatched(policy, dataset, device, found.mismatched, tokens_per_pass, sequence_len)
    warn_of_infinite(dataset, found.logps + found.mismatched)
    return found


@torch.no_grad()
def _score_mismatched(
    policy: Policy,
    dataset: TokenDataset,
    device: torch.device,
    kept: Floats,
    tokens_per_pass: int,
    sequence_len: int,
) -> None:
    """Each prompt with the answer of the row before it, as in a step of training that holds the whole dataset."""
    loader = StepLoader(
        dataset,
        rows_per_step=len(dataset),
        tokens_per_pass=tokens_per_pass,
        seed=0,
        shuffle=False,
        sequence_len=sequence_len,
        alone=not policy.flat,
    )
    step = loader.step(0)
    while True:
        largest, alone = loader.tokens_per_pass, loader.tokens_per_pass == 1
        try:
            for batch in loader.mismatched(step, device):
                largest, alone = len(batch.input_ids), len(batch.rows) == 1
                kept[list(batch.rows)] = _answers(policy, batch)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if alone:
                raise RunError(
                    f"out of memory in a prompt of the data with the answer to another one, {largest:,} tokens: "
                    "--dtype bf16 halves the weights, and a smaller sequence_len (in a config) makes it shorter"
                ) from error
        free_unused(device)
        smaller = max(1, min(loader.tokens_per_pass, largest) // 2)
        log.warning("out of memory with passes of up to %d tokens: going on with %d", loader.tokens_per_pass, smaller)
        loader.tokens_per_pass = smaller


def _answers(policy: Policy, batch: Batch) -> Floats:
    """Summed log-prob of each answer of a pass."""
    logps, _ = policy(batch)
    answers = batch.completions
    assert answers is not None
    sums = torch.zeros_like(answers.tokens_C).double()
    return sums.index_add(0, answers.completion_M, logps[answers.entry_M].double()).cpu().numpy()


def labelled(
    own: LabelledScores, reference: LabelledScores | None, desirable: npt.ArrayLike, beta: float, seed: int = 0
) -> Labelled:
    """What answers are worth under a model.

    Args:
        reference: the same answers under the model before its tuning, where that is known and another one.
        desirable: (N,) their labels. seed: of the divergence's interval.
    """
    labels = np.asarray(desirable).astype(bool)
    if reference is None:
        return Labelled(own, labels)
    ratio, apart = own.logps - reference.logps, own.mismatched - reference.mismatched
    kl = max(0.0, float(apart.mean()))
    # As the log does it: below 0 the estimate is cut off, and so are the ends of its interval.
    low, high = (max(0.0, end) for end in bootstrap(apart, share=False, seed=seed))
    return Labelled(own, labels, beta * ratio, (ratio > kl) == labels, {"value": kl, "low": low, "high": high})


def labelled_figures(found: Labelled, owner: npt.NDArray[np.int64], rows: int) -> RowFigures:
    """Figures of each row, which is one answer, or two of a pair.

    Args:
        owner: (N,) the row of each answer, below `rows`.
    """

    def add_up(values: Floats) -> Floats:
        return np.bincount(owner, values, minlength=rows).astype(np.float64)

    columns: dict[str, tuple[Floats, Floats | None]] = {}
    for side, labels in (("desirable", found.desirable), ("undesirable", ~found.desirable)):
        columns[f"{side}_logp"] = add_up(found.scores.logps * labels), add_up(labels.astype(np.float64))
    if found.reward is None or found.right is None:
        return RowFigures(add_up(found.scores.tokens), columns)
    for side, labels in (("desirable", found.desirable), ("undesirable", ~found.desirable)):
        columns[f"{side}_reward"] = add_up(found.reward * labels), add_up(labels.astype(np.float64))
    several = add_up(np.ones(len(owner))) if len(owner) > rows else None
    columns["reward_accuracy"] = add_up(found.right.astype(np.float64)), several
    margin = {"reward_margin": ("desirable_reward", "undesirable_reward")}
    return RowFigures(add_up(found.scores.tokens), columns, margin)


def labelled_texts(dataset: TokenDataset, index: int, tokenizer: Any) -> dict[str, Any]:
    """Prompt, answer and label, for people."""
    document = dataset[index]
    pieces = document.input_ids[: document.prompt], document.input_ids[document.prompt :]
    prompt, answer = (decode(tokenizer, piece.tolist()) for piece in pieces)
    return {"prompt": prompt, "expected": answer, "desirable": document.desirable}


def labelled_line(found: Labelled, number: int) -> dict[str, Any]:
    """What a model makes of one answer."""
    line: dict[str, Any] = {
        "answer": None,
        "logp": float(found.scores.logps[number]),
        "tokens": int(found.scores.tokens[number]),
    }
    if found.reward is not None and found.right is not None:
        line |= {"reward": float(found.reward[number]), "right": bool(found.right[number])}
    return line
