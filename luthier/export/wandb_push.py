"""To Weights & Biases: a run, an adapter or a model as a `model` artifact, files of data as a `dataset` artifact.

A run or a model goes up as it goes to the hub: what `export.parcel` packs, with paths of this machine and secrets
replaced. Data goes up as it is, for every row of it is what was asked for.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import luthier
from luthier.artifacts.client import Unreachable, endpoint, explained, wandb_module, why_unreachable
from luthier.artifacts.sink import is_offline, record
from luthier.config.artifact_names import ArtifactName, parse
from luthier.data.files import KINDS, kind_of
from luthier.errors import ConfigError, LuthierError, RunError
from luthier.export.parcel import Parcel, pack

log = logging.getLogger("luthier")

# A run tells its host, its program, the git repository and the packages, unless it is told not to.
_NOT_OF_THIS_MACHINE = {
    "x_disable_meta": True, "x_disable_stats": True, "x_save_requirements": False, "x_disable_machine_info": True,
    "disable_git": True, "disable_code": True, "console": "off", "host": "luthier", "program": "luthier push",
    "silent": True,
}  # fmt: skip


@dataclass
class Cargo:
    """Attributes:
    kind: the artifact's type. files: name in it -> a file, or its content.
    """

    kind: str
    files: dict[str, Path | bytes]
    metadata: dict[str, Any]
    remarks: list[str]

    def size(self) -> int:
        return sum(len(each) if isinstance(each, bytes) else each.stat().st_size for each in self.files.values())


def push(
    target: str | os.PathLike[str],
    name: str,
    *,
    aliases: Sequence[str] = (),
    merged: bool = False,
    gguf: Sequence[str] = (),
    report: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> str:
    """Log a folder or a file as an artifact, and give its name with the version that it became.

    Args:
        target: a run, an adapter or a model folder; a file or a folder of data. name: wandb:entity/project/name.
        aliases: beside `latest`. merged, gguf, report, base_model, license: as of `export.hub.push`. message: the
            version's description. dry_run: say what would be uploaded, and ask nobody.

    Raises:
        ConfigError: a malformed name, nobody is logged in, wandb is not installed, nothing to upload.
        RunError: the server cannot be reached or refuses.
    """
    asked = _name(name)
    cargo = _cargo(Path(target).expanduser(), asked, merged, list(gguf), report, base_model, license)
    log.info("%s: a %s artifact of %d files, %s bytes", name, cargo.kind, len(cargo.files), f"{cargo.size():,}")
    for each in sorted(cargo.files):
        log.info("  %s", each)
    for remark in cargo.remarks:
        log.info("%s", remark)
    if dry_run:
        log.info("nothing was uploaded (--dry-run)")
        return name
    return _send(asked, cargo, aliases, message)


def _name(text: str) -> ArtifactName:
    try:
        found = parse(text)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if ":" in text.removeprefix("wandb:"):
        raise ConfigError(f"{text}: a push makes a new version: leave out what follows the name; --alias names it")
    found = found.within(os.environ.get("WANDB_ENTITY"), os.environ.get("WANDB_PROJECT"))
    if found.project is None:
        raise ConfigError(f"{text}: which project? Write wandb:entity/project/name, or set WANDB_PROJECT")
    return found


def _cargo(
    target: Path,
    asked: ArtifactName,
    merged: bool,
    gguf: list[str],
    report: bool,
    base_model: str | None,
    license: str | None,
) -> Cargo:
    if not target.exists():
        raise ConfigError(f"{target} does not exist; name a run, an adapter, a model folder, or data")
    of_model = {"--merged": merged, "--gguf": gguf, "--report": report, "--base-model": base_model}
    if (data := _data_files(target)) is not None:
        if wrong := [option for option, value in (of_model | {"--license": license}).items() if value]:
            raise ConfigError(f"{wrong[0]} is for runs and models, and {target} is data: leave it out")
        return Cargo("dataset", data, {"luthier": luthier.__version__}, [])
    parcel: Parcel = pack(
        str(target), f"wandb/{asked.name}", merged=merged, gguf=gguf, report=report, base_model=base_model,
        licence=license, secrets=[os.environ.get("WANDB_API_KEY")], artifact=True,
    )  # fmt: skip
    metadata = {"luthier": luthier.__version__, "base_model": parcel.base, **_figures(target)}
    return Cargo("model", parcel.files, metadata, parcel.remarks)


def _data_files(target: Path) -> dict[str, Path | bytes] | None:
    """Files of data by name; None where it is a run, an adapter or a model (or nothing that is known)."""
    if target.is_file():
        if kind_of(target) is None:
            raise ConfigError(f"{target}: its name does not say what is in it; data ends in {', '.join(sorted(KINDS))}")
        return {target.name: target}
    if any((target / name).is_file() for name in ("config.yaml", "config.json", "adapter_config.json")):
        return None
    files = [p for p in sorted(target.rglob("*")) if p.is_file()]
    files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(target).parts)]
    if not any(kind_of(path) for path in files):
        return None
    return {path.relative_to(target).as_posix(): path for path in files}


def _figures(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, (int, float))} if isinstance(found, dict) else {}


def _send(asked: ArtifactName, cargo: Cargo, aliases: Sequence[str], message: str | None) -> str:
    wandb = wandb_module(str(asked))
    mode = os.environ.get("WANDB_MODE", "online")
    if mode == "disabled":
        raise ConfigError("WANDB_MODE is disabled, and a push needs Weights & Biases: unset it")
    if mode != "offline" and (reason := why_unreachable()) is not None:
        raise Unreachable(f"{endpoint()} cannot be reached ({reason}): nothing was uploaded")
    folder = os.environ.get("WANDB_DIR") or (tempfile.mkdtemp(prefix="luthier-push-") if mode != "offline" else None)
    try:
        with wandb.init(
            entity=asked.entity, project=asked.project, job_type="luthier-push", name=f"push-{asked.name}", dir=folder,
            settings=wandb.Settings(**_NOT_OF_THIS_MACHINE),
        ) as run:  # fmt: skip
            offline, where = is_offline(run), str(run.dir)
            made = record(
                run, asked.name, cargo.kind, cargo.files,
                aliases=aliases, metadata=cargo.metadata, description=message, wait=True,
            )  # fmt: skip
    except Exception as error:  # the client's own kinds, and those of its HTTP library
        why = explained(error, str(asked))
        kind: type[LuthierError] = ConfigError if isinstance(why, ConfigError) else RunError
        raise kind(f"{why}; what was to be uploaded is as it was") from error
    if offline:
        folder = str(Path(os.path.normpath(where)).parent)
        log.info("WANDB_MODE is offline: the artifact is in %s; wandb sync %s sends it", folder, folder)
    return f"wandb:{made}"
