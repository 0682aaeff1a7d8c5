"""Continuous batching against `model.generate` on every prompt alone, whatever the company and the memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from luthier.generate import engine as engine_module
from luthier.generate.continuous import PROMPT_TOKENS, Continuous, common
from luthier.generate.engine import Engine, why_not_continuous
from luthier.generate.sampling import Sampling
from luthier.generate.slots import Slots
from luthier.models import attention
from tests.models.families import ALONE, FAMILIES, OTHERS, toy_model

LENGTHS = (5, 17, 3, 40, 40, 11)


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    attention.register()


def ours(family: str, **changes: Any) -> Any:
    model = toy_model(family, **changes)
    model.generation_config.eos_token_id = None
    model.set_attn_implementation(attention.NAME)
    assert not why_not_continuous(model)
    return model


def some_prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 128) for _ in range(length)] for length in lengths]


def alone(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    ids = torch.tensor([prompt])
    try:
        found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    finally:
        model.set_attn_implementation(before)
    return found[0, len(prompt) :].tolist()


@contextmanager
def passes(model: Any) -> Iterator[list[tuple[int, ...]]]:
    """How many tokens of each text are in each pass."""
    seen: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["document_lengths"]), with_kwargs=True
    )
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
@pytest.mark.parametrize("budget", [16384, 200], ids=["room", "little-room"])
def test_greedy_equals_generate_alone(family: str, budget: int, byte_tokenizer: Any) -> None:
    """With little room texts leave and come back; six of up to 60 tokens do not fit 200."""
    model, prompts = ours(family), some_prompts()
    completions = Engine(model, byte_tokenizer, [], max_cached_tokens=budget).generate(
        prompts, Sampling(max_new_tokens=20, do_sample=False)
    )
    assert [completion.token_ids for completion in completions] == [alone(model, prompt, 20) for prompt in prompts]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_texts_of_very_unequal_length_attend_apart(
    family: str, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = ours(family), some_prompts((90, 3, 4, 3, 5, 4))
    monkeypatch.setattr(Slots, "_mask", lambda *args: pytest.fail("one call with a mask"))
    completions = Engine(model, byte_tokenizer, []).generate(prompts, Sampling(max_new_tokens=8, do_sample=False))
    assert [completion.token_ids for completion in completions] == [alone(model, prompt, 8) for prompt in prompts]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_the_way_of_accelerators_is_the_same(
    family: str, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One masked call for all texts, however unequal."""
    model, prompts = ours(family), some_prompts((90, 3, 4, 17, 5, 4))
    masked: list[bool] = []
    one_call = Slots._mask
    make = Slots.__init__

    def on_an_accelerator(self: Slots, device: torch.device) -> None:
        make(self, device)
        self.one_by_one = False

    monkeypatch.setattr(Slots, "__init__", on_an_accelerator)
    monkeypatch.setattr(Slots, "_mask", lambda self, *args: masked.append(True) or one_call(self, *args))
    completions = Engine(model, byte_tokenizer, []).generate(prompts, Sampling(max_new_tokens=20, do_sample=False))
    assert masked
    assert [completion.token_ids for completion in completions] == [alone(model, prompt, 20) for prompt in prompts]


def test_nothing_is_padded_and_a_shared_beginning_is_read_once(byte_tokenizer: Any) -> None:
    model, template = ours("llama"), some_prompts((30,), seed=5)[0]
    prompts = [[*template, 50 + n, *some_prompts((n,), seed=n)[0]] for n in (1, 4, 11)] + [template]
    with passes(model) as seen:
        Engine(model, byte_tokenizer, []).generate(prompts, Sampling(max_new_tokens=5, do_sample=False))
    read = 42 + 5 + 2 + 1  # the longest one first; the template itself needs its last token's logits
    assert sum(map(sum, seen)) == read + 4 * 4


def test_a_turn_reads_what_is_new(byte_tokenizer: Any) -> None:
    """A conversation: its next prompt begins with the last one and its answer, which a slot still holds."""
    model = ours("llama")
    engine = Engine(model, byte_tokenizer, [])
    loop = engine.loop()
    sampling = Sampling(max_new_tokens=6, do_sample=False)
    [first] = engine.rows(some_prompts((25,)), sampling)
    [other] = engine.rows(some_prompts((12,), seed=9), sampling)
    loop.submit([first, other])
    while loop.step():
        pass
    [second] = engine.rows([[*first.ids, 7, 8, 9]], sampling)
    loop.submit([second])
    with passes(model) as seen:
        while loop.step():
            pass
    assert seen[0] == (4,)  # the answer's last token was given out and never read
    assert second.token_ids == alone(model, second.prompt_ids, 6)


