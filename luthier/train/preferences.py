"""The parts of a run that preference tuning adds: the objective, what it needs of the reference, its evaluation.

The reference's log-probs depend on the starting weights and the data alone. Those that are computed beforehand are
kept on disk under a name made of the content of both, so that any run with the same start and rows finds them, and no
other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from luthier.config import Config
from luthier.config.preference import asks_reference_in_steps, has_reference
from luthier.data.cache import cache_folder
from luthier.data.dataset import TokenDataset
from luthier.data.loader import StepLoader
from luthier.data.tree import Sharing
from luthier.evaluate.preference import evaluate_preference
from luthier.models.policy import Policy
from luthier.models.reference import Reference
from luthier.objectives.preference import KTO, Pairs, answer_logps_of, preference
from luthier.train.checkpoint import State
from luthier.train.distributed import Processes
from luthier.train.files import write_atomic
from luthier.train.optim import warmup_steps
from luthier.train.preference_watch import PreferenceWatch

log = logging.getLogger("luthier")


class ReferenceLogps:
    """(policy, batch) -> log-probs (C,) of the batch's answers under the reference, each the sum over its tokens.

    Args:
        known: those of the answers of each row of a dataset, (rows, 2) fp32, NaN where they are not known yet; given,
            they are kept from the first time on.
    """

    def __init__(self, reference: Reference, known: np.ndarray | None = None) -> None:
        self.reference = reference
        self.known = known

    def __call__(self, policy: nn.Module, batch: Any) -> torch.Tensor:
        if self.known is None:
            return self._compute(policy, batch)
        rows, answers = list(batch.rows), len(batch.completions.tokens_C) // len(batch.rows)
        if np.isnan(self.known[rows, :answers]).any():
            self.known[rows, :answers] = self._compute(policy, batch).view(-1, answers).cpu().numpy()
        kept = torch.from_numpy(self.known[rows, :answers].reshape(-1))
        return kept.to(batch.completions.tokens_C.device)

    def _compute(self, policy: nn.Module, batch: Any) -> torch.Tensor:
        with self.reference.active():
            return answer_logps_of(policy, batch)


@dataclass
class PreferenceTuning:
    """What a run does otherwise with `rl`.

    Attributes:
        objective: for training. evaluate: tokens of a pass -> figures over the validation set; None without one.
    """

    objective: Pairs | KTO
    evaluate: Callable[[int], dict[str, float]] | None

    @classmethod
    def prepare(
        cls,
        config: Config,
        policy: Policy,
        loader: StepLoader,
        validation: TokenDataset | None,
        *,
        device: torch.device,
        settings: Any,
        processes: Processes,
    ) -> PreferenceTuning:
        """For weights that are those with which the run begins, before a checkpoint is loaded into them.

        Args:
            settings: what the log-probs depend on beside weights and data, such as the precision.
        """
        section = config.preference
        held_out = None if validation is None else _whole(validation, loader, config, policy)
        of_training = of_validation = live = None
        if has_reference(section.rl):
            reference = Reference.of(policy.model, copies=asks_reference_in_steps(section))
            log.info("%s", reference.describe())
            live, of_training = ReferenceLogps(reference), ReferenceLogps(reference)
            # In lockstep all have to compute or none: which are known already differs between processes.
            known = None if validation is None or loader.lockstep else _unknown(validation)
            if section.precompute_ref_log_probs:
                folder = cache_folder(config) / "reference-logps"
                of_training.known = _precomputed(folder, policy, reference, loader, device, settings, processes)
                if held_out is not None:
                    known = _precomputed(folder, policy, reference, held_out, device, settings, processes)
            of_validation = ReferenceLogps(reference, known)

        def add_up(number: torch.Tensor) -> torch.Tensor:
            if processes.size == 1 or (loader.lockstep and bool(number.isnan())):  # nobody waits for a failed one
                return number
            return number.new_tensor(sum(found for (found,) in processes.gather([float(number)])))

        evaluate = None
        if held_out is not None:
            objective = preference(section, of_validation, live, add_up)
            evaluate = partial(_evaluate, policy, objective, held_out, device, processes)
        return cls(preference(section, of_training, live, add_up), evaluate)


def watch_of(
    config: Config, loader: StepLoader, validation: TokenDataset | None, total_steps: int, state: State
) -> PreferenceWatch:
    """What says in words what the figures of a run mean; what it knows is part of the run's state."""
    section = config.preference
    assert section.rl is not None and section.rl_beta is not None
    return PreferenceWatch(
        section.rl,
        kind=section.dpo_loss_type,
        beta=section.rl_beta,
        answers_per_step=loader.rows_per_step,
        held_out_answers=0 if validation is None else len(validation),
        warmup_steps=warmup_steps(config.training, total_steps),
        total_steps=total_steps,
        state=state.noticed,
    )


