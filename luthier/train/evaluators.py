"""What is asked of a model at every evaluation of its run: figures over the validation set, and samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.config import Config
from luthier.data.dataset import TokenDataset
from luthier.data.formats import prompt_example
from luthier.data.loader import StepLoader
from luthier.data.render import Renderer
from luthier.data.tokenizer import terminator_ids
from luthier.evaluate.loss import evaluate_loss
from luthier.evaluate.samples import Sampler, validation_prompts
from luthier.generate import engine as generate
from luthier.generate.engine import default_terminators
from luthier.generate.sampling import Sampling
from luthier.models.policy import Policy
from luthier.train.distributed import Processes
from luthier.train.engine import Engine
from luthier.train.preferences import PreferenceTuning


def evaluation(
    config: Config,
    validation: TokenDataset | None,
    policy: Policy,
    loader: StepLoader,
    tuning: PreferenceTuning | None,
    device: torch.device,
    processes: Processes,
) -> Callable[[int], dict[str, float]] | None:
    """step -> figures over the validation set, if there is one."""
    if validation is None:
        return None
    batch, limit = config.evaluation.eval_batch_size, math.inf
    if batch is not None:
        limit = batch * config.data.sequence_len

    def evaluate(step: int) -> dict[str, float]:
        # What training has room for, without its gradients.
        budget = int(min(limit, loader.tokens_per_pass))
        if tuning is not None:
            assert tuning.evaluate is not None
            return tuning.evaluate(budget)
        return evaluate_loss(
            policy,
            validation,
            tokens_per_pass=budget,
            alone=not policy.flat,
            share=loader.share,
            device=device,
            rank=processes.rank,
            processes=processes.size,
            gather=processes.gather,
            lockstep=loader.lockstep,
        )

    return evaluate


def sampling(
    config: Config,
    validation: TokenDataset | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
) -> Callable[[int], list[dict[str, Any]]] | None:
    """step -> generated samples, if any are asked for."""
    section = config.evaluation
    if not section.generate_samples:
        return None
    entry = config.data.datasets[0]
    renderer = Renderer(tokenizer, config)
    prompts: list[tuple[Any, ...]] = [
        (text, renderer.prompt_ids(prompt_example(entry, text, rl=config.preference.rl), entry))
        for text in section.sample_prompts
    ]
    if validation is not None and (section.num_generation_samples or not prompts):
        prompts += validation_prompts(validation, tokenizer, section.num_generation_samples or 3)
    sampler = Sampler(prompts, Sampling.from_config(section, seed=config.training.seed))
    # What the config trains as an end, and what the model's own settings know as one.
    ends = (*terminator_ids(tokenizer, config), *default_terminators(model))
    writer = generate.Engine(model, tokenizer, ends)

    def sample(step: int) -> list[dict[str, Any]]:
        with engine.generating():
            return sampler.rows(writer, step)

    return sample
