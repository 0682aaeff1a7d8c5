"""Loss and gradients with shared beginnings are those without, in every family that takes flat batches."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from luthier.config import AdapterConfig
from luthier.data.batches import make_batch
from luthier.data.dataset import Document
from luthier.data.tree import MIN_SHARED, Sharing
from luthier.models import attention
from luthier.models.fuse import fuse_policy
from luthier.models.isolation import build_policy, prove
from luthier.models.load import use_flat_attention
from luthier.models.lora import add_lora, lora_layers
from luthier.models.policy import Policy
from luthier.objectives.sft import sft
from tests.models.families import FAMILIES, OTHERS, toy_model

CPU = torch.device("cpu")


def _rows(answers_only: bool) -> list[Document]:
    """Two templates that begin alike, a row twice, one that is another's beginning, and a packed one."""
    rng = np.random.default_rng(0)
    first, second, third = (rng.integers(3, 128, n) for n in (11, 9, 14))

    def row(*parts: np.ndarray, inside: tuple[int, ...] | None = None) -> Document:
        ids = np.concatenate(parts).astype(np.int32)
        labels = ids.copy()
        if answers_only:
            labels[: -len(parts[-1])] = -100
        return Document(ids, labels, inside)

    twice = row(first, second, rng.integers(3, 128, 7))
    return [
        twice,
        row(first, third, rng.integers(3, 128, 12)),
        row(first, second, rng.integers(3, 128, 3)),
        twice,
        row(first, second),
        row(rng.integers(3, 128, 10)),
        row(first, third, rng.integers(3, 128, 2), first, second[:4], inside=(27, 15)),
    ]


def _gradients(
    policy: Policy, rows: list[Document], passes: list[list[int]], share: Sharing
) -> tuple[float, dict[str, torch.Tensor], int]:
    policy.zero_grad()
    loss, computed = 0.0, 0
    total = sum(int((row.labels[1:] >= 0).sum()) for row in rows)
    for indices in passes:
        seeds = [100 + index for index in indices]
        batch = make_batch(rows, indices, seeds, CPU, share=share)  # type: ignore[arg-type]
        logps, _ = policy(batch)
        partial = sft(logps, batch.weight_N, total)
        partial.backward()
        loss += float(partial.detach())
        computed += len(batch.input_ids)
    return loss, {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}, computed


@pytest.mark.parametrize("answers_only", [False, True], ids=["all", "answers"])
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_loss_and_gradients_are_those_of_the_unshared_rows(family: str, answers_only: bool) -> None:
    model = toy_model(family)
    assert use_flat_attention(model)
    policy = build_policy(model, None, sequence_len=64)
    assert policy.flat and policy.may_share() == "all"
    rows = _rows(answers_only)
    everything = [list(range(len(rows)))]
    loss, gradients, tokens = _gradients(policy, rows, everything, share="")
    assert tokens == sum(len(row.input_ids) for row in rows)
    for passes in (everything, [[0, 2, 5], [1, 6], [3, 4]]):
        shared_loss, shared_gradients, computed = _gradients(policy, rows, passes, share="all")
        assert computed < 0.85 * tokens
        assert shared_loss == pytest.approx(loss, rel=1e-5)
        assert gradients.keys() == shared_gradients.keys()
        noise = 1e-7 * max(
            gradient.norm() for gradient in gradients.values()
        )  # the bias of keys has none else
        for name, gradient in gradients.items():
            error = (gradient - shared_gradients[name]).norm()
            assert error < 1e-5 * gradient.norm() + noise, name


def test_recomputed_layers_see_the_same_forest() -> None:
    model = toy_model("mistral").train()
    use_flat_attention(model)
    policy = build_policy(model, None, sequence_len=64)
    rows = _rows(False)
    _, kept, _ = _gradients(policy, rows, [[0, 1, 2, 3]], share="all")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, again, _ = _gradients(policy, rows, [[0, 1, 2, 3]], share="all")
    for name in kept:
        torch.testing.assert_close(kept[name], again[name])


def test_an_attention_that_ignores_parents_is_seen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="luthier")
    model = toy_model("llama")
    use_flat_attention(model)
    assert not prove(model, 64).why_not_shared
    whole = attention.attention

    def flat_only(*args, document_parents=None, **kwargs):  # type: ignore[no-untyped-def]
        return whole(*args, **kwargs)

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, flat_only)
    policy = build_policy(model, None, sequence_len=64)
    assert policy.flat and not policy.may_share()
    assert "documents share no prefixes: in LlamaForCausalLM documents with a common beginning" in caplog.text


