"""DoRA, other starts, patterns, experts, embeddings and ranks from data: the function, the gradients and the files
beside PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel

from luthier.config import AdapterConfig
from luthier.errors import ConfigError, DataError, ModelError
from luthier.models import adapter_files, lora_init, rank_budget
from luthier.models.fuse import fuse_policy
from luthier.models.fused import Fused, FusedMLP
from luthier.models.load import count_parameters, use_flat_attention
from luthier.models.lora import DoRALinear, adapters, adapters_off, add_lora, lora_layers
from luthier.models.lora_init import Sources
from luthier.models.policy import Policy
from tests.models.families import toy_model
from tests.models.test_fuse import Batch

IDS = torch.randint(3, 128, (1, 23), generator=torch.Generator().manual_seed(3))
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

# What makes a variant: its config here. Each is loaded by PEFT from Luthier's files, and the other way round.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {"peft_use_dora": True}),
    "dora, biases": ("qwen2", {"peft_use_dora": True}),
    "dora, Conv1D": ("gpt2", {"peft_use_dora": True}),
    "dora, rslora": ("llama", {"peft_use_dora": True, "peft_use_rslora": True}),
    "dora, fused inputs": ("phi3", {"peft_use_dora": True}),
    "dora, dropout": ("llama", {"peft_use_dora": True, "lora_dropout": 0.3}),
    "gaussian": ("llama", {"peft_init_lora_weights": "gaussian"}),
    "pissa": ("llama", {"peft_init_lora_weights": "pissa"}),
    "pissa, fast": ("llama", {"peft_init_lora_weights": "pissa_niter_4"}),
    "pissa, rslora": ("llama", {"peft_init_lora_weights": "pissa", "peft_use_rslora": True}),
    "pissa, dora": ("llama", {"peft_init_lora_weights": "pissa", "peft_use_dora": True}),
    "pissa, Conv1D": ("gpt2", {"peft_init_lora_weights": "pissa"}),
    "pissa, patterns": (
        "llama",
        {"peft_init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.5}},
    ),
    "olora": ("llama", {"peft_init_lora_weights": "olora"}),
    "patterns": (
        "llama",
        {
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, "(up|down)_proj": 7},
            "alpha_pattern": {r"layers\.1\..*": 3.0},
        },
    ),
    "embeddings": ("llama", {"lora_target_modules": ["embed_tokens", "q_proj"], "lora_target_linear": None}),
    "embeddings, scaled": ("gemma3_text", {"lora_target_modules": ["embed_tokens"], "lora_target_linear": None}),
    "embeddings, dora": (
        "gemma3_text",
        {"lora_target_modules": ["embed_tokens", "v_proj"], "lora_target_linear": None, "peft_use_dora": True},
    ),
    "experts": ("mixtral", {"lora_target_parameters": EXPERTS}),
    "experts, one of two": ("qwen3_moe", {"lora_target_parameters": ["experts.down_proj"]}),
    "experts, patterns": (
        "qwen3_moe",
        {
            "lora_target_parameters": EXPERTS,
            "rank_pattern": {"experts.gate_up_proj": 3},
            "alpha_pattern": {"experts.down_proj": 5.0},
            "peft_use_rslora": True,
        },
    ),
    "experts alone": ("mixtral", {"lora_target_parameters": EXPERTS, "lora_target_linear": None}),
    "experts, transposed": ("gpt_oss", {"lora_target_parameters": EXPERTS}),
    "experts, one layer": (
        "qwen3_moe",
        {"lora_target_parameters": EXPERTS, "peft_layers_to_transform": [1], "lora_target_linear": None},
    ),
}


def _adapter(**values: object) -> AdapterConfig:
    return AdapterConfig(
        **{"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, **values}
    )


def _randomise(model: torch.nn.Module, seed: int = 5) -> None:
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_loads_in_peft_and_comes_back(variant: str, tmp_path: Path) -> None:
    family, values = VARIANTS[variant]
    base, model, settings = toy_model(family), toy_model(family), _adapter(**values)
    add_lora(model, settings, seed=0)
    if "gaussian" not in variant and "embeddings" not in variant:  # whatever it begins with, nothing changes by it
        torch.testing.assert_close(_logits(model), _logits(base), atol=2e-5, rtol=2e-5)
    _randomise(model)
    with adapters_off(model):
        torch.testing.assert_close(_logits(model), _logits(base), atol=2e-5, rtol=2e-5)
    expected = _logits(model)
    assert (expected - _logits(base)).abs().max() > 1e-2
    _save(model, tmp_path, settings)
    theirs = peft.PeftModel.from_pretrained(toy_model(family), tmp_path).eval()
    torch.testing.assert_close(_logits(theirs), expected, atol=3e-5, rtol=3e-5)
    saved = adapter_files.read_adapter_tensors(tmp_path)
    assert set(saved) == set(peft.get_peft_model_state_dict(theirs, save_embedding_layers=False))

    again = toy_model(family)
    adapter_files.load_adapter(again, tmp_path, adapter_files.adapter_settings(tmp_path))
    torch.testing.assert_close(_logits(again), expected, atol=3e-5, rtol=3e-5)
    adapter_files.merge_into_base(again)
    assert not adapters(again) and not [name for name, _ in again.named_parameters() if "lora" in name]
    torch.testing.assert_close(_logits(again), expected, atol=1e-4, rtol=1e-4)


def _theirs(family: str, folder: Path) -> torch.nn.Module:
    return peft.PeftModel.from_pretrained(toy_model(family), folder, is_trainable=True)


def _gradients_by_file_name(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {
        f"{adapter_files.PREFIX}{path}.{name}": tensor.grad
        for path, adapter in adapters(model).items()
        for name, tensor in adapter.tensors().items()
    }


@pytest.mark.parametrize(
    "variant",
    [
        *("dora", "dora, biases", "dora, Conv1D", "embeddings, scaled", "embeddings, dora"),
        *("experts, patterns", "experts, transposed"),
    ],
)
def test_gradients_are_pefts(variant: str, tmp_path: Path) -> None:
    """Of every tensor of the adapter. DoRA's norm is a constant in both."""
    family, values = VARIANTS[variant]
    model, settings = toy_model(family), _adapter(**values)
    add_lora(model, settings, seed=0)
    _randomise(model)
    _save(model, tmp_path, settings)
    theirs = _theirs(family, tmp_path)
    for one in (model, theirs):
        out = one(input_ids=IDS, use_cache=False).logits
        out.square().mean().backward()
    expected = {
        name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector"): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    found = _gradients_by_file_name(model)
    assert set(found) == set(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_dora_with_dropout_is_pefts(tmp_path: Path) -> None:
    """With the same mask: what is dropped still goes through the base, unscaled."""
    model, settings = toy_model("qwen2"), _adapter(peft_use_dora=True, lora_dropout=0.4, lora_target_modules=["q_proj"])
    add_lora(model, settings, seed=0)
    _randomise(model)
    _save(model, tmp_path, settings)
    ours = lora_layers(model)["model.layers.0.self_attn.q_proj"].train()
    theirs = _theirs("qwen2", tmp_path).get_submodule("base_model.model.model.layers.0.self_attn.q_proj").train()
    x = torch.randn(2, 9, 32)
    ours.state.lengths, ours.state.seeds = (9, 9), (1, 2)
    keep = ours.state.keep(x, 0.4, ours.layer).view(x.shape)

    class Dropped(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * keep / 0.6

    theirs.lora_dropout["default"] = Dropped()
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)
    assert (ours.eval()(x) - expected).abs().max() > 1e-2
    ours.train()(x).square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.lora_B.grad, theirs.lora_B["default"].weight.grad, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(
        ours.lora_magnitude_vector.grad, theirs.lora_magnitude_vector["default"].weight.grad, atol=1e-3, rtol=1e-4
    )


def test_what_peft_made_loads_here(tmp_path: Path) -> None:
    """Patterns written as people write them, DoRA, an adapter on the embeddings; and experts."""
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r".*\.(q_proj|down_proj|embed_tokens)",
        rank_pattern={"^model.layers.0.self_attn.q_proj": 2, "model.layers.1.mlp.down_proj": 6, "unused": 3},
        alpha_pattern={r"layers\.\d+\.self_attn\.q_proj": 5},
        use_dora=True,
        use_rslora=True,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    experts = peft.LoraConfig(
        r=3, target_modules=["q_proj"], target_parameters=EXPERTS, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    for family, made in (("llama", settings), ("qwen3_moe", experts)):
        theirs = peft.get_peft_model(toy_model(family), made).eval()
        theirs.save_pretrained(tmp_path / family)
        ours = toy_model(family)
        folder = tmp_path / family
        names = adapter_files.read_adapter_tensors(folder)  # PEFT copies adapted embeddings whole beside their adapter
        assert ("base_model.model.model.embed_tokens.base_layer.weight" in names) == (family == "llama")
        adapter_files.load_adapter(ours, folder, adapter_files.adapter_settings(folder))
        torch.testing.assert_close(_logits(ours), _logits(theirs), atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize(
    ("how", "family"),  # PEFT's OLoRA does not know GPT-2's transposed layers
    [("pissa", "llama"), ("olora", "llama"), ("gaussian", "llama"), ("pissa", "gpt2"), ("gaussian", "gpt2")],
)
def test_starts_are_pefts(how: str, family: str) -> None:
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "down_proj"]
    made = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, init_lora_weights=how, fan_in_fan_out=family == "gpt2"
    )
    theirs = peft.get_peft_model(toy_model(family), made)
    ours = toy_model(family)
    add_lora(
        ours,
        _adapter(
            lora_alpha=6, lora_target_modules=targets, lora_target_linear=None, peft_init_lora_weights=how
        ),
        seed=0,
    )
    for path, layer in lora_layers(ours).items():
        their = theirs.base_model.model.get_submodule(path)
        torch.testing.assert_close(layer.weight, their.base_layer.weight, atol=1e-5, rtol=1e-5)
        product = their.lora_B["default"].weight @ their.lora_A["default"].weight
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, product, atol=1e-5, rtol=1e-5)
        if how == "gaussian":
            assert layer.lora_A.std().item() == pytest.approx(1 / 4, rel=0.3)
        else:  # each side for itself, whose signs a decomposition leaves open
            torch.testing.assert_close(layer.lora_A.abs(), their.lora_A["default"].weight.abs(), atol=1e-4, rtol=1e-4)


def test_fast_pissa_is_near_the_whole_one_and_a_seed_decides_it() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 30, generator=generator)).Q for n in (40, 30))
    weight = left * 0.7 ** torch.arange(30) @ right.T
    whole, fast, again = (
        lora_init.principal_parts(weight, 4, 2.0, how, seed=1) for how in ("pissa", "pissa_niter_16", "pissa_niter_16")
    )
    torch.testing.assert_close(fast[1] @ fast[0], whole[1] @ whole[0], atol=1e-3, rtol=1e-3)
    assert all(torch.equal(one, other) for one, other in zip(fast, again, strict=True))
    values = torch.linalg.svdvals(weight - 2.0 * whole[1] @ whole[0])
    torch.testing.assert_close(values[:26], 0.7 ** torch.arange(4, 30), atol=1e-4, rtol=1e-4)


