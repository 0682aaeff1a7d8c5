"""Training on a stream: the steps are those of a run that reads everything, and nothing is lost when it is killed."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from luthier.config import Config
from luthier.data.stream import files
from luthier.errors import ConfigError, DataError, ModelError, RunError
from luthier.train import checkpoint
from luthier.train.run import train
from tests.train.conftest import losses

MakeConfig = Callable[..., Config]
MACHINE = {"seconds", "tokens_per_second", "peak_memory_gib", "eta_seconds"}


@pytest.fixture
def stream_config(run_config: MakeConfig) -> MakeConfig:
    """Flat keys -> Config of a quick run on a stream, in passes of a fixed size."""

    def make(**values: Any) -> Config:
        base = {"streaming": True, "max_steps": 33, "lora_dropout": 0.1, "max_tokens_per_pass": 600, "save_steps": 1000}
        return run_config(**{**base, **values})

    return make


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what measures the machine."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in MACHINE} for row in rows]


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


@pytest.mark.parametrize(
    "values",
    [
        {"shuffle_buffer_size": 1000},  # holds all: the same shuffle too
        pytest.param({"shuffle_buffer_size": 7, "shuffle": False}, marks=pytest.mark.slow),
        pytest.param(
            {"shuffle_buffer_size": 60, "sample_packing": True, "sequence_len": 256, "max_steps": 9},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["shuffled", "in-order", "packed"],
)
def test_the_steps_are_those_of_a_run_that_reads_everything(
    stream_config: MakeConfig, tmp_path: Path, values: dict[str, Any]
) -> None:
    """Over several epochs, each with a smaller step at its end; dropout too."""
    whole = {name: value for name, value in values.items() if name != "shuffle_buffer_size"}
    train(stream_config(**whole, streaming=False, num_epochs=3, output_dir=str(tmp_path / "whole")))
    train(stream_config(**values, output_dir=str(tmp_path / "stream")))
    assert losses(tmp_path / "stream") == losses(tmp_path / "whole")
    assert same_weights(tmp_path / "stream", tmp_path / "whole")
    rows = rows_of(tmp_path / "stream")
    assert [row["epoch"] for row in rows] == [int(row["epoch"] - 1e-9) for row in rows_of(tmp_path / "whole")]


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["documents", "packed"])
def test_a_run_goes_on_from_any_step_and_reads_two_blocks_for_it(
    stream_config: MakeConfig, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """With left-overs between blocks, rows that are left out, and the end of a round on the way."""
    lines = rows_file.read_text().splitlines()
    lines += [line.replace("Add", "Take") for line in lines] * (2 if packed else 4)
    lines[13] = "{broken"
    rows_file.write_text("\n".join(lines) + "\n")
    values = dict(
        skip_bad_rows=True,
        shuffle_buffer_size=37,
        sample_packing=packed,
        sequence_len=160,
        save_steps=1,
        max_steps=36 if packed else 85,
        val_set_size=9,
        eval_steps=20,
    )
    whole = tmp_path / "whole"
    train(stream_config(**values, output_dir=str(whole)))
    rounds = [row["epoch"] for row in rows_of(whole) if "epoch" in row]
    assert rounds == sorted(rounds) and set(rounds) == {0, 1}
    parsed: list[bytes] = []
    object_of = files.object_of
    monkeypatch.setattr(files, "object_of", lambda line: (parsed.append(line), object_of(line))[1])
    for step in (1, 8, 9, 10, 11, 28) if packed else (3, 40, 47, 71, 72, 73, 74, 75, 84):
        again = tmp_path / f"again-{step}"
        again.mkdir()
        shutil.copytree(whole / f"checkpoint-{step}", again / f"checkpoint-{step}")
        shutil.copy(whole / "metrics.jsonl", again)
        parsed.clear()
        train(stream_config(**values, output_dir=str(again), resume_from_checkpoint="auto"))
        assert rows_of(again) == rows_of(whole), step
        assert same_weights(again, whole), step
        if step == 84:
            # the first block and what is held out, the one before, and the one at hand
            assert len(parsed) < 9 + 4 * 37 < len(lines)


def test_a_run_from_an_address_writes_nothing_beside_its_folder(
    stream_config: MakeConfig, rows_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    lines = rows_file.read_text().splitlines()
    lines[50] = json.dumps({"instruction": "x", "output": "word " * 300})
    system.pipe("/bucket/rows.jsonl", "\n".join(lines).encode())
    try:
        config = stream_config(
            datasets=[{"path": "memory://bucket/*.jsonl", "type": "alpaca"}],
            max_steps=16,
            val_set_size=5,
            eval_steps=8,
            shuffle_buffer_size=20,
            logging_steps=5,
        )
        with caplog.at_level(logging.INFO, "luthier"):
            result = train(config)
    finally:
        system.store.clear()
    assert result.finished and result.summary["examples"] == 54
    assert not any(Path(os.environ["LUTHIER_CACHE"]).rglob("*"))
    assert "how many there are is not known" in caplog.text and "not by their content" in caplog.text
    assert "1 (1.3%) left out: longer than sequence_len; first: memory:///bucket/rows.jsonl:51" in caplog.text
    logged = [row for row in rows_of(tmp_path / "run") if "rows_read" in row]
    # behind the five that are held out, up to the end of the block that a step is in
    assert [(row["step"], row["rows_read"], row["rows_left_out"]) for row in logged] == [
        (5, 20, 0), (10, 40, 0), (15, 75, 1), (16, 75, 1),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("rl", ["kto", "dpo", "orpo", "simpo"])
def test_preference_runs_are_those_that_read_everything(
    stream_config: MakeConfig, pairs_file: Path, tmp_path: Path, rl: str
) -> None:
    values = dict(rl=rl, datasets=[{"path": str(pairs_file)}], max_steps=5, learning_rate=2e-3)
    for name, more in (("whole", {"streaming": False}), ("stream", {"shuffle_buffer_size": 500})):
        train(stream_config(**values, **more, output_dir=str(tmp_path / name)))
    assert losses(tmp_path / "stream") == losses(tmp_path / "whole")


def test_the_only_answer_of_a_buffer_is_not_its_own_mismatch(stream_config: MakeConfig, tmp_path: Path) -> None:
    """kto: of five answers and a buffer of four, the fifth is alone, and its divergence is that of no other prompt."""
    rows = [{"prompt": f"Say {n}:", "completion": f" {n} " * (n + 2), "label": n % 2 == 0} for n in range(5)]
    file = tmp_path / "labelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = dict(rl="kto", datasets=[{"path": str(file)}], shuffle_buffer_size=4, micro_batch_size=4)
    values |= dict(gradient_accumulation_steps=1, learning_rate=1e-2, lr_scheduler="constant", max_steps=4)
    train(stream_config(**values, output_dir=str(tmp_path / "run")))
    logged = [row for row in rows_of(tmp_path / "run") if "loss" in row]
    assert [row["rows_read"] for row in logged] == [4, 5, 9, 10]
    alone = logged[1]
    assert alone["kl"] == 0
    assert alone["loss"] != pytest.approx(0.5, abs=1e-5)  # which it is wherever an answer is weighed against itself


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"max_steps": None}, "set max_steps"),
        ({"num_epochs": 2}, "num_epochs: the length of a stream is not known"),
        ({"val_set_size": 0.1}, "val_set_size: 0.1 is a fraction.*how many rows"),
        ({"saves_per_epoch": 2, "save_steps": None}, "saves_per_epoch.*write save_steps"),
        ({"mix_strategy": "temperature"}, "sizes of the datasets, which are not known.*interleave"),
        ({"rl": "dpo", "precompute_ref_log_probs": True}, "precompute_ref_log_probs goes through all rows"),
        ({"dataset_exact_deduplication": True}, "repeats cannot be found"),
        ({"streaming": False, "shuffle_buffer_size": 9}, "shuffle_buffer_size is for streams"),
        ({"shuffle_buffer_size": 0}, "shuffle_buffer_size"),
        ({"datasets": [{"path": "a", "type": "alpaca", "weight": 2}]}, "weight needs `mix_strategy: interleave`"),
    ],
    ids=str,
)
def test_what_a_stream_cannot_go_with(stream_config: MakeConfig, values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        stream_config(**{name: value for name, value in values.items() if value is not None or name == "max_steps"})


def test_what_is_found_before_the_model_is_loaded(
    stream_config: MakeConfig, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.train.run.build_model", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(DataError, match="val_set_size: 60 rows.*there are no rows|there are no rows in it to train on"):
        train(stream_config(val_set_size=60))
    with pytest.raises(DataError, match="val_set_size: 61 rows would be held out, and .* has only 60"):
        train(stream_config(val_set_size=61))
    with pytest.raises(ModelError, match="a document has 1,024 tokens, and .* made for 512"):
        train(stream_config(sequence_len=1024))
    with pytest.raises(DataError, match="nothing in the first 20 rows can be trained.*longer than sequence_len"):
        train(stream_config(sequence_len=5, shuffle_buffer_size=20))
    rows_file.write_text('{"instruction": "x"}\n')
    with pytest.raises(DataError, match="rows.jsonl:1: .*output"):
        train(stream_config())
    rows_file.write_text("")
    with pytest.raises(DataError, match="there are no rows in it"):
        train(stream_config())


def test_another_buffer_is_another_run(stream_config: MakeConfig, rows_file: Path, tmp_path: Path) -> None:
    values = dict(max_steps=3, shuffle_buffer_size=20)
    train(stream_config(**values))
    for changes in ({"shuffle_buffer_size": 21}, {"streaming": False, "shuffle_buffer_size": None}):
        more = {**values, "max_steps": 5, "resume_from_checkpoint": "auto", **changes}
        with pytest.raises(RunError, match="belongs to another run; what differs: data"):
            train(stream_config(**more))
    lines = rows_file.read_text().splitlines()
    rows_file.write_text("\n".join([*lines[:3], lines[7], *lines[4:]]) + "\n")  # its beginning
    with pytest.raises(RunError, match="belongs to another run; what differs: data"):
        train(stream_config(**{**values, "max_steps": 5}, resume_from_checkpoint="auto"))


@pytest.mark.slow
def test_killed_at_any_moment_it_is_the_run_that_was_not(stream_config: MakeConfig, tmp_path: Path) -> None:
    values = dict(max_steps=60, save_steps=7, shuffle_buffer_size=13, save_total_limit=2, val_set_size=6, eval_steps=9)
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    train(stream_config(**values, output_dir=str(whole)))
    file = tmp_path / "killed.yml"
    file.write_text(stream_config(**values, output_dir=str(folder), resume_from_checkpoint="auto").to_yaml())
    kills = 0
    for wanted in (1, 3, 5):
        code = "import sys, luthier; luthier.run(luthier.Config.load(sys.argv[1]))"
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(file)], stderr=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            found = checkpoint.list_checkpoints(folder)
            if found and checkpoint.step_of(found[-1]) >= 7 * wanted:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
            time.sleep(0.01)
        _, said = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), said.decode()
    assert kills >= 2
    train(Config.load(file))
    assert rows_of(folder) == rows_of(whole)
    assert same_weights(folder, whole)


def test_a_config_that_was_written_is_read_again(stream_config: MakeConfig, tmp_path: Path) -> None:
    config = stream_config(val_set_size=3)
    assert config.evaluation.eval_steps == 0.1  # no epochs to go by
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert Config.load(tmp_path / "config.yaml").flat() == config.flat()


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["documents", "packed"])
def test_two_processes_make_the_run_of_one_and_go_on_as_one(
    stream_config: MakeConfig, rows_file: Path, tmp_path: Path, packed: bool
) -> None:
    """And one goes on from where two stopped, in the middle of a block."""
    values = dict(
        shuffle_buffer_size=13, val_set_size=3, eval_steps=8, save_steps=5, lr_scheduler="constant", max_steps=16
    )
    values |= {"sample_packing": True, "sequence_len": 128} if packed else {}
    # Gradients near zero count for little: else adding up in another order is soon another run, where packed
    # rows make few and large steps.
    values["adam_epsilon"] = 1e-3
    one, two = tmp_path / "one", tmp_path / "two"
    train(stream_config(**values, gradient_accumulation_steps=2, output_dir=str(one)))
    file = tmp_path / "two.yml"
    file.write_text(stream_config(**values, gradient_accumulation_steps=1, output_dir=str(two)).to_yaml())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(__file__).with_name("in_processes.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [*launcher, str(script), "train", str(file)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    again = tmp_path / "again"
    again.mkdir()
    shutil.copytree(two / "checkpoint-5", again / "checkpoint-5")
    shutil.copy(two / "metrics.jsonl", again)
    more = {**values, "gradient_accumulation_steps": 2, "resume_from_checkpoint": "auto"}
    train(stream_config(**more, output_dir=str(again)))
    for folder in (two, again):
        assert losses(folder) == pytest.approx(losses(one), rel=1e-5)
        for row, like in zip(rows_of(folder), rows_of(one), strict=True):
            for name in ("step", "epoch", "tokens", "trained_tokens", "rows_read", "rows_left_out"):
                assert row.get(name) == like.get(name)
