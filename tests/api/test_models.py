"""Models and tokenizers of `FastLanguageModel` are transformers' and PEFT's, in whatever a notebook does with them."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft import get_peft_model as wrap
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, TextStreamer

import luthier
from luthier.errors import ConfigError, ModelError
from tests.api.conftest import Row

IDS = torch.arange(5, 45)[None]


@pytest.fixture
def pair(toy_llama_dir: Path) -> tuple[Any, Any]:
    return luthier.FastLanguageModel.from_pretrained(str(toy_llama_dir), load_in_4bit=False)


def test_classes_are_the_usual_ones(pair: tuple[Any, Any], toy_llama_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = pair
    assert isinstance(model, LlamaForCausalLM) and type(model).__name__ == "LlamaForCausalLM"
    plain = AutoModelForCausalLM.from_pretrained(toy_llama_dir, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, atol=1e-6, rtol=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("a b c")["input_ids"] == tokenizer("a b c")["input_ids"]
    wrapped = luthier.FastLanguageModel.get_peft_model(model, r=2)
    assert isinstance(wrapped, PeftModel) and wrapped.get_base_model() is model
    assert wrapped.peft_config["default"].base_model_name_or_path == str(toy_llama_dir)


def test_copies_and_pickles(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) and torch.equal(other.lm_head.weight, model.lm_head.weight)
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert type(other) is type(tokenizer) and other("a b")["input_ids"] == tokenizer("a b")["input_ids"]


def test_datasets_map_with_the_tokenizer_in_its_function(pair: tuple[Any, Any], rows: list[Row]) -> None:
    """Other processes get the function, and the tokenizer with it."""
    tokenizer = pair[1]
    data = datasets.Dataset.from_list(rows[:8])

    def template(batch: dict[str, list[str]]) -> dict[str, list[str]]:
        chats = [[{"role": "user", "content": text}] for text in batch["instruction"]]
        return {"text": [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]}

    found = data.map(template, batched=True, num_proc=2, load_from_cache_file=False)
    assert found[7]["text"] == "<|im_start|>user\nAdd 7 and 8.<|im_end|>\n"


def test_inference_and_training_modes(pair: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = pair
    model = luthier.FastLanguageModel.get_peft_model(model, r=2)
    luthier.FastLanguageModel.for_training(model)
    assert model.training
    model.gradient_checkpointing_enable()
    luthier.FastLanguageModel.for_inference(model)
    assert not model.training and model.config.use_cache
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    inputs = tokenizer(["one two"], return_tensors="pt")
    out = model.generate(**inputs, streamer=TextStreamer(tokenizer), max_new_tokens=4, do_sample=False)
    streamed = capsys.readouterr().out
    assert tokenizer.batch_decode(out)[0].startswith("one two") and streamed.startswith("one two")


def test_the_first_adapter_is_that_of_a_run(pair: tuple[Any, Any], toy_llama_dir: Path) -> None:
    """And PEFT's own at another seed: B is zero, A of the same spread."""
    ours = luthier.FastLanguageModel.get_peft_model(pair[0], r=8, random_state=5, target_modules=["q_proj", "v_proj"])
    base = AutoModelForCausalLM.from_pretrained(toy_llama_dir, dtype=torch.float32)
    theirs = wrap(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    mine, other = (dict(model.named_parameters()) for model in (ours, theirs))
    assert mine.keys() == other.keys()
    for name, parameter in mine.items():
        assert parameter.requires_grad == other[name].requires_grad
        if "lora_B" in name:
            assert not parameter.any()
        if "lora_A" in name:
            assert float(parameter.detach().std()) == pytest.approx(float(other[name].detach().std()), rel=0.2)
    again, _ = luthier.FastLanguageModel.from_pretrained(str(toy_llama_dir), load_in_4bit=False)
    again = luthier.FastLanguageModel.get_peft_model(again, r=8, random_state=5, target_modules=["q_proj", "v_proj"])
    assert all(torch.equal(p, mine[name]) for name, p in again.named_parameters())


@pytest.mark.parametrize("adapter", [True, False])
def test_saving(adapter: bool, pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = pair
    if adapter:
        model = luthier.FastLanguageModel.get_peft_model(model, r=2, lora_alpha=2, init_lora_weights=False)
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        expected, found = model.eval()(IDS).logits, merged(IDS).logits
    assert (found - expected).norm() < 0.03 * expected.norm()  # bfloat16 has 8 bits
    model.save_pretrained_merged(tmp_path / "lora", tokenizer, save_method="lora")
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    assert (tmp_path / "lora" / name).is_file() and (tmp_path / "lora" / "tokenizer.json").is_file()
    with pytest.raises(ConfigError, match="merged_16bit, merged_4bit, lora"):
        model.save_pretrained_merged(tmp_path / "x", tokenizer, save_method="merged_2bit")
    with pytest.raises(ConfigError, match="push_to_hub_merged"):
        model.save_pretrained_merged(tmp_path / "x", tokenizer, push_to_hub=True)
    if not adapter:
        with pytest.raises(ModelError, match="no adapter to merge"):
            model.save_pretrained_merged(tmp_path / "x", tokenizer, save_method="merged_4bit")
    assert not (tmp_path / "x").exists()


def test_merged_4bit(pair: tuple[Any, Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = luthier.FastLanguageModel.get_peft_model(pair[0], r=2, init_lora_weights=False)
    model.save_pretrained_merged(tmp_path / "merged", pair[1], save_method="merged_4bit_forced")
    described = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert described["quantization_config"]["load_in_4bit"]


def test_pushing_is_luthiers(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    caplog.set_level("INFO", logger="luthier")
    pushed: list[Any] = []

    def push(folder: Path, repo: str, **options: Any) -> str:
        pushed.append((sorted(p.name for p in folder.iterdir() if "adapter" in p.name), repo, options))
        return f"https://hub/{repo}"

    monkeypatch.setattr("luthier.export.hub.push", push)
    model = luthier.FastLanguageModel.get_peft_model(pair[0], r=2)
    assert model.push_to_hub("me/toy", token="secret") == "https://hub/me/toy"
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert pushed == [(files, "me/toy", {"token": "secret", "private": True})]
    assert any("private=False" in record.message for record in caplog.records)
    model.push_to_hub_merged("me/toy", pair[1], private=False, commit_message="m")
    assert pushed[1] == ([], "me/toy", {"private": False, "message": "m"})
    with pytest.raises(ConfigError, match="by name"):
        model.push_to_hub("me/toy", True)
