"""Going on with a run: its state from a checkpoint, and what has changed in the config since it began."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from luthier.config import Config
from luthier.errors import RunError
from luthier.train import checkpoint
from luthier.train.checkpoint import State
from luthier.train.engine import Engine
from luthier.train.folder import CONFIG

log = logging.getLogger("luthier")


def resume(
    path: Path,
    job: dict[str, Any],
    engine: Engine,
) -> State:
    """Put masters, optimizer, loss scale and random numbers back, and say where the run stood.

    Args:
        job: what the checkpoint must agree on with the run that goes on from it; the number of processes is no
            part of it.

    Raises:
        RunError: it belongs to another run.
    """
    state, before = checkpoint.read_state(path)
    changed = [name for name in job if job[name] != before.get(name)]
    if changed == ["rows_per_step"]:
        rows, now = before.get("rows_per_step"), job["rows_per_step"]
        raise RunError(
            f"{path}: rows_per_step was {rows} when this run began, and micro_batch_size x "
            f"gradient_accumulation_steps x the number of processes ({engine.processes.size}) is {now} now. The steps "
            "of a run stay the same: set micro_batch_size and gradient_accumulation_steps so that the product is "
            f"{rows} again"
        )
    if changed:
        says = ", ".join(
            f"{name} (was {before.get(name)}, is {job[name]})" if name not in ("data", "parameters") else name
            for name in changed
        )
        raise RunError(f"{path}: this checkpoint belongs to another run; what differs: {says}")
    engine.restore(path)
    if state.loss_scale:
        engine.scaler.load_state_dict(state.loss_scale)
    log.info("going on from %s", path)
    return state


def say_changes(folder: Path, config: Config) -> None:
    """Name the settings that are not those that the run began with; the checkpoint allows them."""
    if not (folder / CONFIG).is_file():
        return
    before, now = Config.load(folder / CONFIG).flat(), config.flat()
    for key in now:
        if before[key] != now[key] and key not in (
            "output_dir",
            "overwrite_output_dir",
            "resume_from_checkpoint",
        ):
            log.warning("%s was %s when this run began and is %s now", key, before[key], now[key])
