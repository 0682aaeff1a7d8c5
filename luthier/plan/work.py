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
from luthier.config.preference import has_reference, unit_of
from luthier.data.loader import StepLoader
from luthier.data.mixed import mix_of, mix_report
from luthier.data.stream.prepare import prepare
from luthier.errors import ConfigError
from luthier.plan.engine import Engine
from luthier.plan.shape import Shape

log = logging.getLogger("luthier")

# Share of a card's multiply peak that training is taken to reach where nobody has measured it.
USUAL_MFU = 0.4
# Steps that are looked at for the largest.
_STEPS_SEEN = 4096


@dataclass(frozen=True)
class Work:
    """What a run goes through. Sizes are those of what is computed: of a pair whose answers share their prompt, the
    prompt once.

    Attributes:
        source: where the figures come from, for people. rows_per_step: examples (packed rows) of a step.
        longest: tokens of the longest document, or pair. largest_step: of what one process has of a step. mean: of a
            document. mean_square: of documents' squared lengths, over `mean`: what a token attends to, on average.
        labelled: share of tokens that are trained.
        tokens: of the whole run, those of both answers to a prompt with the prompt. steps: of the whole run. None where
            it is not known.
        unit: what a row is: documents, pairs, or answers. sides: answers in one. shared: share of a pair's tokens that
            are its prompt, where both answers share it.
        computed: share of `tokens` that are computed.
        forward_only: how often a token goes through a model once more without a gradient: the reference's, and for
            `kto` both models' over answers behind other prompts.
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
    unit: str = "documents"
    sides: int = 1
    shared: float = 0.0
    computed: float = 1.0
    forward_only: float = 0.0

    @property
    def attended(self) -> float:
        """What a token attends to on average if all attended to all of their document, which the mask halves."""
        if self.sides == 1:
            return self.mean_square
        # Prompt p, answers of half the rest each: (p + a)^2 + 2 p a + a^2, of the prompt's own half once.
        return self.mean_square * (0.5 + self.shared - self.shared**2 / 2)


def work_from_data(config: Config, tokenizer: PreTrainedTokenizerBase, processes: int = 1) -> Work:
    """From the tokenised datasets, which are made if they are not in the cache. Of several processes, the largest step
    is what the first of them has of it.

    Raises:
        DataError, ConfigError: as `data.dataset.prepare`.
    """
    prepared = prepare(config, tokenizer, processes)
    train, data, training = prepared.train, config.data, config.training
    rl = config.preference.rl
    rows = training.micro_batch_size * training.gradient_accumulation_steps * processes
    loader = StepLoader(
        train,
        rows_per_step=rows,
        tokens_per_pass=int(train.lengths.sum()) + 1,
        seed=training.seed,
        shuffle=data.shuffle,
        packed_len=data.sequence_len if data.sample_packing else None,
        share="rows" if _shares(config) else "",
        processes=processes,
        mix=mix_of(config, prepared),
        epochs=training.num_epochs,
    )
    steps = training.max_steps or loader.total_steps(training.num_epochs)
    seen = [loader.step(index) for index in range(min(steps, loader.order.steps_in(0), _STEPS_SEEN))]
    sizes = np.array(loader.computed(range(len(train))), np.int64)
    times: np.ndarray = np.ones(len(train))
    epochs = steps / loader.steps_per_epoch
    all_tokens, unit = int(train.lengths.sum()), unit_of(rl)
    total = round(all_tokens * epochs)
    source = f"{len(train):,} {unit} of the config's datasets"
    if prepared.stream is not None:
        source = f"the first {len(train):,} {unit} of the stream, taken to be like the rest"
    if (mixed := mix_report(config, prepared, loader.order, steps)) is not None and mixed.mixed:
        times = loader.order.seen(steps)
        total = int((times * train.lengths).sum())
        epochs = total / all_tokens
        source += "; in the run " + ", ".join(f"{each.examples:,} of {each.name}" for each in mixed.sources)
    lengths = sizes.astype(np.float64)
    computed = float((times * lengths).sum())
    return Work(
        source=source,
        rows_per_step=rows,
        longest=int(sizes.max()),
        largest_step=max(int(sizes[[step.rows[i] for one in step.passes for i in one]].sum()) for step in seen),
        mean=computed / float(times.sum()),
        mean_square=float((times * lengths**2).sum()) / computed,
        labelled=float((times * train.trained).sum()) / computed,
        tokens=total,
        steps=steps,
        unit=unit,
        sides=2 if unit == "pairs" else 1,
        shared=float((times * (train.lengths - sizes)).sum()) / computed,
        computed=computed / float((times * train.lengths).sum()),
        forward_only=_forward_only(config, epochs),
    )


def work_stated(config: Config, tokens: int | None, rows: int | None, why: str, processes: int = 1) -> Work:
    """From what the user says, or from nothing: then every document is taken to be `sequence_len` long. Of a pair that
    holds for both sides, each with the prompt, which is taken to be `max_prompt_len` long, or half of it.

    Args:
        tokens, rows: of one epoch. why: where the figures come from.
    """
    training, limit, rl = config.training, config.data.sequence_len, config.preference.rl
    of_process = training.micro_batch_size * training.gradient_accumulation_steps
    per_step = of_process * processes
    packed, unit = config.data.sample_packing, unit_of(rl)
    sides = 2 if unit == "pairs" else 1
    whole = sides * limit
    mean = min(float(whole), tokens / rows) if tokens and rows and not packed else float(whole)
    if tokens is None and rows is not None:
        tokens = rows * whole
    units = math.ceil(tokens / limit) if packed and tokens else rows
    steps = None
    if units is not None:
        steps = math.ceil(training.num_epochs * math.ceil(units / per_step))
    steps = training.max_steps or steps
    total = None
    epoch_steps = math.ceil(units / per_step) if units else None
    if tokens is not None:
        total = round(tokens * steps / epoch_steps) if steps and epoch_steps else round(tokens * training.num_epochs)
    prompt = min(1.0, (config.preference.max_prompt_len or limit / 2) / limit) if rl else 0.0  # of a side
    spared = prompt / 2 if sides == 2 and _shares(config) else 0.0
    computed = mean * (1 - spared)
    # One side's prompt is trained too, where prompts are.
    trained = 1 - prompt + (prompt / 2 if rl == "orpo" and config.data.train_on_inputs else 0.0)
    return Work(
        source=why,
        rows_per_step=per_step,
        longest=whole,  # the prompt may be short
        largest_step=max(whole, round(of_process * computed)),
        mean=computed,
        mean_square=computed,
        labelled=trained / (1 - spared),
        tokens=total,
        steps=steps,
        unit=unit,
        sides=sides,
        shared=spared / (1 - spared),
        computed=1 - spared,
        forward_only=_forward_only(config, steps / epoch_steps if steps and epoch_steps else training.num_epochs),
    )


def _shares(config: Config) -> bool:
    """Whether a pair's prompt is computed once, on models that can; of other documents it is not known beforehand what
    they share."""
    of_pairs = unit_of(config.preference.rl) == "pairs"
    return of_pairs and config.training.share_prefixes == "auto" and config.model.attn_implementation is None


def _forward_only(config: Config, epochs: float) -> float:
    preference = config.preference
    if not has_reference(preference.rl):
        return 0.0
    asked = 1 / epochs if preference.precompute_ref_log_probs else 1.0
    return asked + (2.0 if preference.rl == "kto" else 0.0)


def flops_per_token(shape: Shape, work: Work, engine: Engine) -> float:
    """FLOPs of training on a token, on average; a multiply-add counts as two.

    Two for each multiplied parameter forward, two for the gradient of its input, two more for its own where it is
    trained, two again for what is computed a second time. The head runs on labelled tokens only. Causal attention
    takes 6 x layers x width x the tokens a token attends to on average, forward and backward (halved by the mask).
    A token that is computed with another's costs nothing, and a forward pass without gradient a third of the attention
    and two for each multiplied parameter.
    """
    mode = engine.recompute
    head = shape.head * work.labelled
    attention = len(shape.layers) * shape.query_width * work.attended
    forward = forward_flops(shape, work)
    flops = 4 * (shape.multiplied + head) + 2 * shape.multiplied_trained + 6 * attention
    if shape.head_trained and not engine.weighted:
        flops += 2 * head
    if mode == "mlp":
        flops += 2 * sum(layer.gates for layer in shape.layers)
    elif mode in ("layer", "offload"):
        flops += 2 * shape.multiplied + 2 * attention
    return work.computed * (flops + work.forward_only * forward)


def forward_flops(shape: Shape, work: Work, *, head: bool = True) -> float:
    """FLOPs of a computed token's forward pass, on average; with or without the head's."""
    attention = len(shape.layers) * shape.query_width * work.attended
    return 2 * (shape.multiplied + (shape.head * work.labelled if head else 0)) + 2 * attention


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
