"""Several processes on one run: the same run as one process makes, to the rounding of sums; and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from luthier.config import Config
from luthier.data.dataset import Document
from luthier.data.loader import StepLoader
from luthier.data.packing import split_evenly
from luthier.errors import ConfigError, RunError
from luthier.train import checkpoint, distributed
from luthier.train.checkpoint import State
from luthier.train.distributed import Processes
from luthier.train.folder import SMALLER_PASSES
from luthier.train.passes import remember_smaller, take_over_smaller
from luthier.train.run import train
from tests.train.conftest import losses

MakeConfig = Callable[..., Config]
ROOT = Path(__file__).parents[2]
SCRIPT = str(Path(__file__).with_name("in_processes.py"))
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def _start(*arguments: str, processes: int = 2) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*LAUNCHER, str(processes), *arguments], stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )


def _write(config: Config) -> str:
    """The file of a config, beside its run folder."""
    path = Path(f"{config.output.output_dir}.yml")
    path.write_text(config.to_yaml())
    return str(path)


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _assert_same_run(one: Path, other: Path) -> None:
    """Figures and final weights within 1e-5 of each other, relatively; counts equal."""
    assert len(losses(one)) >= 6
    np.testing.assert_allclose(losses(one), losses(other), rtol=1e-5)
    for row, like in zip(_rows(one), _rows(other), strict=True):
        for name in ("step", "tokens", "trained_tokens", "learning_rate"):
            assert row.get(name) == like.get(name)
        assert {name for name in row if "/" in name} == {name for name in like if "/" in name}
        for name in {"grad_norm", "eval_loss", *(name for name in like if "logps/" in name)} & like.keys():
            assert row[name] == pytest.approx(like[name], rel=1e-5)
        # a label that is hit by a hair's breadth may be missed after rounding
        for name in {"token_accuracy", "eval_token_accuracy"} & like.keys():
            assert row[name] == pytest.approx(like[name], abs=2e-3)
    weights, expected = (_final_weights(folder) for folder in (one, other))
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        # Of the whole tensor: Adam makes full steps of the sign of a gradient that is hardly more than rounding.
        assert float((tensor - expected[name]).norm() / expected[name].norm()) < 1e-5, name


def _final_weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = [*folder.glob("adapter_model.safetensors"), *folder.glob("model.safetensors")]
    return load_file(file)


KINDS: dict[str, dict[str, Any]] = {
    # Of 57 documents in steps of 8, the last step of an epoch has 1, and nothing for one of two processes.
    "lora": dict(
        lora_dropout=0.2,
        val_set_size=3,
        eval_steps=4,
        save_steps=4,
        max_steps=8,
        num_epochs=2,
        lr_scheduler="constant",
    ),
    "shared": dict(
        max_tokens_per_pass=300,
        train_on_inputs=True,
        sample_prompts=["Add 1 and 2."],
        generation_max_new_tokens=4,
        eval_steps=3,
        general_eval=True,
    ),
    "packed": dict(adapter=None, lora_r=None, sample_packing=True, sequence_len=128, num_epochs=9),
    "ranks": dict(lora_rank_budget=9000, peft_init_lora_weights="eva"),
    "kto": dict(rl="kto", lora_dropout=0.2, val_set_size=5, eval_steps=3, max_tokens_per_pass=200),
}
MORE_KINDS: dict[str, dict[str, Any]] = {
    "schedule_free": dict(optimizer="schedule_free_adamw", lr_scheduler="constant"),
    "tracked": dict(report_to="tensorboard"),
    "dpo": dict(rl="dpo", adapter=None, lora_r=None, precompute_ref_log_probs=True, val_set_size=5, eval_steps=3),
    "nf4": dict(load_in_4bit=True, gradient_checkpointing=True),
    "alone": dict(sample_packing=True, sequence_len=256, peft_use_dora=True, lora_dropout=0.1, num_epochs=9),
}


@pytest.fixture
def make(run_config: MakeConfig, tmp_path: Path, pairs_file: Path) -> Callable[..., Config]:
    """A config with 8 rows a step for one process (2 x 4) or two (2 x 2)."""

    def made(name: str, processes: int, **values: Any) -> Config:
        defaults = dict(
            micro_batch_size=2,
            gradient_accumulation_steps=4 // processes,
            # small, so that rounding does not grow over the steps: see test_equivalence.py
            learning_rate=1e-3,
            max_steps=6,
            output_dir=str(tmp_path / f"{name}-{processes}"),
        )
        if "rl" in values:
            defaults["datasets"] = [{"path": str(pairs_file)}]
        return run_config(**{**defaults, **values})

    return made


def test_two_processes_make_the_run_of_one(make: Callable[..., Config], tmp_path: Path) -> None:
    """LoRA with dropout, shared prefixes, full fine-tuning of packed rows, ranks by layer; begun by one and gone on
    with by two, and the other way round; resumed by two to the last bit."""
    files = []
    for name, values in KINDS.items():
        train(make(name, 1, **values))
        files.append(_write(make(name, 2, **values)))
    goes_on = dict(KINDS["lora"], resume_from_checkpoint="auto")
    # One process has begun, two go on.
    shutil.copytree(tmp_path / "lora-1", tmp_path / "one-two-2")
    checkpoint._remove(tmp_path / "one-two-2" / "checkpoint-8")
    files.append(_write(make("one-two", 2, **goes_on)))
    # Two end behind step 4, and go on.
    files.append(_write(make("again", 2, **{**KINDS["lora"], "max_steps": 4})))
    later = tmp_path / "later.yml"
    later.write_text(make("again", 2, **goes_on).to_yaml())
    files.append(str(later))

    process = _start(SCRIPT, "runs", *files)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "micro_batch_size 2 x gradient_accumulation_steps 2 x 2 processes" in said
    assert said.count("trainable parameters:") == len(files), "only the first process logs"
    assert "rank 1" not in said, said

    for name in KINDS:
        _assert_same_run(tmp_path / f"{name}-2", tmp_path / f"{name}-1")
    _assert_same_run(tmp_path / "one-two-2", tmp_path / "lora-1")
    assert losses(tmp_path / "again-2") == losses(tmp_path / "lora-2")
    masters = {
        (name, rank): load_file(tmp_path / f"{name}-2" / f"masters-{rank}.safetensors")
        for name in (*KINDS, "one-two", "again")
        for rank in (0, 1)
    }
    for name, rank in masters:
        for other in [(name, 0), *([("lora", 0)] if name == "again" else [])]:
            assert all(torch.equal(masters[name, rank][n], masters[other][n]) for n in masters[other])
    row = [row for row in _rows(tmp_path / "shared-2") if "tokens" in row][-1]
    assert row["computed_tokens"] < row["tokens"]
    one, two = ((tmp_path / f"shared-{n}" / "samples.jsonl").read_text() for n in (1, 2))
    assert one == two and len(one.splitlines()) == 2
    found = [json.loads((tmp_path / f"shared-{n}" / "evaluation" / "general.json").read_text()) for n in (1, 2)]
    for side in ("compare", "target"):
        one, two = (result["figures"]["all"][side]["loss"]["value"] for result in found)
        assert one == pytest.approx(two, abs=1e-5)
    state, _ = checkpoint.read_state(tmp_path / "lora-2" / "checkpoint-8")
    assert state.documents == 57

    # Two have begun, one goes on; and a product that is another one is refused.
    shutil.copytree(tmp_path / "lora-2", tmp_path / "two-one-1")
    checkpoint._remove(tmp_path / "two-one-1" / "checkpoint-8")
    with pytest.raises(RunError, match=r"rows_per_step was 8 .* processes \(1\) is 4 now.* product is 8 again"):
        train(make("two-one", 1, **goes_on, gradient_accumulation_steps=2))
    train(make("two-one", 1, **goes_on))
    _assert_same_run(tmp_path / "two-one-1", tmp_path / "lora-1")


@pytest.mark.slow
def test_two_processes_make_the_run_of_one_in_other_ways(make: Callable[..., Config], tmp_path: Path) -> None:
    files = []
    for name, values in MORE_KINDS.items():
        train(make(name, 1, **values))
        files.append(_write(make(name, 2, **values)))
    process = _start(SCRIPT, "runs", *files)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    for name in MORE_KINDS:
        _assert_same_run(tmp_path / f"{name}-2", tmp_path / f"{name}-1")
    one, other = (list((tmp_path / f"tracked-{n}" / "trackers").rglob("events.*")) for n in (1, 2))
    assert len(one) == len(other) > 0


@pytest.mark.slow
def test_out_of_memory_on_one_ends_all_and_the_run_goes_on_with_half_until_a_signal(
    make: Callable[..., Config], tmp_path: Path
) -> None:
    config = make("full", 2, max_tokens_per_pass=400, max_steps=4000, num_epochs=1000, lr_scheduler="constant")
    config = config.replace("a test", saves_per_epoch=0, resume_from_checkpoint="auto", share_prefixes="off")
    folder = Path(config.output.output_dir)
    file = _write(config)

    process = _start(SCRIPT, "full", "1", "200", file)
    said = ""
    assert process.stderr is not None
    for line in process.stderr:
        said += line
        if "error: out of memory" in line:
            began = time.monotonic()
            said += process.communicate(timeout=60)[1]
            assert time.monotonic() - began < 10
            break
    process.wait(timeout=60)
    assert process.returncode not in (0, None), said
    # Whoever is not ended before it comes to it says the same, all but the first with their rank.
    lines = [line.replace("error: rank 1: ", "error: ") for line in said.splitlines()]
    (message,) = {line for line in lines if "out of memory" in line and "Root Cause" not in line}
    tokens = int(message.split("in a pass of ")[1].split()[0])
    assert message.startswith("error: out of memory at step 1 on rank 1 in a pass of")
    assert 200 < tokens <= 400
    assert f"goes on in passes of up to {tokens // 2} tokens" in message
    assert json.loads((folder / SMALLER_PASSES).read_text())["tokens_per_pass"] == tokens // 2

    process = _start("-m", "luthier", "train", file)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        if (folder / "metrics.jsonl").exists() and len(losses(folder)) >= 3:
            break
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert f"passes of up to {tokens // 2} tokens" in said, said
    assert said.count("stopped by SIGTERM after step") == 1, said
    (saved,) = checkpoint.list_checkpoints(folder)
    state, _ = checkpoint.read_state(saved)
    assert f"after step {state.step} of 4000" in said
    assert not checkpoint.damage(saved) and state.tokens_per_pass == tokens // 2
    assert state.step == len(losses(folder))


@pytest.mark.slow
def test_one_document_recomputes_on_its_process_and_ends_all_where_that_does_not_help(
    make: Callable[..., Config], tmp_path: Path
) -> None:
    config = make("one", 2, max_tokens_per_pass=1)
    process = _start(SCRIPT, "full", "1", "20", _write(config))
    _, said = process.communicate(timeout=120)
    assert process.returncode
    warnings = [line for line in said.splitlines() if line.startswith("warning: rank 1: out of memory in one document")]
    assert warnings and "keep their input only" in warnings[-1], said
    (message,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert message.startswith("error: out of memory at step 1 on rank 1 in a pass of")
    assert "it is one document, so that no cut helps" in message
    assert not (tmp_path / "one-2" / SMALLER_PASSES).exists()


@pytest.mark.slow
def test_a_process_that_is_killed_ends_all_in_seconds(make: Callable[..., Config], tmp_path: Path) -> None:
    config = make("killed", 2, max_steps=4000, num_epochs=1000, lr_scheduler="constant", save_steps=5)
    folder = Path(config.output.output_dir)
    process = _start("-m", "luthier", "train", _write(config))
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        if checkpoint.list_checkpoints(folder):
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {_environment(child)["RANK"]: int(child) for child in children}
    os.kill(ranks["1"], signal.SIGKILL)
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode and time.monotonic() - began < 15
    assert said.count("error: another of the 2 processes has ended or cannot be reached") == 1, said
    assert checkpoint.latest(folder)


def _environment(process: str) -> dict[str, str]:
    pairs = Path(f"/proc/{process}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


class _Dataset:
    """Documents of given lengths, all of them trained; they begin alike for their first 20 tokens."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = self.trained = np.array(lengths)
        self.prompts = self.chosen = np.zeros_like(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Document:
        ids = np.r_[np.arange(20), np.full(int(self.lengths[index]) - 20, index)].astype(np.int32)
        return Document(ids, ids)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"share": True}, {"alone": True}, {"packed_len": 300}], ids=lambda o: "".join(o) or "plain"
)
def test_the_shares_of_a_step_are_the_step_and_all_know_how_many_passes_there_are(
    processes: int, options: dict[str, Any]
) -> None:
    lengths = [20 + n * 37 % 211 for n in range(40)]
    loaders = [
        StepLoader(
            _Dataset(lengths),  # type: ignore[arg-type]
            rows_per_step=9,
            tokens_per_pass=250,
            seed=1,
            shuffle=True,
            rank=rank,
            processes=processes,
            **options,
        )
        for rank in range(processes)
    ]
    for index in range(loaders[0].steps_per_epoch):
        steps = [loader.step(index) for loader in loaders]
        assert len({(step.rows, step.tokens, step.trained_tokens) for step in steps}) == 1
        own = [[row for indices in step.passes for row in indices] for step in steps]
        assert sorted(row for rows in own for row in rows) == list(range(len(steps[0].rows)))
        (agreed,) = {loader.passes_agreed(step) for loader, step in zip(loaders, steps, strict=True)}
        assert agreed == max(len(step.passes) for step in steps)
        if len(steps[0].rows) >= processes:
            loads = [sum(lengths[steps[0].rows[row]] for row in rows) for rows in own]
            assert min(loads) > 0 and max(loads) - min(loads) <= max(lengths)


