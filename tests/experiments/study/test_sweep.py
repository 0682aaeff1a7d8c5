"""A study as it is run: what is started, what is not started again, and what stopping and failing leave."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.experiments.run_files import read_run
from luthier.experiments.study.devices import Slot, slots, visible_devices
from luthier.experiments.study.results import Trial, goal_of, read_study

from .conftest import Sweep, Write

GRID = {"name": "s", "grid": {"lora_r": [8, 16]}, "seeds": 2}
DRIVER = Path(__file__).with_name("driver.py")


def rows(folder: str = "s") -> dict[str, Trial]:
    return {trial.name: trial for trial in read_study(folder).trials}


def starts(name: str, folder: str = "s") -> list[str]:
    """At which steps a run began, for each of its starts."""
    text = (Path(folder) / "runs" / f"{name}.log").read_text()
    return [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith("begins")]


def test_all_runs_are_run_and_written_down(sweep: Sweep, capsys: pytest.CaptureFixture[str]):
    assert sweep(GRID) == 0
    found = rows()
    assert list(found) == ["r8-s0", "r16-s0", "r8-s1", "r16-s1"]
    assert [trial.metric for trial in found.values()] == pytest.approx(
        [1 + 1 / 6, 0.5 + 1 / 6, 1.001 + 1 / 6, 0.501 + 1 / 6]
    )
    one = found["r8-s0"]
    assert (one.settings, one.seed, one.status) == ({"lora_r": 8}, 0, "finished")
    assert (one.train_seconds, one.peak_memory_gib, one.trainable_parameters) == (2.0, 1.5, 7)
    assert one.tokens_per_second == 50.0
    assert one.seconds is not None and one.seconds > 0
    table = list(csv.DictReader(Path("s/results.csv").read_text().splitlines()))
    assert [row["name"] for row in table] == list(found)
    assert float(table[1]["eval_loss"]) == pytest.approx(found["r16-s0"].metric)
    said = capsys.readouterr()
    assert "best: lora_r: 16 with eval_loss 0.66717, the mean of 2 seeds" in said.out
    assert "[4/4] r16-s1: eval_loss" in said.err
    assert not list(Path("s/runs").glob("*/checkpoint-*"))  # keep: results
    assert (Path("s/runs/r8-s0") / "adapter_model.safetensors").is_file()


def test_what_is_finished_is_not_run_again(sweep: Sweep):
    assert sweep(GRID) == 0
    before = Path("s/runs/r8-s0/summary.json").stat().st_mtime_ns
    assert sweep(GRID) == 0
    assert Path("s/runs/r8-s0/summary.json").stat().st_mtime_ns == before
    # Another value: one more setting. Another axis: other names, and the runs that are there are still found.
    assert sweep({**GRID, "grid": {"lora_r": [8, 16, 32]}}) == 0
    assert sweep({**GRID, "grid": {"lora_r": [8, 16, 32], "lora_alpha": [32, 64]}}) == 0
    assert all(starts(name) == ["0"] for name in ("r8-s0", "r16-s1", "r32-s0", "r8-alpha64-s0"))
    assert len(rows()) == 12
    assert rows()["r8-s0"].settings == {"lora_r": 8, "lora_alpha": 32}
    # Fewer: what is not asked for stays where it is, and is said.
    assert sweep({**GRID, "grid": {"lora_r": [32]}}) == 0
    assert list(rows()) == ["r32-s0", "r32-s1"]
    assert "10 runs in the folder belong to an earlier form" in read_study("s").notes[0]


@pytest.mark.slow
def test_other_settings_are_another_run_and_a_deleted_one_is_made_again(sweep: Sweep):
    assert sweep(GRID) == 0
    assert sweep(GRID, "max_steps=7") == 0
    assert all(name.startswith(("r8-s", "r16-s")) and len(name.split("-")) == 3 for name in rows())
    assert len(list(Path("s/runs").glob("*.log"))) == 8
    subprocess.run(["rm", "-r", "s/runs/r8-s0"], check=True)
    assert sweep(GRID) == 0
    assert starts("r8-s0") == ["0", "0"] and starts("r16-s0") == ["0"]


def test_a_run_that_fails_is_a_row(sweep: Sweep, capsys: pytest.CaptureFixture[str]):
    study = {"name": "s", "grid": {"lora_dropout": [0.0, 0.5, 0.25]}}
    assert sweep(study) == 1
    found = rows()
    assert [trial.status for trial in found.values()] == ["finished", "failed", "finished"]
    assert found["dropout0.5"].error == "error: it cannot be trained\n  for this reason"
    assert found["dropout0.25"].metric is None
    assert "eval_loss" in found["dropout0.25"].error
    said = capsys.readouterr()
    assert "1 of 3 runs failed" in said.err and "best: lora_dropout: 0" in said.out
    log = Path("s/runs/dropout0.5.log")
    assert sweep(study) == 1
    assert log.read_text().count("error") == 1  # not tried again unasked
    assert sweep(study, "--rerun-failed") == 1
    assert log.read_text().count("error") == 2


@pytest.mark.parametrize(
    ("keep", "left"), [("all", {"checkpoint-2", "checkpoint-4", "adapter_model.safetensors"}), ("figures", set())]
)
def test_what_is_kept(keep: str, left: set[str], sweep: Sweep):
    assert sweep({"name": "s", "grid": {"lora_r": [8, 16]}, "keep": keep}) == 0
    figures = {"config.yaml", "metrics.jsonl", "summary.json"}
    assert {path.name for path in Path("s/runs/r8").iterdir()} == {*figures, *left}
    assert rows()["r8"].metric is not None


def test_a_metric_that_no_run_has(sweep: Sweep, capsys: pytest.CaptureFixture[str]):
    assert sweep({**GRID, "metric": "eval_los", "goal": "min"}) == 2
    said = capsys.readouterr().err
    before, _, said = said.partition("study s: ")
    assert "study.yml:8: metric: eval_los is looked for when the first run ends. Did you mean eval_loss?" in before
    assert "study.yml:8: metric: eval_los is no figure of a run. Did you mean eval_loss?" in said
    assert "There are eval_loss, eval_loss_best" in said
    assert len(list(Path("s/runs").glob("*.log"))) == 1  # the first run showed it
    assert sweep({**GRID, "metric": "eval_loss_best"}) == 0
    assert starts("r8-s0") == ["0"]


@pytest.mark.slow
def test_other_figures_can_decide(sweep: Sweep, capsys: pytest.CaptureFixture[str]):
    assert sweep({**GRID, "metric": "tokens_per_second"}) == 0
    assert read_study("s").goal == "max"
    assert rows()["r8-s0"].metric == 50.0
    assert sweep({**GRID, "metric": "trainable_parameters"}) == 0
    assert rows()["r8-s0"].metric == 7
    assert (goal_of("eval_rewards/accuracies"), goal_of("eval_loss"), goal_of("wonder")) == ("max", "min", None)


def test_nothing_is_started_to_look(sweep: Sweep, capsys: pytest.CaptureFixture[str]):
    assert sweep(GRID, "--dry-run") == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0].split() == ["run", "lora_r", "seed"]
    assert "r16-s1" in said and "4 runs, all valid" in said
    assert not Path("s").exists()
    assert sweep(GRID, "--report-only") == 0
    assert {trial.status for trial in rows().values()} == {"waiting"}


def test_several_at_a_time_share_the_threads(sweep: Sweep, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert sweep(GRID, "--jobs", "2") == 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert f"threads {max(1, cores // 2)} devices" in Path("s/runs/r8-s0.log").read_text()
    assert len(rows()) == 4


def test_each_job_has_its_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("luthier.experiments.study.devices.visible_devices", lambda: ["2", "3", "GPU-x", "5"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    class OnGPU:
        class model:
            device_map = None

    def given(jobs: int | None, gpus: int = 1) -> list[str | None]:
        return [slot.environment.get("CUDA_VISIBLE_DEVICES") for slot in slots(jobs, gpus, [OnGPU()])]  # type: ignore[list-item]

    assert given(None) == ["2", "3", "GPU-x", "5"]
    assert given(2) == ["2", "3"]
    assert given(6) == ["2", "3", "GPU-x", "5", "2", "3"]  # asked for: two share a device
    assert given(None, 2) == ["2,3", "GPU-x,5"]
    assert given(None, 3) == ["2,3,GPU-x"]


def test_on_a_cpu_there_is_one_place(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("luthier.experiments.study.devices._DRIVERS", ())
    if sys.platform.startswith("linux"):
        assert visible_devices() == []
        assert slots(None, 1, []) == [Slot()]


def test_a_folder_that_holds_something_else(sweep: Sweep, capsys: pytest.CaptureFixture[str]):
    Path("s").mkdir()
    (Path("s") / "thesis.txt").write_text("mine")
    assert sweep(GRID) == 2
    assert "holds something that is no study" in capsys.readouterr().err
    assert sweep(GRID, "--output-dir", "other") == 0
    assert sweep({**GRID, "name": "t"}, "--output-dir", "other") == 2
    assert "holds the study s, and this one is t" in capsys.readouterr().err


def test_the_page_is_there_at_the_end(
    sweep: Sweep, drawn: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("luthier.experiments.study.page.write_page", drawn)
    assert sweep(GRID) == 0
    assert "r16-s1" in Path("s/report.html").read_text()
    assert "report: s/report.html" in capsys.readouterr().out


def test_a_page_that_fails_does_not_lose_the_study(sweep: Sweep, monkeypatch: pytest.MonkeyPatch):
    def fail(folder: Path) -> Path:
        raise ValueError("no page today")

    monkeypatch.setattr("luthier.experiments.study.page.write_page", fail)
    assert sweep(GRID) == 0
    assert len(rows()) == 4


@pytest.mark.slow
def test_a_real_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two ranks of the demo's run, a few steps of each, by the command as it is."""
    root = Path(luthier.__file__).parent
    (tmp_path / "study.yml").write_text(
        f"""
name: real
base: {root}/demo/demo.yml
grid: {{lora_r: [2, 8], lora_alpha: "=2*lora_r"}}
"""
    )
    monkeypatch.chdir(root.parent)
    command = [sys.executable, "-m", "luthier", "sweep", str(tmp_path / "study.yml"), "max_steps=3"]
    subprocess.run([*command, "general_eval=false", "--output-dir", str(tmp_path / "out")], check=True, timeout=300)
    found = rows(str(tmp_path / "out"))
    assert list(found) == ["r2", "r8"]
    for trial in found.values():
        assert trial.status == "finished" and trial.metric is not None and trial.peak_memory_gib
        figures = read_run(tmp_path / "out" / trial.folder).points("eval_loss")
        assert trial.metric == figures[-1][1]
    # Both matrices of an adapter grow with its rank, and the rest stays.
    small, large = (trial.trainable_parameters or 0 for trial in found.values())
    assert large == 4 * small > 0
    assert (found["r8"].total_parameters or 0) - large == (found["r2"].total_parameters or 0) - small
    assert (tmp_path / "out" / "report.html").is_file()


