"""A config file to write, and the report that it makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.config import Config
from luthier.errors import ConfigError

BASE = "base_model: m\ndatasets:\n  - path: d.jsonl\n    type: alpaca\n"  # four lines

Load = Callable[..., Config]
Report = Callable[..., list[str]]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """load(text, *overrides): the config of `cfg.yml` with the four lines of BASE and then `text`."""
    monkeypatch.chdir(tmp_path)

    def load_config(text: str | bytes = "", *overrides: str, base: str = BASE) -> Config:
        raw = text if isinstance(text, bytes) else text.encode()
        Path("cfg.yml").write_bytes(base.encode() + raw)
        return Config.load("cfg.yml", overrides)

    return load_config


@pytest.fixture
def report(load: Load) -> Report:
    """report(text, *overrides): the lines of the error that the same config makes, without the headline."""

    def lines(text: str | bytes = "", *overrides: str, base: str = BASE) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides, base=base)
        found = [line.strip() for line in str(caught.value).splitlines()]
        if len(found) > 1:
            assert found[0] == f"cfg.yml: {len(found) - 1} problems"
        return found[1:] or found

    return lines
