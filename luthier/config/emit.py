"""A config as YAML in which every line says where its value is from.

The text loads again to the same values. Keys that would do nothing beside the others (`lora_r` without an
adapter) are written as comments, since they would be errors in a config that a person wrote.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from luthier.config.needs import is_idle
from luthier.config.schema import SECTIONS, Sections
from luthier.config.yaml_source import Path_, dotted, parse_scalar

_PLAIN = re.compile(r"^[A-Za-z_./][\w./-]*$", re.ASCII)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the YAML: its text, the path of the value that it shows, and where that value is from."""

    text: str
    path: Path_
    origin: str
    idle: bool


def config_lines(flat: Mapping[str, Any], origins: Mapping[str, str]) -> Iterator[tuple[str, list[Line]]]:
    """The lines of each section, under the section's heading."""
    for name, section in SECTIONS.items():
        heading = Sections.model_fields[name].description or name
        lines: list[Line] = []
        for key in section.model_fields:
            idle = is_idle(key, flat)
            lines += [
                Line(text, path, _origin(path, origins), idle)
                for text, path in _entry(key, flat[key], (key,), "")
            ]
        yield heading, lines


def to_yaml(flat: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """All of it, sections as comments."""
    parts: list[str] = []
    for heading, lines in config_lines(flat, origins):
        body = [f"{'# ' if line.idle else ''}{line.text}  # {line.origin}" for line in lines]
        parts.append("\n".join([f"# {heading}", *body]) + "\n")
    return "\n".join(parts)


def short_yaml(flat: Mapping[str, Any], remarks: Mapping[str, str]) -> str:
    """The given flat keys alone as YAML, sections apart, with the remark on a key behind its first line."""
    parts: list[str] = []
    for section in SECTIONS.values():
        lines: list[str] = []
        for key in section.model_fields:
            if key in flat:
                first, *rest = (text for text, _ in _entry(key, flat[key], (key,), ""))
                lines += [f"{first}  # {remarks[key]}" if key in remarks else first, *rest]
        if lines:
            parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def scalar(value: Any) -> str:
    """One value in YAML, on one line."""
    if not isinstance(value, str):
        return yaml.safe_dump(value, width=float("inf")).split("\n", 1)[0]
    if _PLAIN.match(value) and parse_scalar(value) == value:
        return value
    # Double quotes keep any text on one line; a comment inside a block of text would become part of it.
    return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=float("inf")).rstrip("\n")


def _entry(key: str, value: Any, path: Path_, indent: str) -> Iterator[tuple[str, Path_]]:
    """The lines of `key: value`, nested ones indented."""
    name = f"{indent}{scalar(key)}:"
    if isinstance(value, dict) and value:
        yield name, path
        for inner, item in value.items():
            yield from _entry(inner, item, (*path, inner), indent + "  ")
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        yield name, path
        for index, item in enumerate(value):
            yield from _item(item, (*path, index), indent + "  ")
    else:
        yield f"{name} {_flow(value)}", path


def _item(item: Any, path: Path_, indent: str) -> Iterator[tuple[str, Path_]]:
    if not (isinstance(item, dict) and item):
        yield f"{indent}- {_flow(item)}", path
        return
    for number, (key, value) in enumerate(item.items()):
        for row, (text, place) in enumerate(_entry(key, value, (*path, key), indent + "  ")):
            first = number == 0 and row == 0
            yield (f"{indent}- {text[len(indent) + 2 :]}" if first else text), place


def _flow(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_flow(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    return scalar(value)


def _origin(path: Path_, origins: Mapping[str, str]) -> str:
    """The origin of the value, or of what holds it."""
    for length in range(len(path), 0, -1):
        if (name := dotted(path[:length])) in origins:
            return origins[name]
    return "default"
