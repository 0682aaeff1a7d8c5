"""Predicted memory against a real step: every tensor that autograd keeps, every allocation, every optimizer state."""

from __future__ import annotations

import importlib.util
from typing import Any, get_args

import pytest
import torch
from torch import nn

from luthier.config import Config
from luthier.config.optimizers import OPTIMIZERS, OptimizerName
from luthier.models.recompute import MODES
from luthier.plan import memory, weights
from luthier.plan.engine import Engine, Pass, Sharding
from luthier.plan.memory import memory_of
from luthier.plan.optimizers import state_bytes
from luthier.plan.shape import shape_of
from luthier.plan.weights import weight_bytes
from luthier.train.optim import Masters
from luthier.train.optimizers import build_optimizer
from tests.models.families import toy_model
from tests.plan.traced import Traced, run_step


def _total(step: Traced) -> float:
    return step.static + step.optimizer + step.peak + step.copy


@pytest.mark.parametrize(
    "settings",
    [
        dict(family="llama"),
        dict(family="llama", lengths=(1200,)),
        dict(family="qwen3"),
        dict(family="gemma2"),
        dict(family="gemma3_text", lengths=(700, 600)),
        dict(family="phi3"),
        dict(family="olmo2"),
        dict(family="llama", dora=True),
        dict(family="gemma2", dora=True),
        dict(family="llama", lora=False),
        dict(family="gemma3_text", lora=False, lengths=(700, 600)),
    ],
    ids=lambda s: " ".join(map(str, s.values())),
)
def test_kept_tensors_and_the_peak_within_a_tenth(settings: dict[str, Any]) -> None:
    step = run_step(**settings)
    shape, engine, one = step.shape, step.engine, step.one
    assert shape.exact
    # Kept beyond the layers: the gradient of labelled rows, that of a trained head, and the stacked A's.
    kept = memory.activations(shape, engine, one) + one.labels * shape.hidden * 4 + 4 * shape.stacked
    kept += shape.head * 4 if shape.head_trained else 0
    assert kept == pytest.approx(step.kept, rel=0.1)
    predicted = memory_of(shape, engine, one)
    assert predicted.total == pytest.approx(_total(step), rel=0.1)
    assert predicted.weights + 4 * shape.adapters == step.static
    assert predicted.optimizer == pytest.approx(step.optimizer, rel=0.01)
    assert memory._gradients(shape, engine) == step.gradients


# Prompt, chosen, rejected. In fp32 branches have masks: small ones are made once, those of the long pair in each layer.
PAIRS, LONG = [(300, 200, 250), (200, 150, 100)], [(800, 500, 500)]


@pytest.mark.parametrize(
    "settings",
    [
        dict(rl="dpo", pairs=PAIRS),
        dict(rl="dpo", pairs=PAIRS, lora=False),
        dict(rl="orpo", pairs=PAIRS),
        dict(rl="orpo", pairs=PAIRS, lora=False, vocab_size=4096),
        dict(rl="dpo", pairs=LONG, family="qwen3"),
        dict(rl="dpo", pairs=PAIRS, family="phi3"),
        dict(rl="dpo", pairs=PAIRS, recompute="layer"),
        dict(rl="dpo", pairs=PAIRS, vocab_size=4096, recompute="layer"),
    ],
    ids=lambda s: " ".join(map(str, s.values())),
)
def test_preference_runs_within_a_tenth(settings: dict[str, Any]) -> None:
    """Their prompts computed once, the reference's forward before the policy's, its copy where all weights train."""
    step = run_step(**{"family": "llama", **settings})
    predicted = memory_of(step.shape, step.engine, step.one)
    assert predicted.total == pytest.approx(_total(step), rel=0.1)
    assert predicted.reference == step.copy
    assert (step.copy > 0) == (settings["rl"] == "dpo" and not settings.get("lora", True))
    if settings["rl"] == "dpo" and "vocab_size" in settings:  # the reference's logits come to the same
        assert predicted.moment == "logits of a pass"
    if "recompute" not in settings and settings.get("lora", True):
        kept = memory.activations(step.shape, step.engine, step.one) + 4 * step.shape.stacked
        assert kept + step.one.labels * step.shape.hidden * 4 == pytest.approx(step.kept, rel=0.03)


