"""Fused forwards: which modules get one, that the whole model computes the same with them, and that what does not
compute the same keeps its own."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from luthier.config import Config
from luthier.models import fuse, load
from luthier.models.fused import FusedAttention, FusedLayer, FusedMLP, FusedNorm
from luthier.models.isolation import build_policy
from luthier.models.load import use_flat_attention
from luthier.models.lora import DropoutState, add_lora, lora_layers
from luthier.models.policy import Policy
from tests.models.families import FAMILIES, OTHERS, toy_model

# What is fused in a family; families that are not named get all four kinds.
PARTLY: dict[str, set[type]] = {
    "cohere": {FusedMLP},
    "gpt_oss": {FusedNorm, FusedLayer},
    "mixtral": {FusedNorm, FusedAttention, FusedLayer},
    "qwen3_moe": {FusedNorm, FusedAttention, FusedLayer},
    "gpt2": set(),
    "phi": set(),
    "opt": set(),
}
ALL = {FusedNorm, FusedMLP, FusedAttention, FusedLayer}


class Batch:
    """Three documents; the labels of one are left out, and one position has two targets."""

    lengths = drawn = (5, 9, 3)
    parents = (-1, -1, -1)
    seeds = (11, 12, 13)
    cu_seqlens = torch.tensor([0, 5, 14, 17], dtype=torch.int32)
    position_ids = torch.cat([torch.arange(n) for n in lengths])
    input_ids = torch.randint(3, 128, (17,), generator=torch.Generator().manual_seed(0))
    position_N = torch.tensor([0, 1, 2, 3, 3, 14, 15])
    target_N = torch.tensor([3, 4, 5, 6, 7, 8, 9])
    weight_N = torch.tensor([1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0])


def plain(family: str) -> PreTrainedModel:
    model = toy_model(family)
    use_flat_attention(model)
    load.turn_off_randomness(model)
    return model


def adapted(family: str, **settings: Any) -> tuple[PreTrainedModel, DropoutState]:
    model = plain(family)
    values = {
        "base_model": "x",
        "datasets": [{"path": "x", "type": "alpaca"}],
        "adapter": "lora",
        "lora_r": 4,
    }
    state = add_lora(model, Config.from_flat({**values, **settings}).adapter, seed=0)
    generator = torch.Generator().manual_seed(5)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(0, 0.1, generator=generator)
    return model, state


def logps_and_gradients(policy: Policy) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    policy.train()
    policy.zero_grad(set_to_none=True)
    logps, _ = policy(Batch())
    (logps * Batch.weight_N * torch.linspace(0.5, 2.0, 7)).sum().backward()
    return logps.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(found[1][name], gradient, atol=2e-5 * size + 1e-7, rtol=0, msg=name)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_the_fused_model_computes_what_the_model_does(family: str) -> None:
    model, state = adapted(family)
    policy = build_policy(model, state, sequence_len=32)
    expected = logps_and_gradients(policy)
    names = list(model.state_dict())
    fuse.fuse_policy(policy)
    kinds = {type(m.__dict__["forward"]) for m in model.modules() if "forward" in m.__dict__}
    assert kinds == PARTLY.get(family, ALL)
    assert policy.rows_in_last_layer == (FusedLayer in kinds)
    assert_same(logps_and_gradients(policy), expected)
    assert list(model.state_dict()) == names
    fuse.undo(model)
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_dropout": 0.3},
        {"lora_target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"peft_layers_to_transform": [1]},
        {"peft_use_rslora": True, "lora_modules_to_save": ["lm_head"]},
        {"adapter": None, "lora_r": 16},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_whatever_is_trained(family: str, settings: dict[str, Any]) -> None:
    if family == "phi3" and "lora_target_modules" in settings:
        settings = {"lora_target_modules": ["qkv_proj", "down_proj"]}
    if settings.get("adapter", "") is None:
        policy = Policy(plain(family))
    else:
        policy = Policy(*adapted(family, **settings))
    expected = logps_and_gradients(policy)
    fuse.fuse_policy(policy)
    assert policy.rows_in_last_layer
    assert_same(logps_and_gradients(policy), expected)


@pytest.mark.parametrize("kept", [0, 1])
def test_one_layer_that_is_kept_sees_no_label_rows(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention is fused, and would take them."""
    model, state = adapted("llama")
    policy = Policy(model, state)
    expected = logps_and_gradients(policy)
    layer = model.model.layers[kept]
    layer.marked = 1  # a kind of its own
    inner = fuse._difference

    def differs(expected: Any, module: Any, call: Any) -> float | None:
        return 1.0 if module is layer else inner(expected, module, call)

    monkeypatch.setattr(fuse, "_difference", differs)
    fuse.fuse_policy(policy)
    assert "forward" not in layer.__dict__ and "forward" in layer.self_attn.__dict__
    assert not policy.rows_in_last_layer
    assert_same(logps_and_gradients(policy), expected)


def test_recomputation_goes_on_in_fused_layers() -> None:
    model, state = adapted("llama", lora_dropout=0.2)
    policy = Policy(model, state)
    expected = logps_and_gradients(policy)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": False})
    fuse.fuse_policy(policy)
    calls = 0
    layer = model.get_decoder().layers[0]
    run = layer.forward._run

    def count(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return run(*args, **kwargs)

    layer.forward._run = count
    assert_same(logps_and_gradients(policy), expected)
    assert calls == 2  # once forward, once again in backward
    fuse.undo(model)
    assert layer.gradient_checkpointing


def test_generation_and_masks_take_the_models_own_way() -> None:
    model, _ = adapted("llama")
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model.eval()
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False)
    expected, logits = model.generate(ids, **options), model(ids, attention_mask=mask).logits
    fuse.fuse(model)
    assert torch.equal(model.generate(ids, **options), expected)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, logits, atol=1e-5, rtol=1e-5)


def test_what_computes_something_else_keeps_its_own_forward(caplog: pytest.LogCaptureFixture) -> None:
    """The parts fit, the arithmetic does not: one line says so, and the model trains with its own."""
    model, state = adapted("llama")
    own = type(model.get_decoder().layers[0].mlp).forward

    class Doubled(type(model.get_decoder().layers[0].mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * own(self, x)

    model.get_decoder().layers[1].mlp.__class__ = Doubled
    policy = Policy(model, state)
    expected = logps_and_gradients(policy)
    with caplog.at_level(logging.INFO, "luthier"):
        fuse.fuse_policy(policy)
    assert "forward" in model.get_decoder().layers[0].mlp.__dict__
    assert "forward" not in model.get_decoder().layers[1].mlp.__dict__
    assert "kept as it is: 1 x Doubled (gated MLP): the fused one differs by" in caplog.text
    assert_same(logps_and_gradients(policy), expected)


def test_a_wrong_gradient_alone_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted("llama")
    honest = FusedNorm.__call__

    def wrong(self: FusedNorm, hidden_states: torch.Tensor) -> torch.Tensor:
        out = honest(self, hidden_states)
        return out + (hidden_states - hidden_states.detach())  # forward as it was, gradient not

    monkeypatch.setattr(FusedNorm, "__call__", wrong)
    fuse.fuse(model)
    assert FusedNorm not in {type(m.__dict__.get("forward")) for m in model.modules()}


def test_fusing_leaves_no_trace() -> None:
    model, _ = adapted("gemma2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    fuse.fuse(model)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not model.training
