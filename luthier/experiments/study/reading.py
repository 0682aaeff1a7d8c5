"""Plain values of a study's file, and a list of what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.config.names import nearest
from luthier.config.schema import FIELDS
from luthier.config.yaml_source import Path_, Problem, Source
from luthier.experiments.study.axes import KEYS


class Reading:
    """A file that is being read: each value is given as what it has to be, or reported and left out."""

    def __init__(self, source: Source) -> None:
        self.source, self.values = source, source.values
        self.problems: list[Problem] = list(source.problems)

    def report(self, path: Path_, message: str) -> None:
        """Something is wrong with what stands there."""
        self.problems.append(Problem(self.source.where(path), message))

    def unknown(self, key: str) -> None:
        """Report a key that no study has."""
        message = f"{key} is not a key of a study."
        if key in FIELDS:
            message += f" It is one of the config: write it into base ({key}: ...) or vary it in grid."
        else:
            message += nearest(key, KEYS) or f" The keys are {', '.join(KEYS)}."
        self.report((key,), message)

    def wrong(self, key: str) -> bool:
        """Whether something was reported of a key's value."""
        return any(problem.message.startswith(f"{key}:") for problem in self.problems)

    def text(self, key: str) -> str | None:
        """A text that is not empty."""
        value = self.values.get(key)
        if value is None or (isinstance(value, str) and value.strip()):
            return value
        self.report((key,), f"{key}: expected a text, found {value!r}.")
        return None

    def texts(self, key: str) -> list[str]:
        """A list of texts."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            self.report((key,), f"{key}: expected a list of texts.")
            return []
        return value

    def one_of(self, key: str, choices: Sequence[str], default: str | None) -> str | None:
        """One of some words."""
        value = self.values.get(key)
        if value is None:
            return default
        if value not in choices:
            near = nearest(str(value), choices)
            self.report((key,), f"{key}: expected {' or '.join(choices)}, found {value!r}.{near}")
            return default
        return str(value)

    def count(self, key: str, least: int = 1) -> int | None:
        """A whole number."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.report((key,), f"{key}: expected a whole number of at least {least}, found {value!r}.")
            return None
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """Keys with values; empty where there are none."""
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict) or not value:
            self.report((key,), f"{key}: expected keys of the config with a list of values for each.")
            return {}
        return value
