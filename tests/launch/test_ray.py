"""Runs under Ray: what is said and asked without it; and real runs in two workers of a cluster on this machine."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from luthier.cli import main
from luthier.config import Config
from luthier.errors import ConfigError, RunError
from luthier.launch.ended import Report
from luthier.launch.ray import desk, driver, ended
from luthier.launch.ray.ended import Failure
from luthier.train import interrupt
from luthier.train.checkpoint import list_checkpoints
from luthier.train.run import train
from tests.train.conftest import losses

MakeConfig = Callable[..., Config]
ROOT = Path(__file__).parents[2]
PLACES = {0: "process 7 on one", 1: "process 8 on two"}
# What Ray 2.60 says where a worker's process was killed by SIGKILL.
KILLED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n\tnamespace: ab\n"
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called"
)


# --- without Ray ---


def test_without_ray_the_message_says_what_to_install(
    run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["train", _written(run_config()), "--launcher", "ray"]) == 2
    assert "pip install 'luthier[ray]'" in capsys.readouterr().err


def test_a_ray_without_train_is_said_too(run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setitem(sys.modules, "ray", None)  # its import is an ImportError
    with pytest.raises(ConfigError, match=r"Ray Train 2.60 or later .*pip install 'luthier\[ray\]'"):
        driver.train(run_config(), 2, 0)


@pytest.mark.parametrize(
    ("values", "address", "says"),
    [
        ({}, "ray://head:10001", "RAY_ADDRESS is ray://head:10001, .*ray job submit"),
        (dict(optimizer_in_backward=True, adapter=None, lora_r=None), "local", "optimizer_in_backward .* 2 processes"),
    ],
)
def test_what_cannot_be_is_refused_before_ray_starts(
    run_config: MakeConfig, values: dict[str, object], address: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setitem(sys.modules, "ray", None)  # its import would be an ImportError
    with pytest.raises(ConfigError, match=says):
        driver.train(run_config(max_grad_norm=0.0, gradient_accumulation_steps=1, **values), 2, 0)


def test_workers_are_as_many_as_gpus_that_the_config_may_use(
    run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    of_two = {"CPU": 16.0, "GPU": 4.0}
    assert driver._workers_of(of_two, run_config(), None) == driver.Workers(4, 1, 1)
    assert driver._workers_of(of_two, run_config(device_map="cpu"), None) == driver.Workers(1, 1, 0)
    assert driver._workers_of(of_two, run_config(), 2).needs == {"CPU": 1, "GPU": 1}
    assert not caplog.records
    driver._workers_of(of_two, run_config(), 6)
    assert "6 workers with 1 CPU and 1 GPU each, and the cluster has 4 GPUs now" in caplog.text

    monkeypatch.setattr("torch.get_num_threads", lambda: 9)
    assert driver._workers_here(run_config(device_map="cpu"), 2) == (driver.Workers(2, 4, 0), 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert driver._workers_here(run_config(), None) == (driver.Workers(3, 3, 1), 3)


def test_more_workers_than_gpus_are_refused_on_this_machine_and_not_in_a_cluster(
    run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"CPU": 64.0, "GPU": 8.0}

    class Ray:
        def init(self, address: str | None = None, num_cpus: int | None = None, **_: object) -> None:
            if num_cpus and address != "local":
                raise ValueError("When connecting to an existing cluster, num_cpus must not be provided.")

        def cluster_resources(self) -> dict[str, float]:
            return there

    monkeypatch.setitem(sys.modules, "ray", Ray())
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match="--num-workers 4: this machine shows 1 GPUs"):
        driver._connect(run_config(), 4, "local")
    assert driver._connect(run_config(), 4, "") == (driver.Workers(4, 1, 1), "in the cluster that is there")


@pytest.mark.parametrize(
    ("kind", "text", "means"),
    [
        ("ActorDiedError", KILLED, "was killed, or has crashed"),
        ("ActorDiedError", "The actor is dead because its node has died. Node Id: 1", "is lost with its machine"),
        ("ActorDiedError", "Task was killed due to the node running low on memory.", "memory of its machine"),
        ("OutOfMemoryError", "", "memory of its machine"),
        ("WorkerHealthCheckTimeoutError", "", "does not answer"),
    ],
)
def test_how_a_worker_was_lost(kind: str, text: str, means: str) -> None:
    assert means in ended.how_it_was_lost(kind, text)


def test_the_message_names_the_cause_and_not_the_consequence(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-20").mkdir()
    alone = Report("another process has ended", 1, 1.0, consequence=True)
    lost = [Failure(0, alone), Failure(1, lost="is lost with its machine")]
    error = ended.final(lost, PLACES, tmp_path, 1, 0)
    assert str(error).startswith("rank 1 (process 8 on two) is lost with its machine. The other workers")
    assert str(error).endswith("goes on from checkpoint-20; --max-failures N does so by itself, N times")
    assert "--max-failures 2 is used up. The same command" in str(ended.final(lost, PLACES, tmp_path, 3, 2))

    own = [Failure(0, alone), Failure(1, Report("no such file", 1, 2.0, trace="Traceback ..."))]
    error = ended.final(own, PLACES, tmp_path, 3, 2)
    assert str(error).startswith("rank 1: no such file. --max-failures 2 is used up. The same command")
    assert "Traceback ..." in error.__notes__[0]
    wrong = Failure(0, Report("sequence_len: wrong", 2, 1.0), again=False)
    error = ended.final([wrong], PLACES, tmp_path, 1, 2)  # no other attempt was made
    assert (str(error), error.exit_status) == ("sequence_len: wrong", 2)


def test_what_the_command_hears_is_told_in_time(
    run_config: MakeConfig, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    run = driver._Run(run_config(), driver.Workers(2), 3, driver._Signals(), "")
    run._hear([("begins", 0, "process 1 on a", 1), ("begins", 1, "process 2 on a", 1), ("said", "step 1")])
    assert (capsys.readouterr().err, caplog.messages) == ("step 1\n", [])
    run._hear([("failed", [Failure(1, lost="is lost")])])
    run._hear([("begins", 1, "process 4 on b", 2), ("begins", 0, "process 3 on a", 2)])
    assert caplog.messages == [
        "rank 1 (process 2 on a) is lost. The run begins again: attempt 2, --max-failures 3"
    ]
    run._hear([("begins", 0, "process 5 on a", 3)])  # the cloud has announced it: for Ray that is no failure
    assert caplog.messages[1:] == ["a machine is taken away. The run begins again: attempt 3, --max-failures 3"]


def test_the_desk_counts_attempts_and_keeps_the_first_stamp() -> None:
    one = desk.Desk()
    assert one.begin((3, 4)) == (1, (3, 4))
    assert one.begin(None) == (2, (3, 4))
    one.put("said", "a")
    one.put("said", "b")
    assert [one.take(), one.take()] == [[("said", "a"), ("said", "b")], []]


def test_a_run_in_its_steps_can_be_asked_to_stop() -> None:
    assert not interrupt.request(signal.SIGTERM)
    with interrupt.Interrupt() as asked:
        assert not asked()
        assert interrupt.request(signal.SIGTERM)
        assert asked() and asked.signal is signal.SIGTERM
    assert not interrupt.request(signal.SIGTERM)


# --- with Ray ---


def test_an_attempt_goes_on_with_its_own_run_only(run_config: MakeConfig, tmp_path: Path) -> None:
    worker = _worker()
    config = run_config(overwrite_output_dir=True)
    folder = Path(config.output.output_dir)
    folder.mkdir()
    # An earlier run is there, and the first attempt failed before it was replaced.
    assert worker.going_on(config, folder, replaced=False) is config
    assert worker.going_on(config, folder, replaced=True).output.resume_from_checkpoint == "auto"
    # A run that began from another's checkpoint goes on from its own, once there is one.
    config = run_config(resume_from_checkpoint="other/checkpoint-3")
    again = worker.going_on(config, folder, replaced=True).output
    assert (again.resume_from_checkpoint, again.overwrite_output_dir) == ("other/checkpoint-3", True)
    (folder / "checkpoint-5").mkdir()
    assert worker.going_on(config, folder, replaced=True).output.resume_from_checkpoint == "auto"


@pytest.mark.parametrize("shared", [True, False])
def test_several_machines_need_one_folder(tmp_path: Path, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = _worker()

    class Second:
        def get_world_size(self) -> int:
            return 2

        def get_local_world_size(self) -> int:
            return 1

        def get_world_rank(self) -> int:
            return 1

    probe = tmp_path / ".partial-1"
    if shared:
        probe.touch()
    monkeypatch.setattr(worker, "get_context", Second)
    monkeypatch.setattr(worker, "broadcast_from_rank_zero", lambda own: own or str(probe))
    monkeypatch.setattr(worker, "barrier", lambda: None)
    if shared:
        worker.check_folder(tmp_path)
    else:
        with pytest.raises(ConfigError, match="output_dir has to be on a file system that all of them share"):
            worker.check_folder(tmp_path)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "head"])
def test_a_cluster_that_cannot_be_reached_is_said_at_once(
    run_config: MakeConfig, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RunError, match=f"Ray's cluster at {address} cannot be reached.*RAY_ADDRESS=local"):
        driver.train(run_config(), 2, 0)


@pytest.mark.slow
def test_two_workers_make_the_run_of_one_process(run_config: MakeConfig, tmp_path: Path) -> None:
    values = dict(learning_rate=1e-3, lora_dropout=0.1, val_set_size=3, eval_steps=3, max_steps=8, num_epochs=2)
    alone = run_config(**values, gradient_accumulation_steps=4, output_dir=str(tmp_path / "alone"))
    train(alone)
    config = run_config(**values)
    with _under_ray(config, "local") as process:
        _, said = process.communicate(timeout=400)
    assert process.returncode == 0, said
    np.testing.assert_allclose(losses(config.output.output_dir), losses(alone.output.output_dir), rtol=1e-5)
    assert "Ray: 2 workers with 1 CPU each, on this machine" in said
    assert said.count("step 8/8") == said.count("trainable parameters:") == 1, "the first worker reports"
    assert "pid=" not in said and "raylet" not in said, "Ray's own lines"


@pytest.mark.slow
def test_a_killed_worker_is_made_again_and_the_run_goes_on(
    run_config: MakeConfig, tmp_path: Path, cluster: str
) -> None:
    values = dict(learning_rate=1e-4, max_steps=120, num_epochs=100, save_steps=4, lora_dropout=0.1)
    alone = run_config(**values, gradient_accumulation_steps=4, output_dir=str(tmp_path / "alone"))
    train(alone)
    config = run_config(**values)
    folder = Path(config.output.output_dir)
    with _under_ray(config, cluster, "--max-failures", "1") as process:
        _wait(process, (folder / "checkpoint-4").exists)
        killed = max(_workers(os.getpid()))
        os.kill(killed, signal.SIGKILL)
        _, said = process.communicate(timeout=400)
    assert process.returncode == 0, said
    (told,) = [line for line in said.splitlines() if f"(process {killed} on " in line]
    assert told.startswith("warning: rank ") and told.endswith("The run begins again: attempt 2, --max-failures 1")
    assert f"going on from {folder}/checkpoint-" in said
    found, expected = losses(folder), losses(alone.output.output_dir)
    assert len(found) == 120
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.slow
def test_a_signal_saves_and_a_config_that_is_wrong_is_not_tried_again(
    run_config: MakeConfig, tmp_path: Path, cluster: str
) -> None:
    config = run_config(max_steps=100_000, num_epochs=100_000, saves_per_epoch=0)
    folder = Path(config.output.output_dir)
    with _under_ray(config, cluster) as process:
        _wait(process, lambda: (folder / "metrics.jsonl").exists() and len(losses(folder)) >= 3)
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped by SIGTERM after step" in said, said
    (saved,) = list_checkpoints(folder)
    assert saved.name == f"checkpoint-{len(losses(folder))}"

    # The folder is not empty now, which the first worker alone finds out.
    with _under_ray(config, cluster, "--max-failures", "3") as process:
        _, said = process.communicate(timeout=400)
    assert process.returncode == 2, said
    assert said.splitlines()[-1].startswith(f"error: output_dir: {folder} already holds something")
    assert "begins again" not in said


def _worker():  # type: ignore[no-untyped-def]
    pytest.importorskip("ray.train")
    from luthier.launch.ray import worker

    return worker


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a running cluster with two CPUs on this machine."""
    ray = pytest.importorskip("ray")
    context = ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=2**27,
        log_to_driver=False,
    )
    try:
        yield context.address_info["gcs_address"]
    finally:
        ray.shutdown()


def _written(config: Config) -> str:
    path = Path(f"{config.output.output_dir}.yml")
    path.write_text(config.to_yaml())
    return str(path)


@contextmanager
def _under_ray(config: Config, address: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "luthier", "train", _written(config), "--launcher", "ray", "--num-workers", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_ADDRESS": address}
    pytest.importorskip("ray")
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def _wait(process: subprocess.Popen[str], until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline and not until():
        time.sleep(0.02)
    assert until(), process.poll()


def _workers(ancestor: int) -> list[int]:
    """Processes of Ray Train's workers below a process."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text()
        except OSError:
            continue

    def below(process: int) -> bool:
        return process == ancestor or (process in parents and below(parents[process]))

    return [process for process, name in names.items() if "RayTrainWorker" in name and below(process)]
