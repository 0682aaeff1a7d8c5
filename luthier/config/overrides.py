"""Command-line overrides: `key=value`, `--key value`, `--key=value`, and a bare `--flag` for true.

A value is read as YAML (`--lora_target_modules "[q_proj, v_proj]"`, `--max_steps null`), except that a key
which can only be text takes it as it stands. A dotted key reaches inside: `datasets.0.path=data.jsonl`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from luthier.config.distributed import plain_path
from luthier.config.names import unknown_key
from luthier.config.schema import FIELDS
from luthier.config.values import accepts, accepts_only_text
from luthier.config.yaml_source import Path_, Source, parse_scalar

COMMAND_LINE = "command line"
_ASSIGNMENT = re.compile(r"^-{0,2}([A-Za-z_][\w-]*(?:\.[\w-]+)*)=(.*)$", re.DOTALL)
_FLAG = re.compile(r"^--([A-Za-z_][\w-]*(?:\.[\w-]+)*)$")


def parse_overrides(arguments: Sequence[str]) -> Source:
    """The overrides as a source: values by dotted path in the order given, problems with what could not be
    read."""
    source = Source(COMMAND_LINE)
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if assignment := _ASSIGNMENT.match(argument):
            _set(source, assignment[1], assignment[2])
        elif flag := _FLAG.match(argument):
            key = flag[1]
            if remaining and not _begins_override(remaining[0], key):
                _set(source, key, remaining.pop(0))
            else:
                source.values[_normal(key)] = True
        else:
            hint = " A value goes right after its --key, and one with spaces in it needs quotes."
            source.report(f"{argument!r} is no override; write key=value or --key value.{hint}")
    return source


def apply_overrides(values: dict[str, Any], overrides: Source) -> list[Path_]:
    """Write the overrides into the nested `values` of a file; gives the paths that they set."""
    touched: list[Path_] = []
    for key, value in overrides.values.items():
        path = _as_path(key)
        if path[0] not in FIELDS:
            overrides.report(unknown_key(str(path[0]), value))
        elif _write(values, path, value, overrides):
            touched.append(path)
    return touched


def _as_path(key: str) -> Path_:
    first, *rest = key.split(".")
    return plain_path((first, *(int(part) if part.isdigit() else part for part in rest)))


def _write(values: dict[str, Any], path: Path_, value: Any, overrides: Source) -> bool:
    here: Any = values
    for depth, part in enumerate(path):
        name = ".".join(map(str, path[: depth + 1]))
        if isinstance(here, list):
            if not isinstance(part, int) or part > len(here):
                overrides.report(f"{name}: the list has {len(here)} entries; number them from 0.")
                return False
            if part == len(here):  # one past the end adds an entry
                here.append(None)
        elif not isinstance(here, dict):
            above = ".".join(map(str, path[:depth]))
            overrides.report(f"{name}: {above} is {here!r}, and has nothing inside that could be set.")
            return False
        if depth == len(path) - 1:
            here[part] = value
            return True
        if isinstance(here, dict) and here.get(str(part)) is None:
            here[str(part)] = [] if isinstance(path[depth + 1], int) else {}
        elif isinstance(here, list) and here[int(part)] is None:
            here[int(part)] = {}
        here = here[part]
    return False


def _set(source: Source, key: str, text: str) -> None:
    name = _normal(key)
    info = FIELDS.get(name)
    text_only = info is not None and accepts_only_text(info.annotation)
    try:
        value = parse_scalar(text)
    except yaml.YAMLError:
        if not (text_only or "." in name):
            source.report(
                f"{name}: the value {text!r} is not valid YAML; quote texts that hold special signs."
            )
            return
        value = text
    if text_only and value is not None and not isinstance(value, str):
        value = text
    source.values[name] = value


def _begins_override(text: str, key: str) -> bool:
    """Whether the argument after `--key` is an override of its own, so that `--key` is a bare flag."""
    if _FLAG.match(text):
        return True
    assignment = _ASSIGNMENT.match(text)
    if assignment is None:
        return False
    info = FIELDS.get(_normal(key))
    known = _normal(assignment[1]).split(".")[0] in FIELDS
    return text.startswith("--") or (known and info is not None and accepts(info.annotation, bool))


def _normal(key: str) -> str:
    return key.replace("-", "_")
