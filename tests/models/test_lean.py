"""Lean forwards against the model's own, on every family, and what they do not touch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from luthier.models import attention
from luthier.models.fuse import fuse
from luthier.models.fused import Fused
from luthier.models.lean import KINDS, LeanAttention, LeanMLP, make_lean
from tests.models.families import ALONE, FAMILIES, OTHERS, toy_model


def frozen(family: str, **changes: Any) -> Any:
    attention.register()
    model = toy_model(family, **changes)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.set_attn_implementation(attention.NAME)
    return model


def flat_logits(model: Any, ids: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    positions = torch.cat([torch.arange(length) for length in lengths])
    with attention.flat_pass(), torch.no_grad():
        return model(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=ids.new_empty(1, 1, 1, 1),
            use_cache=False,
            document_lengths=lengths,
        ).logits[0]


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_logits_are_the_models_own(family: str) -> None:
    model = frozen(family)
    ids = torch.randint(3, 120, (35,), generator=torch.Generator().manual_seed(0))
    flat, padded = flat_logits(model, ids, (9, 21, 5)), model(ids[None]).logits
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make_lean(model)
    torch.testing.assert_close(flat_logits(model, ids, (9, 21, 5)), flat, rtol=1e-4, atol=1e-5)
    # With a cache or a mask the module's own forward runs, on the weights that have moved.
    torch.testing.assert_close(model(ids[None]).logits, padded, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", [*FAMILIES, "gemma", "granite", "olmo2"])
def test_all_of_a_known_shape_becomes_lean(family: str) -> None:
    fusion = fuse(frozen(family), KINDS)
    assert {kind.fused for kind in fusion.kinds} == set(KINDS)
    assert not [kind.why for kind in fusion.kinds if kind.why]


def test_weights_lie_in_one_place_and_are_there_once() -> None:
    model = frozen("qwen2")
    before = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
    make_lean(model)
    layer = model.model.layers[0].self_attn
    assert isinstance(layer.__dict__["forward"], LeanAttention)
    assert layer.q_proj.weight.untyped_storage().data_ptr() == layer.v_proj.weight.untyped_storage().data_ptr()
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == before


def test_what_is_trained_or_takes_no_flat_pass_stays_as_it_is() -> None:
    trained = frozen("llama")
    for parameter in trained.parameters():
        parameter.requires_grad_(True)
    make_lean(trained)
    found = [type(module.__dict__.get("forward")) for module in trained.modules()]
    assert LeanAttention not in found and LeanMLP not in found
    for family in ALONE:
        model = toy_model(family)
        make_lean(model)
        assert not any(isinstance(module.__dict__.get("forward"), Fused) for module in model.modules())


def test_a_model_that_moves_afterwards_is_joined_again() -> None:
    model = frozen("llama")
    ids = torch.randint(3, 120, (12,), generator=torch.Generator().manual_seed(0))
    make_lean(model)
    before = flat_logits(model, ids, (12,))
    model.double()
    torch.testing.assert_close(flat_logits(model, ids, (12,)).float(), before, rtol=1e-4, atol=1e-5)
