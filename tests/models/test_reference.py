"""The reference is the model as the run began, whatever trains; asking it changes nothing of the training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from luthier.config import AdapterConfig, Config, FreezeConfig
from luthier.data.tokenizer import load_tokenizer
from luthier.models import adapter_files, reference
from luthier.models.assemble import build_model
from luthier.models.freeze import set_trainable
from luthier.models.fuse import fuse_policy
from luthier.models.isolation import build_policy
from luthier.models.load import use_flat_attention
from luthier.models.lora import DropoutState, adapters, add_lora, lora_layers
from luthier.models.policy import Policy
from luthier.models.reference import Reference, fingerprint
from luthier.objectives.sft import sft
from luthier.train.optim import Masters
from tests.models.families import toy_model
from tests.models.test_fuse import Batch
from tests.train.conftest import rows_file, run_config  # noqa: F401 -- fixtures

MakeConfig = Callable[..., Config]
Made = tuple[PreTrainedModel, DropoutState | None]

EMBEDDINGS = {"lora_target_modules": ["embed_tokens", "q_proj"], "lora_target_linear": None}
EXPERTS = {"lora_target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
# Adapters that begin at the base: family, settings.
AT_BASE: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {}),
    "dropout": ("llama", {"lora_dropout": 0.3}),
    "gaussian": ("llama", {"peft_init_lora_weights": "gaussian"}),
    "dora": ("llama", {"peft_use_dora": True}),
    "dora, dropout": ("qwen2", {"peft_use_dora": True, "lora_dropout": 0.3}),
    "pissa": ("llama", {"peft_init_lora_weights": "pissa"}),
    "pissa, dora": ("llama", {"peft_init_lora_weights": "pissa", "peft_use_dora": True}),
    "olora": ("llama", {"peft_init_lora_weights": "olora"}),
    "embeddings": ("llama", EMBEDDINGS),
    "embeddings, dora": ("gemma3_text", {**EMBEDDINGS, "peft_use_dora": True}),
    "experts": ("mixtral", EXPERTS),
}


def _settings(**values: Any) -> AdapterConfig:
    return AdapterConfig(
        **{"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, **values}
    )


def _adapted(family: str, dtype: torch.dtype = torch.float32, **values: Any) -> Made:
    model = _plain(family, dtype)
    return model, add_lora(model, _settings(**values), seed=0)


def _plain(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    if dtype == torch.bfloat16:  # small, since a CPU is slow in it
        changes |= dict(hidden_size=16, intermediate_size=16, head_dim=4, num_hidden_layers=1)
    model = toy_model(family, **changes)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    use_flat_attention(model)
    return model


def _from_folder(folder: Path) -> Made:
    """An adapter that was trained before goes on."""
    earlier, _ = _adapted("llama")
    _move(earlier)
    adapter_files.save_adapter(earlier, folder, base_model="toy", revision=None, adapter=_settings())
    model = _plain("llama")
    settings = adapter_files.adapter_settings(folder)
    settings = settings.model_copy(update={"lora_model_dir": str(folder), "lora_dropout": 0.3})
    return model, adapter_files.load_adapter(model, folder, settings, 0)


def _frozen(dtype: torch.dtype = torch.float32, tied: bool = False, **values: Any) -> Made:
    model = _plain("llama", dtype, tie_word_embeddings=tied)
    set_trainable(model, FreezeConfig(**values))
    return model, None


# What begins elsewhere, and the names of the parameters whose values are kept.
ELSEWHERE: dict[str, tuple[Callable[[Path], Made], Callable[[str], bool]]] = {
    "modules_to_save": (
        lambda _: _adapted("llama", lora_modules_to_save=["embed_tokens", "lm_head"]),
        lambda name: "lora" not in name,
    ),
    "lora_model_dir": (_from_folder, lambda name: True),
    "full, tied": (lambda _: _frozen(tied=True), lambda name: True),
    "full, bf16": (lambda _: _frozen(torch.bfloat16), lambda name: True),
    "last layer": (lambda _: _frozen(train_last_n_layers=1, freeze_embeddings=True), lambda name: True),
}


def _move(model: nn.Module, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def _logps(policy: Policy) -> torch.Tensor:
    return policy(Batch())[0].detach()


def _policy(made: Made) -> Policy:
    policy = build_policy(*made, sequence_len=64)
    fuse_policy(policy)
    return policy.train()


def _train(policy: Policy, asked: Reference | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Three steps of two passes: what the reference said before each pass, and the masters at the end."""
    masters = Masters(policy.model)
    optimizer = torch.optim.AdamW(list(masters), lr=3e-2)
    said = []
    for step in range(3):
        masters.zero_grad()
        for _ in range(2):
            if asked is not None:
                with asked.active():
                    said.append(_logps(policy))
            batch = Batch()
            batch.seeds = (11 + step, 12 + step, 13 + step)
            logps, _ = policy(batch)
            sft(logps, batch.weight_N, 10).backward()
        optimizer.step()
        masters.publish()
    return said, [master.detach().clone() for master in masters]


