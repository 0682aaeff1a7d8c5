"""The steps of a run: from its data to the loader, what is said of it, and what a checkpoint has to agree on."""

from __future__ import annotations

import logging
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from luthier.config import Config
from luthier.config.preference import unit_of
from luthier.data.dataset import PreparedData, TokenDataset
from luthier.data.loader import StepLoader
from luthier.data.mixed import MixReport, mix_of
from luthier.data.stream.loader import StreamLoader
from luthier.data.tree import Sharing
from luthier.models.memory import PROBE_TOKENS
from luthier.models.rank_budget import TOKENS
from luthier.train.distributed import Processes
from luthier.train.optim import Masters

log = logging.getLogger("luthier")


def loader_of(
    config: Config, prepared: PreparedData, processes: Processes, *, alone: bool, share: Sharing
) -> StepLoader:
    """The loader of a run; `alone` and `share` as for `StepLoader`."""
    training, data = config.training, config.data
    rows_per_step = training.micro_batch_size * training.gradient_accumulation_steps * processes.size
    settings: dict[str, Any] = dict(
        tokens_per_pass=PROBE_TOKENS,  # until the budget is known
        seed=training.seed,
        shuffle=data.shuffle,
        sequence_len=data.sequence_len,
        alone=alone,
        share=share,
        rank=processes.rank,
        processes=processes.size,
    )
    loader: StepLoader
    if prepared.stream is not None:
        assert training.max_steps is not None
        streamed = prepared.stream
        loader = StreamLoader(*streamed, total_steps=training.max_steps, agree=processes.agree_on, **settings)
    else:
        loader = StepLoader(
            prepared.train,
            rows_per_step=rows_per_step,
            packed_len=data.sequence_len if data.sample_packing else None,
            mix=mix_of(config, prepared),
            epochs=training.num_epochs,
            **settings,
        )
    if loader.fill is not None:
        log.info("packed into rows of %d tokens, %.1f%% full", data.sequence_len, 100 * loader.fill)
    return loader


def say_steps(
    config: Config,
    loader: StepLoader,
    total: int,
    device: torch.device,
    dtype: torch.dtype,
    processes: Processes,
    mix: MixReport | None,
) -> None:
    """Log how many steps of what there are."""
    training = config.training
    unit = unit_of(config.preference.rl) if config.preference.rl else "examples"
    unit = "packed rows" if config.data.sample_packing else unit
    log.info(
        "%d steps of %d %s (micro_batch_size %d x gradient_accumulation_steps %d x %s), %s, %s on %s",
        total,
        loader.rows_per_step,
        unit,
        training.micro_batch_size,
        training.gradient_accumulation_steps,
        "1 process" if processes.size == 1 else f"{processes.size} processes",
        "of a stream" if config.data.streaming else f"{loader.steps_per_epoch:.6g} steps an epoch",
        str(dtype)[6:],
        device,
    )
    if mix is not None:
        for level, line in mix.lines():
            log.log(level, "%s", line)


def job_of(config: Config, data: PreparedData, masters: Masters, loader: StepLoader) -> dict[str, Any]:
    """What a checkpoint must agree on with the run that goes on from it."""
    trained = np.concatenate([data.train.digests, data.train.trained.view(np.uint64)])
    return {
        "base_model": config.model.base_model,
        "data": data.fingerprint if config.data.streaming else sha256(trained.tobytes()).hexdigest(),
        "rows_per_step": loader.rows_per_step,
        "seed": config.training.seed,
        "shuffle": config.data.shuffle,
        "sample_packing": config.data.sample_packing,
        "rl": config.preference.rl,
        "optimizer": config.training.optimizer,
        "parameters": masters.shapes,
        "mix": None if loader.order.mix is None else loader.order.mix.describe(),
    }


def first_documents(dataset: TokenDataset, config: Config) -> list[torch.Tensor]:
    """Token ids of training documents drawn by the seed, as many as an adapter's start looks at."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.training.seed))
    found: list[torch.Tensor] = []
    for index in order.tolist():
        if sum(map(len, found)) >= TOKENS:
            break
        document = dataset[index]
        ids = torch.from_numpy(document.input_ids.astype(np.int64))
        found += ids.split(list(document.lengths or (len(ids),)))
    return found
