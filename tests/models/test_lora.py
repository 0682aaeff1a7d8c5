"""LoRA: the function, its files in both directions with PEFT, targets, counts."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from luthier.config import AdapterConfig
from luthier.errors import ConfigError, ModelError
from luthier.models import adapter_files
from luthier.models.load import count_parameters
from luthier.models.lora import DropoutState, adapters_off, add_lora, lora_layers
from tests.models.families import FAMILIES, toy_model

IDS = torch.randint(3, 128, (1, 23), generator=torch.Generator().manual_seed(3))


def _adapter(**values: object) -> AdapterConfig:
    return AdapterConfig(
        **{"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, **values}
    )


def _randomise(model: PreTrainedModel, seed: int = 5) -> None:
    """Adapters away from their start, B = 0, and whole modules away from the base."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def _save(model: PreTrainedModel, folder: Path, settings: AdapterConfig) -> None:
    adapter_files.save_adapter(model, folder, base_model="toy", revision=None, adapter=settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_adapter_loads_in_peft_with_equal_logits(family: str, tmp_path: Path) -> None:
    model, settings = toy_model(family), _adapter()
    add_lora(model, settings, seed=0)
    _randomise(model)
    _save(model, tmp_path, settings)
    theirs = peft.PeftModel.from_pretrained(toy_model(family), tmp_path).eval()
    torch.testing.assert_close(_logits(theirs), _logits(model), atol=1e-5, rtol=1e-5)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == set(peft.get_peft_model_state_dict(theirs))
    with adapters_off(model):
        torch.testing.assert_close(_logits(model), _logits(toy_model(family)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_files_load_here_with_equal_logits(family: str, rslora: bool, tmp_path: Path) -> None:
    base = toy_model(family)
    targets = sorted({n.rpartition(".")[2] for n in adapter_files_targets(family)})
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets,
        use_rslora=rslora,
        task_type="CAUSAL_LM",
        layers_to_transform=[1],
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(base, settings).eval()
    theirs.save_pretrained(tmp_path, safe_serialization=not rslora)
    if rslora:  # the older, pickled form
        state = (
            load_file(tmp_path / "adapter_model.safetensors")
            if (tmp_path / "adapter_model.safetensors").exists()
            else None
        )
        if state is not None:
            torch.save(state, tmp_path / "adapter_model.bin")
            (tmp_path / "adapter_model.safetensors").unlink()
    ours = toy_model(family)
    adapter_files.load_adapter(ours, tmp_path, adapter_files.adapter_settings(tmp_path))
    torch.testing.assert_close(_logits(ours), _logits(theirs), atol=1e-5, rtol=1e-5)
    adapter_files.merge_into_base(ours)
    assert not lora_layers(ours)
    torch.testing.assert_close(_logits(ours), _logits(theirs), atol=1e-4, rtol=1e-4)


def adapter_files_targets(family: str) -> list[str]:
    model = toy_model(family)
    add_lora(model, _adapter(), seed=0)
    return list(lora_layers(model))


def test_gpt2_conv1d_round_trip_with_peft(tmp_path: Path) -> None:
    model, settings = toy_model("gpt2"), _adapter()
    add_lora(model, settings, seed=0)
    _randomise(model)
    _save(model, tmp_path, settings)
    theirs = peft.PeftModel.from_pretrained(toy_model("gpt2"), tmp_path).eval()
    torch.testing.assert_close(_logits(theirs), _logits(model), atol=1e-5, rtol=1e-5)
    expected = _logits(model)
    adapter_files.merge_into_base(model)
    torch.testing.assert_close(_logits(model), expected, atol=1e-4, rtol=1e-4)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"x": Evil()}, tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match="cannot be read"):
        adapter_files.read_adapter_tensors(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_modules_to_save_mean_the_same_in_peft(tied: bool, saved: list[str], tmp_path: Path) -> None:
    model = toy_model("llama", tie_word_embeddings=tied)
    settings = _adapter(lora_modules_to_save=saved)
    add_lora(model, settings, seed=0)
    _randomise(model)
    _save(model, tmp_path, settings)
    theirs = peft.PeftModel.from_pretrained(toy_model("llama", tie_word_embeddings=tied), tmp_path).eval()
    torch.testing.assert_close(_logits(theirs), _logits(model), atol=1e-5, rtol=1e-5)
    again = toy_model("llama", tie_word_embeddings=tied)
    adapter_files.load_adapter(again, tmp_path, adapter_files.adapter_settings(tmp_path))
    assert torch.equal(_logits(again), _logits(model))


def test_a_lora_on_the_head_trains() -> None:
    model = toy_model("llama")
    add_lora(model, _adapter(lora_target_modules=["lm_head"], lora_target_linear=False), seed=0)
    head = lora_layers(model)["lm_head"]
    logits = model(input_ids=IDS).logits
    logits.square().mean().backward()
    assert head.lora_B.grad is not None and head.lora_B.grad.abs().max() > 0


@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_lora_on_the_head_leaves_the_embeddings_alone(tied: bool, tmp_path: Path) -> None:
    model = toy_model("llama", tie_word_embeddings=tied)
    settings = _adapter(lora_target_modules=["lm_head", "q_proj"], lora_target_linear=False)
    add_lora(model, settings, seed=0)
    _randomise(model)
    _save(model, tmp_path, settings)
    theirs = peft.PeftModel.from_pretrained(toy_model("llama", tie_word_embeddings=tied), tmp_path).eval()
    expected = _logits(model)
    torch.testing.assert_close(_logits(theirs), expected, atol=1e-5, rtol=1e-5)
    adapter_files.merge_into_base(model)
    torch.testing.assert_close(_logits(model), expected, atol=1e-4, rtol=1e-4)


def test_a_module_with_adapted_layers_inside_cannot_be_saved_whole() -> None:
    with pytest.raises(ModelError, match="q_proj inside"):
        add_lora(toy_model("llama"), _adapter(lora_modules_to_save=["layers"]), seed=0)


def test_an_adapter_that_changed_its_base_is_refused(tmp_path: Path) -> None:
    described = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "init_lora_weights": "pissa_niter_4"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match="pissa"):
        adapter_files.read_adapter_config(tmp_path)


def test_layers_that_kernels_read_past_get_no_adapter(tmp_path: Path) -> None:
    model, settings = toy_model("mamba"), _adapter()
    add_lora(model, settings, seed=0)
    assert not any("out_proj" in name for name in lora_layers(model))
    _randomise(model)
    _save(model, tmp_path, settings)
    theirs = peft.PeftModel.from_pretrained(toy_model("mamba"), tmp_path).eval()
    torch.testing.assert_close(_logits(theirs), _logits(model), atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match="out_proj"):
        add_lora(toy_model("mamba"), _adapter(lora_target_modules=["out_proj"], lora_target_linear=False), 0)


def test_layers_to_transform_and_regex() -> None:
    model = toy_model("llama")
    add_lora(model, _adapter(peft_layers_to_transform=[1]), seed=0)
    assert lora_layers(model) and all(".layers.1." in name for name in lora_layers(model))
    model = toy_model("llama")
    add_lora(model, _adapter(lora_target_linear=None, lora_target_modules=r".*\.(q|v)_proj"), seed=0)
    assert {name.rpartition(".")[2] for name in lora_layers(model)} == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"lora_target_modules": ["q_proj", "nope"], "lora_target_linear": None}, ModelError, "q_proj"),
        ({"lora_target_modules": ["self_attn"], "lora_target_linear": None}, ModelError, "linear layers"),
        ({"lora_target_modules": "(", "lora_target_linear": None}, ConfigError, "regular expression"),
        ({"lora_modules_to_save": ["head"]}, ModelError, "lm_head"),
        ({"peft_layers_to_transform": [7]}, ModelError, "layers 0 to 1"),
        ({"lora_modules_to_save": ["lm_head"], "lora_target_modules": ["lm_head"]}, ModelError, "same layer"),
    ],
)
def test_targets_that_match_nothing_say_what_there_is(values, error, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=says):
        add_lora(toy_model("llama"), _adapter(**values), seed=0)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    settings = _adapter()
    model = toy_model("llama")
    add_lora(model, settings, seed=0)
    _save(model, tmp_path, settings)
    with pytest.raises(ModelError, match="does not fit"):
        adapter_files.load_adapter(
            toy_model("llama", num_hidden_layers=3), tmp_path, adapter_files.adapter_settings(tmp_path)
        )
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**described, "use_qalora": True}))
    with pytest.raises(ModelError, match="use_qalora"):
        adapter_files.adapter_settings(tmp_path)