def test_loftq_is_pefts_and_nearer_to_the_original() -> None:
    from peft.utils.loftq_utils import _low_rank_decomposition

    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    rough = (weight * 2).round() / 2
    theirs = _low_rank_decomposition(weight - rough, reduced_rank=4)
    a, b = lora_init.quantisation_residual(weight, rough, 4, 1.0)
    torch.testing.assert_close(b @ a, theirs["L"] @ theirs["R"], atol=1e-5, rtol=1e-5)
    a, b = lora_init.quantisation_residual(weight, rough, 4, 3.0)
    torch.testing.assert_close(3.0 * b @ a, theirs["L"] @ theirs["R"], atol=1e-5, rtol=1e-5)
    assert lora_init.quantisation_residual(weight, rough, 40, 1.0)[0].shape == (40, 32)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.up_proj"])  # a square one, and one that is not
def test_loftq_finds_a_transposed_weight(name: str) -> None:
    """GPT-2's files hold (in, out), of which the quantised layer is (out, in)."""
    model = toy_model("llama")
    add_lora(model, _adapter(), seed=0)
    layer = lora_layers(model)[f"model.layers.0.{name}"]
    quantised = layer.weight_in(torch.float32)
    error = 0.1 * quantised.std() * torch.randn(quantised.shape, generator=torch.Generator().manual_seed(1))
    sources = Sources(original=lambda path: (quantised + error).t())
    lora_init.begin(layer, name, "loftq", 0, sources, None)
    assert (error - layer.scale * layer.lora_B @ layer.lora_A).norm() < 0.95 * error.norm()


