"""The folder that a merge leaves: whole, or not there, and never in the place of something that is needed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from luthier.artifacts.source import local
from luthier.data.hub import notice_missing_network
from luthier.errors import ConfigError, ModelError, RunError, cannot_load

RECORD = "merge.json"

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
)
# Beside weights and tokenizer: code that comes with a model, and what a multimodal one does to pictures and sound.
_OTHERS = ("*.py", "*processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
_OF_BASE = ("*.json", "*.safetensors", "*.bin", *TOKENIZER_FILES, *_OTHERS)


def base_folder(name: str, revision: str | None) -> Path:
    """Where the base's files are: the folder itself, or what the hub's cache has or gets.

    Raises:
        ModelError: there is no such model.
    """
    folder = Path(local(name)).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name}: the base model has no config.json")
        return folder
    if folder.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ModelError(
            f"the base model {name} {what}; name the one that the adapter was trained on with --base-model"
        )
    notice_missing_network()
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_OF_BASE)))
    except (OSError, ValueError, HFValidationError) as error:
        raise cannot_load("model", name, error) from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: this is no mapping")
    return found


def write_json(path: Path, value: Any) -> None:
    """Readable JSON, whole or not at all."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def copy_files(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Files and folders of the source that match, followed where they are links."""
    for found in sorted({path for pattern in patterns for path in source.glob(pattern)}):
        if found.is_dir():
            shutil.copytree(found, target / found.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(found, target / found.name)


def copy_beside_weights(base: Path, target: Path) -> None:
    """What a base has besides weights, config and tokenizer."""
    copy_files(base, target, _OTHERS)


def check_target(target: Path, needed: Sequence[Path], *, overwrite: bool) -> None:
    """Raises ConfigError for a folder that holds something, unless it may be replaced and is safe to replace."""
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file, and a folder is written: choose another place for it")
    for path in needed:
        if path.resolve().is_relative_to(target.resolve()):
            raise ConfigError(f"{target} holds {path}, which the merge reads; choose another folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ConfigError(
            f"{target} already holds something, and nothing is overwritten unasked. Choose another folder, or "
            "add --overwrite"
        )
    if not (target / RECORD).is_file():
        raise ConfigError(
            f"{target} was not made by a merge ({RECORD} is missing), and is not overwritten: delete it yourself, or "
            "choose another folder"
        )


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `target` once it is whole, and is gone if it does not become so.

    Raises:
        RunError: it cannot be written.
    """
    partial = target.with_name(f".partial-{target.name}")
    old = target.with_name(f".partial-old-{target.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a merge that was killed
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        os.replace(partial, target)
    except OSError as error:
        raise RunError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            os.replace(old, target)