def _check(make: Callable[[], Made]) -> Reference:
    """Trained with and without the reference being asked."""
    model, state = make()
    asked = Reference.of(model)
    policy = _policy((model, state))
    marked = asked.fingerprint()
    untouched = _policy(make()).eval()
    with torch.no_grad():
        expected = _logps(untouched)
    said, masters = _train(policy, asked)
    _, alone = _train(_policy(make()), None)
    assert len(said) == 6 and all(torch.equal(one, expected) for one in said)
    assert all(torch.equal(one, other) for one, other in zip(masters, alone, strict=True))
    with torch.no_grad():
        assert (_logps(policy.eval()) - expected).abs().max() > 1e-2  # it has learnt something
    assert asked.fingerprint() == marked == fingerprint(untouched.model, _idle(untouched.model))
    assert fingerprint(model, asked.off) == marked or asked.starts
    return asked


def _idle(model: nn.Module) -> list[Any]:
    return [adapter for adapter in adapters(model).values() if adapter.idle()]


@pytest.mark.parametrize("kind", AT_BASE)
def test_adapters_off_are_the_beginning(kind: str) -> None:
    family, values = AT_BASE[kind]
    asked = _check(lambda: _adapted(family, **values))
    assert not asked.starts and asked.nbytes == 0
    assert asked.describe() == "reference: the base model, adapters off"


def test_adapters_of_a_model_in_16_bits() -> None:
    asked = _check(lambda: _adapted("llama", torch.bfloat16, peft_init_lora_weights="pissa"))
    assert not asked.starts


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_starting_values_are_kept_of_what_begins_elsewhere(kind: str, tmp_path: Path) -> None:
    make, is_kept = ELSEWHERE[kind]
    asked = _check(lambda: make(tmp_path))
    named = {name: p for name, p in asked.model.named_parameters() if p.requires_grad and is_kept(name)}
    assert {id(p) for p, _ in asked.starts} == {id(p) for p in named.values()}
    assert asked.nbytes == sum(p.nbytes for p in named.values())
    assert all(start.dtype == p.dtype for p, start in asked.starts)
    count = sum(p.numel() for p in named.values())
    assert f"a copy of the {count:,} starting values" in asked.describe()
    assert ("other adapters off" in asked.describe()) == (kind == "modules_to_save")


@pytest.mark.parametrize("dora", [False, True])
def test_four_bits_and_loftq(dora: bool, run_config: MakeConfig) -> None:  # noqa: F811
    """LoftQ begins beside the quantised base; nothing else does."""
    pytest.importorskip("bitsandbytes")
    values = dict(load_in_4bit=True, peft_use_dora=dora)

    def make(**more: Any) -> Made:
        config = run_config(**values, **more)
        return build_model(config, load_tokenizer(config), torch.device("cpu"), torch.float32)

    assert not _check(make).starts
    asked = _check(lambda: make(loftq_config={"loftq_bits": 4}))
    assert len(asked.starts) == (3 if dora else 2) * len(lora_layers(asked.model)) and not asked.off


def test_loftq_begins_in_the_same_place_when_a_run_goes_on(
    run_config: MakeConfig,  # noqa: F811
    tmp_path: Path,
) -> None:
    pytest.importorskip("bitsandbytes")
    config = run_config(load_in_4bit=True, loftq_config={"loftq_bits": 4}, rl="dpo", datasets=[{"path": "rows"}])
    tokenizer, cpu = load_tokenizer(config), torch.device("cpu")
    first, _ = build_model(config, tokenizer, cpu, torch.float32)
    marked = Reference.of(first).fingerprint()
    _move(first)
    adapter_files.save_adapter(first, tmp_path, base_model="x", revision=None, adapter=config.adapter)
    again, _ = build_model(config, tokenizer, cpu, torch.float32, resume_from=tmp_path)
    assert Reference.of(again).fingerprint() == marked


@pytest.mark.parametrize("kind", ["lora", "dora", "modules_to_save"])
def test_peft_with_its_adapter_disabled_says_the_same(kind: str, tmp_path: Path) -> None:
    variants: dict[str, dict[str, Any]] = {
        "lora": {},
        "dora": {"peft_use_dora": True},
        "modules_to_save": {"lora_modules_to_save": ["lm_head"]},
    }
    settings = _settings(**variants[kind])
    model, _ = _adapted("llama", **variants[kind])
    asked = Reference.of(model)
    _move(model)
    adapter_files.save_adapter(model, tmp_path, base_model="toy", revision=None, adapter=settings)
    theirs = peft.PeftModel.from_pretrained(toy_model("llama"), tmp_path).eval()
    ids = torch.randint(3, 128, (1, 23))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, atol=3e-5, rtol=3e-5)
        with theirs.disable_adapter(), asked.active():
            expected = theirs(ids).logits
            torch.testing.assert_close(model(ids).logits, expected, atol=3e-5, rtol=3e-5)
        assert (model(ids).logits - expected).abs().max() > 1e-2


