"""Manifests against the OpenAPI schema that Kubernetes publishes, in which an unknown field is an error."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

# The oldest with all fields that are used here (podReplacementPolicy), one between, the newest that the package has.
VERSIONS = ("1.29", "1.33", "1.37")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")


class Invalid(Exception):
    """What is wrong, where, and in which version."""


def validate(manifest: dict[str, Any], versions: tuple[str, ...] = VERSIONS) -> None:
    """Raises Invalid for a manifest that a cluster of one of these versions would refuse."""
    for version in versions:
        for error in _validator(manifest["apiVersion"], manifest["kind"], version).iter_errors(manifest):
            where = ".".join(map(str, error.absolute_path))
            raise Invalid(f"{manifest['kind']} {where}, Kubernetes {version}: {error.message}")
    if not _NAME.fullmatch(manifest["metadata"]["name"]) or len(manifest["metadata"]["name"]) > 63:
        raise Invalid(f"metadata.name {manifest['metadata']['name']}: no name of an object")


@cache
def _validator(api_version: str, kind: str, version: str) -> Draft202012Validator:
    """Of one kind, from the package `kubernetes-validate`, which has the schema of each version."""
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}.0-local-strict"
    name = f"{kind.lower()}-{api_version.replace('/', '-')}.json"
    return Draft202012Validator(json.loads((folder / name).read_text()), registry=_definitions(str(folder)))


@cache
def _definitions(folder: str) -> Registry[Any]:
    definitions = Resource.from_contents(json.loads(Path(folder, "_definitions.json").read_text()))
    return Registry().with_resource("/api/_definitions.json", definitions).crawl()


def all_fields(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all mappings' keys."""
    found: list[tuple[Any, ...]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if isinstance(value, dict):
            found.append((*path, key))
        found += all_fields(inner, (*path, key))
    return found
