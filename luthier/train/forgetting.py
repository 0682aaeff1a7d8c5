"""What a run forgets: the general set before the first step, and again with the weights that are kept.

The process that writes measures, with the policy as it stands: nothing is loaded a second time, nothing random is
drawn, and the training goes on as if nobody had looked. The figures before are kept row by row in the run folder, so
that a run which was stopped has them at its end.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from luthier.config import Config
from luthier.data.held_out import HeldOut
from luthier.data.loader import StepLoader
from luthier.errors import ConfigError, RunError
from luthier.evaluate.general import general_set, limit_of, write_general
from luthier.evaluate.measure import DocumentScores, score_documents
from luthier.evaluate.results import FOLDER
from luthier.models.policy import Policy
from luthier.train.checkpoint import State
from luthier.train.files import write_json_atomic
from luthier.train.folder import GENERAL_BEFORE, RunFolder

log = logging.getLogger("luthier")

# `auto`: most tokens of both measurements that are worth it, as a share of the run's own. A trained token costs its
# forward pass and at least as much again, so that twice the set beside it is the set against the run's tokens.
MOST = 0.03
_AFTERWARDS = "`luthier evaluate RUN --general` measures it afterwards"


def say_not_measured(config: Config) -> None:
    """For a run whose weights are shared out over processes: its first process cannot compute by itself."""
    if asked := config.evaluation.general_eval:
        level = logging.INFO if asked == "auto" else logging.WARNING
        log.log(level, "what the run forgets is not measured while processes share its weights: %s", _AFTERWARDS)


def before_training(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    policy: Policy,
    loader: StepLoader,
    total_steps: int,
    opened: RunFolder,
    state: State,
    device: torch.device,
) -> Callable[[], None] | None:
    """Measure the general set, or read what was measured when the run began.

    Returns:
        What measures it again at the end and writes both to `evaluation/general.json`; None where it is left out, which
        is said, or not wanted.
    """
    asked = config.evaluation.general_eval
    if asked is False:
        return None
    try:
        general = general_set(tokenizer, limit_of(config))
    except ConfigError as error:
        log.warning("%s: what the run forgets is not measured", error)
        return None
    # The others wait while one process measures.
    share = loader.processes * int(general.documents.lengths.sum()) / _tokens_of(loader, total_steps)
    if asked == "auto" and share > MOST:
        log.info(
            "what the run forgets is not measured: the general set, before and after, would cost %s of the run "
            "itself. general_eval: true measures it all the same; %s",
            f"{share:.0%}" if share < 10 else "many times that", _AFTERWARDS,
        )  # fmt: skip
        return None

    def measure() -> DocumentScores:
        was_training, tokens = policy.training, _tokens_per_pass(config, loader)
        try:
            return score_documents(policy, general.documents, device, tokens_per_pass=tokens)
        finally:
            policy.train(was_training)

    try:
        before = _before(opened, state, general, measure)
    except RunError as error:
        log.warning("what the run forgets is not measured: %s", error)
        return None
    if before is None:
        return None

    def after_training() -> None:
        try:
            after = measure()
            write_general(
                opened.path / FOLDER, config, tokenizer, general, before, after,
                target=str(opened.path),
                compare=config.adapter.lora_model_dir or config.model.base_model,
                settings={"measured_by": "the run itself", "dtype": str(policy.model.dtype)[6:], "device": str(device)},
            )  # fmt: skip
        except RunError as error:
            log.warning("what the run forgot is not known: %s; %s", error, _AFTERWARDS)
            return
        log.info("general set: loss %.4f before training, %.4f after it", _loss(before), _loss(after))

    return after_training


def _before(
    opened: RunFolder, state: State, general: HeldOut, measure: Callable[[], DocumentScores]
) -> DocumentScores | None:
    """Measured now at the run's beginning; else as it was then, and None where nobody knows, which is said."""
    rows = sha256(general.documents.digests.tobytes() + general.documents.rows.tobytes()).hexdigest()
    if state.step == 0:
        before = measure()
        _keep(opened.path, rows, before)
        log.info(
            "general set: loss %.4f before training (%d rows, %s tokens)",
            _loss(before), len(before.nll), f"{int(before.tokens.sum()):,}",
        )  # fmt: skip
        return before
    assert opened.resume_from is not None
    for folder in (opened.path, opened.resume_from.parent):
        found = _read(folder / GENERAL_BEFORE)
        if found.get("rows") == rows and len(found.get("nll", ())) == len(general.documents):
            nll, correct = (np.asarray(found[name], np.float64) for name in ("nll", "correct"))
            before = DocumentScores(nll, correct, general.documents.trained.astype(np.float64))
            if folder != opened.path:
                _keep(opened.path, rows, before)
            return before
    log.warning(
        "what the run forgets is not measured: the general set was not measured when the run began (%s); %s",
        GENERAL_BEFORE, _AFTERWARDS,
    )  # fmt: skip
    return None


def _keep(folder: Path, rows: str, before: DocumentScores) -> None:
    found = {"rows": rows, "nll": before.nll.tolist(), "correct": before.correct.tolist()}
    try:
        write_json_atomic(folder / GENERAL_BEFORE, found)
    except OSError as error:
        raise RunError(f"{folder / GENERAL_BEFORE} cannot be written: {error.strerror or error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _tokens_of(loader: StepLoader, total_steps: int) -> float:
    return loader.per_step(loader.dataset.lengths) * total_steps


def _tokens_per_pass(config: Config, loader: StepLoader) -> int:
    """What training has room for, without its gradients, as an evaluation of the run takes it."""
    batch = config.evaluation.eval_batch_size
    return int(min(math.inf if batch is None else batch * config.data.sequence_len, loader.tokens_per_pass))


def _loss(scores: DocumentScores) -> float:
    return float(scores.nll.sum() / scores.tokens.sum())