def test_dropout_of_a_document_does_not_depend_on_its_neighbours() -> None:
    state = DropoutState()
    x = torch.randn(1, 12, 16)
    state.lengths, state.seeds = (5, 7), (11, 22)
    both = state.keep(x, 0.5, layer=3)
    state.lengths, state.seeds = (7,), (22,)
    alone = state.keep(x[:, 5:], 0.5, layer=3)
    assert torch.equal(both[5:], alone)
    assert not torch.equal(state.keep(x[:, 5:], 0.5, layer=4), alone)
    assert 0.35 < both.float().mean().item() < 0.65


def test_trainable_counts_are_those_of_the_literature() -> None:
    """Llama-2-7B's shape on the meta device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from luthier.config import FreezeConfig
    from luthier.models.freeze import set_trainable

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        tie_word_embeddings=False,
    )

    def shape() -> PreTrainedModel:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    model = shape()
    set_trainable(model, FreezeConfig(train_last_n_layers=8, freeze_embeddings=True))
    assert [round(n / 1e6, 2) for n in count_parameters(model)] == [1750.14, 6738.42]
    for values, expected in [
        ({"lora_target_modules": ["q_proj", "v_proj"], "lora_target_linear": None}, 4_194_304),
        ({}, 19_988_480),
        ({"lora_target_modules": ["lm_head"]}, 20_277_248),
    ]:
        model = shape()
        add_lora(model, _adapter(lora_r=8, **values), seed=0)
        assert count_parameters(model)[0] == expected


def test_experts_without_lora_are_said(caplog: pytest.LogCaptureFixture) -> None:
    add_lora(toy_model("qwen3_moe"), _adapter(), seed=0)
    assert "no LoRA on the experts" in caplog.text and "gate_up_proj" in caplog.text
    caplog.clear()
    add_lora(toy_model("qwen3_moe"), _adapter(lora_target_parameters=["experts.gate_up_proj"]), seed=0)
    assert "(experts.down_proj)" in caplog.text
    caplog.clear()
    add_lora(toy_model("qwen3_moe"), _adapter(lora_target_parameters=["gate_up_proj", "down_proj"]), seed=0)
    add_lora(toy_model("qwen3"), _adapter(), seed=0)
    assert not caplog.text
