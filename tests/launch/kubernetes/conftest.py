"""A config with rows beside it, and a kubectl that only notes what it is asked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from luthier import cli

CONFIG = """\
base_model: owner/model  # from the hub
datasets:
  - path: rows.jsonl
    type: alpaca
adapter: lora
"""
KUBECTL = """\
#!/bin/sh
printf '%s\\n' "$*" >> "$KUBECTL_LOG"
case "$*" in
    *" get job "*) cat "$KUBECTL_LOG.there" 2>/dev/null; exit 0 ;;
    *" apply "*) if [ -e "$KUBECTL_LOG.fails" ]; then cat "$KUBECTL_LOG.fails" >&2; exit 1; fi; echo applied ;;
esac
"""


@pytest.fixture(autouse=True)
def _no_tokens_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.endswith(("TOKEN", "KEY", "SECRET", "PASSWORD")):
            monkeypatch.delenv(name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: `first.yml` and `rows.jsonl`."""
    (tmp_path / "first.yml").write_text(CONFIG)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "a", "output": "ö"}) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


Launch = Callable[..., tuple[int, str, str]]


@pytest.fixture
def launch(folder: Path, capfd: pytest.CaptureFixture[str]) -> Launch:
    """launch(*options): exit status, standard output and error of `luthier launch kubernetes first.yml`."""

    def run(*options: str, config: str = "first.yml", image: str = "r.example/luthier:0.1") -> tuple[int, str, str]:
        status = cli.main(["launch", "kubernetes", config, "--image", image, *options])
        out, err = capfd.readouterr()
        return status, out, err

    return run


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which a stand-in notes its arguments; `.there` is what it finds, `.fails` what it says and fails."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "kubectl").write_text(KUBECTL)
    (programs / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("KUBECTL_LOG", str(tmp_path / "kubectl.log"))
    return tmp_path / "kubectl.log"


def documents(text: str) -> dict[str, dict]:
    """Manifests by kind, ConfigMaps by the end of their name."""
    found = {}
    for each in yaml.safe_load_all(text):
        kind = each["kind"]
        found[each["metadata"]["name"].rpartition("-")[2] if kind == "ConfigMap" else kind] = each
    return found