def test_shares_are_even() -> None:
    assert split_evenly([5, 3, 3, 2, 2, 1], 2) == [[0, 3, 5], [1, 2, 4]]
    assert split_evenly([7, 1], 3) == [[0], [1], []]
    assert split_evenly(np.array([4, 9]), 1) == [[0, 1]]


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "the environment lacks MASTER_ADDR, MASTER_PORT: .*torchrun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "RANK is 2 and WORLD_SIZE 2: ranks go from 0 to 1",
        ),
    ],
)
def test_an_environment_that_is_not_whole(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], says: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert Processes.of_environment().size == 1
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=says):
        Processes.of_environment()


def test_what_several_processes_cannot_do_is_refused(run_config: MakeConfig) -> None:
    two = Processes(1, 2, 1)
    for values, says in [
        (dict(adapter=None, lora_r=None, optimizer_in_backward=True, max_grad_norm=0), "optimizer_in_backward"),
        (dict(device_map="cuda:0"), "device_map: cuda:0 would be the device of all 2"),
    ]:
        config = run_config(**{"gradient_accumulation_steps": 1, **values})
        Processes().check(config)
        with pytest.raises(ConfigError, match=says):
            two.check(config)
    two.check(run_config(device_map="cpu"))
    assert two.take_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ConfigError, match="mps computes in one process only"):
        two.take_device(torch.device("mps"))