def test_other_attention_turns_sharing_off_and_dropout_most_of_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="luthier")
    model = toy_model("llama")
    model.set_attn_implementation("eager")
    assert not build_policy(model, None, sequence_len=64).may_share()
    model = toy_model("llama")
    use_flat_attention(model)
    adapter = AdapterConfig(adapter="lora", lora_target_linear=True, lora_dropout=0.1)
    state = add_lora(model, adapter, seed=0)
    assert build_policy(model, state, sequence_len=64).may_share() == "rows"
    assert "lora_dropout is drawn for each document" in caplog.text


def _pairs() -> list[Document]:
    """Pairs whose answers begin alike or not, behind prompts that are worth sharing or not; and one other row."""
    rng = np.random.default_rng(1)

    def pair(prompt: np.ndarray, alike: int, chosen: int, rejected: int) -> Document:
        begun = rng.integers(3, 128, alike)
        sides = [np.concatenate([prompt, begun, [n], rng.integers(3, 128, n)]) for n in (chosen, rejected)]
        ids = np.concatenate(sides).astype(np.int32)
        labels = ids.copy()
        for start in (0, len(sides[0])):
            labels[start : start + len(prompt)] = -100
        return Document(ids, labels, (len(sides[0]), len(sides[1])), prompt=len(prompt), pair=True)

    prompt, short = rng.integers(3, 128, 14), rng.integers(3, 128, MIN_SHARED - 3)
    other = rng.integers(3, 128, 20).astype(np.int32)
    return [
        pair(prompt, 0, 6, 9),
        pair(prompt, 11, 3, 5),
        pair(prompt[:10], 0, 5, 4),
        pair(short, 0, 4, 7),
        pair(short, 12, 7, 4),
        Document(other, other, None),
    ]


@pytest.mark.parametrize("fused", [False, True])
def test_with_dropout_the_answers_of_a_pair_share_their_prompt_and_nothing_else(fused: bool) -> None:
    model = toy_model("llama")
    use_flat_attention(model)
    adapter = AdapterConfig(adapter="lora", lora_r=4, lora_target_linear=True, lora_dropout=0.3)
    state = add_lora(model, adapter, seed=0)
    policy = build_policy(model, state, sequence_len=64)
    if fused:
        fuse_policy(policy)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(std=0.2, generator=generator)
    policy.train()
    rows = _pairs()
    everything = [list(range(len(rows)))]
    loss, gradients, tokens = _gradients(policy, rows, everything, share="")
    for passes in (everything, [[0, 3], [5], [1, 2, 4]]):
        shared_loss, shared_gradients, computed = _gradients(policy, rows, passes, share="rows")
        assert computed == tokens - 14 - 14 - 10
        assert shared_loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients.items():
            assert (gradient - shared_gradients[name]).norm() < 1e-5 * gradient.norm(), name
    # The masks are at work: other ones give another loss, and so does sharing where they differ.
    wrong, _, computed = _gradients(policy, rows, everything, share="all")
    assert computed < tokens - 14 - 14 - 10 and abs(wrong - loss) > 1e-3 * loss
    policy.eval()
    plain, gradients, _ = _gradients(policy, rows, everything, share="")
    assert abs(plain - loss) > 1e-3 * loss
    shared_loss, shared_gradients, _ = _gradients(policy, rows, everything, share="all")
    assert shared_loss == pytest.approx(plain, rel=1e-5)
    for name, gradient in gradients.items():
        assert (gradient - shared_gradients[name]).norm() < 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("own_head", [False, True])
def test_documents_that_run_alone_draw_the_same_when_a_step_is_repeated(own_head: bool) -> None:
    model = toy_model("bloom")
    adapter = AdapterConfig(adapter="lora", lora_r=4, lora_target_linear=True, lora_dropout=0.3)
    policy = Policy(model, add_lora(model, adapter, seed=0), flat=False, own_head=own_head).train()
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    rows = _pairs()
    passes = [[index] for index in range(len(rows))]
    before = torch.random.get_rng_state()
    loss, gradients, _ = _gradients(policy, rows, passes, share="")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, recomputed, _ = _gradients(policy, rows, passes, share="")
    assert again == loss
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient)
    policy.eval()
    assert abs(_gradients(policy, rows, passes, share="")[0] - loss) > 1e-4 * loss  # something is dropped
