"""Documents of one flat pass do not see each other, and the head is run as the family runs it."""

from __future__ import annotations

import pytest
import torch

from luthier.kernels.document_layout import layout_of
from luthier.models.attention import NAME
from luthier.models.isolation import build_policy, prove
from luthier.models.load import use_flat_attention
from luthier.models.policy import Policy
from tests.models.families import ALONE, FAMILIES, OTHERS, toy_model

LENGTHS = [17, 5, 1, 30]  # on both sides of the toy sliding windows


def _documents(seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (n,), generator=generator) for n in LENGTHS]


def _flat_logits(policy: Policy, documents: list[torch.Tensor]) -> list[torch.Tensor]:
    lengths = [len(d) for d in documents]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    hidden = policy.hidden(torch.cat(documents), torch.cat([torch.arange(n) for n in lengths]), lengths, cu)
    return list(policy.logits(hidden).split(lengths))


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_packed_documents_equal_the_model_on_each_alone(family: str) -> None:
    model = toy_model(family)
    model.set_attn_implementation("eager")
    documents = _documents()
    with torch.no_grad():
        expected = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in documents]
        assert use_flat_attention(model)
        policy = build_policy(model, None, sequence_len=64)
        assert policy.flat and policy.own_head
        for found, wanted in zip(_flat_logits(policy, documents), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ALONE)
def test_families_that_cannot_share_a_pass_are_recognised_and_still_right(family: str) -> None:
    model = toy_model(family)
    documents = _documents()
    with torch.no_grad():
        expected = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in documents]
        use_flat_attention(model)
        policy = build_policy(model, None, sequence_len=64)
        assert not policy.flat
        for found, wanted in zip(_flat_logits(policy, documents), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_leak_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof must fail on an attention that ignores documents; otherwise it proves nothing."""
    from luthier.models import attention

    model = toy_model("llama")
    use_flat_attention(model)
    assert prove(model, 64).flat
    whole = attention.attend

    def leaky(module, query, key, value, mask, **kwargs):  # type: ignore[no-untyped-def]
        out = whole(
            query,
            key,
            value,
            mask=None,
            causal=True,
            window=None,
            scaling=kwargs.get("scaling"),
            softcap=None,
            sinks=None,
        )
        return out.transpose(1, 2), None

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, NAME, leaky)
    proof = prove(model, 64)
    assert not proof.flat and "see each other" in proof.why


def test_rounding_of_a_deep_model_in_16_bits_is_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty layers of bf16 round away several hundredths of a vector; a neighbour that is seen changes far more."""
    from luthier.models import attention

    model = toy_model("llama", num_hidden_layers=60)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)
    model = model.bfloat16()
    use_flat_attention(model)
    proof = prove(model, sequence_len=64)
    assert proof.flat and proof.own_head and not proof.why_not_shared
    monkeypatch.setattr(attention, "layout_of", lambda lengths, _=None: layout_of((sum(lengths),)))
    assert "see each other" in prove(model, sequence_len=64).why


def test_longrope_switch_is_respected() -> None:
    """Phi-3's long and short factors: a short document beside a long one keeps the short ones."""
    half = 4
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 24,
        "short_factor": [1.0] * half,
        "long_factor": [4.0] * half,
    }
    model = toy_model("phi3")
    config = model.config
    config.rope_parameters = rope
    config.original_max_position_embeddings = 24
    model = type(model)(config).eval()
    use_flat_attention(model)
    assert prove(model, sequence_len=24).flat
    proof = prove(model, sequence_len=40)
    assert not proof.flat and "rotary" in proof.why


def test_generation_goes_on_working_with_our_attention() -> None:
    for family in ("mistral", "gemma2", "gpt_oss"):
        model = toy_model(family)
        model.set_attn_implementation("eager")
        ids = _documents()[3][None]
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        arguments = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
        expected = model.generate(ids, **arguments)
        use_flat_attention(model)
        assert torch.equal(model.generate(ids, **arguments), expected), family


def test_an_unknown_head_convention_falls_back_to_the_models_own_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = toy_model("llama")
    use_flat_attention(model)
    forward = model.forward

    def scaled(*args, **kwargs):  # type: ignore[no-untyped-def]
        out = forward(*args, **kwargs)
        out.logits = out.logits * 3.0
        return out

    monkeypatch.setattr(model, "forward", scaled)
    policy = build_policy(model, None, sequence_len=64)
    assert not policy.own_head