# --- processes that are stopped and killed --------------------------------------------------------------------------


def start(path: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(DRIVER), str(path), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "FAKE_SECONDS": "0.05", **environment},
    )


def until(holds: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def has_rows(name: str, number: int, folder: str = "s") -> bool:
    path = Path(folder) / "runs" / name / "metrics.jsonl"
    return path.is_file() and path.read_text().count("\n") >= number


LONG = {"name": "s", "grid": {"lora_r": [8, 16]}}


def test_a_signal_stops_runs_in_order_and_the_same_command_goes_on(write: Write, sweep: Sweep):
    process = start(write(LONG), "max_steps=30", "save_steps=100")
    until(lambda: has_rows("r8", 3))
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "the same command goes on" in said
    assert list(Path("s/runs/r8").glob("checkpoint-*"))  # it saved where it was
    assert {trial.status for trial in rows().values()} == {"waiting"}
    assert sweep(LONG, "max_steps=30", "save_steps=100") == 0
    assert starts("r8")[0] == "0" and int(starts("r8")[1]) >= 3 and starts("r16") == ["0"]
    seconds = rows()["r8"].seconds
    assert seconds is not None and seconds > 0.15  # of both starts


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the runs of a killed study go on")
def test_a_killed_study_takes_its_runs_along_and_goes_on_from_their_checkpoints(write: Write, sweep: Sweep):
    process = start(write(LONG), "--jobs", "2", "max_steps=30", "save_steps=1")
    until(lambda: has_rows("r8", 3) and has_rows("r16", 3))
    process.kill()
    process.wait(timeout=30)
    record = json.loads(Path("s/runs/r8.json").read_text())
    assert record["status"] == "running"
    assert sweep(LONG, "max_steps=30", "save_steps=1") == 0
    for name in ("r8", "r16"):
        assert len(starts(name)) == 2 and 3 <= int(starts(name)[1]) < 30
        assert "stopped after step" in (Path("s/runs") / f"{name}.log").read_text()


def test_a_run_that_ended_while_nobody_looked_is_finished(sweep: Sweep):
    assert sweep(LONG) == 0
    path = Path("s/runs/r8.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "running", "began": 1.0}))
    assert sweep(LONG) == 0
    assert starts("r8") == ["0"]


@pytest.mark.slow
def test_two_commands_do_not_run_one_study(write: Write, sweep: Sweep, capsys: pytest.CaptureFixture[str]):
    process = start(write(LONG), "max_steps=40")
    until(lambda: has_rows("r8", 1))
    assert sweep(LONG, "max_steps=40") == 1
    assert "another `luthier sweep` is at work" in capsys.readouterr().err
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143


@pytest.mark.slow
def test_an_orphan_that_still_writes_is_waited_for(write: Write, sweep: Sweep, capsys: pytest.CaptureFixture[str]):
    assert sweep(LONG, "--report-only") == 0
    config = Path("s/runs/r8.yml")
    config.write_text("output_dir: s/runs/r8\nmax_steps: 20\nlora_r: 8\n")
    trainer = Path(__file__).with_name("trainer.py")
    orphan = subprocess.Popen([sys.executable, str(trainer), str(config)], env={**os.environ, "FAKE_SECONDS": "0.02"})
    until(lambda: has_rows("r8", 1))
    assert sweep(LONG) == 0
    assert "its end is waited for" in capsys.readouterr().err
    assert orphan.wait(timeout=30) == 0
    assert rows()["r8"].status == "finished"