def test_what_the_reference_keeps_is_what_it_says() -> None:
    """A copy of all weights, of modules that are trained whole, or of an adapter that is trained further."""
    from luthier.config import AdapterConfig
    from luthier.models.lora import add_lora
    from luthier.models.reference import Reference

    def bytes_of(model: Any, **values: Any) -> tuple[float, int]:
        engine = Engine(compute=4, frozen=4, reference=True, **values)
        return memory.starting_values(shape_of(model), engine), Reference.of(model).nbytes

    said, kept = bytes_of(_trained(toy_model("llama")))
    assert said == kept > 0
    for modules, moved in (([], False), (["lm_head"], False), (["lm_head"], True)):
        model = toy_model("llama", tie_word_embeddings=False)
        adapter = AdapterConfig(adapter="lora", lora_r=4, lora_target_linear=True, lora_modules_to_save=modules)
        add_lora(model, adapter, 0)
        if moved:
            for name, parameter in model.named_parameters():
                parameter.data += 0.1 * ("lora_B" in name)
        said, kept = bytes_of(model, moved=moved)
        assert said == kept and (kept > 0) == bool(modules)
    assert memory.starting_values(shape_of(model), Engine()) == 0


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("keep", "offload")])
@pytest.mark.parametrize("lora", [True, False])
def test_with_recomputation(mode: Any, lora: bool) -> None:
    step = run_step("llama", recompute=mode, lora=lora)
    assert memory_of(step.shape, step.engine, step.one).total == pytest.approx(_total(step), rel=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        dict(vocab_size=8192),
        dict(hidden_size=256, intermediate_size=700, num_attention_heads=16, optimizer="adamw_torch"),
        dict(hidden_size=256, intermediate_size=700, num_attention_heads=16, tie_word_embeddings=True),
    ],
)
def test_where_weights_outweigh_activations(settings: dict[str, Any]) -> None:
    """The peak then lies at the end of the backward pass or in the optimizer's step, not where activations are most."""
    step = run_step("llama", lora=False, lengths=(100,), labels=50, **settings)
    predicted = memory_of(step.shape, step.engine, step.one)
    assert predicted.moment in ("end of backward", "optimizer step")
    assert predicted.total == pytest.approx(_total(step), rel=0.1)


@pytest.mark.parametrize("settings", [dict(family="llama", kernels=False), dict(family="qwen3_moe")])
def test_layers_that_are_not_fused_are_estimated_roughly(settings: dict[str, Any]) -> None:
    step = run_step(**settings)
    assert not step.shape.exact
    assert memory_of(step.shape, step.engine, step.one).total == pytest.approx(_total(step), rel=0.35)


def test_offload_keeps_two_inputs_and_layer_all() -> None:
    shape = shape_of(_frozen(toy_model("llama", num_hidden_layers=8)))
    one, row = Pass(1000, 500, 1000, 10**6), 1000 * 32 * 2
    layer = memory.activations(shape, Engine(recompute="layer"), one)
    offload = memory.activations(shape, Engine(recompute="offload"), one)
    assert layer - offload == 6 * row
    mixed = Engine(recompute="keep", modes=("layer",) * 4 + ("keep",) * 4)
    kept = memory.activations(shape, Engine(), one)
    assert layer < memory.activations(shape, mixed, one) < kept


def test_gradients_stand_beside_activations_only_where_a_step_has_several_passes() -> None:
    shape = shape_of(_trained(toy_model("llama")))
    single, several = (memory_of(shape, Engine(), Pass(5000, 4000, 200, 10**6, 25, flag)) for flag in (False, True))
    assert single.moment == several.moment == "logits of a pass"
    assert single.gradients == 0 and several.gradients == 4 * shape.trainable