def test_everything_is_put_back_even_after_an_error() -> None:
    model, _ = _adapted("llama", lora_dropout=0.5, lora_modules_to_save=["lm_head"])
    asked = Reference.of(model)
    _move(model)
    model.train()
    model.model.layers[0].eval()
    first, *_, off = adapters(model).values()
    off.enabled = False
    before = [(p.data_ptr(), p.clone()) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    versions = [p._version for p, _ in asked.starts]

    def fails() -> None:
        with asked.active():
            assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
            assert not first.enabled and torch.equal(model.lm_head.weight, asked.starts[0][1])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    for parameter, (place, values) in zip(model.parameters(), before, strict=True):
        assert parameter.data_ptr() == place and torch.equal(parameter, values)
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()
    assert first.enabled and not off.enabled
    assert all(p._version >= v + 2 for (p, _), v in zip(asked.starts, versions, strict=True))


def test_without_copies_nothing_is_kept() -> None:
    model, _ = _frozen()
    asked = Reference.of(model, copies=False)
    assert asked.nbytes == 0 and not asked.starts
    assert asked.describe() == "reference: the model as it begins"
    assert asked.fingerprint() == Reference.of(model).fingerprint()


def test_a_fingerprint_tells_weights_apart_and_not_folders(tmp_path: Path) -> None:
    model = toy_model("llama")
    marks = []
    for name in ("one", "other"):
        model.save_pretrained(tmp_path / name)
        marks.append(fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)))
    assert marks[0] == marks[1] == fingerprint(model)
    seen = {marks[0]}

    def differs(change: Callable[[torch.Tensor], Any]) -> None:
        weight = model.model.layers[1].mlp.down_proj.weight
        before = weight.detach().clone()
        with torch.no_grad():
            change(weight)
            seen_now = fingerprint(model)
            weight.copy_(before)
        assert seen_now not in seen
        seen.add(seen_now)

    differs(lambda w: w[3, 5].nextafter_(torch.tensor(9.0)))
    differs(lambda w: w[3, 5].neg_())
    differs(lambda w: w.copy_(w.roll(1, 0)))
    differs(lambda w: w.copy_(w.flip(1)))
    differs(lambda w: w[:, :2].copy_(w[:, [1, 0]]))
    assert fingerprint(model) == marks[0]
    model.config.rms_norm_eps *= 2
    assert fingerprint(model) != marks[0]
    other = toy_model("llama", seed=1)
    assert fingerprint(other) not in seen


def test_a_fingerprint_of_a_long_tensor_and_of_odd_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_CHUNK", 64)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-100, 100, (151,), generator=generator, dtype=torch.int8)
    sums = {tuple(reference._two_sums(numbers).tolist())}
    for place in range(150):
        swapped = numbers.clone()
        swapped[place : place + 2] = numbers[place : place + 2].flip(0)
        if not torch.equal(swapped, numbers):
            sums.add(tuple(reference._two_sums(swapped).tolist()))
    swapped = torch.cat([numbers[64:128], numbers[:64], numbers[128:]])  # whole chunks
    sums.add(tuple(reference._two_sums(swapped).tolist()))
    distinct = 1 + int((numbers[1:] != numbers[:-1]).sum()) + 1
    assert len(sums) == distinct
    assert torch.equal(reference._two_sums(numbers[1:]), reference._two_sums(numbers[1:].clone()))


def test_a_fingerprint_sees_the_scales_of_quantised_weights(run_config: MakeConfig) -> None:  # noqa: F811
    pytest.importorskip("bitsandbytes")
    marks = []
    for values in ({"lora_r": 4}, {"lora_r": 8, "peft_use_dora": True}, {"bnb_4bit_quant_type": "fp4"}):
        config = run_config(**{"load_in_4bit": True, "bnb_4bit_use_double_quant": True, **values})
        model, _ = build_model(config, load_tokenizer(config), torch.device("cpu"), torch.float32)
        marks.append(Reference.of(model).fingerprint())
    assert marks[0] == marks[1] != marks[2]
    weight: Any = next(iter(lora_layers(model).values())).weight
    state = weight.quant_state
    for tensor in (state.absmax, state.state2.absmax):
        tensor[0] += 1
        marks.append(Reference.of(model).fingerprint())
    assert len(set(marks[2:])) == 3
