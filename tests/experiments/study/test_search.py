"""Settings that Optuna chooses: the same ones each time, however often the search was stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from luthier.experiments.study.results import read_study

from .conftest import Sweep, Write
from .test_sweep import has_rows, rows, start, starts, until

optuna = pytest.importorskip("optuna")

SEARCH = {
    "name": "s",
    "search": "optuna",
    "trials": 6,
    "space": {
        "learning_rate": {"low": 1e-5, "high": 1e-1, "log": True},
        "lora_r": {"low": 4, "high": 64, "step": 4},
        "size": [{"name": "long", "max_steps": 8}, {"name": "short", "max_steps": 4}],
        "lora_alpha": "=2*lora_r",
    },
}


def settings() -> list[dict[str, Any]]:
    return [trial.settings for trial in read_study("s").trials]


def history() -> Any:
    (name,) = optuna.get_all_study_names("sqlite:///s/search.db")
    return optuna.load_study(study_name=name, storage="sqlite:///s/search.db")


# The sampler looks at what is there from the 11th on.
@pytest.mark.slow
@pytest.mark.parametrize(("stopped", "trials"), [(1, 3), (5, 12)])
def test_a_search_goes_on_as_if_it_had_not_been_stopped(
    stopped: int, trials: int, sweep: Sweep, capsys: pytest.CaptureFixture[str]
):
    study = {**SEARCH, "trials": trials, "jobs": 1}
    assert sweep(study) == 0
    assert "best: learning_rate" in capsys.readouterr().out
    whole = settings()
    assert len(whole) == trials
    assert all(set(each) == {"learning_rate", "lora_r", "size"} for each in whole)
    assert all(trial.changed["lora_alpha"] == 2 * trial.changed["lora_r"] for trial in read_study("s").trials)
    assert history().best_value == min(trial.metric or 9 for trial in read_study("s").trials)
    Path("s").rename("first")
    assert sweep({**study, "trials": stopped}) == 0
    assert sweep(study) == 0
    assert settings() == whole
    assert all(len(starts(f"t{number:03d}")) == 1 for number in range(trials))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the runs of a killed study go on")
def test_a_killed_search_goes_on_with_its_run(write: Write, sweep: Sweep):
    study = {**SEARCH, "trials": 4}
    assert sweep(study) == 0
    whole = settings()
    Path("s").rename("first")
    process = start(write(study), FAKE_SECONDS="0.1")
    until(lambda: has_rows("t001", 2))
    process.kill()
    process.communicate(timeout=30)
    assert sweep(study) == 0
    assert settings() == whole
    assert len(starts("t001")) == 2 and int(starts("t001")[1]) >= 2
    assert [each.state.name for each in history().trials] == ["COMPLETE"] * 4


def test_what_fails_and_what_is_proposed_twice(sweep: Sweep, capsys: pytest.CaptureFixture[str]):
    study: dict[str, Any] = {"name": "s", "search": "optuna", "sampler": "random", "trials": 8}
    study["space"] = {"lora_dropout": [0.0, 0.1, 0.5]}
    assert sweep(study) == 1
    found = rows()
    assert len(found) == 3
    assert sorted(trial.status for trial in found.values()) == ["failed", "finished", "finished"]
    assert "5 of 8 settings were proposed again" in " ".join(read_study("s").notes)
    states = [each.state.name for each in history().trials]
    assert len(states) == 8 and set(states) == {"COMPLETE", "FAIL"}
    assert sweep(study, "--rerun-failed") == 1
    (failed,) = [name for name, trial in found.items() if trial.status == "failed"]
    assert (Path("s/runs") / f"{failed}.log").read_text().count("error") == 2


@pytest.mark.slow
def test_the_grid_sampler_sees_everything_once(sweep: Sweep):
    space = {"lora_r": [4, 8], "lora_dropout": {"low": 0.0, "high": 0.2, "step": 0.1}}
    study = {"name": "s", "search": "optuna", "sampler": "grid", "space": space, "jobs": 3}
    assert sweep({**study, "trials": 2}) == 0
    assert sweep(study) == 0
    found = [(each["lora_r"], round(each["lora_dropout"], 6)) for each in settings()]
    assert sorted(found) == [(r, dropout) for r in (4, 8) for dropout in (0.0, 0.1, 0.2)]


@pytest.mark.slow
def test_another_space_is_another_search_and_finished_runs_count(sweep: Sweep):
    study = {"name": "s", "search": "optuna", "sampler": "grid", "space": {"lora_r": [4, 8]}}
    assert sweep(study) == 0
    assert sweep({**study, "space": {"lora_r": [4, 8, 16]}}) == 0
    assert sorted(each["lora_r"] for each in settings()) == [4, 8, 16]
    assert "began anew" in " ".join(read_study("s").notes)
    assert sum(len(starts(path.stem)) for path in Path("s/runs").glob("*.log")) == 3


@pytest.mark.slow
def test_the_pruner_stops_what_is_worse(sweep: Sweep, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAKE_SECONDS", "0.05")
    # The good rates first, by the seed of the order.
    study = {
        "name": "s", "search": "optuna", "trials": 9, "pruner": "median", "search_seed": 1,
        "space": {"learning_rate": {"low": 1e-6, "high": 1e-1, "log": True}},
    }  # fmt: skip
    assert sweep(study, "max_steps=20") == 0
    found = read_study("s").trials
    pruned = [trial for trial in found if trial.status == "pruned"]
    assert pruned
    assert all(trial.metric is None and trial.figures["eval_loss"] for trial in pruned)
    assert [each.state.name == "PRUNED" for each in history().trials] == [trial.status == "pruned" for trial in found]
    worst = max(trial.figures["eval_loss"] for trial in found)
    assert any(trial.figures["eval_loss"] == worst for trial in pruned)


def test_without_optuna_it_says_what_to_install(sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert sweep(SEARCH) == 2
    assert "pip install 'luthier[studies]'" in capsys.readouterr().err
    assert sweep(SEARCH, "--dry-run") == 0
    assert "a search of 6 runs" in capsys.readouterr().out


@pytest.mark.slow
def test_a_broken_history_is_one_message(sweep: Sweep, capsys: pytest.CaptureFixture[str]):
    assert sweep({**SEARCH, "trials": 1}) == 0
    Path("s/search.db").write_bytes(b"no database" * 1000)
    assert sweep({**SEARCH, "trials": 1}) == 1
    assert "search.db: the search's history cannot be read" in capsys.readouterr().err
    Path("s/search.db").unlink()
    assert sweep({**SEARCH, "trials": 1}) == 0
    assert starts("t000") == ["0"]
    assert json.loads(Path("s/results.jsonl").read_text().splitlines()[0])["status"] == "finished"
