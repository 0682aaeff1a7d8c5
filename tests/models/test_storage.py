"""Frozen weights in 16 bits beside fp32: the same numbers as the widened model, or the widened model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from luthier.config import AdapterConfig, Config, ModelConfig
from luthier.kernels import linear_ce
from luthier.models import frozen, storage
from luthier.models.frozen import FrozenLinear
from luthier.models.load import decoder_of
from luthier.models.lora import add_lora, lora_layers
from luthier.train.run import train
from tests.models.families import toy_model
from tests.train.conftest import losses, rows_file, run_config  # noqa: F401 -- fixtures

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "olmo2", "gpt2", "mixtral", "mamba")


@pytest.fixture(autouse=True)
def _worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "WORTH_BYTES", 0)


def _narrow_and_wide(family: str, tmp_path: Path, targets: str | None = None) -> list[PreTrainedModel]:
    toy_model(family).to(torch.bfloat16).save_pretrained(tmp_path)
    models = []
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
        adapter = AdapterConfig(
            adapter="lora", lora_r=2, lora_target_modules=targets, lora_target_linear=targets is None
        )
        add_lora(model, adapter, 0)
        for layer in lora_layers(model).values():
            with torch.no_grad():
                layer.lora_B.normal_(generator=torch.Generator().manual_seed(1))
        models.append(model)
    storage.settle(models[0], torch.float32)
    return models


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_widened_model(family: str, tmp_path: Path) -> None:
    narrow, wide = _narrow_and_wide(family, tmp_path)
    kept = [p for p in narrow.parameters() if p.dtype == torch.bfloat16]
    if family != "mamba":  # its layers' weights are read past the modules
        linears = [m for m in decoder_of(narrow).modules() if isinstance(m, FrozenLinear)]
        assert {id(m.weight) for m in linears} <= {id(p) for p in kept}
    ids = torch.randint(3, 128, (2, 17), generator=torch.Generator().manual_seed(2))
    outs = []
    for model in (narrow, wide):
        logits = model(input_ids=ids).logits
        logits.square().mean().backward()
        outs.append([logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*outs, strict=True):
        if other is None:  # a layer that is read past
            assert one is None
            continue
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


def test_layers_without_an_adapter_stay_narrow_too(tmp_path: Path) -> None:
    narrow, _ = _narrow_and_wide("llama", tmp_path, targets=".*q_proj")
    matrices = [p for n, p in narrow.named_parameters() if p.dim() == 2 and "lora" not in n]
    assert {p.dtype for p in matrices} == {torch.bfloat16}
    assert {p.dtype for p in narrow.parameters() if p.dim() == 1} == {torch.float32}


def test_buffers_that_a_model_computes_for_itself_are_not_rounded(tmp_path: Path) -> None:
    """Gemma 3 scales its embeddings by a buffer; sqrt(32) has no bf16 of its own."""
    narrow, wide = _narrow_and_wide("gemma3_text", tmp_path)
    exact = dict(wide.named_buffers())
    scales = {n: b for n, b in narrow.named_buffers() if "embed_scale" in n}
    assert scales and all(torch.equal(b, exact[n]) for n, b in scales.items())


def test_a_model_that_reads_a_weight_past_its_layer_is_widened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    mlp: Any = model.model.layers[1].mlp
    inner = mlp.forward
    mlp.forward = lambda x: inner(x.to(mlp.up_proj.weight.dtype).to(x.dtype))  # rounds its input
    mlp.marked = 1  # so that it is a kind of its own
    add_lora(model, AdapterConfig(adapter="lora", lora_r=2, lora_target_linear=True), 0)
    with caplog.at_level(logging.INFO, logger="luthier"):
        storage.settle(model, torch.float32)
    assert "frozen weights are widened to float32: hidden states differ by" in caplog.text
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.fixture
def bf16_dir(toy_llama_dir: Path, toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    folder = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(toy_llama_dir).to(torch.bfloat16).save_pretrained(
        folder, max_shard_size="20KB"
    )
    toy_tokenizer.save_pretrained(folder)
    return folder


def test_a_run_has_the_losses_of_the_widened_one(
    run_config: Callable[..., Config],  # noqa: F811
    bf16_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = run_config(base_model=str(bf16_dir), output_dir=str(tmp_path / "narrow"), val_set_size=4)
    with caplog.at_level(logging.INFO, logger="luthier"):
        train(config)
    assert "frozen weights stay in bfloat16 as the checkpoint has them" in caplog.text
    caplog.clear()
    monkeypatch.setattr(storage, "WORTH_BYTES", 2**40)
    with caplog.at_level(logging.INFO, logger="luthier"):
        train(config.replace("test", output_dir=str(tmp_path / "wide")))
    assert "frozen weights" not in caplog.text
    assert losses(tmp_path / "narrow") == pytest.approx(losses(tmp_path / "wide"), rel=1e-5)


@pytest.mark.parametrize(
    "keys",
    [
        {"adapter": None, "lora_r": None},
        {"tokens": ["<new>"], "lora_modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
def test_what_is_trained_is_not_narrow(
    keys: dict[str, Any],
    run_config: Callable[..., Config],  # noqa: F811
    bf16_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="luthier"):
        train(run_config(base_model=str(bf16_dir), max_steps=1, **keys))
    assert "frozen weights stay" not in caplog.text


def test_a_checkpoint_with_one_finer_tensor_is_loaded_widened(bf16_dir: Path) -> None:
    config = ModelConfig(base_model=str(bf16_dir))
    values = AutoModelForCausalLM.from_pretrained(bf16_dir).config
    ask = lambda: storage.smaller_dtype(config, values, 10, torch.float32)  # noqa: E731
    assert ask() == torch.bfloat16
    assert storage.smaller_dtype(config, values, 10, torch.bfloat16) is None
    assert storage.smaller_dtype(config, values, values.vocab_size + 1, torch.float32) is None
    shard = sorted(bf16_dir.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    name = next(iter(tensors))
    tensors[name] = tensors[name].float()
    save_file(tensors, shard, metadata={"format": "pt"})
    assert ask() is None


def test_a_large_head_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "BLOCK", 100)
    monkeypatch.setattr(linear_ce, "BLOCK_FLOATS", 100)
    monkeypatch.setattr(linear_ce, "CHUNK_FLOATS", 256)
    base = nn.Linear(16, 61, bias=True).to(torch.bfloat16)
    wide = nn.Linear(16, 61).requires_grad_(False)
    wide.load_state_dict(base.state_dict())
    base.bias.data = base.bias.data.float()
    layer = FrozenLinear(base)
    x = torch.randn(9, 16)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wide(x))
    target = torch.arange(9)
    found = []
    for weight in (layer.weight, wide.weight):
        hidden = x.clone().requires_grad_(True)
        logps, correct = linear_ce.linear_logps(hidden, target, weight, wide.bias, softcap=3.0)
        logps.sum().backward()
        found.append((logps.detach(), correct, hidden.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_weights_share_a_buffer_only_while_they_are_multiplied_with() -> None:
    """What autograd keeps of a reference computation is a copy of its own; the kernels keep no weight."""
    layers = [FrozenLinear(nn.Linear(8, 8, bias=False).to(torch.bfloat16)) for _ in range(2)]
    x = torch.randn(5, 8, requires_grad=True)
    expected = x.detach() @ layers[0].weight.float().T @ layers[1].weight.float().T
    torch.testing.assert_close(layers[1](layers[0](x)), expected)
    first, second = (layer.weight_in(torch.float32) for layer in layers)
    assert first.data_ptr() != second.data_ptr()
    brief = [layer.weight_in(torch.float32, True) for layer in layers]
    assert brief[0].data_ptr() == brief[1].data_ptr()
    grad = torch.randn(5, 8)
    layers[1](layers[0](x)).backward(grad)
    torch.testing.assert_close(x.grad, grad @ layers[1].weight.float() @ layers[0].weight.float())
