"""The real client: online against the loopback server, and offline, where what was logged is read back."""

from __future__ import annotations

import inspect
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.artifacts import stand_in
from tests.artifacts.conftest import ROWS
from tests.artifacts.test_sinks import check_the_run, fill
from tests.artifacts.wandb_server import Server

pytestmark = pytest.mark.slow


def luthier(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own: the client keeps what it was told first."""
    done = subprocess.run(
        [sys.executable, "-m", "luthier", *arguments], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == status, done.stderr[-3000:]
    return done


@pytest.fixture
def config(toy_llama_dir: Path, tmp_path: Path) -> list[str]:
    """Arguments of `luthier train` for two steps of LoRA from artifacts."""
    file = tmp_path / "c.yml"
    values: dict[str, Any] = {
        "base_model": "wandb:team/lab/tiny:best", "datasets": [{"path": "wandb:rows:latest#8", "type": "alpaca"}],
        "adapter": "lora", "lora_r": 2, "micro_batch_size": 2, "max_steps": 2, "bf16": False, "sequence_len": 256,
        "wandb_project": "lab", "wandb_entity": "team", "wandb_log_model": "end",
        "output_dir": str(tmp_path / "my run"),
    }  # fmt: skip
    file.write_text(json.dumps(values))
    return ["train", str(file)]


def test_a_run_from_artifacts_says_their_versions_and_becomes_one(
    loopback: Server, config: list[str], toy_llama_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    fill(loopback, toy_llama_dir)
    said = luthier(*config).stderr
    assert "wandb:team/lab/my-run:v0" in said
    check_the_run(loopback, tmp_path / "my run", toy_llama_dir)
    assert sorted(loopback.used) == ["artifact-0", "artifact-1"], loopback.unknown
    answer = luthier("generate", "wandb:team/lab/my-run:final", "--prompt", "Say 3.", "--max-new-tokens", "2")
    assert "downloading" in answer.stderr


def test_push_and_what_goes_wrong(loopback: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(ROWS)
    assert luthier("push", str(rows), "wandb:team/lab/rows", "--alias", "good").stdout == "wandb:team/lab/rows:v0\n"
    (made,) = loopback.versions
    assert made.files == {"rows.jsonl": ROWS} and made.kind == "dataset" and set(made.aliases) == {"latest", "good"}
    missing = luthier("generate", "wandb:team/lab/rows:v9", "--prompt", "x", status=2).stderr
    assert "has no such artifact, version or alias" in missing
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    assert "does not accept this account" in luthier("generate", "wandb:team/lab/x", "--prompt", "x", status=2).stderr
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))  # no .netrc
    assert "nobody is logged in" in luthier("generate", "wandb:team/lab/x", "--prompt", "x", status=2).stderr


def test_offline_the_artifact_lies_in_the_runs_files(
    loopback: Server, config: list[str], toy_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    fill(loopback, toy_llama_dir)
    said = luthier(*config, "--wandb_mode", "offline").stderr
    assert "wandb sync" in said and "will not say which artifacts it was made from" in said
    (logged,) = logged_offline(tmp_path)
    assert (logged.name, logged.type) == ("my-run", "model") and set(logged.aliases) == {"latest", "final", "step-2"}
    contents = {each.path: Path(each.local_path) for each in logged.manifest.contents}
    weights = tmp_path / "my run" / "adapter_model.safetensors"
    assert contents["adapter_model.safetensors"].read_bytes() == weights.read_bytes()
    assert json.loads(logged.metadata)["base_model"] == "wandb:team/lab/tiny:v0"

    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(ROWS)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "wandb sync" in luthier("push", str(rows), "wandb:team/lab/data").stderr
    assert sorted(each.name for each in logged_offline(tmp_path)) == ["data", "my-run"]


def logged_offline(folder: Path) -> list[Any]:
    """The artifacts in the files of offline runs below a folder."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in folder.rglob("offline-run-*/*.wandb"):
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "artifact":
                found.append(record.artifact)
            if record.request.HasField("log_artifact"):
                found.append(record.request.log_artifact.artifact)
    return found


def records(file: bytes) -> Iterator[bytes]:
    """The records of a run's file, which is a log of LevelDB's format behind a header of seven bytes."""
    at, parts = 7, b""
    while at + 7 <= len(file):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", file, at + 4)
        parts += file[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_the_stand_in_has_the_signatures_of_the_package() -> None:
    wandb = pytest.importorskip("wandb")
    pairs = [
        (stand_in.Logged.download, wandb.Artifact.download),
        (stand_in.Logged.wait, wandb.Artifact.wait),
        (stand_in.Artifact.__init__, wandb.Artifact.__init__),
        (stand_in.Artifact.add_file, wandb.Artifact.add_file),
        (stand_in.Artifact.new_file, wandb.Artifact.new_file),
        (stand_in.Run.log_artifact, wandb.Run.log_artifact),
        (stand_in.Run.use_artifact, wandb.Run.use_artifact),
        (stand_in.Wandb._find, wandb.Api.artifact),
    ]
    for ours, theirs in pairs:
        own, real = (inspect.signature(each).parameters for each in (ours, theirs))
        assert list(own) == list(real)[: len(own)], theirs
        assert [p.default for p in own.values()] == [p.default for p in list(real.values())[: len(own)]], theirs
    for name in ("entity", "project", "version", "name", "type", "digest", "state", "aliases", "metadata", "manifest"):
        assert hasattr(wandb.Artifact, name), name
    assert {"entity", "project", "dir", "offline"} <= set(dir(wandb.Run))
    assert {"entity", "project", "job_type", "name", "dir", "settings", "mode"} <= set(
        inspect.signature(wandb.init).parameters
    )
