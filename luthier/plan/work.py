"""How much there is to train: documents, tokens and steps, and what that takes in hours and money."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from luthier.config import Config
from luthier.data.dataset import prepare
from luthier.data.loader import StepLoader
from luthier.errors import ConfigError
from luthier.models.recompute import Mode
from luthier.plan.shape import Shape

log = logging.getLogger("luthier")

# Share of a card's multiply peak that training is taken to reach where nobody has measured it.
USUAL_MFU = 0.4
# Steps that are looked at for the largest.
_STEPS_SEEN = 4096


@dataclass(frozen=True)
class Work:
    """What a run goes through.

    Attributes:
        source: where the figures come from, for people. rows_per_step: examples (packed rows) of a step.
        longest: tokens of the longest document. largest_step: of the step with most tokens. mean: of a document.
        mean_square: of documents' squared lengths, over `mean`: what a token attends to, on average.
        labelled: share of tokens that are trained.
        tokens: of the whole run. steps: of the whole run. None where it is not known.
    """

    source: str
    rows_per_step: int
    longest: int
    largest_step: int
    mean: float
    mean_square: float
    labelled: float
    tokens: int | None
    steps: int | None


def work_from_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> Work:
    """From the tokenised datasets, which are made if they are not in the cache.

    Raises:
        DataError, ConfigError: as `data.dataset.prepare`.
    """
    prepared = prepare(config, tokenizer)
    train, data, training = prepared.train, config.data, config.training
    lengths = train.lengths.astype(np.float64)
    rows = training.micro_batch_size * training.gradient_accumulation_steps
    loader = StepLoader(
        train,
        rows_per_step=rows,
        tokens_per_pass=int(lengths.sum()) + 1,
        seed=training.seed,
        shuffle=data.shuffle,
        packed_len=data.sequence_len if data.sample_packing else None,
    )
    steps = training.max_steps or math.ceil(training.num_epochs * loader.steps_per_epoch)
    seen = [loader.step(index).tokens for index in range(min(steps, loader.steps_per_epoch, _STEPS_SEEN))]
    total = round(float(lengths.sum()) * steps / loader.steps_per_epoch)
    return Work(
        source=f"{len(train):,} documents of the config's datasets",
        rows_per_step=rows,
        longest=int(lengths.max()),
        largest_step=max(seen),
        mean=float(lengths.mean()),
        mean_square=float((lengths**2).sum() / lengths.sum()),
        labelled=float(train.trained.sum() / lengths.sum()),
        tokens=total,
        steps=steps,
    )


def work_stated(config: Config, tokens: int | None, rows: int | None, why: str) -> Work:
    """From what the user says, or from nothing: then every document is taken to be `sequence_len` long.

    Args:
        tokens, rows: of one epoch. why: where the figures come from.
    """
    training, limit = config.training, config.data.sequence_len
    per_step = training.micro_batch_size * training.gradient_accumulation_steps
    packed = config.data.sample_packing
    mean = min(float(limit), tokens / rows) if tokens and rows and not packed else float(limit)
    if tokens is None and rows is not None:
        tokens = rows * limit
    units = math.ceil(tokens / limit) if packed and tokens else rows
    steps = None
    if units is not None:
        steps = math.ceil(training.num_epochs * math.ceil(units / per_step))
    steps = training.max_steps or steps
    total = None
    if tokens is not None:
        epoch_steps = math.ceil(units / per_step) if units else None
        total = round(tokens * steps / epoch_steps) if steps and epoch_steps else round(tokens * training.num_epochs)
    return Work(
        source=why,
        rows_per_step=per_step,
        longest=limit,
        largest_step=max(limit, round(per_step * mean)),
        mean=mean,
        mean_square=mean,
        labelled=1.0,
        tokens=total,
        steps=steps,
    )


def flops_per_token(shape: Shape, work: Work, mode: Mode) -> float:
    """FLOPs of training on a token, on average; a multiply-add counts as two.

    Two for each multiplied parameter forward, two for the gradient of its input, two more for its own where it is
    trained, two again for what is computed a second time. The head runs on labelled tokens only. Causal attention
    takes 6 x layers x width x the tokens a token attends to on average, forward and backward (halved by the mask).
    """
    head = shape.head * work.labelled
    attention = len(shape.layers) * shape.query_width * work.mean_square
    flops = 4 * (shape.multiplied + head) + 2 * shape.multiplied_trained + 6 * attention
    if mode == "mlp":
        return flops + 2 * sum(layer.gates for layer in shape.layers)
    return flops + ((2 * shape.multiplied + 2 * attention) if mode in ("layer", "offload") else 0)


def measured_speed(run: Path) -> float:
    """Tokens per second of a run that has been made, from its last row in `metrics.jsonl`.

    Raises:
        ConfigError: no such file, or no training row in it.
    """
    path = run / "metrics.jsonl" if run.is_dir() else run
    last: dict[str, Any] | None = None
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row.get("seconds") and row.get("tokens"):
                last = row
    except (OSError, ValueError) as error:
        raise ConfigError(f"--measured: {path} cannot be read: {error}; name a run's folder") from error
    if last is None:
        raise ConfigError(f"--measured: {path} has no row with tokens and seconds; name the folder of a run")
    return float(last["tokens"] / last["seconds"])
