"""The loop for models that take no flat passes."""

from __future__ import annotations

import random
from typing import Any

from luthier.generate.engine import Engine, why_not_continuous
from luthier.generate.sampling import Sampling


def some_prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(4, 260) for _ in range(length)] for length in lengths]


def shapes_of(model: Any, engine: Engine, prompts: list[list[int]], new_tokens: int) -> list[tuple[int, int]]:
    shapes: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        engine.generate(prompts, Sampling(max_new_tokens=new_tokens, do_sample=False))
    finally:
        hook.remove()
    return shapes


def test_batches_keep_to_the_budget_and_are_of_one_length(llama: Any, byte_tokenizer: Any) -> None:
    assert "whole documents only" in why_not_continuous(llama)  # its own attention
    prompts = some_prompts((5,) * 30 + (7,) * 10 + (80,) * 3)
    engine = Engine(llama, byte_tokenizer, [], max_cached_tokens=200)
    prefills = [(rows, width) for rows, width in shapes_of(llama, engine, prompts, 5) if width > 1]
    assert sum(rows * width for rows, width in prefills) == sum(map(len, prompts))
    assert all(rows * (width + 5) <= 200 for rows, width in prefills)
    assert max(rows for rows, _ in prefills) == 20


def test_ended_rows_leave_the_batch(llama: Any, byte_tokenizer: Any) -> None:
    prompts = some_prompts((6,) * 8)
    completions = Engine(llama, byte_tokenizer, []).generate(prompts, Sampling(max_new_tokens=30))
    answers = [one.token_ids for one in completions]
    terminators = [answer[4] for answer in answers[:7] if answer[4] not in answers[7]]
    rows = [rows for rows, _ in shapes_of(llama, Engine(llama, byte_tokenizer, terminators), prompts, 30)]
    assert rows[0] == 8
    assert rows[-1] < 4


def test_a_row_that_comes_later_and_one_that_is_taken_back(llama: Any, byte_tokenizer: Any) -> None:
    engine = Engine(llama, byte_tokenizer, [])
    sampling = Sampling(max_new_tokens=6, do_sample=False)
    rows = engine.rows(some_prompts((4, 4, 9)), sampling)
    expected = [one.token_ids for one in engine.generate(some_prompts((4, 4, 9)), sampling)]
    loop = engine.loop()
    loop.submit(rows[:2])
    loop.step()
    loop.submit(rows[2:])
    loop.cancel(rows[1])
    while stepped := loop.step():
        assert rows[1] not in stepped
    assert [row.token_ids for row in rows] == [expected[0], expected[1][:1], expected[2]]
