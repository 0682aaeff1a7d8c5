"""DeepSpeed's ZeRO on two CPU processes: the run of one process, and checkpoints that go on anywhere."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from luthier.config import Config
from luthier.errors import ConfigError, ModelError, ProcessLost
from luthier.models.policy import Policy
from luthier.train import checkpoint, zero
from luthier.train.distributed import Processes
from luthier.train.folder import SMALLER_PASSES
from luthier.train.run import train
from tests.models.families import toy_model
from tests.train import test_distributed as distributed
from tests.train.conftest import losses
from tests.train.test_distributed import _assert_same_run, _environment, _start, _write

make = distributed.make  # the fixture: a config with 8 rows a step for one process, or two

CPU = torch.device("cpu")
THERE = importlib.util.find_spec("deepspeed") is not None


def needs_deepspeed(test: Any) -> Any:
    return pytest.mark.slow(pytest.mark.skipif(not THERE, reason="DeepSpeed is not installed")(test))


FULL: dict[str, Any] = dict(adapter=None, lora_r=None, learning_rate=3e-4)
PAIRS: dict[str, Any] = dict(rl="dpo", val_set_size=5, eval_steps=3, max_tokens_per_pass=200)
ROWS: dict[str, Any] = dict(val_set_size=3, eval_steps=4, max_tokens_per_pass=150)
# Ten steps each. Small budgets make many passes, of which two processes have different numbers.
KINDS: dict[str, dict[str, Any]] = {
    "lora": dict(ROWS, lora_dropout=0.2, save_steps=5),
    "full": dict(ROWS, **FULL, save_steps=5),
    "dpo": PAIRS,
    "full-dpo": {**PAIRS, **FULL},
}
# Stage 3 leaves parameters whole that are small, which all of a toy's are; small buckets are filled more than once.
EVERYTHING = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 20000,
        "reduce_bucket_size": 20000,
        "sub_group_size": 30000,
    },
    "gradient_clipping": "auto",
}
MORE_KINDS: dict[str, dict[str, Any]] = {
    "zero1": dict(FULL, deepspeed="zero1"),
    "offload": dict(FULL, deepspeed="zero3_offload"),
    "nf4": dict(load_in_4bit=True, gradient_checkpointing=True, deepspeed="zero2"),
    "kto": dict(rl="kto", lora_dropout=0.2, val_set_size=5, eval_steps=3, max_tokens_per_pass=200),
    "precomputed": {**PAIRS, **FULL, "precompute_ref_log_probs": True},
    "some": dict(FULL, unfrozen_parameters=["model.layers.1", "lm_head"]),
    "packed": dict(FULL, sample_packing=True, sequence_len=128, gradient_checkpointing=True),
    "plain": dict(FULL, kernels="reference", gradient_checkpointing=True),
    "saved": dict(lora_modules_to_save=["embed_tokens", "lm_head"], loraplus_lr_ratio=4, max_grad_norm=0),
    "dora": dict(peft_use_dora=True, lora_dropout=0.1),
    "samples": dict(
        FULL,
        sample_prompts=["Add 1 and 2."],
        generation_max_new_tokens=4,
        val_set_size=3,
        eval_steps=3,
        load_best_model_at_end=True,
    ),
}


def _alone(values: dict[str, Any], **more: Any) -> dict[str, Any]:
    found = {"max_steps": 10, "num_epochs": 9, "lr_scheduler": "constant", **values, **more}
    return {key: value for key, value in found.items() if key != "deepspeed"}


@pytest.fixture
def everything(tmp_path: Path) -> str:
    file = tmp_path / "everything.json"
    file.write_text(json.dumps(EVERYTHING))
    return str(file)


def _train_together(files: list[str], processes: int = 2) -> str:
    process = _start(distributed.SCRIPT, "train", *files, processes=processes)
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert "rank 1" not in said, said
    return said


def _from_the_middle(tmp_path: Path, source: str, name: str) -> None:
    shutil.copytree(tmp_path / source, tmp_path / name)
    checkpoint._remove(tmp_path / name / "checkpoint-10")


def _assert_same_checkpoint(one: Path, other: Path) -> None:
    for what in ("masters", "optimizer"):
        found, expected = (checkpoint.read_tensors(path / "checkpoint-10", what) for path in (one, other))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert float((found[name] - tensor).norm()) <= 1e-4 * float(tensor.norm()) + 1e-12, name


@needs_deepspeed
def test_stages_2_and_3_make_the_run_of_one_process(
    make: Callable[..., Config], tmp_path: Path, everything: str
) -> None:
    """LoRA and full fine-tuning, SFT and DPO; what one strategy has begun goes on under any other."""
    files = []
    for name, values in KINDS.items():
        train(make(name, 1, **_alone(values)))
        files.append(_write(make(f"{name}-zero2", 2, **_alone(values), deepspeed="zero2")))
        files.append(_write(make(f"{name}-everything", 2, **_alone(values), deepspeed=everything)))
    said = _train_together(files)
    assert said.count("ZeRO stage 3: ") == said.count("ZeRO stage 2: ") == len(KINDS)
    assert "[WARNING]" not in said and "[INFO]" not in said and "FutureWarning" not in said
    for name in KINDS:
        for how in ("zero2", "everything"):
            _assert_same_run(tmp_path / f"{name}-{how}-2", tmp_path / f"{name}-1")

    files = []
    routes = {"zero2": "everything", "everything": "fsdp", "fsdp": "zero2", "1": "everything"}
    fsdp = dict(fsdp_version=2, fsdp_config={"state_dict_type": "SHARDED_STATE_DICT"})
    keys = {"fsdp": fsdp, "everything": dict(deepspeed=everything)}
    _train_together([_write(make(f"{name}-fsdp", 2, **_alone(KINDS[name]), **fsdp)) for name in ("lora", "full")])
    for name in ("lora", "full"):
        for source, target in routes.items():
            folder = f"{name}-1" if source == "1" else f"{name}-{source}-2"
            _from_the_middle(tmp_path, folder, f"{name}-{source}-{target}-2")
            how = keys.get(target, dict(deepspeed=target))
            goes_on = make(f"{name}-{source}-{target}", 2, **_alone(KINDS[name], resume_from_checkpoint="auto"), **how)
            files.append(_write(goes_on))
    _train_together(files)
    for name in ("lora", "full"):
        for source, target in routes.items():
            _assert_same_run(tmp_path / f"{name}-{source}-{target}-2", tmp_path / f"{name}-1")
            _assert_same_checkpoint(tmp_path / f"{name}-{source}-{target}-2", tmp_path / f"{name}-1")
        for source in ("zero2", "everything"):  # two have begun, one goes on
            _from_the_middle(tmp_path, f"{name}-{source}-2", f"{name}-{source}-alone-1")
            train(make(f"{name}-{source}-alone", 1, **_alone(KINDS[name], resume_from_checkpoint="auto")))
            _assert_same_run(tmp_path / f"{name}-{source}-alone-1", tmp_path / f"{name}-1")
            _assert_same_checkpoint(tmp_path / f"{name}-{source}-alone-1", tmp_path / f"{name}-1")


@needs_deepspeed
def test_in_other_ways(make: Callable[..., Config], tmp_path: Path, everything: str) -> None:
    files = []
    for name, values in MORE_KINDS.items():
        train(make(name, 1, **_alone(values, max_steps=6)))
        how = values.get("deepspeed", everything)
        files.append(_write(make(name, 2, **_alone(values, max_steps=6), deepspeed=how)))
    _train_together(files)
    for name in MORE_KINDS:
        _assert_same_run(tmp_path / f"{name}-2", tmp_path / f"{name}-1")
    one, two = ((tmp_path / f"samples-{n}" / "samples.jsonl").read_text() for n in (1, 2))
    assert one == two and one
    # A single process, whose optimizer and weights are in the host's memory.
    single = make("single", 1, **_alone(FULL, max_steps=6), deepspeed="zero3_offload")
    _train_together([_write(single)], processes=1)
    _assert_same_run(tmp_path / "single-1", tmp_path / "offload-1")


@needs_deepspeed
def test_a_reference_that_begins_with_a_trained_adapter(
    make: Callable[..., Config], tmp_path: Path, everything: str
) -> None:
    """Its starting values are kept, in pieces, since the adapter changes something from the beginning."""
    train(make("first", 1, **_alone({}, max_steps=6, learning_rate=1e-2)))
    values = _alone(PAIRS, max_steps=6, learning_rate=3e-4, lora_model_dir=str(tmp_path / "first-1"))
    train(make("second", 1, **values))
    said = _train_together([_write(make("second", 2, **values, deepspeed=everything))])
    assert "starting values that training changes" in said
    _assert_same_run(tmp_path / "second-2", tmp_path / "second-1")


@needs_deepspeed
def test_in_16_bits_the_masters_are_fp32(make: Callable[..., Config], tmp_path: Path, everything: str) -> None:
    """The weights of full fine-tuning are in bfloat16 and DeepSpeed's masters fp32; an adapter is fp32 beside a base in
    bfloat16, to the last bit. As near to a single process as rounding lets them be."""
    files, kinds = [], {"full": dict(FULL, learning_rate=1e-3), "lora": {}}
    stages = {"zero1": "zero1", "zero2": "zero2", "zero3": everything}
    for name, values in kinds.items():
        settings = _alone(values, bf16=True, max_steps=4)
        train(make(name, 1, **settings))
        files += [_write(make(f"{name}-{n}", 2, **settings, deepspeed=how)) for n, how in stages.items()]
    _train_together(files)
    for name in kinds:
        start = checkpoint.read_masters(tmp_path / f"{name}-1" / "checkpoint-4")
        for stage in stages:
            folder = tmp_path / f"{name}-{stage}-2"
            np.testing.assert_allclose(losses(folder), losses(tmp_path / f"{name}-1"), rtol=2e-3)
            masters = checkpoint.read_masters(folder / "checkpoint-4")
            assert {tensor.dtype for tensor in masters.values()} == {torch.float32}
            # no rounded copies: steps of 1e-3 are lost in bfloat16's 8 bits
            assert any((tensor != tensor.bfloat16().float()).any() for tensor in masters.values())
            assert masters.keys() == start.keys()
    weights = load_file(tmp_path / "full-zero3-2" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


@needs_deepspeed
def test_a_process_that_is_killed_ends_all_and_the_run_goes_on(make: Callable[..., Config], tmp_path: Path) -> None:
    values = _alone(KINDS["full"], max_steps=4000, num_epochs=1000, save_total_limit=1)
    config = make("killed", 2, **values, deepspeed="zero3")
    folder = Path(config.output.output_dir)
    process = subprocess.Popen(
        [sys.executable, "-m", "luthier", "train", _write(config), "--num-processes", "2"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
            if checkpoint.list_checkpoints(folder):
                break
        os.kill(_ranks(process.pid)["1"], signal.SIGKILL)
        began = time.monotonic()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode and time.monotonic() - began < 15
    (message,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert message.startswith("error: rank 1 (process ") and "was killed by SIGKILL" in message

    last = checkpoint.latest(folder)
    assert last is not None
    steps = checkpoint.step_of(last) + 3
    settings = _alone(values, max_steps=steps, resume_from_checkpoint="auto", save_total_limit=None)
    _train_together([_write(make("killed", 2, **settings, deepspeed="zero3"))])
    train(make("whole", 1, **_alone(KINDS["full"], max_steps=steps, num_epochs=1000)))
    np.testing.assert_allclose(losses(folder), losses(tmp_path / "whole-1"), rtol=1e-4)


def _ranks(launcher: int) -> dict[str, int]:
    """Processes of the run below a launcher, by rank."""
    found, below = {}, [launcher]
    while below:
        parent = below.pop()
        for task in Path(f"/proc/{parent}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                below.append(child)
                if rank := _environment(str(child)).get("RANK"):
                    found.setdefault(rank, child)
    return found


@needs_deepspeed
def test_out_of_memory_on_one_ends_all_with_the_budget_to_go_on_with(
    make: Callable[..., Config], tmp_path: Path
) -> None:
    values = _alone(FULL, max_tokens_per_pass=400, resume_from_checkpoint="auto", share_prefixes="off")
    process = _start(distributed.SCRIPT, "full", "1", "200", _write(make("oom", 2, **values, deepspeed="zero3")))
    began = time.monotonic()
    _, said = process.communicate(timeout=240)
    assert process.returncode and time.monotonic() - began < 120
    found = {line for line in said.splitlines() if line.startswith("error: ") and "has ended" not in line}
    assert len(found) == 1, said
    (message,) = found
    tokens = int(message.split("in a pass of ")[1].split()[0])
    assert "on rank 1" in message and f"goes on in passes of up to {tokens // 2} tokens" in message
    noted = json.loads((tmp_path / "oom-2" / SMALLER_PASSES).read_text())
    assert noted["tokens_per_pass"] == tokens // 2


@needs_deepspeed
def test_every_family_computes_what_it_did_before() -> None:
    process = _start(str(Path(__file__).with_name("zero_families.py")))
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said


# --- what needs no DeepSpeed ------------------------------------------------------------------------------------


def _config(**keys: Any) -> Config:
    return Config.from_flat({"base_model": "x", "datasets": [{"path": "x", "type": "alpaca"}], **keys})


def test_what_it_cannot_do_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    zero.check(_config(), CPU, torch.float16, given=True)  # nobody asks for it
    two = _config(deepspeed="zero2")
    monkeypatch.setattr(zero.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'luthier\[deepspeed\]'"):
        zero.check(two, CPU, torch.float32, given=False)
    monkeypatch.setattr(zero.importlib.util, "find_spec", lambda name: object())
    zero.check(two, CPU, torch.bfloat16, given=False)
    with pytest.raises(ConfigError, match="belongs to a program"):
        zero.check(two, CPU, torch.float32, given=True)
    with pytest.raises(ConfigError, match="the device is mps"):
        zero.check(two, torch.device("mps"), torch.float32, given=False)
    with pytest.raises(ConfigError, match="computes in fp16"):
        zero.check(two, CPU, torch.float16, given=False)


def test_settings_are_those_of_the_yaml() -> None:
    settings = zero._settings(_config(deepspeed="zero3_offload", max_grad_norm=0.5), torch.bfloat16)
    assert settings["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert settings["gradient_clipping"] == 0.5 and settings["bf16"] == {"enabled": True}
    assert settings["communication_data_type"] == "fp32"  # gradients are added up in fp32, as everywhere
    assert "bf16" not in zero._settings(_config(deepspeed="zero2"), torch.float32)
    # An adapter is in fp32, and the base stays as it is stored.
    assert "bf16" not in zero._settings(_config(deepspeed="zero2", adapter="lora"), torch.bfloat16)


@pytest.mark.parametrize(
    ("deepspeed", "several", "shared"),
    [("zero2", True, False), ("zero3", True, True), ("zero3", False, False), ("zero3_offload", False, True)],
)
def test_who_holds_the_whole_model(deepspeed: str, several: bool, shared: bool) -> None:
    assert zero.shares_weights(_config(deepspeed=deepspeed), several=several) is shared
    assert not zero.shares_weights(_config(), several=several)


def test_a_layer_whose_gradients_stage_3_would_send_away_too_early_is_an_error() -> None:
    policy = Policy(toy_model("llama"))
    zero._gather_by_layers(policy)
    layer, hidden = policy.model.model.layers[0], torch.zeros(1, 2, policy.model.config.hidden_size)
    layer.forward = lambda hidden_states: hidden_states
    layer.train()
    assert layer._z3_leaf and layer(hidden.requires_grad_()) is hidden
    for call in (lambda: layer(hidden.detach()), lambda: layer(hidden_states=hidden)):
        with pytest.raises(ModelError, match=r"when the gradients of a \w+Layer are complete.*zero2"):
            call()
        with torch.no_grad():
            call()
    ids = torch.tensor([[1, 2]])
    embeddings = policy.model.get_input_embeddings()
    embeddings.weight.requires_grad_(False)
    assert embeddings(ids).requires_grad
    with torch.no_grad():
        assert not embeddings(ids).requires_grad


def test_models_that_stage_3_cannot_take_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="run one by one: write `deepspeed: zero2`"):
        zero._gather_by_layers(Policy(toy_model("llama"), flat=False))
    policy = Policy(toy_model("llama"))
    monkeypatch.setattr(zero, "layers_of", lambda decoder: [decoder])
    with pytest.raises(ModelError, match="not in one list: write `deepspeed: zero2`"):
        zero._gather_by_layers(policy)


@pytest.mark.parametrize("numbers", [8, 7, 3])
def test_pieces_of_a_tensor_make_it_up_again(numbers: int) -> None:
    whole = torch.arange(1.0, numbers + 1)
    parameter = SimpleNamespace(ds_tensor=torch.empty(-(-numbers // 3)))
    pieces = [
        zero.Zero._piece(SimpleNamespace(processes=Processes(rank, 3)), parameter, whole.view(1, -1))  # type: ignore[arg-type]
        for rank in range(3)
    ]
    assert torch.equal(torch.cat(pieces)[:numbers], whole) and not torch.cat(pieces)[numbers:].any()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/pytorch/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"), True),
        (torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0."), True),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False),
    ],
)
def test_what_another_engine_says_of_a_process_that_is_gone(error: RuntimeError, lost: bool) -> None:
    with pytest.raises(ProcessLost if lost else RuntimeError), Processes(0, 2).lost_ones_named():
        raise error
    with pytest.raises(RuntimeError), Processes().lost_ones_named():
        raise error


def test_counts_that_differ_become_one(caplog: pytest.LogCaptureFixture) -> None:
    """As of experts that some steps have not met; DeepSpeed counts for all weights together."""
    pieces = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    optimizer = torch.optim.AdamW(pieces)
    engine: Any = SimpleNamespace(optimizer=optimizer, stage=3, _pieces=lambda: iter(pieces), _link_state=lambda: None)
    zero.Zero._begin_state(engine, {"step": torch.tensor([4.0, 6.0])}, {"exp_avg"})
    for piece in pieces:
        state = optimizer.state[piece]
        assert state["step"] == 6 and torch.equal(state["exp_avg"], torch.zeros_like(piece))
    assert "step is 6 for all weights from now on, and was less for some" in caplog.text
