"""From the name of an artifact to a folder or a file of this machine, downloaded once.

    ~/.cache/luthier/wandb-artifacts/ENTITY/PROJECT/NAME-v7/...     (or WANDB_ARTIFACT_DIR/wandb-artifacts/...)
                                                   /NAME-v7.json    what of it is here, with sizes and digests
                                                   /NAME.json       which version an alias was, when last asked

A version never changes, so one that is here is used without a question to anybody. An alias is asked for, and what it
stands for is what a run writes down: `latest` is `v7` from then on. Files appear under their names when they are whole
and have the digests of the artifact's manifest. Where there is no network, an alias is what it was when last asked,
which is said.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from luthier.artifacts.client import Unreachable, endpoint, explained, find, wandb_module
from luthier.config import Config
from luthier.config.artifact_names import (
    PREFIX,
    ArtifactName,
    is_artifact,
    named_in,
    parse,
    replaced,
    without_count,
)
from luthier.errors import ConfigError, RunError

log = logging.getLogger("luthier")

FOLDER = "wandb-artifacts"
# As `float` reads it; a folder in the artifact may stand before it.
_WEIGHT = re.compile(rf"({PREFIX}[^:]+:[^:]+):([+-]?(?:[\d._]+(?:e[+-]?\d+)?|nan|inf))", re.IGNORECASE)
_KEPT = re.compile(rf"{FOLDER}[\\/]([^\\/]+)[\\/]([^\\/]+)[\\/]([^\\/]+)-(v\d+)(?:[\\/](.+))?$")


@dataclass(frozen=True)
class Artifact:
    """Attributes:
    name: the exact one. path: the folder here, or the file that the name says. digest: the artifact's. kind: its type.
    """

    name: ArtifactName
    path: Path
    digest: str
    kind: str


def local(name: str) -> str:
    """A path or an id as it is; of an artifact the folder or file on this machine, downloaded if it is not here.

    Raises:
        ConfigError: no such artifact, not logged in, wandb is not installed. RunError: the download failed.
    """
    return str(artifact(name).path) if is_artifact(name) else name


def local_dataset(path: str) -> str:
    """The same for a dataset's path, which may end in `#1000`."""
    if not is_artifact(path):
        return path
    path, count = without_count(path)
    return local(path) + count


def local_source(text: str, *, weighted: bool) -> str:
    """The same for an argument of a verb; `weighted`: a weight may stand behind it (`wandb:name:v0:0.5`).

    What follows the name is always the version, so that an artifact with a weight has to say which.
    """
    match = _WEIGHT.fullmatch(text) if weighted else None
    return f"{local(match[1])}:{match[2]}" if match else local_dataset(text)


def reference_of(path: str) -> str | None:
    """The artifact that a path of a cache (of this machine or of another one) is in; None if it is in none."""
    if (found := _KEPT.search(path)) is None:
        return None
    entity, project, name, version, inside = found.groups()
    return str(ArtifactName(name, version, project, entity, inside))


@lru_cache(maxsize=256)
def artifact(text: str, entity: str | None = None, project: str | None = None) -> Artifact:
    """What a name stands for, on this machine.

    Args:
        entity, project: where the name leaves them out; None: those of the environment, then the account's.
    """
    try:
        asked = parse(text)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    asked = asked.within(entity or os.environ.get("WANDB_ENTITY"), project or os.environ.get("WANDB_PROJECT"))
    if asked.project is None:
        raise ConfigError(f"{text}: whose artifact is it? Write wandb:entity/project/name:v0, or set wandb_project")
    if asked.exact and (kept := _kept(asked)) is not None:
        log.info("%s: already on this machine, in %s", asked, _folder(asked))
        return kept
    try:
        found = find(asked)
    except Unreachable as error:
        return _as_last_asked(asked, error)
    entity, project, digest = str(found.entity), str(found.project), str(found.digest)
    exact = replace(asked, entity=entity, project=project, version=str(found.version))
    if asked.version != exact.version:
        log.info("%s is %s now", asked, exact.version)
        _remember(replace(exact, version=asked.version), exact.version)
    kept = _kept(exact)
    if kept is not None and kept.digest == digest:
        log.info("%s: already on this machine, in %s", exact, _folder(exact))
        return kept
    return _download(exact, found, digest)


def pinned(config: Config) -> Config:
    """The config with the artifacts that it names downloaded, and their exact versions in place of aliases.

    Raises:
        ConfigError: one of them cannot be had, with its key.
    """
    exact = {key: (text, str(each.name)) for key, text, each in _of_config(config)}
    changed = replaced(config.flat(), exact)
    return config.replace("the artifact's version when it was fetched", **changed) if changed else config


def described(config: Config) -> list[dict[str, str]]:
    """What a run's environment.json says of its artifacts."""
    return [
        {"key": key, "artifact": str(each.name), "type": each.kind, "digest": each.digest}
        for key, _, each in _of_config(config)
    ]


def _of_config(config: Config) -> Iterator[tuple[str, str, Artifact]]:
    section = config.logging
    for key, text in named_in(config.flat()):
        try:
            yield key, text, artifact(text, section.wandb_entity, section.wandb_project)
        except ConfigError as error:
            raise ConfigError(f"{config.place(key)}{key}: {error}") from error


# --- the cache ----------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    given = os.environ.get("WANDB_ARTIFACT_DIR")
    return (Path(given).expanduser() if given else Path.home() / ".cache" / "luthier") / FOLDER


def _folder(name: ArtifactName) -> Path:
    assert name.entity is not None and name.project is not None
    return cache_folder() / name.entity / name.project / f"{name.name}-{name.version}"


def _record_of(name: ArtifactName) -> Path:
    folder = _folder(name)
    return folder.with_name(f"{folder.name}.json")


