"""Nothing is lost: killed at any moment and started again, a run is the run that was never killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from luthier.config import Config
from luthier.errors import ConfigError, ModelError, RunError
from luthier.train import checkpoint
from luthier.train.folder import hold_folder
from luthier.train.run import train
from tests.train.conftest import losses

MakeConfig = Callable[..., Config]


def _figures(folder: Path) -> list[dict[str, object]]:
    """Rows of metrics.jsonl without what measures the machine."""
    machine = {"seconds", "tokens_per_second", "peak_memory_gib"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in machine} for row in rows]


def _start(config_file: Path) -> subprocess.Popen[bytes]:
    code = "import sys, luthier; luthier.run(luthier.Config.load(sys.argv[1]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(config_file)], stderr=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )


def _write(config: Config, path: Path) -> Path:
    path.write_text(config.to_yaml())
    return path


def test_killed_at_random_moments_the_losses_are_the_same_to_the_last_bit(
    run_config: MakeConfig, tmp_path: Path
) -> None:
    values = dict(
        max_steps=60,
        num_epochs=10,
        save_steps=7,
        save_total_limit=2,
        lora_dropout=0.1,
        eval_steps=9,
        val_set_size=10,
        logging_steps=4,
        resume_from_checkpoint="auto",
    )
    whole = run_config(**values, output_dir=str(tmp_path / "whole"))
    train(whole)
    folder = tmp_path / "killed"
    file = _write(run_config(**values, output_dir=str(folder)), tmp_path / "killed.yml")
    moments = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID", ""))
    kills = 0
    while kills < 3:
        process = _start(file)
        seen = len(checkpoint.list_checkpoints(folder))
        deadline = time.monotonic() + 60
        # until it has come further than before, then at a moment of its own
        while (
            process.poll() is None
            and len(checkpoint.list_checkpoints(folder)) <= min(seen, 1)
            and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        ended = process.poll() is not None
        process.kill()
        _, said = process.communicate()
        if ended:
            assert process.returncode == 0, said.decode()
            break
        kills += 1
    train(Config.load(file))
    assert kills, "the run was over before it could be killed"
    assert _figures(folder) == _figures(tmp_path / "whole")
    one, other = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "whole"))
    assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_ends_cleanly(
    run_config: MakeConfig, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "stopped"
    values = dict(
        max_steps=4000,
        num_epochs=1000,
        save_steps=100_000,
        output_dir=str(folder),
        resume_from_checkpoint="auto",
    )
    process = _start(_write(run_config(**values), tmp_path / "stopped.yml"))
    try:
        while (
            process.poll() is None and len(losses(folder) if (folder / "metrics.jsonl").exists() else []) < 3
        ):
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert f"stopped by {number.name}" in said.decode() and "Traceback" not in said.decode()
    done = len(losses(folder))
    assert [path.name for path in checkpoint.list_checkpoints(folder)] == [f"checkpoint-{done}"]
    assert not (folder / "adapter_model.safetensors").exists()
    assert f"Unfinished: step {done} of 4,000." in (folder / "report.html").read_text(encoding="utf-8")
    train(run_config(**{**values, "max_steps": done + 2}))
    assert len(losses(folder)) == done + 2
    assert "Unfinished" not in (folder / "report.html").read_text(encoding="utf-8")


def test_a_signal_before_the_first_step_is_one_message(
    run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from luthier.train import run

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(run, "load_tokenizer", lambda config: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        train(run_config())
    assert ended.value.code == 143 and "stopped by SIGTERM" in caplog.text
    assert signal.getsignal(signal.SIGTERM) == before


def test_damaged_checkpoints_are_passed_over(
    run_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = dict(save_steps=2, output_dir=str(tmp_path / "run"), resume_from_checkpoint="auto")
    train(run_config(**values))
    expected = losses(tmp_path / "run")
    torn = tmp_path / "run" / "checkpoint-6" / "optimizer.safetensors"
    torn.write_bytes(torn.read_bytes()[:-10])
    (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").unlink()
    (tmp_path / "run" / ".partial-checkpoint-5").mkdir()
    train(run_config(**values))
    assert "checkpoint-6 is passed over" in caplog.text and "checkpoint-4 is passed over" in caplog.text
    assert losses(tmp_path / "run") == expected
    assert not (tmp_path / "run" / ".partial-checkpoint-5").exists()
    # and written anew
    assert not any(checkpoint.damage(path) for path in checkpoint.list_checkpoints(tmp_path / "run"))
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path / "run")] == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]


def test_going_on_from_an_earlier_checkpoint_replaces_the_later_ones_if_asked(
    run_config: MakeConfig, tmp_path: Path
) -> None:
    train(run_config(save_steps=2))
    first = str(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(ConfigError, match="checkpoint-4, checkpoint-6"):
        train(run_config(save_steps=2, resume_from_checkpoint=first))
    before = checkpoint.read_masters(tmp_path / "run" / "checkpoint-4")
    train(
        run_config(save_steps=2, resume_from_checkpoint=first, overwrite_output_dir=True, learning_rate=0.1)
    )
    after = checkpoint.read_masters(tmp_path / "run" / "checkpoint-4")
    assert any((after[name] != before[name]).any() for name in before)
    # into a folder of its own: without the best model's checkpoint, the last one is kept
    other = run_config(save_steps=2, resume_from_checkpoint=first, output_dir=str(tmp_path / "other"))
    train(other)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path / "other")] == [
        "checkpoint-4",
        "checkpoint-6",
    ]


def test_one_run_at_a_time_holds_a_folder(run_config: MakeConfig) -> None:
    with (
        hold_folder(run_config()),
        pytest.raises(RunError, match="another run"),
        hold_folder(run_config()),
    ):
        pass
    with hold_folder(run_config()):
        pass


def test_overwriting_costs_nothing_that_the_run_needs(
    run_config: MakeConfig, toy_llama_dir: Path, tmp_path: Path
) -> None:
    train(run_config(max_steps=2))
    with pytest.raises(ModelError):  # found out before anything is deleted
        train(run_config(overwrite_output_dir=True, lora_target_modules=["nowhere"]))
    assert (tmp_path / "run" / "checkpoint-2").exists()
    with pytest.raises(ConfigError, match="lora_model_dir"):
        train(run_config(overwrite_output_dir=True, lora_model_dir=str(tmp_path / "run")))
    model = tmp_path / "model"
    shutil.copytree(toy_llama_dir, model)
    with pytest.raises(ConfigError, match="base_model"):
        train(run_config(overwrite_output_dir=True, base_model=str(model), output_dir=str(model)))
    assert (model / "config.json").exists()


def test_an_existing_folder_is_not_overwritten_unasked(run_config: MakeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(run_config())
    note = folder / "my-notes.txt"
    note.write_text("keep me")
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        train(run_config())
    assert (folder / "metrics.jsonl").read_bytes() == before
    train(run_config(overwrite_output_dir=True, max_steps=2))
    assert len(losses(folder)) == 2 and note.read_text() == "keep me"
    assert [p.name for p in checkpoint.list_checkpoints(folder)] == ["checkpoint-2"]


def test_going_on_with_another_run_is_refused(run_config: MakeConfig) -> None:
    train(run_config(max_steps=2))
    for changes, says in [
        ({"lora_r": 8}, "parameters"),
        ({"gradient_accumulation_steps": 1}, "rows_per_step"),
        ({"sequence_len": 100}, "data"),
    ]:
        with pytest.raises(RunError, match=says):
            train(run_config(**changes, max_steps=4, resume_from_checkpoint="auto"))


def test_missing_checkpoint_names_those_there_are(run_config: MakeConfig) -> None:
    train(run_config(max_steps=2))
    with pytest.raises(ConfigError, match="checkpoint-2"):
        train(run_config(resume_from_checkpoint="./nowhere"))


def test_keeps_as_many_as_asked_and_the_best(run_config: MakeConfig, tmp_path: Path) -> None:
    train(
        run_config(
            max_steps=6,
            save_steps=1,
            save_total_limit=2,
            eval_steps=1,
            val_set_size=8,
            learning_rate=0.3,
            load_best_model_at_end=True,
        )
    )
    kept = {path.name for path in checkpoint.list_checkpoints(tmp_path / "run")}
    state, _ = checkpoint.read_state(tmp_path / "run" / "checkpoint-6")
    assert state.best_step is not None
    others = [step for step in range(1, 7) if step != state.best_step]
    assert kept == {f"checkpoint-{step}" for step in (*others[-2:], state.best_step)}
    best = checkpoint.read_masters(tmp_path / "run" / f"checkpoint-{state.best_step}")
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    for name, master in best.items():
        assert (saved[f"base_model.model.{name}.weight"] == master).all()