def test_a_weight_without_a_gradient_anywhere_stays_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an expert that no token of a step has met; one that was met by the other process gets that gradient."""
    own, others, nobodys = (torch.zeros(2, requires_grad=True) for _ in range(3))
    own.grad, loss = torch.ones(2), torch.tensor(0.5)
    two, summed = Processes(0, 2), []
    answers = iter([[[0.0, 2.0, 7.0], [0.0, 2.0, 8.0]], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    monkeypatch.setattr(two, "gather", lambda values: next(answers))
    monkeypatch.setattr(two, "_sum", summed.extend)
    assert two.add_up([own, others, nobodys], [loss], [7.0]) == [[7.0], [8.0]]
    assert nobodys.grad is None and others.grad is not None and not others.grad.any()
    assert [id(tensor) for tensor in summed] == [id(own.grad), id(others.grad), id(loss)]


def test_gradients_travel_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_BUCKET_BYTES", 40)
    tensors = [torch.zeros(n) for n in (4, 5, 2, 30, 1, 9)]
    assert [[len(t) for t in bucket] for bucket in distributed._buckets(tensors)] == [[4, 5], [2], [30], [1, 9]]


def test_smaller_passes_hold_for_what_they_were_noted_for(
    run_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = run_config(max_tokens_per_pass=400, resume_from_checkpoint="auto")
    remember_smaller(tmp_path, 150, config)

    def after(state: State, config: Config = config) -> tuple[int, int | str | None]:
        take_over_smaller(tmp_path, state, config, Processes())
        return state.tokens_per_pass, state.tokens_asked

    assert after(State()) == (150, 400)
    assert after(State(step=2, tokens_per_pass=300, tokens_asked=400)) == (150, 400)
    assert after(State(step=2, tokens_per_pass=100, tokens_asked=400)) == (100, 400)
    assert after(State(step=2, tokens_per_pass=100, tokens_asked="auto")) == (150, 400)
    # asked for something else since, begun anew, or unreadable
    other = run_config(max_tokens_per_pass=500, resume_from_checkpoint="auto")
    assert after(State(step=2, tokens_per_pass=300, tokens_asked=400), other) == (300, 400)
    assert after(State(), run_config(max_tokens_per_pass=400)) == (0, None)
    (tmp_path / SMALLER_PASSES).write_text("{")
    assert after(State()) == (0, None) and "is passed over" in caplog.text