DOCUMENTS = [torch.randint(3, 128, (n,), generator=torch.Generator().manual_seed(n)) for n in (60, 25, 40, 60)]


def test_ranks_from_data_are_pefts() -> None:
    """EVA on one batch, which is seen by PEFT until it no longer changes anything."""
    model = toy_model("llama")
    with torch.no_grad():  # layers whose inputs are worth different ranks
        model.model.layers[0].input_layernorm.weight.copy_(torch.linspace(2, 0, 32).square())
    made = peft.LoraConfig(
        r=4, target_modules=["q_proj", "o_proj"], init_lora_weights="eva", eva_config=peft.EvaConfig()
    )
    batch = {"input_ids": DOCUMENTS[0][None]}
    theirs = peft.tuners.lora.eva.get_eva_state_dict(model, [batch], made, show_progress_bar=False)
    settings = _adapter(lora_target_modules=["q_proj", "o_proj"], lora_target_linear=None, lora_rank_budget=4 * 4 * 64)
    layers = {name: model.get_submodule(name) for name in theirs}
    ranks, directions = rank_budget.choose_ranks(model, layers, settings, DOCUMENTS[:1])
    assert ranks == {name: len(components) for name, components in theirs.items()}
    assert len(set(ranks.values())) > 1
    for name, components in theirs.items():
        cosines = (directions[name][: ranks[name]] * components).sum(1).abs()
        assert cosines.min() > 0.98, name  # PEFT's own decomposition is a randomised one


