"""`luthier train`: which options there are together, and how many processes they come to."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier import cli
from luthier.config import Config
from luthier.errors import ConfigError
from luthier.launch import processes as launching
from luthier.launch.asked import Asked, host_and_port
from luthier.launch.processes import number_of_processes
from luthier.train import run

CONFIG = "base_model: m\ndatasets:\n  - path: d.jsonl\n    type: alpaca\n"


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "cfg.yml"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a command line comes to: "here", or the arguments with which processes are started."""
    found: list[Any] = []
    monkeypatch.setattr(run, "train", lambda config: found.append("here"))
    monkeypatch.setattr(launching, "run_in_processes", lambda config, *rest: found.append(rest))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return found


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"launcher": "slurm"}, "--launcher slurm: it is one of auto, none, ray"),
        ({"num_processes": 0}, "--num-processes 0: it is at least 1"),
        ({"nnodes": -1}, "--nnodes -1: it is at least 1"),
        ({"node_rank": -1}, "--node-rank -1: it is at least 0"),
        ({"launcher": "ray", "max_failures": -1}, "--max-failures -1: it is at least 0"),
        ({"launcher": "ray", "num_workers": 0}, "--num-workers 0: it is at least 1"),
        ({"num_workers": 2}, "--num-workers: this is for --launcher ray"),
        ({"num_workers": 2, "max_failures": 1}, "--num-workers and --max-failures: this is for --launcher ray"),
        ({"launcher": "none", "max_failures": 1}, "--max-failures: this is for --launcher ray"),
        ({"launcher": "none", "num_processes": 2}, "--num-processes: --launcher none starts nothing"),
        ({"launcher": "none", "nnodes": 2, "rdzv_endpoint": "a:1"}, "--nnodes and --rdzv-endpoint: --launcher none"),
        ({"launcher": "ray", "num_processes": 2}, "--num-processes: --launcher ray starts its own workers"),
        ({"nnodes": 2}, "--nnodes 2: say where the machines meet: --rdzv-endpoint HOST:PORT"),
        ({"node_rank": 0}, "--node-rank: this is for several machines; say --nnodes"),
        ({"nnodes": 1, "rdzv_endpoint": "a:1"}, "--rdzv-endpoint: this is for several machines"),
        ({"nnodes": 2, "node_rank": 2, "rdzv_endpoint": "a:1"}, "--node-rank 2: of 2 machines the last is 1"),
        ({"nnodes": 2, "rdzv_endpoint": "node0"}, "--rdzv-endpoint node0: write HOST:PORT"),
        ({"nnodes": 2, "rdzv_endpoint": "node0:70000"}, "write HOST:PORT"),
    ],
)
def test_options_that_cannot_be_together(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Asked(**options).check()


def test_options_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in (
        {},
        {"num_processes": 2},
        {"nnodes": 2, "rdzv_endpoint": "a.b-c:29500", "num_processes": 8},
        {"nnodes": 2, "rdzv_endpoint": "[fe80::1]:29500", "node_rank": 1},
        {"launcher": "ray", "num_workers": 2, "max_failures": 0},
        {"launcher": "none"},
    ):
        Asked(**options).check()
    assert host_and_port("[fe80::1]:29500") == ("fe80::1", 29500)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    Asked(nnodes=2, rdzv_endpoint="a:1").check()


@pytest.mark.parametrize("options", [{"num_processes": 2}, {"launcher": "ray"}, {"nnodes": 2, "rdzv_endpoint": "a:1"}])
def test_nothing_is_started_inside_of_a_launcher(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    Asked(**options).check()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 4 in the environment, so that a launcher has started"):
        Asked(**options).check()


@pytest.mark.parametrize("launcher", ["auto", "none"])
def test_tasks_of_srun_would_all_train_by_themselves(monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ConfigError, match=r"srun has started 8 tasks.*RANK=\$SLURM_PROCID"):
        Asked(launcher=launcher).check()
    monkeypatch.setenv("WORLD_SIZE", "8")
    Asked(launcher=launcher).check()


@pytest.mark.parametrize(
    ("arguments", "gpus", "comes_to"),
    [
        ([], 0, "here"),
        ([], 1, "here"),
        ([], 3, (3, 1, None, None)),
        (["device_map=cpu"], 3, "here"),
        (["device_map=cuda:1"], 3, "here"),
        (["device_map=cuda"], 2, (2, 1, None, None)),
        (["--launcher", "none"], 3, "here"),
        (["--num-processes", "1"], 3, "here"),
        (["--num-processes", "2"], 0, (2, 1, None, None)),
        (["--num_processes", "2"], 3, (2, 1, None, None)),
        (["num_processes=2", "device_map=cpu"], 1, (2, 1, None, None)),
        (["--nnodes=2", "--rdzv-endpoint=a:1"], 0, (1, 2, None, "a:1")),
        (["--nnodes=2", "--rdzv_endpoint", "a:1", "--node-rank", "1"], 4, (4, 2, 1, "a:1")),
    ],
)
def test_as_many_processes_as_there_are_gpus(
    config: str, calls: list[Any], monkeypatch: pytest.MonkeyPatch, arguments: list[str], gpus: int, comes_to: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert cli.main(["train", config, *arguments]) == 0
    assert calls == [comes_to]


def test_a_launcher_that_is_there_has_started_the_processes(
    config: str, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", config]) == 0
    assert calls == ["here"]


def test_more_processes_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = {"base_model": "m", "datasets": [{"path": "d", "type": "alpaca"}]}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert number_of_processes(Config.from_flat(flat), 2) == 2
    assert number_of_processes(Config.from_flat({**flat, "device_map": {"": "cpu"}}), 3) == 3
    with pytest.raises(ConfigError, match="--num-processes 3: this machine shows 2 GPUs"):
        number_of_processes(Config.from_flat(flat), 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="mps computes in one process only"):
        number_of_processes(Config.from_flat(flat), 2)


def test_what_several_processes_cannot_do_is_said_before_any_is_started(
    config: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching.subprocess, "Popen", None)
    assert cli.main(["train", config, "--num-processes", "2", "device_map=cuda:1"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: device_map: cuda:1 would be the device of all 2 processes") and err.count("\n") == 1


def test_a_wrong_config_is_said_once(config: str, calls: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", config, "--num-processes", "2", "lora_rr=3"]) == 2
    assert capfd.readouterr().err.count("lora_rr") == 1 and not calls


def test_ray_trains_with_the_config_that_was_given(
    config: str, calls: list[Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", config, "--launcher", "ray", "--num-workers", "2", "seed=3"]
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else found(name, *rest))
    assert cli.main(arguments) == 2
    assert "pip install 'luthier[ray]'" in capfd.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "ray" or found(name, *rest))
    module = types.ModuleType("luthier.launch.ray")
    module.train = lambda *given, **named: calls.append((given, named))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "luthier.launch.ray", module)
    assert cli.main(arguments) == 0
    assert calls == [((Path(config), ["seed=3"]), {"num_workers": 2, "max_failures": None})]


def test_the_help_lists_options_and_keys(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    out = capfd.readouterr().out
    for name in ("num-processes N", "nnodes N", "node-rank K", "rdzv-endpoint HOST:PORT", "launcher auto|none|ray",
                 "num-workers N", "max-failures N", "debug"):  # fmt: skip
        assert f"  --{name}\n" in out
    assert "micro_batch_size" in out
