"""How a run cuts its steps into passes: the token budget, what layers recompute, and what an end of memory leaves."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from luthier.config import Config
from luthier.data.loader import StepLoader
from luthier.errors import ConfigError
from luthier.models.layers import Recomputation
from luthier.models.memory import Budget, choose_pass
from luthier.models.policy import Policy
from luthier.train.checkpoint import State
from luthier.train.composed import PerParameter
from luthier.train.distributed import Processes
from luthier.train.files import write_json_atomic
from luthier.train.folder import SMALLER_PASSES
from luthier.train.optim import Masters

log = logging.getLogger("luthier")


def keep_less(recomputation: Recomputation, state: State, processes: Processes) -> str:
    """Let layers recompute more; says what, and nothing if there is no more to do."""
    said = recomputation.more()
    if said:
        state.recomputed = list(recomputation.modes)
        if not processes.main:  # the run's own line is that of the first process
            log.warning("out of memory in one document: going on with %s", said)
    return said


def choose_tokens(
    config: Config,
    state: State,
    loader: StepLoader,
    policy: Policy,
    masters: Masters,
    recomputation: Recomputation,
    device: torch.device,
    processes: Processes,
) -> Budget:
    """Most tokens in a pass: as when the run began, unless the config asks for something else now. Of several
    processes each looks for itself, and what the smallest has room for holds for all."""
    asked = config.training.max_tokens_per_pass
    in_backward = config.training.optimizer_in_backward
    known = state.tokens_per_pass if state.tokens_asked == asked and not in_backward else 0
    if known and state.step:
        return Budget(known, "as before")
    asked = known or asked  # known and at the beginning: noted by a run that ended out of memory in its first steps

    def run_pass() -> int:
        policy.train()
        # The last step of an epoch may have nothing for this one of several processes, the first has.
        batch = next(loader.batches(loader.step(state.step if processes.size == 1 else loader.first), device))
        policy(batch)[0].sum().backward()
        masters.zero_grad()
        return len(batch.input_ids)

    lengths = np.sort(loader.lengths_held())
    in_step = lengths[-loader.rows_per_step :].sum()
    if config.data.sample_packing:
        in_step = min(loader.rows_per_step * config.data.sequence_len, lengths.sum())
    if processes.size > 1:  # the largest share, at most
        in_step = in_step // processes.size + lengths[-1]
    if in_backward:
        asked = int(max(in_step, lengths[-1]))
    budget = choose_pass(
        policy,
        recomputation,
        device,
        longest=int(lengths[-1]),
        step_tokens=int(in_step),
        run_pass=run_pass,
        asked=asked if isinstance(asked, int) else None,
        agree=(lambda free: int(min(processes.gather([free]))[0])) if loader.lockstep else None,
    )
    if known:
        return replace(budget, why="half of what memory had no room for")
    if in_backward:
        return replace(budget, why="a step is one, with optimizer_in_backward")
    if (smallest := int(min(processes.gather([budget.tokens]))[0])) < budget.tokens:
        return Budget(smallest, "what another process has room for")
    return budget


def steps_in_backward(
    optimizer: torch.optim.Optimizer, masters: Masters, loader: StepLoader
) -> Callable[[Masters], torch.Tensor]:
    """Let backward take the optimizer's steps from now on; returns what says the gradients' norm afterwards."""
    assert isinstance(optimizer, PerParameter)
    if loader.alone and loader.rows_per_step > 1:
        raise ConfigError(
            "optimizer_in_backward: this model runs one document per pass, and a step has to be one pass: write "
            "`micro_batch_size: 1`, or leave optimizer_in_backward out"
        )
    optimizer.fuse_into_backward(masters)
    masters.stepped_by_backward = True
    return optimizer.gradient_norm


def remember_smaller(folder: Path, tokens: int, config: Config) -> None:
    """Note in the run folder that passes have to be smaller from now on: for a run that ended out of memory, whose
    checkpoints are from before it, if there are any."""
    write_json_atomic(
        folder / SMALLER_PASSES,
        {"tokens_per_pass": tokens, "tokens_asked": config.training.max_tokens_per_pass},
    )


def take_over_smaller(folder: Path, state: State, config: Config, processes: Processes) -> None:
    """Put what was noted into the state that a run goes on from, unless the config asks for something else now."""
    asked, file = config.training.max_tokens_per_pass, folder / SMALLER_PASSES
    text = processes.from_first(file.name, lambda: file.read_text(encoding="utf-8") if file.exists() else "")
    if not text or not config.output.resume_from_checkpoint:
        return
    try:
        noted = json.loads(text)
        tokens = int(noted["tokens_per_pass"])
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is passed over: %s", file, error)
        return
    if noted.get("tokens_asked") == asked:
        before = state.tokens_per_pass if state.tokens_asked == asked else 0
        state.tokens_per_pass, state.tokens_asked = min(tokens, before or tokens), asked