def test_parts_of_the_data_add_up_to_the_decomposition_of_all_of_it() -> None:
    """Where nothing is cut off, in whatever parts and shapes the rows come."""
    x = torch.randn(70, 12, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.2, 12) + 1.0
    found = rank_budget.Directions(12)
    for part in x.split([20, 5, 30, 15]):
        found.add(part)
    _, values, vectors = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    expected = values.square() / values.square().sum()
    torch.testing.assert_close(torch.tensor(found.explained()), expected, atol=1e-5, rtol=1e-4)
    assert found.components is not None
    assert (found.components * vectors).sum(1).abs().min() > 0.999


@pytest.mark.parametrize("dora", [False, True])
def test_a_budget_is_kept_and_used_up(dora: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    budget = 6000
    model, settings = toy_model("llama"), _adapter(lora_rank_budget=budget, peft_use_dora=dora, lora_alpha=6)
    add_lora(model, settings, seed=0, sources=Sources(documents=DOCUMENTS))
    trainable = count_parameters(model)[0]
    cheapest = min(layer.in_features + layer.out_features for layer in lora_layers(model).values())
    assert budget - cheapest < trainable <= budget
    ranks = {path: layer.r for path, layer in lora_layers(model).items()}
    assert len(set(ranks.values())) > 1 and max(ranks.values()) <= 8
    assert all(layer.scale == pytest.approx(6 / 4) for layer in lora_layers(model).values())
    assert f"{trainable:,} of 6,000" in caplog.text
    assert f"model.layers.0.mlp: gate_proj {ranks['model.layers.0.mlp.gate_proj']}" in caplog.text
    _randomise(model)
    _save(model, tmp_path, settings)
    theirs = peft.PeftModel.from_pretrained(toy_model("llama"), tmp_path).eval()
    torch.testing.assert_close(_logits(theirs), _logits(model), atol=3e-5, rtol=3e-5)
    again = toy_model("llama")
    adapter_files.load_adapter(again, tmp_path, adapter_files.adapter_settings(tmp_path))
    assert {path: layer.r for path, layer in lora_layers(again).items()} == ranks


def test_an_adapter_may_begin_with_the_directions_of_the_data() -> None:
    model = toy_model("llama")
    settings = _adapter(peft_init_lora_weights="eva", rank_pattern={"q_proj": 6})
    add_lora(model, settings, seed=0, sources=Sources(documents=DOCUMENTS))
    layer = lora_layers(model)["model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(6), atol=1e-4, rtol=1e-4)
    assert torch.equal(_logits(model), _logits(toy_model("llama")))


@pytest.mark.parametrize(
    ("family", "values", "error", "says"),
    [
        ("llama", {"rank_pattern": {"k_prj": 2}}, ModelError, "rank_pattern: 'k_prj' decides nothing.*k_proj"),
        ("llama", {"alpha_pattern": {"layers.7.*": 2.0}}, ModelError, "alpha_pattern: 'layers.7"),
        ("llama", {"rank_pattern": {".*proj": 2, "q_proj": 3}}, ModelError, "'q_proj' decides nothing.*earlier"),
        ("mixtral", {"lora_target_parameters": ["expert.w1"]}, ModelError, "there is: .*experts.down_proj"),
        ("llama", {"lora_target_parameters": ["q_proj.weight"]}, ModelError, "lora_target_modules"),
        ("gpt_oss", {"lora_target_parameters": ["experts.down_proj_bias"]}, ModelError, "has to be a matrix"),
        ("mixtral", {"lora_target_parameters": EXPERTS, "lora_dropout": 0.1}, ConfigError, "lora_dropout: 0.1"),
        (
            "mixtral",
            {"lora_target_parameters": EXPERTS, "lora_target_linear": None, "peft_layers_to_transform": [5]},
            ModelError,
            "match none of lora_target_parameters",
        ),
        (
            "llama",
            {"lora_target_modules": ["embed_tokens"], "lora_modules_to_save": ["embed_tokens"]},
            ModelError,
            "same layer",
        ),
        ("llama", {"lora_rank_budget": 500}, ConfigError, "less than rank 1 in each of the 14 layers takes, 928"),
        ("llama", {"lora_rank_budget": 10**6}, ConfigError, "more than these 14 layers can use, 7,424"),
        ("llama", {"lora_rank_budget": 1500, "lora_r": 8}, DataError, "too little training data.*10 tokens"),
        (
            "llama",
            {"lora_rank_budget": 5000, "lora_target_modules": ["embed_tokens", "q_proj"]},
            ModelError,
            "lora_rank_budget is for linear layers",
        ),
        (
            "llama",
            {"peft_init_lora_weights": "pissa", "lora_target_modules": ["embed_tokens"]},
            ModelError,
            "peft_init_lora_weights is for linear layers",
        ),
        ("llama", {"peft_init_lora_weights": "pissa", "lora_r": 40}, ModelError, "cannot begin with rank 40"),
    ],
)
def test_what_cannot_be_says_so(family: str, values: dict[str, Any], error: type[Exception], says: str) -> None:
    values = {"lora_target_linear": "lora_target_modules" not in values, **values}
    documents = [DOCUMENTS[0][:10]] if error is DataError else DOCUMENTS
    with pytest.raises(error, match=says):
        add_lora(toy_model(family), _adapter(**values), seed=0, sources=Sources(documents=documents))


def test_variants_have_their_shapes_without_weights(caplog: pytest.LogCaptureFixture) -> None:
    """What a plan is made from."""
    for family, values in (*VARIANTS.values(), ("llama", {"lora_rank_budget": 6000})):
        settings = _adapter(**values)
        with torch.device("meta"):
            shapes = type(toy_model(family))._from_config(toy_model(family).config)
            add_lora(shapes, settings, seed=0)
        real = toy_model(family)
        add_lora(real, settings, seed=0, sources=Sources(documents=DOCUMENTS))
        found, expected = count_parameters(shapes)[0], count_parameters(real)[0]
        assert found == expected or ("lora_rank_budget" in values and 5900 < found <= 6000)


def test_doras_norms_are_computed_once_for_each_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy_model("llama")
    add_lora(model, _adapter(peft_use_dora=True, lora_target_modules=["q_proj"], lora_target_linear=None), seed=0)
    _randomise(model)
    layer = lora_layers(model)["model.layers.0.self_attn.q_proj"]
    assert isinstance(layer, DoRALinear)
    read: list[int] = []
    whole = layer.magnitude.weight
    monkeypatch.setattr(layer.magnitude, "weight", lambda: (read.append(1), whole())[1])
    for _ in range(3):
        _logits(model)
    assert len(read) == 1
    _randomise(model, seed=6)
    _logits(model)
    assert len(read) == 2
    expected = (layer.weight + layer.scale * layer.lora_B @ layer.lora_A).norm(dim=1)
    torch.testing.assert_close(layer.magnitude.norms(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "variant",
    [
        *("dora, biases", "dora, fused inputs", "dora, dropout", "pissa", "patterns"),
        *("embeddings, scaled", "experts, patterns"),
    ],
)
def test_fused_models_compute_the_same(variant: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    family, values = VARIANTS[variant]
    model = toy_model(family)
    use_flat_attention(model)
    state = add_lora(model, _adapter(**values), seed=0)
    _randomise(model)
    policy = Policy(model, state)
    expected = _loss_and_gradients(policy)
    fuse_policy(policy)
    assert any(isinstance(vars(module).get("forward"), Fused) for module in model.modules())
    assert ("attention and MLPs with DoRA" in caplog.text) == ("dropout" in variant)
    if "dora" in variant and "dropout" not in variant:
        assert "(attention), equal" in caplog.text and "(gated MLP), equal" in caplog.text
    found = _loss_and_gradients(policy)
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_doras_mlps_are_made_again_in_tiles_where_asked() -> None:
    model = toy_model("llama")
    use_flat_attention(model)
    policy = Policy(model, add_lora(model, _adapter(peft_use_dora=True), seed=0))
    _randomise(model)
    fuse_policy(policy)
    kept, expected = _kept_bytes(policy)
    mlps = [found for m in model.modules() if isinstance(found := vars(m).get("forward"), FusedMLP)]
    assert len(mlps) == 2 and all(mlp.rescaled for mlp in mlps)
    for mlp in mlps:
        mlp.tile = 7
    fewer, found = _kept_bytes(policy)
    assert fewer < 0.7 * kept
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def _kept_bytes(policy: Policy) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that a pass keeps for its backward, beside parameters; and what the pass gives."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = _loss_and_gradients(policy)
    return sum(kept.values()), found


def _loss_and_gradients(policy: Policy) -> dict[str, torch.Tensor]:
    logps, _ = policy.train()(Batch())
    policy.zero_grad()
    logps.sum().backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert len(gradients) == sum(p.requires_grad for p in policy.parameters())
    return {"": logps.detach(), **gradients}


def test_going_on_with_another_start_is_refused() -> None:
    first, settings = toy_model("llama"), _adapter()
    add_lora(first, settings, seed=0)
    earlier = {
        f"{path}.{name}": tensor for path, one in adapters(first).items() for name, tensor in one.exported().items()
    }
    with pytest.raises(ModelError, match="did not begin with pissa at rank 4"):
        add_lora(
            toy_model("llama"), _adapter(peft_init_lora_weights="pissa"), seed=0, sources=Sources(earlier=earlier)
        )
