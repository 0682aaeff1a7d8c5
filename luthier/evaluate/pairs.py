"""Which of two answers a model prefers, and how much more than the model before its tuning does.

The figures of `rl` runs, row by row: an answer's log-prob is the sum over its tokens, and its reward beta times how far
that is above the reference's (`dpo`, `ipo`), or without a reference beta times the mean of a token (`orpo`, `simpo`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from luthier.config.preference import REFERENCE_FREE
from luthier.data.batches import Batch
from luthier.data.dataset import TokenDataset
from luthier.evaluate.figures import RowFigures
from luthier.evaluate.intervals import Floats
from luthier.evaluate.measure import in_passes, warn_of_infinite
from luthier.generate.text import decode
from luthier.models.policy import Policy


@dataclass(frozen=True)
class PairScores:
    """Of N pairs, the chosen answer before the rejected one: summed log-probs (N, 2) and tokens (N, 2)."""

    logps: Floats
    tokens: Floats


def score_pairs(
    policy: Policy,
    dataset: TokenDataset,
    device: torch.device,
    *,
    tokens_per_pass: int,
    on_done: Callable[[int], None] = lambda documents: None,
) -> PairScores:
    """Score every pair of a dataset; see `measure.in_passes`."""
    found = PairScores(np.zeros((len(dataset), 2)), np.zeros((len(dataset), 2)))

    def score(rows: npt.NDArray[np.int64], batch: Batch) -> None:
        logps, _ = policy(batch)
        answers = batch.completions
        assert answers is not None
        sums = torch.zeros_like(answers.tokens_C).double()
        sums = sums.index_add(0, answers.completion_M, logps[answers.entry_M].double())
        for values, kept in ((sums, found.logps), (answers.tokens_C, found.tokens)):
            kept[rows] = values.double().cpu().numpy().reshape(-1, 2)

    in_passes(policy, dataset, device, score, tokens_per_pass=tokens_per_pass, on_done=on_done)
    warn_of_infinite(dataset, found.logps.sum(1))
    return found


def pair_figures(own: PairScores, reference: PairScores | None, rl: str, beta: float) -> RowFigures:
    """Figures of each pair under a model.

    Args:
        reference: the model before its tuning, where rewards are against one and it is known.
    """
    mean = own.logps / own.tokens
    compared = mean if rl in REFERENCE_FREE else own.logps
    columns: dict[str, tuple[Floats, Floats | None]] = {"prefers_chosen": (_first_is_more(compared), None)}
    if rl in REFERENCE_FREE:
        columns["reward_margin"] = beta * (mean[:, 0] - mean[:, 1]), None
    elif reference is not None:
        rewards = beta * (own.logps - reference.logps)
        columns["reward_accuracy"] = _first_is_more(rewards), None
        columns["reward_margin"] = rewards[:, 0] - rewards[:, 1], None
    return RowFigures(own.tokens.sum(1), columns)


def _first_is_more(values: Floats) -> Floats:
    return (values[:, 0] > values[:, 1]).astype(np.float64)


def pair_texts(dataset: TokenDataset, index: int, tokenizer: Any) -> dict[str, str]:
    """Prompt and both answers of a pair, for people."""
    document = dataset[index]
    assert document.lengths is not None
    start, middle = document.prompt, document.lengths[0]
    pieces = document.input_ids[:start], document.input_ids[start:middle], document.input_ids[middle + start :]
    prompt, chosen, rejected = (decode(tokenizer, piece.tolist()) for piece in pieces)
    return {"prompt": prompt, "expected": chosen, "rejected": rejected}


def pair_line(scores: PairScores, number: int) -> dict[str, Any]:
    """What a model makes of one pair."""
    (chosen, rejected), tokens = scores.logps[number].tolist(), scores.tokens[number].astype(int).tolist()
    return {
        "answer": None,
        "chosen_logp": chosen,
        "rejected_logp": rejected,
        "chosen_tokens": tokens[0],
        "rejected_tokens": tokens[1],
    }
