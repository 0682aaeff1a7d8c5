"""One conversion under way: values of ours as they are found, and what is said of each key of theirs."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import yaml

from luthier.config.convert.report import Item, Report, shown
from luthier.config.names import nearest
from luthier.config.needs import NEEDS, asks_for_something
from luthier.config.schema import FIELDS
from luthier.config.values import INVALID, accepts, check_value
from luthier.config.yaml_source import Path_, Source, dotted, parse_scalar

# Needs that a conversion may not settle by leaving a key out: without it another model would be trained.
_NEVER_DROPPED = {"load_in_4bit", "load_in_8bit", "load_in_fp8", "adam_beta1", "adam_beta2", "adam_epsilon"}

_ADVICE = re.compile(r": (?=write|set|leave|change)")
"""Where the message of a need begins to say what to do."""


class Conversion:
    """Values and report of one file; the module of each tool fills it.

    Attributes:
        values: flat keys of ours. report: the lists. source: the file, for the lines that values come from.
        places: where a key stands, for what has no lines of its own (a notebook).
    """

    def __init__(self, source: Source, tool: str) -> None:
        self.source = source
        self.values: dict[str, Any] = {}
        self.report = Report(tool, source.name)
        self.places: dict[str, str] = {}
        self._lines: dict[Path_, int] = {}
        self._remarks: dict[str, str] = {}

    # --- the four lists ---

    def carry(self, theirs: str, key: str, value: Any, remark: str = "") -> None:
        """A key of theirs becomes `key`; a value that ours cannot have makes it one that is not supported."""
        info = FIELDS[key]
        value = plain_number(value, info.annotation)
        problems: list[str] = []
        checked = check_value(
            info.annotation, value, (key,), lambda _, message: problems.append(message), info.metadata
        )
        if checked is INVALID:
            self.unsupported(theirs, " ".join(problems))
            return
        self.values[key] = value
        self._place(theirs, key)
        text = "" if theirs == key and not remark else f"{key}: {shown(value)}"
        self._say(self.report.carried, theirs, f"{text} ({remark})" if remark else text)
        if theirs != key:
            self._remarks[key] = theirs

    def also(self, key: str, value: Any, theirs: str) -> None:
        """A second key of ours that the value of one of theirs becomes."""
        self.values[key] = value
        self._place(theirs, key)
        self._remarks[key] = theirs

    def carried(self, theirs: str, text: str = "") -> None:
        """Say that a key was carried over where `values` has been filled already."""
        self._say(self.report.carried, theirs, text)

    def no_effect(self, theirs: str, why: str = "") -> None:
        """A key that does nothing here; without a reason, since nothing was asked by it."""
        self._say(self.report.no_effect, theirs, why)

    def unsupported(self, theirs: str, why: str, *, essential: bool = False) -> None:
        """A key that would change the run and cannot; `essential`: the run would be of another kind without it."""
        self._say(self.report.unsupported, theirs, why)
        if essential:
            self.report.essential.add(theirs)

    def refuse(self, theirs: str, value: Any, why: str, *, essential: bool = False) -> None:
        """The same, unless the value asks for nothing."""
        if asks_for_something(value) and value not in ("", 0, "no", "none", "off"):
            self.unsupported(theirs, why, essential=essential)
        else:
            self.no_effect(theirs)

    def unknown(self, theirs: str, known: Mapping[str, Any] | set[str], whose: str) -> None:
        """A key that the tool has not, with the nearest one that it has."""
        last = re.split(r"[.(]", theirs.rstrip(")"))[-1]
        self._say(self.report.unknown, theirs, f"{theirs} is not a key of {whose}.{nearest(last, known)}")

    # --- beside them ---

    def default(self, key: str, value: Any, remark: str = "", whose: str | None = None) -> None:
        """Write a default of theirs where the file says nothing and ours is another."""
        if key in self.values or FIELDS[key].default == value:
            return
        self.values[key] = value
        text = ", ".join(part for part in (whose and f"of {whose}", remark) if part)
        ours = shown(FIELDS[key].default)
        here = "unset" if ours in ("null", "None") else ours
        self.report.defaults.append(Item(key, f"{shown(value)} (here {here}){'; ' if text else ''}{text}"))
        self._remarks[key] = f"default of {whose or self.report.tool}"

    def check(self, what: str, text: str) -> None:
        """Something that a person should look at in the result."""
        self.report.to_check.append(Item(what, text))

    def has(self, *keys: str) -> bool:
        """Whether any of the keys of ours is set."""
        return any(key in self.values for key in keys)

    # --- the end ---

    def drop_idle(self) -> None:
        """Leave out what does nothing beside the other values (`wandb_name` without a project), and say why: the other
        tools pass over such keys, here they would be errors."""
        flat = {key: copy.copy(info.get_default()) for key, info in FIELDS.items() if not info.is_required()}
        flat |= {"base_model": "", "datasets": []} | self.values
        for need in NEEDS:
            for key in need.keys:
                if key not in self.values or key in _NEVER_DROPPED or need.holds(flat):
                    continue
                value = self.values.pop(key)
                self.report.defaults = [item for item in self.report.defaults if item.key != key]
                theirs = self._remarks.pop(key, key)
                self.report.carried = [item for item in self.report.carried if item.key != theirs]
                if theirs.startswith("default of "):
                    continue
                if not asks_for_something(value):
                    self.no_effect(theirs)
                else:
                    self.no_effect(theirs, _ADVICE.split(need.message.format(key=key))[0].rstrip("."))

    def result(self) -> Source:
        """The values as a source of ours, with the lines that they were written in."""
        return Source(self.source.name, self.values, self._lines, list(self.source.problems))

    def remarks(self) -> dict[str, str]:
        """What to write behind the values that their file does not say, or calls otherwise."""
        return {
            key: theirs if theirs.startswith("default of ") else f"was {theirs}"
            for key, theirs in self._remarks.items()
            if not theirs.endswith(f"({key})")
        }

    def _say(self, items: list[Item], theirs: str, text: str) -> None:
        items.append(Item(theirs, text, self.places.get(theirs) or self.source.where(_path(theirs))))

    def _place(self, theirs: str, key: str) -> None:
        """Give what stands at `key` the lines of what stands at `theirs`."""
        old, new = _path(theirs), _path(key)
        for path, line in self.source.lines.items():
            if path[: len(old)] == old:
                self._lines[(*new, *path[len(old) :])] = line


def _path(name: str) -> Path_:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def plain_number(value: Any, annotation: Any) -> Any:
    """A number or switch that was written as text, where no text is wanted: `"5e-5"`, which YAML 1.1 reads as text."""
    if not isinstance(value, str) or accepts(annotation, str):
        return value
    try:
        read = parse_scalar(value)
    except yaml.YAMLError:
        return value
    return read if isinstance(read, bool | int | float) else value


READERS = ("json", "csv", "parquet", "arrow")
"""Names that `load_dataset` takes in place of a path, with data_files."""


def split_and_count(split: str) -> tuple[str, int | None] | None:
    """`train[:100]` as the split and the number of its first rows; None for any other part of a split."""
    name, bracket, rest = split.partition("[")
    if not bracket:
        return name, None
    count = rest.removesuffix("]").removeprefix(":")
    return (name, int(count)) if rest.startswith(":") and count.isdigit() else None


def inner(path: str, *parts: str | int) -> str:
    """A dotted name inside of another."""
    return dotted((path, *parts))
