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
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, TextStreamer

import luthier
from luthier.api import saving
from luthier.errors import ConfigError, ModelError
from luthier.models import several
from luthier.models.adapter_files import adapter_settings
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


def test_4bit_layers_of_any_shape_are_read_on_a_cpu(
    toy_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 80 numbers, over whose ends blocks of 64 go, where bitsandbytes would repack them (AVX512-BF16)."""
    dequantize_4bit = pytest.importorskip("bitsandbytes").functional.dequantize_4bit
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    config = AutoConfig.from_pretrained(toy_llama_dir)
    config.hidden_size, config.intermediate_size, config.head_dim = 80, 96, 20
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(toy_llama_dir).save_pretrained(tmp_path)
    model, _ = luthier.FastLanguageModel.from_pretrained(str(tmp_path))
    layer = model.model.layers[0].mlp.down_proj
    assert type(layer).__name__ == "Linear4bit"
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = x @ dequantize_4bit(layer.weight.data, layer.weight.quant_state).t()
        torch.testing.assert_close(layer.eval()(x), expected, atol=1e-5, rtol=1e-5)
    assert model.eval().generate(IDS, max_new_tokens=2, do_sample=False).shape == (1, 42)


def test_an_adapter_with_resized_embeddings_opens_everywhere(toy_llama_dir: Path, tmp_path: Path) -> None:
    """PEFT writes embeddings and head beside the adapter where a notebook has resized them (setup_chat_format)."""
    tokenizer = AutoTokenizer.from_pretrained(toy_llama_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|one|>", "<|two|>"]})
    model = AutoModelForCausalLM.from_pretrained(toy_llama_dir, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    wrapped = wrap(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    wrapped.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "lora")
    ids = torch.cat([IDS, torch.tensor([[len(tokenizer) - 2, len(tokenizer) - 1]])], 1)
    loaded = luthier.load(str(tmp_path / "lora"), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, wrapped.eval()(ids).logits, atol=2e-5, rtol=0)
    # Trained on, they would be missing from the new adapter; beside another adapter, they would change its answers.
    with pytest.raises(ModelError, match="have no place in the model"):
        luthier.train(
            {
                "base_model": str(toy_llama_dir), "tokenizer_config": str(tmp_path / "lora"), "adapter": "lora",
                "datasets": [{"path": _rows(tmp_path), "type": "completion"}], "bf16": False, "max_steps": 1,
                "lora_model_dir": str(tmp_path / "lora"), "output_dir": str(tmp_path / "run"),
            }
        )  # fmt: skip
    with pytest.raises(ModelError, match="brings a weight of the base that is another"):
        several._check_targets(loaded.model, "lora", adapter_settings(_changed(tmp_path / "lora")))


def test_an_adapter_is_not_saved_into_a_whole_model(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model = luthier.FastLanguageModel.get_peft_model(pair[0], r=2)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="choose another folder"):
        model.save_pretrained_merged(tmp_path, pair[1], save_method="lora")
    with pytest.raises(ConfigError, match="luthier push FOLDER me/it --gguf FILE"):
        model.push_to_hub_gguf("me/it", pair[1], quantization_method="q8_0")


def _rows(folder: Path) -> str:
    (folder / "rows.jsonl").write_text('{"text": "a b c"}\n' * 4)
    return str(folder / "rows.jsonl")


def _changed(folder: Path) -> Path:
    """The same adapter with other embeddings."""
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.weight"
    save_file({**tensors, name: tensors[name] + 1}, folder / "adapter_model.safetensors")
    return folder


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
def test_saving(
    adapter: bool, pair: tuple[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="luthier")
    model, tokenizer = pair
    if adapter:
        model = luthier.FastLanguageModel.get_peft_model(model, r=2, lora_alpha=2, init_lora_weights=False)
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        expected, found = model.eval()(IDS).logits, merged(IDS).logits
    assert (found - expected).norm() < 0.03 * expected.norm()  # bfloat16 has 8 bits
    if adapter:
        record = (tmp_path / "merged" / "merge.json").read_text()
        assert json.loads(record)["adapters"][0]["path"] == "the adapter in memory"
        assert "luthier-" not in record and json.loads(record)["check"]["text"] == "4 fixed texts"
        assert not [each for each in caplog.messages if "cannot be read" in each]  # there are no rows to look for
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


def test_what_is_saved_answers_in_the_models_own_format(toy_llama_dir: Path, tmp_path: Path) -> None:
    """The chat template's, until a run says another; then the run's, also when its adapter is opened again."""
    model, tokenizer = luthier.FastLanguageModel.from_pretrained(str(toy_llama_dir), load_in_4bit=False)
    model = luthier.FastLanguageModel.get_peft_model(model, r=2)
    assert saving._config_of(model, tokenizer).data.datasets[0].type == "chat_template"
    tokenizer.chat_template = None
    assert saving._config_of(model, tokenizer).data.datasets[0].type == "completion"
    model.save_pretrained(tmp_path)
    rows = [{"path": "rows.jsonl", "type": "alpaca"}]
    run = luthier.Config.from_flat({"base_model": str(toy_llama_dir), "adapter": "lora", "datasets": rows})
    (tmp_path / "config.yaml").write_text(run.to_yaml(), encoding="utf-8")
    again, tokenizer = luthier.FastLanguageModel.from_pretrained(str(tmp_path), load_in_4bit=False)
    assert saving._config_of(again, tokenizer).data.datasets[0].type == "alpaca"


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
