"""The run folder: who may write into it, and what a run leaves there."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from luthier.config import Config
from luthier.errors import ConfigError, RunError
from luthier.train import checkpoint
from luthier.train.distributed import Processes

log = logging.getLogger("luthier")

CONFIG = "config.yaml"
# Tokens of a pass that a run which ended out of memory has to go on with (`train.passes`).
SMALLER_PASSES = "smaller_passes.json"
# The general set before the first step (`train.forgetting`).
GENERAL_BEFORE = "general_before.json"
# What a program handed over to its run: rows and a tokenizer, there before the run opens its folder.
GIVEN = "given"
# What a run came to: there once it has ended, and gone while it goes on.
SUMMARY = "summary.json"

# What a run writes at the top of its folder; overwriting removes these and leaves anything else alone.
_OWN = (
    CONFIG,
    SMALLER_PASSES,
    GENERAL_BEFORE,
    "metrics.jsonl",
    "samples.jsonl",
    "notes.jsonl",
    SUMMARY,
    "report.html",
    "evaluation",
    "environment.json",
    "README.md",
    "loss.png",
    "adapter_*",
    "config.json",
    "generation_config.json",
    "model*.safetensors*",
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "checkpoint-*",
    ".partial-*",
)


@dataclass(frozen=True)
class RunFolder:
    """A folder that a run may write into.

    Attributes:
        resume_from: the checkpoint to go on from; None: from the beginning.
        replaced: what of an earlier run has to go before this one writes.
    """

    path: Path
    resume_from: Path | None = None
    replaced: tuple[Path, ...] = ()

    def clear(self) -> None:
        """Delete what is replaced. As late as possible: a config that cannot run must not cost the old run."""
        for path in self.replaced:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def shared_folder(config: Config, processes: Processes) -> Iterator[RunFolder]:
    """The folder of a run for all its processes: the first one holds it, the others read the checkpoint that it found.

    Raises:
        RunError: that checkpoint cannot be read from where this process runs.
    """
    if processes.main:
        with hold_folder(config) as opened:
            processes.from_first("resume_from", lambda: str(opened.resume_from or ""))
            yield opened
        return
    resume_from = processes.from_first("resume_from", str)
    if resume_from and not (Path(resume_from) / checkpoint.STATE).is_file():
        raise RunError(
            f"{resume_from} is on the machine of rank 0, and not on that of rank {processes.rank}. To go on with a "
            "run, all of its processes have to reach output_dir: put it on a file system that their machines share"
        )
    yield RunFolder(Path(config.output.output_dir).expanduser(), Path(resume_from) if resume_from else None)


@contextmanager
def hold_folder(config: Config) -> Iterator[RunFolder]:
    """The folder of a run, made if need be, for as long as the run lasts; no other run can hold it meanwhile.

    Raises:
        ConfigError: the folder holds something and the config says neither to resume nor to overwrite, or
            overwriting would delete what the run starts from.
        RunError: it cannot be written, another run holds it, or the checkpoint asked for is not whole.
    """
    folder = Path(config.output.output_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _try_writing(folder)
    except OSError as error:
        raise RunError(f"output_dir: {folder} cannot be written: {error.strerror or error}") from error
    with _alone_in(folder):
        yield _open(config, folder)


def _open(config: Config, folder: Path) -> RunFolder:
    output = config.output
    resume_from = _checkpoint_to_resume(folder, output.resume_from_checkpoint)
    here = resume_from is not None and resume_from.resolve().parent == folder.resolve()
    if resume_from is not None and here:
        replaced = [p for p in checkpoint.list_checkpoints(folder) if _comes_after(p, resume_from)]
        if replaced and output.resume_from_checkpoint != "auto" and not output.overwrite_output_dir:
            raise ConfigError(
                f"resume_from_checkpoint: {resume_from.name} is not the last of {folder}: going on from it "
                f"replaces {', '.join(p.name for p in replaced)}. Add --overwrite_output_dir if that is "
                "wanted, or choose another output_dir"
            )
        # After the newest whole checkpoint there are damaged ones only, already named.
        return RunFolder(folder, resume_from, tuple(replaced))
    if (output.resume_from_checkpoint and resume_from is None) or not any(p.name != GIVEN for p in folder.iterdir()):
        return RunFolder(folder, resume_from)
    if not output.overwrite_output_dir:
        raise ConfigError(
            f"output_dir: {folder} already holds something, and nothing is overwritten unasked. Choose another "
            "output_dir, or add --resume_from_checkpoint auto (go on with that run) or --overwrite_output_dir "
            "(delete that run)"
        )
    replaced = sorted({path for pattern in _OWN for path in folder.glob(pattern)})
    _refuse_to_delete_sources(config, folder, replaced)
    return RunFolder(folder, resume_from, tuple(replaced))


def _comes_after(one: Path, other: Path) -> bool:
    return checkpoint.step_of(one) > checkpoint.step_of(other)


def _refuse_to_delete_sources(config: Config, folder: Path, doomed: Sequence[Path]) -> None:
    sources = {
        "base_model": config.model.base_model,
        "tokenizer_config": config.model.tokenizer_config,
        "lora_model_dir": config.adapter.lora_model_dir,
        **{f"datasets.{i}.path": e.path.split("#")[0] for i, e in enumerate(config.data.datasets)},
        **{f"test_datasets.{i}.path": e.path.split("#")[0] for i, e in enumerate(config.data.test_datasets)},
    }
    for key, name in sources.items():
        source = Path(name).expanduser().resolve() if name else None
        if source and (source == folder.resolve() or any(source.is_relative_to(p.resolve()) for p in doomed)):
            raise ConfigError(
                f"overwrite_output_dir: {key} ({name}) lies in {folder} and would be deleted before it is read; "
                "choose another output_dir"
            )


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Lock a folder. The lock is the system's, on the folder itself: it leaves no file behind, and ends with
    the process, however that ends.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"output_dir: another run is writing into {folder}; wait for its end, or choose another output_dir"
            ) from error
        except OSError:
            log.info("%s cannot be locked on this file system: start no second run in it", folder)
        yield
    finally:
        os.close(descriptor)


def _checkpoint_to_resume(folder: Path, resume: str | bool | None) -> Path | None:
    if not resume:
        return None
    if resume is True or resume == "auto":
        for leftover in folder.glob(".partial-*"):  # of a run that was killed while it wrote
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
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