def test_more_tokens_never_need_less() -> None:
    shape = shape_of(_trained(toy_model("gemma2")))
    for mode in MODES:
        engine = Engine(recompute=mode, sharding=Sharding(2, 3, fsdp=True))
        sizes = [memory_of(shape, engine, Pass(n, n, n, n * n)).total for n in (1, 10, 100, 10**4, 10**6)]
        assert sizes == sorted(sizes)
    room = 10**8
    most = memory.largest(lambda n: memory_of(shape, Engine(), Pass(n, n, n, n * n)).total <= room)
    assert memory_of(shape, Engine(), Pass(most, most, most, most**2)).total <= room
    more = round(most * 1.01)
    assert memory_of(shape, Engine(), Pass(more, more, more, more**2)).total > room
    assert memory.largest(lambda n: False) == 0


def _config(**values: Any) -> Config:
    return Config.from_flat({"base_model": "x", "datasets": [{"path": "x", "type": "completion"}], **values})


def _trained(model: Any) -> Any:
    return model.train()


def _frozen(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_output_embeddings().weight.requires_grad_(True)
    return model


def test_every_optimizer_has_a_figure() -> None:
    assert set(OPTIMIZERS) == set(get_args(OptimizerName))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "muon" not in name])
def test_bytes_of_state_are_those_of_the_optimizer_itself(name: str) -> None:
    """Muon multiplies in bfloat16, which takes minutes on a CPU without units for it."""
    info = OPTIMIZERS[name]
    if info.package and importlib.util.find_spec(info.package) is None:
        pytest.skip(f"needs {info.package}")
    model = toy_model("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    shape = shape_of(_trained(model))
    masters = Masters(model)
    optimizer = build_optimizer(masters, _config(optimizer=name).training)
    for master in masters:
        master.grad = torch.full_like(master, 0.01)
    for _ in range(2):
        optimizer.step()
    states = [t for held in optimizer.state.values() for t in _tensors(held)]
    # Tables that all tensors share, and step counts, are there once whatever the model.
    own = sum(t.numel() * t.element_size() for t in states if t.numel() > 256)
    small = sum(t.numel() * t.element_size() for t in states) - own
    assert state_bytes(name, shape) == pytest.approx(own, abs=small + 0.01 * own + 1)


def _tensors(held: Any) -> list[torch.Tensor]:
    found = [t for key, t in held.items() if isinstance(t, torch.Tensor) and not str(key).startswith("qmap")]
    return [t for t in found if t.numel() > 1]


def test_momentum_of_sgd_counts() -> None:
    shape = shape_of(_trained(toy_model("llama")))
    assert state_bytes("sgd", shape) == 0
    assert state_bytes("sgd", shape, momentum=True) == 4 * shape.trainable


@pytest.mark.parametrize("double", [True, False])
def test_bytes_of_nf4_are_those_of_bitsandbytes(double: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(512, 1024)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    real = packed.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
    each = weights.NF4_BYTES if double else weights.NF4_SINGLE_BYTES
    assert each * weight.numel() == pytest.approx(real, rel=1e-3)


def test_quantised_weights_leave_embeddings_head_and_norms_alone() -> None:
    model = _frozen(toy_model("llama", num_hidden_layers=3, tie_word_embeddings=False))
    model.get_output_embeddings().weight.requires_grad_(False)
    linear = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, nn.Linear))
    rows = sum(m.weight.shape[0] for m in model.model.layers.modules() if isinstance(m, nn.Linear))
    others = sum(p.numel() for p in model.parameters()) - linear
    shape = shape_of(model)
    assert weight_bytes(shape, Engine()) == 2 * (linear + others)
    assert weight_bytes(shape, Engine(quantised="8bit")) == linear + 4 * rows + 2 * others
    assert weight_bytes(shape, Engine(quantised="4bit")) == weights.NF4_BYTES * linear + 2 * others
    assert weight_bytes(shape, Engine(sharding=Sharding(3, 3))) == pytest.approx(2 * (linear + others) / 3)
