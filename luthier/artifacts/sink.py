"""Files of this machine as an artifact of Weights & Biases, logged by one of its runs."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.artifacts.client import wandb_module

log = logging.getLogger("luthier")

_LONGEST = 128  # of an artifact's name


def clean_name(text: str) -> str:
    """A text as an artifact's name: letters, digits, dashes, underscores and dots."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-")[:_LONGEST] or "run"


def record(
    run: Any,
    name: str,
    kind: str,
    files: Mapping[str, Path | bytes],
    *,
    aliases: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
    description: str | None = None,
    wait: bool = False,
) -> str:
    """Log files as a version of an artifact and give its name; of a run that is offline, what will be its name.

    Args:
        run: wandb's. name: the artifact's. kind: its type, `model` or `dataset`. files: name in it -> a file, or its
            content. aliases: beside `latest`. wait: until the server has all of it.

    Raises: what the client raises.
    """
    wandb = wandb_module("an artifact")
    artifact = wandb.Artifact(name, type=kind, description=description, metadata=dict(metadata or {}))
    for each, file in sorted(files.items()):
        if isinstance(file, bytes):
            with artifact.new_file(each, mode="wb") as opened:
                opened.write(file)
        else:
            artifact.add_file(str(file), name=each)
    logged = run.log_artifact(artifact, aliases=["latest", *dict.fromkeys(a for a in aliases if a != "latest")])
    if is_offline(run) or not wait:
        return "/".join(part for part in (run.entity, run.project, name) if part)
    logged.wait()
    return f"{logged.entity}/{logged.project}/{logged.name}"


def is_offline(run: Any) -> bool:
    return bool(getattr(run, "offline", False)) or bool(getattr(run, "disabled", False))


def how_to_send(run: Any) -> str:
    """What sends a run that was logged offline."""
    folder = Path(os.path.normpath(str(run.dir))).parent
    return f"it is in {folder} and goes to the server with: wandb sync {folder}"