def _kept(name: ArtifactName) -> Artifact | None:
    """What the record says is here, if it is, and if it is all that the name means."""
    folder, record = _folder(name), _read(_record_of(name))
    files: Mapping[str, Any] = record.get("files", {})
    wanted = {file: size for file, size in files.items() if _is_inside(file, name.inside)}
    if not wanted or not (record.get("whole") or (name.inside is not None and name.inside in files)):
        return None
    for file, size in wanted.items():
        path = folder / file
        if not path.is_file() or path.stat().st_size != size:
            log.warning("%s: %s is not as it was downloaded: once more", name, path)
            return None
    path = folder / name.inside if name.inside else folder
    return Artifact(name, path, str(record.get("digest")), str(record.get("type")))


def _as_last_asked(asked: ArtifactName, error: Unreachable) -> Artifact:
    if asked.entity is not None:
        version = asked.version
        if not asked.exact:
            version = _read(_folder(asked).with_name(f"{asked.name}.json")).get(asked.version, "")
        exact = replace(asked, version=version)
        if exact.exact and (kept := _kept(exact)) is not None:
            log.warning("%s; %s was %s when last asked, which is on this machine", error, asked, version)
            return kept
    else:
        raise ConfigError(f"{error}, and the name does not say whose artifact it is: write the entity too") from error
    raise ConfigError(f"{error}, and {cache_folder()} does not hold it either") from error


def _remember(alias: ArtifactName, version: str) -> None:
    path = _folder(alias).with_name(f"{alias.name}.json")
    _write(path, _read(path) | {alias.version: version})


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, value: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".partial-", delete=False) as file:
            json.dump(value, file, indent=2)
        os.replace(file.name, path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}; WANDB_ARTIFACT_DIR moves it") from error


# --- downloads ----------------------------------------------------------------------------------------------


def _is_inside(file: str, inside: str | None) -> bool:
    return inside is None or file == inside or file.startswith(inside + "/")


def _download(name: ArtifactName, found: Any, digest: str) -> Artifact:
    """Fetch what is wanted beside its place, compare digests, and move it there."""
    folder, wandb = _folder(name), wandb_module(str(name))
    if str(getattr(found, "state", "COMMITTED")) not in ("COMMITTED", "ArtifactState.COMMITTED"):
        raise ConfigError(f"{name}: it was deleted, or is not uploaded yet ({found.state})")
    try:
        entries = {str(path): entry for path, entry in found.manifest.entries.items()}
    except Exception as error:  # whatever the client and its HTTP library raise
        raise explained(error, str(name)) from error
    wanted = {path: entry for path, entry in entries.items() if _is_inside(path, name.inside)}
    if not wanted:
        near = difflib.get_close_matches(name.inside or "", entries, n=3, cutoff=0.4) or sorted(entries)[:5]
        raise ConfigError(f"{name}: there is no {name.inside or 'file'} in it; it holds {', '.join(near) or 'nothing'}")
    _check_names(name, wanted)
    log.info("%s: downloading %d files, %s, from %s", name, len(wanted), _shown(wanted), endpoint())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    except OSError as error:
        raise RunError(f"{folder.parent}: cannot be written: {error.strerror or error}") from error
    try:
        # Into its place and nowhere else, unless the client's cache has it: a model is not kept twice.
        cached = bool(os.environ.get("WANDB_CACHE_DIR"))
        found.download(root=str(partial), skip_cache=None if cached else True, path_prefix=name.inside)
        _verify(name, partial, wanted)
        sizes = {}
        for path in wanted:
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial / path, target)
            sizes[path] = target.stat().st_size
    except Exception as error:  # a full disk, a lost connection, a digest: all of them end the download
        reason = explained(error, str(name))
        raise type(reason)(f"{reason}; nothing of it is used") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    before = _read(_record_of(name))
    same = before.get("digest") == digest
    _write(
        _record_of(name),
        {
            "artifact": str(replace(name, inside=None)),
            "type": str(found.type),
            "digest": digest,
            "client": str(getattr(wandb, "__version__", "")),
            "whole": name.inside is None or (same and bool(before.get("whole"))),
            "files": (before.get("files", {}) if same else {}) | sizes,
        },
    )
    kept = _kept(name)
    assert kept is not None, "what was just written is there"
    return kept


def _check_names(name: ArtifactName, entries: Mapping[str, Any]) -> None:
    for path in entries:
        if path.startswith("/") or ".." in re.split(r"[\\/]", path):
            raise ConfigError(f"{name}: a file in it is called {path}, which leads out of its folder: not downloaded")


def _verify(name: ArtifactName, folder: Path, entries: Mapping[str, Any]) -> None:
    """RunError if a file has not the digest that the manifest gives it. References (to a bucket) have none there."""
    import xxhash  # comes with datasets

    unknown = 0
    for path, entry in entries.items():
        file = folder / path
        if not file.is_file():
            raise RunError(f"{name}: {path} did not arrive")
        algorithm = getattr(entry, "digest_algorithm", None)
        if getattr(entry, "ref", None) is not None:
            unknown += 1
            continue
        xxh = callable(algorithm) and "XXH128" in str(algorithm())
        hasher = xxhash.xxh128() if xxh else hashlib.md5(usedforsecurity=False)
        with file.open("rb") as opened:
            while block := opened.read(1 << 22):
                hasher.update(block)
        digest = hasher.digest()
        if base64.b64encode(digest).decode() != str(entry.digest):
            raise RunError(f"{name}: {path} arrived with other bytes than were uploaded (its digest differs)")
    if unknown:
        log.warning("%s: %d files are references, which have no digest to compare with", name, unknown)


def _shown(entries: Mapping[str, Any]) -> str:
    size = sum(getattr(entry, "size", None) or 0 for entry in entries.values())
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size} bytes"
