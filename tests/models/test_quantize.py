"""Quantised bases: the same logits and gradients as transformers, bitsandbytes and PEFT give on them."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast

from luthier.config import Config
from luthier.data.tokenizer import load_tokenizer
from luthier.errors import ConfigError, ModelError
from luthier.models import assemble, quantize, storage
from luthier.models.assemble import open_for_inference
from luthier.models.frozen import FrozenLinear, dequantized
from luthier.models.lora import LoRALinear, lora_layers
from luthier.train.run import train
from tests.models.families import toy_model
from tests.train.conftest import losses, rows_file, run_config  # noqa: F401 -- fixtures

MakeConfig = Callable[..., Config]

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_use_double_quant": False},
    "nf4-double": {"adapter": "qlora"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "8bit": {"load_in_8bit": True},
}


def _ours(config: Config) -> PreTrainedModel:
    return assemble.build_model(config, load_tokenizer(config), torch.device("cpu"), torch.float32)[0]


def _theirs(folder: Path, name: str) -> PreTrainedModel:
    """The same base as transformers loads it."""
    if name == "8bit":
        # A threshold of 0 takes no outliers apart; inputs are rounded to int8 all the same.
        asked = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    else:
        asked = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=name[:3],
            bnb_4bit_use_double_quant=name != "nf4",
            bnb_4bit_compute_dtype=torch.float32,
        )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=asked, device_map={"": "cpu"}, dtype=torch.float32
    )


def _plain(model: nn.Module) -> None:
    """Every 8-bit layer of bitsandbytes becomes a plain one of its dequantised weight: its own forward rounds its
    inputs as well, which Luthier does not."""
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "Linear8bitLt":
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight = nn.Parameter(dequantized(module.weight), requires_grad=False)
            plain.bias = module.bias
            model.set_submodule(path, plain)


@pytest.mark.parametrize("name", FORMATS)
def test_logits_and_gradients_equal_bitsandbytes_and_peft(
    name: str,
    run_config: MakeConfig,  # noqa: F811
    toy_llama_dir: Path,
    tmp_path: Path,
) -> None:
    config = run_config(**FORMATS[name])
    ours = _ours(config)
    for layer in lora_layers(ours).values():
        with torch.no_grad():
            layer.lora_B.normal_(std=0.1)
    assert {layer.storage for layer in lora_layers(ours).values()} == {"8bit" if name == "8bit" else "4bit"}
    assemble.adapter_files.save_adapter(
        ours, tmp_path, base_model=str(toy_llama_dir), revision=None, adapter=config.adapter
    )
    base = _theirs(toy_llama_dir, name)
    if name == "8bit":
        _plain(base)
    theirs = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    ids = torch.randint(3, 100, (2, 19))
    outs = []
    for model in (ours.eval(), theirs.train()):  # in eval mode bitsandbytes may pack its weights anew
        logits = model(input_ids=ids).logits
        logits.square().mean().backward()
        found = {
            n.replace("base_model.model.", "").replace(".default.weight", ""): p.grad
            for n, p in model.named_parameters()
            if p.requires_grad
        }
        outs.append((logits.detach(), found))
    torch.testing.assert_close(outs[0][0], outs[1][0], rtol=1e-5, atol=1e-5)
    assert outs[0][1].keys() == outs[1][1].keys()
    for key, gradient in outs[0][1].items():
        torch.testing.assert_close(gradient, outs[1][1][key], rtol=1e-4, atol=1e-6)


def test_eight_bits_are_near_bitsandbytes_own_layer(
    run_config: MakeConfig,  # noqa: F811
    toy_llama_dir: Path,
) -> None:
    """Which rounds its inputs to int8 too: some per cent of a toy's logits."""
    ours = _ours(run_config(load_in_8bit=True))
    ids = torch.randint(3, 100, (1, 19))
    with torch.no_grad():
        one, other = ours.eval()(input_ids=ids).logits, _theirs(toy_llama_dir, "8bit")(input_ids=ids).logits
    assert 0 < float((one - other).norm() / other.norm()) < 0.05