def _whole(dataset: TokenDataset, like: StepLoader, config: Config, policy: Policy) -> StepLoader:
    """A loader whose first step is a whole dataset, in its own order; without dropout, all of it may be shared."""
    share: Sharing = "all" if config.training.share_prefixes == "auto" and not policy.why_not_shared else ""
    whole = StepLoader(
        dataset,
        rows_per_step=len(dataset),
        tokens_per_pass=like.tokens_per_pass,
        seed=like.seed,
        shuffle=False,
        sequence_len=like.sequence_len,
        alone=like.alone,
        share=share,
        rank=like.rank,
        processes=like.processes,
    )
    whole.lockstep = like.lockstep
    return whole


def _evaluate(
    policy: Policy,
    objective: Pairs | KTO,
    loader: StepLoader,
    device: torch.device,
    processes: Processes,
    tokens_per_pass: int,
) -> dict[str, float]:
    loader.tokens_per_pass = tokens_per_pass
    return evaluate_preference(policy, objective, loader, device, processes.gather)


def _unknown(dataset: TokenDataset) -> np.ndarray:
    return np.full((len(dataset), 2), np.nan, np.float32)


def _precomputed(
    folder: Path,
    policy: Policy,
    reference: Reference,
    loader: StepLoader,
    device: torch.device,
    settings: Any,
    processes: Processes,
) -> np.ndarray:
    """The log-probs of all rows of a loader's dataset, from the cache, or computed now and put there."""
    loader = loader.once()
    dataset = loader.dataset
    content = [dataset.digests.tobytes(), dataset.prompts.tobytes(), repr((settings, reference.fingerprint())).encode()]
    digest = sha256(b"".join(content)).hexdigest()[:32]
    if loader.lockstep:  # each has hashed its own shares of the weights
        of_all = processes.gather([int(digest[i : i + 8], 16) for i in range(0, 32, 8)])
        digest = sha256(repr(of_all).encode()).hexdigest()[:32]
    file = folder / f"{digest}.npy"
    kept = _read(file, len(dataset))
    everywhere = all(there for (there,) in processes.gather([float(kept is not None)]))
    if kept is not None and everywhere:
        log.info("reference: log-probs of %s rows, from the cache", f"{len(dataset):,}")
        return kept
    known = _unknown(dataset)
    compute = ReferenceLogps(reference, known)
    log.info("reference: computing the log-probs of %s rows", f"{len(dataset):,}")
    for index in range(loader.order.steps_in(0)):
        for batch in loader.batches(loader.step(index), device):
            compute(policy, batch)
    if processes.size > 1:  # each has its own share of the rows
        shares = np.array(processes.gather(known.reshape(-1).tolist()), np.float32)
        known = np.fmax.reduce(shares).reshape(known.shape)
    if processes.local_rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(file, partial(_save, known))
        except OSError as error:
            log.warning("%s cannot be written (%s): the next run computes them again", file, error.strerror or error)
    return known


def _read(file: Path, rows: int) -> np.ndarray | None:
    if not file.exists():
        return None
    try:
        found = np.load(file)
    except (OSError, ValueError) as error:
        log.warning("%s cannot be used (%s): the reference's log-probs are computed again", file, error)
        return None
    return found if found.shape == (rows, 2) else None


def _save(known: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, known)
