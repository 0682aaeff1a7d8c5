"""From YAML and overrides to a `Config`: read, check every value, derive what follows, check what contradicts.

Each step adds its problems to one list, so that a user sees all of them at once. Beside the values the config keeps
where each came from: a line of the file, the command line, a default, or the reason for which it was derived.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr
from pydantic.fields import FieldInfo

from luthier.config import rules
from luthier.config.base import Section
from luthier.config.datasets import DataConfig
from luthier.config.overrides import COMMAND_LINE, apply_overrides, parse_overrides
from luthier.config.schema import (
    AdapterConfig,
    EvaluationConfig,
    FreezeConfig,
    LoggingConfig,
    ModelConfig,
    OutputConfig,
    PrecisionConfig,
    TrainingConfig,
)
from luthier.config.values import INVALID, check_value, dotted, found
from luthier.config.yaml_source import Path_, Problem, Source, read_file
from luthier.errors import ConfigError

DEFAULT = "default"


class Config(BaseModel):
    """Everything that a run was asked to do; never changed, only replaced."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)

    model: ModelConfig
    """Model and tokenizer"""
    precision: PrecisionConfig
    """Precision and memory"""
    adapter: AdapterConfig
    """Adapter"""
    freeze: FreezeConfig
    """Training without an adapter"""
    data: DataConfig
    """Data"""
    training: TrainingConfig
    """Training"""
    output: OutputConfig
    """Output and checkpoints"""
    evaluation: EvaluationConfig
    """Evaluation and samples"""
    logging: LoggingConfig
    """Logging"""

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file and command-line overrides. Raises ConfigError with everything that is wrong with them."""
        source = read_file(path)
        if source.problems and not source.values:
            raise_problems(source.name, source.problems)
        arguments = parse_overrides(overrides, FIELDS)
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

    def flat(self) -> dict[str, Any]:
        """All flat keys and their values as plain data, in the order of the sections."""
        return {key: _plain(getattr(getattr(self, section), key)) for section, key, _ in iterate_keys()}

    def to_yaml(self) -> str:
        """The config as YAML that loads again to the same config, each line with its value's origin."""
        from luthier.config.show import to_yaml

        return to_yaml(self)

    def replace(self, reason: str, **flat: Any) -> Self:
        """A config with other values for some flat keys, which are then `derived: reason`."""
        changed = self._with(flat, {key: f"derived: {reason}" for key in flat})
        return changed

    def _with(self, flat: Mapping[str, Any], origins: Mapping[str, str]) -> Self:
        problems: list[Problem] = []

        def report(path: Path_, message: str) -> None:
            problems.append(Problem(origins.get(str(path[0]), "python"), message))

        sections: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            if key not in FIELDS:
                report((key,), f"{key} is not a key of the config.")
                continue
            clean = FIELDS[key].default if value is None else value
            sections.setdefault(SECTION_OF[key], {})[key] = check_value(
                FIELDS[key].annotation, clean, (key,), report, FIELDS[key].metadata
            )
        raise_problems("config", problems)
        copies = {name: getattr(self, name).model_copy(update=update) for name, update in sections.items()}
        changed = self.model_copy(update=copies)
        changed._origins = {**self._origins, **origins}
        return changed

    @classmethod
    def _resolve(cls, source: Source, touched: Sequence[Path_], problems: Sequence[Problem]) -> Self:
        source.problems.extend(problems)
        lines = source.lines

        def where(path: Path_) -> str:
            for overridden in touched:
                if path[: len(overridden)] == overridden or overridden[: len(path)] == path != ():
                    return COMMAND_LINE
            return source.where(path)

        def report(path: Path_, message: str) -> None:
            source.problems.append(Problem(where(path), message))

        clean: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        for key, value in source.values.items():
            if key not in FIELDS:
                report((key,), rules.unknown_key(key, value, FIELDS, SECTIONS))
            elif value is not None:  # null is unset
                info = FIELDS[key]
                clean[SECTION_OF[key]][key] = check_value(info.annotation, value, (key,), report, info.metadata)
        written = {key for section in clean.values() for key in section}
        for key, info in FIELDS.items():
            if info.is_required() and key not in written:
                report((), f"{key} is missing: {(info.description or '').split('. ')[0].split(':')[0].lower()}.")
        invalid = {key for section in clean.values() for key, value in section.items() if value is INVALID}
        missing = {key for key, info in FIELDS.items() if info.is_required() and key not in written}
        if not invalid | missing:
            config = cls(**{name: SECTIONS[name](**values) for name, values in clean.items()})
            config._origins = {key: where((key,)) if key in written else DEFAULT for key in FIELDS}
            inner = {p for p in {*lines, *touched} if len(p) > 1 and p[0] in written}
            config._origins |= {dotted(path): where(path) for path in sorted(inner, key=str)}
            for problem in rules.contradictions(config.flat(), written):
                report((problem.key,), problem.message)
            if not source.problems:
                for key, (value, reason) in rules.derived(config.flat(), written).items():
                    config = config._with({key: value}, {key: f"derived: {reason}"})
                return config
        raise_problems(source.name, source.problems)
        raise AssertionError("an invalid config has problems to report")


SECTIONS: dict[str, type[Section]] = {
    name: info.annotation  # type: ignore[misc]
    for name, info in Config.model_fields.items()
}
FIELDS: dict[str, FieldInfo] = {
    key: info for section in SECTIONS.values() for key, info in section.model_fields.items()
}
SECTION_OF: dict[str, str] = {key: name for name, section in SECTIONS.items() for key in section.model_fields}


def iterate_keys() -> Iterator[tuple[str, str, FieldInfo]]:
    """Every key in the order of the sections: section, key, field."""
    for name, section in SECTIONS.items():
        for key, info in section.model_fields.items():
            yield name, key, info


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


def _plain(value: Any) -> Any:
    """Models as mappings of what was set in them; copies, so that nobody can change a frozen config."""
    if isinstance(value, BaseModel):
        return {key: _plain(getattr(value, key)) for key in type(value).model_fields if key in value.model_fields_set}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