@pytest.mark.parametrize("name", ["nf4-double", "8bit"])
def test_a_run_learns_resumes_and_answers_on_its_quantised_base(
    name: str,
    run_config: MakeConfig,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = run_config(**FORMATS[name], learning_rate=3e-2, save_steps=3)
    with caplog.at_level(logging.INFO, logger="luthier"):
        train(config)
    assert f"14 linear layers in {'8bit' if name == '8bit' else '4bit'}" in caplog.text
    assert "fused: 2 x LlamaMLP" in caplog.text and "fused: 2 x LlamaAttention" in caplog.text
    straight = losses(tmp_path / "run")
    assert straight[-1] < straight[0]
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    train(config.replace("test", resume_from_checkpoint="auto"))
    assert losses(tmp_path / "run") == straight
    model, _, found = open_for_inference(
        str(tmp_path / "run"), device=torch.device("cpu"), dtype=torch.float32
    )
    assert found is not None
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert layers and all(layer.storage != "dense" for layer in layers)
    ids = torch.randint(3, 100, (1, 12))
    ours = _ours(config)
    assemble.adapter_files.fill_adapter(
        ours, assemble.adapter_files.read_adapter_tensors(tmp_path / "run"), [], "run"
    )
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, ours.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["nf4-double", "8bit"])
def test_data_may_run_through_a_quantised_base_before_the_adapter_is_made(
    name: str,
    run_config: MakeConfig,  # noqa: F811
) -> None:
    # In its first forward pass bitsandbytes' 8-bit layer moves the scales from the weight to itself.
    ids = torch.randint(3, 100, (1, 12))
    plain = run_config(**FORMATS[name])
    looking = plain.replace("test", peft_init_lora_weights="eva")
    documents = [torch.randint(3, 100, (64,)) for _ in range(4)]
    model, _ = assemble.build_model(
        looking, load_tokenizer(looking), torch.device("cpu"), torch.float32, documents=documents
    )
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, _ours(plain).eval()(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["nf4-double", "8bit"])
def test_a_folder_saved_in_few_bits_loads_as_it_is(
    name: str,
    run_config: MakeConfig,  # noqa: F811
    toy_llama_dir: Path,
    toy_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "quantised"
    _theirs(toy_llama_dir, name).save_pretrained(folder)
    toy_tokenizer.save_pretrained(folder)
    stored = _ours(run_config(base_model=str(folder)))
    asked = _ours(run_config(**FORMATS[name]))
    ids = torch.randint(3, 100, (1, 12))
    with torch.no_grad():
        torch.testing.assert_close(stored(input_ids=ids).logits, asked(input_ids=ids).logits)
    with pytest.raises(ConfigError, match="write `adapter: lora`, or take the full checkpoint"):
        _ours(run_config(base_model=str(folder), adapter=None, lora_r=None))
    other = {"load_in_4bit": True} if name == "8bit" else {"load_in_8bit": True}
    with pytest.raises(ConfigError, match="is stored in another format"):
        _ours(run_config(base_model=str(folder), **other))


def test_narrow_embeddings_beside_four_bits(
    run_config: MakeConfig,  # noqa: F811
    toy_llama_dir: Path,
    toy_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Codes made from bf16 are those made from the same numbers in fp32, and are not rounded to bf16 when read."""
    folder = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(toy_llama_dir).to(torch.bfloat16).save_pretrained(folder)
    toy_tokenizer.save_pretrained(folder)
    config = run_config(base_model=str(folder), adapter="qlora")
    wide = _ours(config)
    monkeypatch.setattr(storage, "WORTH_BYTES", 0)
    narrow = _ours(config)
    assert narrow.get_input_embeddings().weight.dtype == torch.bfloat16
    ids = torch.randint(3, 100, (1, 12))
    with torch.no_grad():
        torch.testing.assert_close(
            narrow(input_ids=ids).logits, wide(input_ids=ids).logits, rtol=1e-5, atol=1e-5
        )


def test_layers_without_an_adapter_are_read_by_ours_too(
    run_config: MakeConfig,  # noqa: F811
) -> None:
    model = _ours(run_config(adapter="qlora", lora_target_modules=["q_proj"]))
    found = [m for m in model.modules() if type(m) is FrozenLinear]
    assert len(found) == 12 and {m.storage for m in found} == {"4bit"}
    assert sum(quantize.stored_bytes(m.weight) for m in found) < 0.7 * sum(
        m.in_features * m.out_features for m in found
    )


def test_experts_that_stay_as_they_are_are_said(
    run_config: MakeConfig,  # noqa: F811
    toy_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    toy_model("mixtral", vocab_size=len(toy_tokenizer)).save_pretrained(tmp_path / "moe")
    toy_tokenizer.save_pretrained(tmp_path / "moe")
    with caplog.at_level(logging.INFO, logger="luthier"):
        _ours(run_config(base_model=str(tmp_path / "moe"), adapter="qlora"))
    assert "the experts of this model are no linear layers and are not quantised" in caplog.text


def test_copies_take_what_they_are_given_and_change_nothing(
    run_config: MakeConfig,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = run_config(adapter="qlora", max_steps=3)
    train(config)
    layers = [m for m in _ours(config).modules() if isinstance(m, FrozenLinear)]
    half = sum(4 * m.in_features * m.out_features for m in layers) / 2
    with caplog.at_level(logging.INFO, logger="luthier"):
        train(config.replace("test", dequantized_copies_gib=half / 2**30, output_dir=str(tmp_path / "copies")))
    kept = int(re.search(r"(\d+) of 14 stored weights have a copy in float32", caplog.text)[1])  # type: ignore[index]
    assert 5 <= kept <= 9
    assert losses(tmp_path / "copies") == losses(tmp_path / "run")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"adapter": None, "lora_r": None, "load_in_4bit": True}, "quantised weights cannot be trained"),
        ({"adapter": None, "lora_r": None, "load_in_8bit": True}, "quantised weights cannot be trained"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
        ({"adapter": "qlora", "load_in_8bit": True}, "`adapter: qlora` is LoRA on a base in 4 bits"),
        ({"adapter": "qlora", "load_in_4bit": False}, "`adapter: qlora` is LoRA on a base in 4 bits"),
        ({"bnb_4bit_quant_type": "fp4"}, "goes with `load_in_4bit: true` only"),
    ],
)
def test_contradictions(keys: dict[str, Any], message: str, run_config: MakeConfig) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=message):
        run_config(**keys)


def test_what_cannot_be_quantised_here_is_said_before_the_model_is_loaded(
    run_config: MakeConfig,  # noqa: F811
    toy_llama_dir: Path,
    toy_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = run_config(adapter="qlora").model
    values = AutoModelForCausalLM.from_pretrained(toy_llama_dir).config
    with pytest.raises(ConfigError, match="does not run on mps"):
        quantize.quantization(config, values, torch.device("mps"), torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match="pip install 'luthier\\[bitsandbytes\\]'"):
            quantize.quantization(config, values, torch.device("cpu"), torch.float32)
    described = json.loads((toy_llama_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**described, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    toy_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is quantised by gptq"):
        _ours(run_config(base_model=str(tmp_path)))


def test_state_space_layers_cannot_be_quantised_and_are_no_experts(
    run_config: MakeConfig,  # noqa: F811
    toy_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    toy_model("mamba", vocab_size=len(toy_tokenizer)).save_pretrained(tmp_path / "mamba")
    toy_tokenizer.save_pretrained(tmp_path / "mamba")
    for keys in ({"load_in_4bit": True}, {"load_in_8bit": True}):
        with pytest.raises(ModelError, match="state-space layers, whose kernels read weights past"):
            _ours(run_config(base_model=str(tmp_path / "mamba"), **keys))
    with caplog.at_level(logging.INFO, logger="luthier"):
        _ours(run_config(base_model=str(tmp_path / "mamba")))
    assert "experts" not in caplog.text
