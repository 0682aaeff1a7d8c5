"""Weights & Biases without Weights & Biases."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.artifacts import source
from tests.artifacts.stand_in import Wandb
from tests.artifacts.wandb_server import KEY, Server, serve

ROWS = b"".join(
    json.dumps({"instruction": f"Say {n}.", "output": f"It is {n}."}).encode() + b"\n" for n in range(12)
)


@pytest.fixture
def loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server, and an environment in which the client talks to it and to nobody else."""
    for name in ("WANDB_MODE", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    source.artifact.cache_clear()
    with serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.setenv("WANDB_ARTIFACT_DIR", str(tmp_path / "cache"))
        monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
        monkeypatch.setenv("WANDB_DIR", str(tmp_path))
        yield server
    source.artifact.cache_clear()


@pytest.fixture
def wandb(loopback: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wandb:
    made = Wandb(loopback, tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", made.module())
    return made


def forget() -> None:
    """As another process would begin."""
    source.artifact.cache_clear()
