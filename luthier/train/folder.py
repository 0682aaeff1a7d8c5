"""The run folder: who may write into it, and what a run leaves there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from luthier.config import Config
from luthier.errors import ConfigError, RunError
from luthier.train import checkpoint

CONFIG = "config.yaml"

# What a run writes at the top of its folder; overwriting removes these and leaves anything else alone.
_OWN = (
    CONFIG,
    "metrics.jsonl",
    "samples.jsonl",
    "environment.json",
    "README.md",
    "loss.png",
    "adapter_*",
    "config.json",
    "generation_config.json",
    "model*.safetensors*",
    "checkpoint-*",
    ".partial-*",
)


def open_folder(config: Config) -> tuple[Path, Path | None]:
    """The folder of a run, made if need be, and the checkpoint to go on from (None: from the beginning).

    Raises:
        ConfigError: the folder holds something and the config says neither to resume nor to overwrite.
        RunError: it cannot be written, or the checkpoint asked for is not whole.
    """
    folder = Path(config.output.output_dir).expanduser()
    resume = config.output.resume_from_checkpoint
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _try_writing(folder)
    except OSError as error:
        raise RunError(f"output_dir: {folder} cannot be written: {error.strerror or error}") from error
    from_checkpoint = _checkpoint_to_resume(folder, resume)
    if resume or not any(folder.iterdir()):
        return folder, from_checkpoint
    if not config.output.overwrite_output_dir:
        raise ConfigError(
            f"output_dir: {folder} already holds something, and nothing is overwritten unasked. Choose another "
            "output_dir, or add --resume_from_checkpoint auto (go on with that run) or --overwrite_output_dir "
            "(delete that run)"
        )
    for pattern in _OWN:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder, None


def _checkpoint_to_resume(folder: Path, resume: str | bool | None) -> Path | None:
    if not resume:
        return None
    if resume is True or resume == "auto":
        for leftover in folder.glob(".partial-*"):  # of a run that was killed while it wrote
            shutil.rmtree(leftover, ignore_errors=True)
        return checkpoint.latest(folder)
    path = Path(resume).expanduser()
    if not path.is_dir():
        there = ", ".join(p.name for p in checkpoint.list_checkpoints(folder)) or "none"
        raise ConfigError(f"resume_from_checkpoint: {path} is no folder; checkpoints in {folder}: {there}")
    if problem := checkpoint.damage(path):
        raise RunError(f"resume_from_checkpoint: {path} cannot be used: {problem}")
    return path


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside the result, then move its files to the top of the run folder.

    Each file appears whole or not at all, and readable as any file that the user makes: some writers leave
    theirs to the owner alone.
    """
    partial = folder / ".partial-result"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write(partial)
        checkpoint.share(partial)
        for path in sorted(partial.iterdir()):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _try_writing(folder: Path) -> None:
    probe = folder / ".partial-probe"
    probe.write_bytes(b"")
    os.unlink(probe)
