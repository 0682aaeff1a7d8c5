"""From YAML and overrides to a `Config`: read, check every value, derive what follows, check what
contradicts.

Each step adds its problems to one list, so that a user sees all of them at once. Beside the values the config
keeps where each came from: a line of the file, the command line, a default, or the reason for which it was
derived.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, PrivateAttr

from luthier.config import entries, rules
from luthier.config.datasets import DatasetEntry
from luthier.config.distributed import one_spelling
from luthier.config.emit import to_yaml
from luthier.config.names import unknown_key
from luthier.config.overrides import COMMAND_LINE, apply_overrides, parse_overrides
from luthier.config.schema import FIELDS, SECTION_OF, SECTIONS, Sections
from luthier.config.values import INVALID, check_value, summary
from luthier.config.yaml_source import Path_, Problem, Source, dotted, read_file
from luthier.errors import ConfigError

DEFAULT = "default"


class Config(Sections):
    """Everything that a run was asked to do; never changed, only replaced."""

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file and command-line overrides. Raises ConfigError with everything that is wrong with
        them."""
        return cls.from_source(read_file(path), overrides)

    @classmethod
    def from_source(cls, source: Source, overrides: Sequence[str] = ()) -> Self:
        """A config from what was read, of which the values are changed in place. Raises ConfigError with everything
        that is wrong."""
        if not source.values:
            raise_problems(source.name, source.problems)
        one_spelling(source)  # for overrides that reach inside of it
        arguments = parse_overrides(overrides)
        touched = apply_overrides(source.values, arguments)
        return cls._resolve(source, touched, arguments.problems)

    @classmethod
    def from_flat(cls, mapping: Mapping[str, Any], origin: str = "python") -> Self:
        """A config from flat keys, checked like a file. Raises ConfigError with everything that is wrong."""
        return cls._resolve(Source(origin, values=copy.deepcopy(dict(mapping))), [], [])

    @property
    def origins(self) -> dict[str, str]:
        """Where each flat key's value is from; dotted keys say it for what was written inside a key."""
        return dict(self._origins)

    def place(self, key: str) -> str:
        """Where a value stands, to begin a message with: "cfg.yml:12: ", or nothing for a default."""
        parts = key.split(".")
        for length in range(len(parts), 0, -1):
            origin = self._origins.get(".".join(parts[:length]), DEFAULT)
            if origin != DEFAULT:
                return "" if origin.startswith("derived: ") else f"{origin}: "
        return ""

    def flat(self) -> dict[str, Any]:
        """All flat keys and their values as plain data, in the order of the sections."""
        return {key: _plain(getattr(getattr(self, section), key)) for key, section in SECTION_OF.items()}

    def to_yaml(self) -> str:
        """The config as YAML that loads again to the same config, each line with its value's origin."""
        return to_yaml(self.flat(), self._origins)

    def replace(self, reason: str, **flat: Any) -> Self:
        """A config with other values for some flat keys, which are then `derived: reason`; None unsets a key.

        The values are checked one by one; what they say together is not, since the config was resolved
        before.
        """
        problems: list[Problem] = []

        def report(path: Path_, message: str) -> None:
            problems.append(Problem(f"derived: {reason}", message))

        updates: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            if key not in FIELDS:
                report((key,), unknown_key(key, value))
                continue
            info = FIELDS[key]
            clean = info.default if value is None else value
            checked = check_value(info.annotation, clean, (key,), report, info.metadata)
            updates.setdefault(SECTION_OF[key], {})[key] = checked
        raise_problems("config", problems)
        sections = {name: getattr(self, name).model_copy(update=update) for name, update in updates.items()}
        changed = self.model_copy(update=sections)
        changed._origins = self._origins | dict.fromkeys(flat, f"derived: {reason}")
        return changed

    @classmethod
    def _resolve(cls, source: Source, touched: Sequence[Path_], problems: Sequence[Problem]) -> Self:
        one_spelling(source)
        problems = [*source.problems, *problems]
        # What the file said inside a value that the command line replaced is gone.
        lines = {path: line for path, line in source.lines.items() if not _inside(path, touched)}

        def where(path: Path_) -> str:
            if _inside(path, touched):
                return COMMAND_LINE
            return source.where(path) if path in lines or path == () else where(path[:-1])

        def report(path: Path_, message: str) -> None:
            problems.append(Problem(where(path), message))

        clean: defaultdict[str, dict[str, Any]] = defaultdict(dict)
        for key, value in source.values.items():
            if key not in FIELDS:
                report((key,), unknown_key(key, value))
            elif value is not None:  # null is unset
                info = FIELDS[key]
                checked = check_value(info.annotation, value, (key,), report, info.metadata)
                # An invalid value is out of the way here, so that the rules below can look at the others.
                clean[SECTION_OF[key]][key] = (
                    _STAND_INS.get(key, info.default) if checked is INVALID else checked
                )
        written = {key for section in clean.values() for key in section}
        for key in _STAND_INS.keys() - written:
            report((), f"{key} is missing: {summary(FIELDS[key])}")
            clean[SECTION_OF[key]][key] = _STAND_INS[key]

        config = cls.model_validate({name: section(**clean[name]) for name, section in SECTIONS.items()})
        # A key that is in doubt (invalid, or probably meant by an unknown one) is named in a message already.
        # What names it as well would be a mere consequence, such as `lora_r` without the misspelt `adapter`.
        doubtful = _keys_named_in(problem.message for problem in problems)
        for contradiction in rules.contradictions(config.flat(), written):
            if not doubtful & _keys_named_in([contradiction.message]):
                report((contradiction.key,), contradiction.message)
        for key in ("datasets", "test_datasets"):
            for index, entry in enumerate(getattr(config.data, key)):
                rl = config.preference.rl
                for inside, message in entries.flaws(entry, config.data.train_on_inputs, rl):
                    if "rl" in doubtful and rl is None and "`rl`" in message:
                        continue
                    path: Path_ = (key, index, *inside)
                    report(path, f"{dotted(path)}: {message}")
        raise_problems(source.name, problems)

        inner = {path for path in (*lines, *touched) if len(path) > 1 and path[0] in written}
        config._origins = {key: where((key,)) if key in written else DEFAULT for key in FIELDS}
        config._origins |= {dotted(path): where(path) for path in sorted(inner, key=str)}
        for key, (value, reason) in rules.derived(config.flat(), written).items():
            config = config.replace(reason, **{key: value})
        return config


