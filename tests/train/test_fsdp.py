"""FSDP2 on two and four CPU processes: the run of one process, and checkpoints that go on anywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.config import Config
from luthier.errors import ConfigError
from luthier.train import checkpoint, spread
from luthier.train.distributed import Processes
from luthier.train.folder import SMALLER_PASSES
from luthier.train.run import train
from tests.models.families import toy_config
from tests.train import test_distributed as distributed
from tests.train.conftest import losses
from tests.train.test_distributed import _assert_same_run, _start, _write

make = distributed.make  # the fixture: a config with 8 rows a step for one process, or two, or four

FULL: dict[str, Any] = dict(adapter=None, lora_r=None, learning_rate=3e-4)
PAIRS: dict[str, Any] = dict(rl="dpo", val_set_size=5, eval_steps=3)
# Ten steps each. Small budgets make many passes, of which two processes have different numbers.
KINDS: dict[str, dict[str, Any]] = {
    "lora": dict(lora_dropout=0.2, val_set_size=3, eval_steps=4, save_steps=5, max_tokens_per_pass=150),
    "full": dict(
        FULL,
        val_set_size=3,
        eval_steps=4,
        save_steps=5,
        max_tokens_per_pass=150,
        fsdp_config={"fsdp_state_dict_type": "SHARDED_STATE_DICT"},
    ),
    "dpo": dict(PAIRS, max_tokens_per_pass=200),
    "full-dpo": dict(FULL, **PAIRS, max_tokens_per_pass=200),
}
MORE_KINDS: dict[str, dict[str, Any]] = {
    "nf4": dict(load_in_4bit=True, gradient_checkpointing=True),
    "kto": dict(rl="kto", lora_dropout=0.2, val_set_size=5, eval_steps=3, max_tokens_per_pass=200),
    "precomputed": dict(FULL, **PAIRS, precompute_ref_log_probs=True),
    "some": dict(FULL, unfrozen_parameters=["model.layers.1", "lm_head"]),
    "kept": dict(FULL, fsdp_config={"reshard_after_forward": False, "activation_checkpointing": True}),
    "saved": dict(lora_modules_to_save=["embed_tokens", "lm_head"]),
    "free": dict(FULL, optimizer="schedule_free_adamw", lr_scheduler="constant"),
    "samples": dict(FULL, sample_prompts=["Add 1 and 2."], generation_max_new_tokens=4, val_set_size=3, eval_steps=3),
}


def _settings(values: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"max_steps": 10, "num_epochs": 9, "lr_scheduler": "constant", **values, **more}


def _alone(values: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {key: value for key, value in _settings(values, **more).items() if key != "fsdp_config"}


def _sharded(make: Callable[..., Config], name: str, processes: int, values: dict[str, Any], **more: Any) -> Config:
    return make(name, processes, **_settings(values, fsdp_version=2, **more))


def test_shared_weights_make_the_run_of_whole_ones(make: Callable[..., Config], tmp_path: Path) -> None:
    """LoRA and full fine-tuning, SFT and DPO; each begun by two processes gone on with by one, and back."""
    files = []
    for name, values in KINDS.items():
        train(make(name, 1, **_alone(values)))
        files.append(_write(_sharded(make, name, 2, values)))
    # One process has begun, two go on.
    for name in ("lora", "full"):
        shutil.copytree(tmp_path / f"{name}-1", tmp_path / f"{name}-joined-2")
        checkpoint._remove(tmp_path / f"{name}-joined-2" / "checkpoint-10")
        goes_on = _sharded(make, f"{name}-joined", 2, KINDS[name], resume_from_checkpoint="auto")
        files.append(_write(goes_on))
    process = _start(distributed.SCRIPT, "train", *files)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert said.count("FSDP2: ") == len(files)
    assert "rank 1" not in said, said
    for name in KINDS:
        _assert_same_run(tmp_path / f"{name}-2", tmp_path / f"{name}-1")
    # Two have begun, one goes on, in all from the middle.
    for name in ("lora", "full"):
        _assert_same_run(tmp_path / f"{name}-joined-2", tmp_path / f"{name}-1")
        shutil.copytree(tmp_path / f"{name}-2", tmp_path / f"{name}-alone-1")
        checkpoint._remove(tmp_path / f"{name}-alone-1" / "checkpoint-10")
        train(make(f"{name}-alone", 1, **_alone(KINDS[name], resume_from_checkpoint="auto")))
        _assert_same_run(tmp_path / f"{name}-alone-1", tmp_path / f"{name}-1")
    parts = sorted(path.name for path in (tmp_path / "full-2" / "checkpoint-5").glob("masters*"))
    assert parts == ["masters-00001-of-00002.safetensors", "masters-00002-of-00002.safetensors"]


@pytest.mark.slow
def test_shared_weights_in_other_ways(make: Callable[..., Config], tmp_path: Path) -> None:
    files = []
    for name, values in MORE_KINDS.items():
        train(make(name, 1, **_alone(values)))
        files.append(_write(_sharded(make, name, 2, values)))
    process = _start(distributed.SCRIPT, "train", *files)
    _, said = process.communicate(timeout=400)
    assert process.returncode == 0, said
    for name in MORE_KINDS:
        _assert_same_run(tmp_path / f"{name}-2", tmp_path / f"{name}-1")
    one, two = ((tmp_path / f"samples-{n}" / "samples.jsonl").read_text() for n in (1, 2))
    assert one == two and one


@pytest.mark.slow
def test_hybrid_sharding_on_four(make: Callable[..., Config], tmp_path: Path) -> None:
    """Two copies of the model, each spread over two processes; and one copy over four."""
    files = []
    for name in ("lora", "full"):
        train(make(name, 1, **_alone(KINDS[name])))
        files.append(_write(_sharded(make, name, 4, KINDS[name])))
        hybrid = dict(KINDS[name], dp_shard_size=2, dp_replicate_size=2)
        files.append(_write(_sharded(make, f"{name}-hybrid", 4, hybrid)))
    process = _start(distributed.SCRIPT, "train", *files, processes=4)
    _, said = process.communicate(timeout=400)
    assert process.returncode == 0, said
    for name in ("lora", "full"):
        for kind in (name, f"{name}-hybrid"):
            _assert_same_run(tmp_path / f"{kind}-4", tmp_path / f"{name}-1")
    assert "2 copies of 2 processes each" in said


@pytest.mark.slow
def test_in_16_bits_shares_are_fp32(make: Callable[..., Config], tmp_path: Path) -> None:
    """Layers compute in bfloat16, the masters are what a single process has: as near as rounding lets them be."""
    values = _settings(FULL, bf16=True, max_steps=4)
    train(make("narrow", 1, **values))
    process = _start(distributed.SCRIPT, "train", _write(make("narrow", 2, **values, fsdp_version=2)))
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    np.testing.assert_allclose(losses(tmp_path / "narrow-2"), losses(tmp_path / "narrow-1"), rtol=2e-3)
    masters = checkpoint.read_masters(tmp_path / "narrow-2" / "checkpoint-4")
    assert {str(tensor.dtype) for tensor in masters.values()} == {"torch.float32"}
    config = json.loads((tmp_path / "narrow-2" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


@pytest.mark.slow
def test_out_of_memory_in_the_middle_of_a_pass_of_all(make: Callable[..., Config], tmp_path: Path) -> None:
    """The process whose memory it is says so, leaves what the run goes on with, and ends; the others wait in vain."""
    config = _sharded(make, "full", 2, FULL, max_tokens_per_pass=400, share_prefixes="off", saves_per_epoch=0)
    config = config.replace("a test", resume_from_checkpoint="auto")
    process = _start(distributed.SCRIPT, "full", "1", "200", _write(config))
    _, said = process.communicate(timeout=240)
    assert process.returncode, said
    smaller = json.loads((tmp_path / "full-2" / SMALLER_PASSES).read_text())["tokens_per_pass"]
    assert smaller < 200
    assert f"on rank 1 in a pass of {2 * smaller}" in said or f"on rank 1 in a pass of {2 * smaller + 1}" in said
    process = _start(distributed.SCRIPT, "full", "1", "200", _write(config))
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert f"passes of up to {smaller} tokens" in said


@pytest.mark.slow
def test_every_family_computes_what_it_did_before() -> None:
    process = _start(str(Path(__file__).with_name("fsdp_families.py")))
    _, said = process.communicate(timeout=400)
    assert process.returncode == 0, said


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dp_shard_size": 4}, "dp_shard_size 4 has to be the number of processes, which is 2"),
        ({"dp_replicate_size": 3}, "dp_replicate_size 3 x dp_shard_size unset has to be"),
    ],
)
def test_copies_and_shares_have_to_be_the_processes(keys: dict[str, int], message: str) -> None:
    values = {"base_model": "x", "datasets": [{"path": "x"}], "fsdp_version": 2}
    with pytest.raises(ConfigError, match=message):
        Processes(0, 2).check(Config.from_flat({**values, **keys}))


def test_layers_that_are_named_have_to_be_the_models() -> None:
    with pytest.raises(ConfigError, match=r"MistralDecoderLayer, but this model's layers are LlamaDecoderLayer"):
        spread.check_layers(["MistralDecoderLayer"], spread.layer_classes(toy_config("llama")))
    spread.check_layers(["LlamaDecoderLayer"], spread.layer_classes(toy_config("llama")))
    spread.check_layers(["Own"], spread.layer_classes(object()))  # nobody knows
