"""The script of the container with Luthier itself: a job that is stopped, started again, and merged."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import luthier
from luthier.launch.ended import STOPPED_ELSEWHERE
from luthier.launch.kubernetes import manifests

pytestmark = pytest.mark.slow  # whole runs in several processes

DEMO = Path(luthier.__file__).parent / "demo"
CONFIG = f"""\
base_model: nobody/nothing
datasets:
  - path: {DEMO}/data/train.jsonl#200
    type: alpaca
adapter: lora
lora_r: 4
micro_batch_size: 2
save_steps: 4
logging_steps: 1
general_eval: false
"""


def pod(folder: Path, **variables: str) -> subprocess.Popen[str]:
    """A pod whose volumes are folders here."""
    script = manifests.script()
    for name in ("/luthier", "/config"):
        (folder / name[1:]).mkdir(exist_ok=True)
        script = script.replace(f"={name}/", f"={folder}{name}/").replace(f'"{name}/', f'"{folder}{name}/')
    if not (folder / "run.sh").exists():  # another pod's shell may be reading it
        (folder / "run.sh").write_text(script)
    (folder / "config" / "cfg.yml").write_text(CONFIG)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CONFIG": "cfg.yml",
        "RUN": "first",
        "BASE_MODEL": str(DEMO / "base_model"),
        "MERGE": "true",
        "NUM_PROCESSES": "1",
        "JOB_UID": "job-1",
        "LUTHIER_CACHE": str(folder / "luthier" / "datasets"),
        **variables,
    }
    command = ["bash", str(folder / "run.sh"), "num_epochs=1"]
    with (folder / f"log-{variables.get('JOB_COMPLETION_INDEX', '0')}").open("w") as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True)


def rows(folder: Path) -> list[dict]:
    path = folder / "luthier" / "runs" / "first" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_pod_that_has_to_go_is_followed_by_one_that_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "luthier" / "runs" / "first"
    first = pod(tmp_path, NUM_PROCESSES="2")
    deadline = time.monotonic() + 200
    while len(rows(tmp_path)) < 6 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) == 128 + signal.SIGTERM, (tmp_path / "log-0").read_text()
    saved = max(int(path.name.partition("-")[2]) for path in run.glob("checkpoint-*"))
    assert 6 <= saved < 50 and not (run / "merged").exists()
    assert pod(tmp_path, NUM_PROCESSES="2").wait(300) == 0, (tmp_path / "log-0").read_text()
    said = (tmp_path / "log-0").read_text()
    assert f"going on from {run}/checkpoint-{saved}" in said
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == list(range(1, 51))
    assert (run / "merged" / "model.safetensors").is_file()


def two_nodes(folder: Path) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    return [pod(folder, NODES="2", RDZV_ENDPOINT=endpoint, JOB_COMPLETION_INDEX=str(index)) for index in (0, 1)]


def test_two_nodes_train_together_and_one_of_them_merges(tmp_path: Path) -> None:
    # The second one has to go first: the run is neither over for the other one nor merged.
    nodes = two_nodes(tmp_path)
    deadline = time.monotonic() + 200
    while len(rows(tmp_path)) < 3 and nodes[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    nodes[1].send_signal(signal.SIGTERM)
    assert [node.wait(120) for node in nodes] == [STOPPED_ELSEWHERE, 128 + signal.SIGTERM]
    first = (tmp_path / "log-0").read_text()
    assert "a signal to another process has stopped the run" in first and "merge-lora" not in first

    nodes = two_nodes(tmp_path)
    assert [node.wait(300) for node in nodes] == [0, 0], [
        (tmp_path / f"log-{index}").read_text() for index in (0, 1)
    ]
    logs = [(tmp_path / f"log-{index}").read_text() for index in (0, 1)]
    assert "x 2 processes" in logs[0] and "going on from" in logs[0] and "merge-lora" in logs[0]
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == list(range(1, 51))
    assert "node 0 does the rest" in logs[1] and "merge-lora" not in logs[1]
    assert (tmp_path / "luthier" / "runs" / "first" / "merged" / "model.safetensors").is_file()