# Values for the keys that have no default, used where they are missing while the rest is checked.
_STAND_INS: dict[str, Any] = {"base_model": "missing", "datasets": [DatasetEntry(path="missing")]}


def raise_problems(name: str, problems: Sequence[Problem]) -> None:
    """Raise one ConfigError for all problems, in the order of the file; nothing if there are none."""
    if not problems:
        return

    def order(problem: Problem) -> tuple[str, int]:
        place, _, line = problem.where.rpartition(":")
        return (place, int(line)) if line.isdigit() else (problem.where, 0)

    lines = [f"{problem.where}: {problem.message}" for problem in sorted(problems, key=order)]
    if len(lines) == 1:
        raise ConfigError(lines[0])
    raise ConfigError("\n".join([f"{name}: {len(lines)} problems", *(f"  {line}" for line in lines)]))


def _keys_named_in(messages: Iterable[str]) -> set[str]:
    return {word for message in messages for word in re.findall(r"\w+", message) if word in FIELDS}


def _inside(path: Path_, outer: Sequence[Path_]) -> bool:
    return any(path[: len(prefix)] == prefix for prefix in outer)


def _plain(value: Any) -> Any:
    """Models as mappings of what was set in them; copies, so that nobody can change a frozen config."""
    if isinstance(value, BaseModel):
        return {
            key: _plain(getattr(value, key))
            for key in type(value).model_fields
            if key in value.model_fields_set
        }
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
