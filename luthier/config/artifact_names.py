"""Names of Weights & Biases artifacts, as they stand where a folder may: `wandb:entity/project/name:v0`.

Entity and project may be left out where `wandb_entity`, `wandb_project` or the environment says them; behind the
colon is a version or an alias (`latest` if there is none), and behind that a file or a folder in the artifact:
`wandb:team/logs/rows:v3/train.jsonl`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

PREFIX = "wandb:"
FORM = "wandb:entity/project/name:v0"
_PART = re.compile(r"[\w. -]+")
_NAME = re.compile(r"[\w.-]+")
_EXACT = re.compile(r"v\d+")
_COUNT = re.compile(r"(.+)#(\d+)")


@dataclass(frozen=True)
class ArtifactName:
    """Attributes:
    version: `v7` or an alias. inside: a path in the artifact, `/` between its parts.
    """

    name: str
    version: str = "latest"
    project: str | None = None
    entity: str | None = None
    inside: str | None = None

    @property
    def exact(self) -> bool:
        """Whether it will name the same bytes for ever: a version, and whose."""
        return bool(_EXACT.fullmatch(self.version)) and self.entity is not None and self.project is not None

    @property
    def qualified(self) -> str:
        """As the client of Weights & Biases takes it."""
        return "/".join(part for part in (self.entity, self.project, f"{self.name}:{self.version}") if part)

    def within(self, entity: str | None, project: str | None) -> ArtifactName:
        """With what is left out filled in."""
        return replace(self, entity=self.entity or entity, project=self.project or project)

    def __str__(self) -> str:
        return PREFIX + self.qualified + (f"/{self.inside}" if self.inside else "")


def is_artifact(text: str | None) -> bool:
    return text is not None and text.startswith(PREFIX)


def parse(text: str) -> ArtifactName:
    """The artifact that a text with `wandb:` before it names.

    Raises:
        ValueError: it has another form; the text says which it should have.
    """
    rest = text.removeprefix(PREFIX)
    owner, colon, behind = rest.partition(":")
    version, slash, inside = behind.partition("/")
    parts = owner.split("/")
    if len(parts) > 3 or not all(_PART.fullmatch(p) for p in parts) or not _NAME.fullmatch(parts[-1]):
        raise ValueError(f"{text} names no artifact: write {FORM}, with a file of it as {FORM}/rows.jsonl")
    if colon and not _PART.fullmatch(version):
        raise ValueError(f"{text}: a version (v0) or an alias (latest) has to follow the colon")
    if slash and (not inside or any(part in ("", ".", "..") for part in inside.rstrip("/").split("/"))):
        raise ValueError(f"{text}: what follows the version has to be a path in the artifact")
    entity, project = [None, None, *parts[:-1]][-2:]
    return ArtifactName(parts[-1], version or "latest", project, entity, inside.rstrip("/") or None)


def without_count(path: str) -> tuple[str, str]:
    """A dataset's path that names an artifact, and the `#1000` behind it, which may be empty."""
    match = _COUNT.fullmatch(path)
    return (match[1], f"#{match[2]}") if match else (path, "")


MODEL_KEYS = ("base_model", "tokenizer_config", "lora_model_dir")


def named_in(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys of a config (`datasets.0.path`) and the artifacts that they name, without `#1000`."""
    for key in MODEL_KEYS:
        if isinstance(values.get(key), str) and is_artifact(values[key]):
            yield key, values[key]
    for key in ("datasets", "test_datasets"):
        for at, entry in enumerate(values.get(key) or ()):
            path = entry.get("path") if isinstance(entry, Mapping) else getattr(entry, "path", None)
            if isinstance(path, str) and is_artifact(path):
                yield f"{key}.{at}.path", without_count(path)[0]


def flaws(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys of the model whose artifacts are named wrongly, and what is wrong."""
    for key in MODEL_KEYS:
        if not is_artifact(text := str(values.get(key))):
            continue
        if problem := flaw(text):
            yield key, f"{key}: {problem}"
        elif (inside := parse(text).inside) and "." in inside.rpartition("/")[2]:
            yield key, f"{key}: {text} names a file of an artifact, and a folder is wanted: leave /{inside} out."
    if is_artifact(values.get("base_model")) and values.get("revision"):
        yield "revision", "revision is of the hub; the version of an artifact is in its name: leave revision out."


def flaw(text: str) -> str | None:
    """What is wrong with the name of an artifact."""
    try:
        parse(text)
    except ValueError as error:
        return f"{error}."
    return None


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that name artifacts without saying whose, with `wandb_entity` and `wandb_project` filled in."""
    owner = (values.get("wandb_entity"), values.get("wandb_project"))
    exact = {key: (text, str(parse(text).within(*owner))) for key, text in named_in(values) if any(owner)}
    return replaced(values, exact)


def replaced(values: Mapping[str, Any], names: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """New values for keys of a config in which artifacts, by `named_in`, get other names (old, new)."""
    found: dict[str, Any] = {}
    for key, (before, after) in names.items():
        if before == after:
            continue
        top, *inner = key.split(".")
        if not inner:
            found[top] = after
            continue
        entries = found.setdefault(top, [dict(entry) for entry in values[top]])
        at = int(inner[0])
        entries[at]["path"] = after + without_count(entries[at]["path"])[1]
    return found