def test_texts_join_and_leave_in_the_middle(byte_tokenizer: Any) -> None:
    model = ours("qwen3")
    engine = Engine(model, byte_tokenizer, [])
    loop = engine.loop()
    assert isinstance(loop, Continuous)
    rows = [
        row
        for prompt, limit in zip(some_prompts(), (9, 2, 14, 5, 7, 3), strict=True)
        for row in engine.rows([prompt], Sampling(max_new_tokens=limit, do_sample=False))
    ]
    cancelled = engine.rows([[5, 6, 7]], Sampling(max_new_tokens=50, do_sample=False))[0]
    loop.submit([*rows[:2], cancelled])
    loop.step()
    loop.submit(rows[2:4])
    loop.step()
    loop.cancel(cancelled)
    loop.submit(rows[4:])
    assert cancelled not in loop.step()
    assert len(cancelled.token_ids) == 2
    while stepped := loop.step():
        assert all(len(row.token_ids) <= row.limit for row in stepped)
    assert [row.token_ids for row in rows] == [alone(model, row.prompt_ids, row.limit) for row in rows]


def test_memory_is_kept_to(byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours("llama")
    sizes: list[int] = []
    resize = Slots.resize

    def watched(self: Slots, slots: int, room: int) -> None:
        sizes.append(slots * room)
        resize(self, slots, room)

    monkeypatch.setattr(Slots, "resize", watched)
    prompts = some_prompts((5,) * 30 + (7,) * 10 + (80,) * 3)
    with passes(model) as seen:
        completions = Engine(model, byte_tokenizer, [], max_cached_tokens=200).generate(
            prompts, Sampling(max_new_tokens=5, do_sample=False)
        )
    assert max(sizes) <= 200
    assert max(map(len, seen)) > 5  # and used
    assert [completion.token_ids for completion in completions] == [alone(model, prompt, 5) for prompt in prompts]


def test_a_pass_reads_so_many_prompt_tokens(byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.generate.continuous.PROMPT_TOKENS", 50)
    model = ours("llama")
    with passes(model) as seen:
        Engine(model, byte_tokenizer, []).generate(some_prompts((40, 60, 20, 20, 5)), Sampling(max_new_tokens=2))
    assert PROMPT_TOKENS > 50
    assert max(sum(length for length in each if length > 1) for each in seen) == 60  # a single one may be longer
    assert any(each[-3:] == (20, 20, 5) for each in seen)


def test_ended_texts_make_room_at_once(byte_tokenizer: Any) -> None:
    model = ours("llama")
    prompts = some_prompts((6,) * 8)
    answers = [alone(model, prompt, 30) for prompt in prompts]
    ends = [answer[4] for answer in answers[:7] if answer[4] not in answers[7]]
    with passes(model) as seen:
        Engine(model, byte_tokenizer, ends).generate(prompts, Sampling(max_new_tokens=30))
    assert len(seen[0]) == 8
    assert len(seen[5]) <= 8 - len(ends)


def test_log_probs_of_the_next_token(byte_tokenizer: Any) -> None:
    model, prompts = ours("gemma2"), some_prompts()
    found: dict[int, list[float]] = {}
    Engine(model, byte_tokenizer, []).next_logps(prompts, [[3, 100, 7]] * len(prompts), found.__setitem__)
    for index, prompt in enumerate(prompts):
        own = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[[3, 100, 7]]
        torch.testing.assert_close(torch.tensor(found[index]), own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ALONE)
def test_families_that_cannot_say_why(family: str) -> None:
    assert why_not_continuous(toy_model(family))


def test_an_attention_that_leaks_is_found_out(byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that see each other's keys: the trial has to notice, and the answers stay right."""
    model = ours("llama")
    written = Slots._written

    def leaking(self: Slots, query: Any, keys: Any, values: Any, *rest: Any) -> Any:
        return written(self, query, keys.roll(1, 0), values, *rest)

    monkeypatch.setattr(Slots, "_written", leaking)
    engine_module._why_not.clear()
    assert "otherwise than alone" in why_not_continuous(model)
    completions = Engine(model, byte_tokenizer, []).generate(some_prompts(), Sampling(max_new_tokens=8))
    assert [one.token_ids for one in completions] == [alone(model, prompt, 8) for prompt in some_prompts()]


def test_memory_is_given_back_after_an_error(byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours("llama")
    engine = Engine(model, byte_tokenizer, [])
    answers = engine.generate(some_prompts(), Sampling(max_new_tokens=4))
    calls = []

    def failing(self: Continuous, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no room")
        return logits(self, *args)

    logits = Continuous.logits
    monkeypatch.setattr(Continuous, "logits", failing)
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate(some_prompts(), Sampling(max_new_tokens=4))
    assert engine.generate(some_prompts(), Sampling(max_new_tokens=4)) == answers


def test_common_beginnings() -> None:
    rng = random.Random(0)
    for _ in range(200):
        one, other = ([rng.randrange(2) for _ in range(rng.randrange(9))] for _ in range(2))
        most = rng.randrange(10)
        expected = next((n for n in range(min(most, len(one), len(other))) if one[n] != other[n]), None)
        assert common(one, other, most) == (min(most, len(one), len(other)) if expected is None else expected)


def test_equal_prompts_that_make_room_for_one_another(byte_tokenizer: Any) -> None:
    """What left and comes back may find its own text in two slots."""
    model, [prompt] = ours("llama"), some_prompts((10,))
    completions = Engine(model, byte_tokenizer, [], max_cached_tokens=120).generate(
        [prompt] * 7, Sampling(max_new_tokens=40, do_sample=False)
    )
    assert {tuple(completion.token_ids) for completion in completions} == {tuple(alone(model, prompt, 40))}
