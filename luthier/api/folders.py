"""Run folders as notebooks use them: a cell is run again, and nothing of the run before may be lost.

transformers writes a second run over the first. Here the second gets a folder beside it (`outputs-2`), which is said.
"""

from __future__ import annotations

import logging
from pathlib import Path

from luthier.errors import ConfigError
from luthier.train.run import GIVEN

log = logging.getLogger("luthier")

ROWS = {"train": "train.jsonl", "eval": "eval.jsonl"}
TOKENIZER = "tokenizer"

__all__ = ["GIVEN", "ROWS", "TOKENIZER", "folder_to_resume", "new_folder"]


def new_folder(asked: Path) -> Path:
    """The folder for a new run: the one asked for, or the first free one beside it.

    Raises:
        ConfigError: it is a folder that holds other things and has no name of its own.
    """
    if _is_free(asked):
        return asked
    if asked.resolve() == Path.cwd():
        raise ConfigError(f'output_dir="{asked}" is the working folder: give the run one of its own, such as "outputs"')
    number = 2
    while not _is_free(_numbered(asked, number)):
        number += 1
    found = _numbered(asked, number)
    log.warning(
        "%s holds something already and is left as it is; this run is in %s (overwrite_output_dir=True would replace a "
        "run, train(resume_from_checkpoint=True) goes on with it)",
        asked,
        found,
    )
    return found


def folder_to_resume(asked: Path, resume: bool | str | Path) -> tuple[Path, str]:
    """The run folder to go on in, and the config's `resume_from_checkpoint`.

    Raises:
        ConfigError: there is no checkpoint.
    """
    if resume is not True:
        checkpoint = Path(str(resume)).expanduser()
        return checkpoint.parent, str(checkpoint)
    number, newest = 2, asked if _has_checkpoint(asked) else None
    while (folder := _numbered(asked, number)).is_dir():
        newest = folder if _has_checkpoint(folder) else newest
        number += 1
    if newest is None:
        raise ConfigError(
            f"resume_from_checkpoint=True: there is no checkpoint in {asked}; leave it out, or check output_dir"
        )
    if newest != asked:
        log.info("going on with the newest run, in %s", newest)
    return newest, "auto"


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(p.name != GIVEN for p in folder.iterdir()))


def _has_checkpoint(folder: Path) -> bool:
    return any(folder.glob("checkpoint-*/"))


def _numbered(folder: Path, number: int) -> Path:
    return folder.with_name(f"{folder.name}-{number}")
