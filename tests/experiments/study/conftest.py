"""Studies on a base that no model is loaded for: their runs are `trainer.py`'s."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.cli import main
from luthier.experiments.study import page, runner

BASE = {
    "base_model": "some/model",
    "adapter": "lora",
    "lora_r": 16,
    "learning_rate": 1e-3,
    "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
    "val_set_size": 10,
    "max_steps": 5,
    "save_steps": 2,
}

Sweep = Callable[..., int]
Write = Callable[[Mapping[str, Any]], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a study (JSON is YAML too) and its base, in a folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yml").write_text(yaml.safe_dump(BASE, sort_keys=False))

    def to_file(study: Mapping[str, Any]) -> Path:
        path = tmp_path / "study.yml"
        path.write_text(yaml.safe_dump({"base": "base.yml", **study}, sort_keys=False))
        return path

    return to_file


@pytest.fixture
def drawn() -> Callable[[Path], Path]:
    """What draws the page."""
    return page.write_page


@pytest.fixture
def sweep(write: Write, drawn: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """`luthier sweep` of a study in this process, its runs by the stand-in; gives the exit status. No page is drawn,
    which takes longer than such runs."""
    monkeypatch.setattr(page, "write_page", lambda folder: folder)
    monkeypatch.setattr(runner, "TRAIN", (sys.executable, str(Path(__file__).with_name("trainer.py"))))
    monkeypatch.setattr(runner, "_LOOK_SECONDS", 0.01)

    def run(study: Mapping[str, Any], *arguments: str) -> int:
        return main(["sweep", str(write(study)), *arguments])

    return run
