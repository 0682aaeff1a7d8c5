"""Adapters that begin in a way of their own, in whole runs: what is trained, what is saved, and going on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from luthier.config import Config
from luthier.data.tokenizer import load_tokenizer
from luthier.errors import ConfigError, ModelError
from luthier.models import lora_init, rank_budget
from luthier.models.assemble import build_model, open_for_inference
from luthier.models.lora import lora_layers
from luthier.train.run import train
from tests.models.families import toy_model
from tests.train.conftest import losses

MakeConfig = Callable[..., Config]

STARTS: dict[str, dict[str, Any]] = {
    "dora": {"peft_use_dora": True},
    "dora, dropout": {"peft_use_dora": True, "lora_dropout": 0.2},
    "pissa": {"peft_init_lora_weights": "pissa_niter_4"},
    "budget": {"lora_rank_budget": 9000, "peft_init_lora_weights": "eva"},
    "budget, pissa, dora": {
        "lora_rank_budget": 9000,
        "peft_init_lora_weights": "pissa",
        "peft_use_dora": True,
    },
    "embeddings": {"lora_target_modules": ["embed_tokens", "v_proj"]},
}


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("start", STARTS)
def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(
    start: str, run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"lr_scheduler": "constant", "learning_rate": 3e-3, "saves_per_epoch": 0, **STARTS[start]}
    whole = train(run_config(**values, max_steps=4, output_dir=str(tmp_path / "whole"))).output_dir
    train(run_config(**values, max_steps=2, save_steps=2, output_dir=str(tmp_path / "parts")))

    def computed_again(*_: Any, **__: Any) -> Any:
        raise AssertionError("what the run began with is read from its checkpoint")

    monkeypatch.setattr(rank_budget, "_look", computed_again)
    monkeypatch.setattr(lora_init, "principal_parts", computed_again)
    parts = run_config(
        **values, max_steps=4, output_dir=str(tmp_path / "parts"), resume_from_checkpoint="auto"
    )
    train(parts)
    assert losses(tmp_path / "parts") == losses(whole)
    one, other = _adapter(tmp_path / "parts"), _adapter(whole)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_with_dora_answers_as_it_was_trained(run_config: MakeConfig, toy_llama_dir: Path) -> None:
    folder = train(run_config(peft_use_dora=True, learning_rate=1e-2)).output_dir
    merged, _, _ = open_for_inference(str(folder))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy_llama_dir), folder).eval()
    ids = torch.randint(5, 200, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_loftq_begins_nearer_to_the_full_model_and_loads_in_peft(
    run_config: MakeConfig, toy_llama_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    values = dict(load_in_4bit=True, lora_r=8, bnb_4bit_use_double_quant=False)
    config = run_config(**values, loftq_config={"loftq_bits": 4})
    assert config.adapter.peft_init_lora_weights == "loftq"
    full = AutoModelForCausalLM.from_pretrained(toy_llama_dir)
    model, _ = build_model(config, load_tokenizer(config), torch.device("cpu"), torch.float32)
    for path, layer in lora_layers(model).items():
        weight, stored = full.get_submodule(path).weight, layer.weight_in(torch.float32)
        begun = stored + layer.scale * layer.lora_B @ layer.lora_A
        assert (weight - begun).norm() < 0.9 * (weight - stored).norm()
    folder = train(config).output_dir
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(
        toy_llama_dir, quantization_config=quantised, device_map={"": "cpu"}, dtype=torch.float32
    )
    theirs = peft.PeftModel.from_pretrained(base, folder).train()  # in eval mode bitsandbytes may pack weights anew
    ours, _, _ = open_for_inference(str(folder))
    ids = torch.randint(5, 200, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_ranks_by_data_on_a_quantised_base_leave_it_as_it_is(run_config: MakeConfig) -> None:
    pytest.importorskip("bitsandbytes")
    plain, chosen = (run_config(load_in_4bit=True, **more) for more in ({}, {"lora_rank_budget": 9000}))
    (before, _), (after, _) = (
        build_model(
            config,
            load_tokenizer(config),
            torch.device("cpu"),
            torch.float32,
            documents=[torch.randint(5, 200, (60,), generator=torch.Generator().manual_seed(0))],
        )
        for config in (plain, chosen)
    )
    for path, layer in lora_layers(after).items():
        expected = lora_layers(before)[path].weight_in(torch.float32)
        assert torch.equal(layer.weight_in(torch.float32), expected)
    assert len({layer.r for layer in lora_layers(after).values()}) > 1


def test_a_run_trains_experts(run_config: MakeConfig, toy_llama_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy_llama_dir)
    model = toy_model("qwen3_moe", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    values = dict(
        base_model=str(tmp_path / "moe"),
        lora_target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        gradient_checkpointing=True,
    )
    folder = train(run_config(**values)).output_dir
    assert losses(folder)[-1] < losses(folder)[0]
    found = _adapter(folder)
    assert len(found) == 8 and all(tensor.abs().max() > 0 for tensor in found.values())
    ids = torch.randint(5, 200, (1, 20), generator=torch.Generator().manual_seed(0))
    ours, _, _ = open_for_inference(str(folder))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "moe"), folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_run_goes_on_from_an_adapter_with_its_own_settings(run_config: MakeConfig, tmp_path: Path) -> None:
    values = dict(
        peft_use_dora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.0.*": 3.5}, max_steps=2
    )
    first = train(run_config(**values, output_dir=str(tmp_path / "first"))).output_dir
    with pytest.raises(ConfigError, match="rank_pattern: {'q_proj': 3}, but the adapter in"):
        train(run_config(lora_model_dir=str(first), rank_pattern={"q_proj": 3}))
    second = train(
        run_config(lora_model_dir=str(first), lora_r=4, max_steps=1, output_dir=str(tmp_path / "second"))
    ).output_dir
    described = [json.loads((folder / "adapter_config.json").read_text()) for folder in (first, second)]
    assert described[0] == described[1] and described[0]["use_dora"]
    assert described[0]["rank_pattern"] == {"q_proj": 2}
    one, other = _adapter(first), _adapter(second)
    assert all(one[name].shape == other[name].shape for name in one) and one.keys() == other.keys()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"peft_init_lora_weights": "pissa"}, "is stored in 4bit; take the model's full checkpoint"),
        ({"loftq_config": {"loftq_bits": 4}, "load_in_4bit": True}, "needs a checkpoint in full precision"),
    ],
)
def test_starts_that_need_the_full_weights_say_so(
    values: dict[str, Any], says: str, run_config: MakeConfig, toy_llama_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(
        toy_llama_dir, quantization_config=quantised, device_map={"": "cpu"}, dtype=torch.float32
    )
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(toy_llama_dir).save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=says):
        train(run_config(base_model=str(tmp_path / "base"), **values))
