"""A file of another tool, converted, and what its result says when it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from luthier.config import Config
from luthier.config.convert.command import convert, converted_text
from luthier.config.convert.conversion import Conversion
from luthier.errors import ConfigError


@dataclass(frozen=True)
class Converted:
    """Our YAML of a file, loaded, and the lists of the report as names."""

    flat: dict[str, Any]
    written: dict[str, Any]
    text: str
    report: str
    conversion: Conversion

    def names(self, which: str) -> list[str]:
        return [item.key for item in getattr(self.conversion.report, which)]

    def said(self, which: str, key: str) -> str:
        return next(item.text for item in getattr(self.conversion.report, which) if item.key == key)


Convert = Callable[..., Converted]
Problems = Callable[..., list[str]]


@pytest.fixture
def converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Convert:
    """converted(text, name, allow=False): the result is loaded from its YAML and from its values, which is the same."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, name: str = "axolotl.yml", allow: bool = False) -> Converted:
        Path(name).write_text(text, encoding="utf-8")
        yaml, report = converted_text(Path(name), allow)
        Path("luthier.yml").write_text(yaml, encoding="utf-8")
        loaded = Config.load("luthier.yml")
        found = convert(Path(name))
        assert loaded.flat() == Config.from_flat(found.values).flat()
        written = {key: loaded.flat()[key] for key in found.values}
        return Converted(loaded.flat(), written, yaml, report, found)

    return run


@pytest.fixture
def problems(converted: Convert) -> Problems:
    """problems(text, name, allow=False): the lines of the error, without the headline."""

    def run(text: str, name: str = "axolotl.yml", allow: bool = False) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            converted(text, name, allow)
        lines = [line.strip() for line in str(caught.value).splitlines()]
        return lines[1:] or lines

    return run
