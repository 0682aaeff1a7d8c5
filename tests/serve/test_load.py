"""Hundreds of streams at once, among clients that leave and bodies that are none: everybody gets an own answer."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from luthier.generate.engine import Engine
from luthier.generate.sampling import Sampling
from luthier.models.assemble import open_for_inference
from luthier.serve.service import Limits
from tests.serve.conftest import Running

NAMES = ("base", "chat", "alpaca")
NEW = 8


def expected(folders: dict[str, Path], tokenizer: Any, asked: list[tuple[str, str]]) -> list[str]:
    """By each model alone, without a server."""
    ends = [*map(tokenizer.convert_tokens_to_ids, ("<|endoftext|>", "<|im_end|>"))]
    texts: dict[int, str] = {}
    for name in NAMES:
        model, tokenizer, _ = open_for_inference(str(folders[name]))
        own = [at for at, (other, _) in enumerate(asked) if other == name]
        answers = Engine(model, tokenizer, ends).generate(
            [tokenizer(asked[at][1])["input_ids"] for at in own], Sampling(max_new_tokens=NEW, do_sample=False)
        )
        texts |= {at: answer.text for at, answer in zip(own, answers, strict=True)}
    return [texts[at] for at in range(len(asked))]


async def load(running: Running, asked: list[tuple[str, str]], patient: Callable[[int], bool]) -> list[str | None]:
    rng = random.Random(0)
    limit = running.service.limits.max_body

    async def stream(client: openai.AsyncOpenAI, at: int) -> str | None:
        name, prompt = asked[at]
        await asyncio.sleep(rng.random())
        chunks = await client.completions.create(
            model=name, prompt=prompt, temperature=0, max_tokens=NEW if patient(at) else 400, stream=True
        )
        text = ""
        async for chunk in chunks:
            text += chunk.choices[0].text
            if not patient(at):
                await chunks.close()
                return None
        return text

    async def nonsense(client: httpx.AsyncClient, body: bytes) -> None:
        await asyncio.sleep(rng.random())
        headers = {"Content-Type": "application/json"}
        answer = await client.post(f"{running.api}/completions", content=body, headers=headers)
        assert answer.status_code in (400, 413, 404), answer.text
        assert answer.json()["error"]["message"]

    bodies = [b"{", b"\x00\xff" * 50, b'{"model": "none", "prompt": "x"}', b'{"a": "' + b"x" * limit + b'"}', b""]
    async with (
        httpx.AsyncClient(timeout=120) as http,
        openai.AsyncOpenAI(base_url=running.api, api_key="x", max_retries=0, timeout=120) as client,
    ):
        rude = [nonsense(http, body) for body in bodies * (len(asked) // 30)]
        texts = await asyncio.gather(*(stream(client, at) for at in range(len(asked))), *rude)
    return list(texts[: len(asked)])


@pytest.mark.parametrize("streams", [210, pytest.param(900, marks=pytest.mark.slow)])
def test_everybody_gets_an_own_answer(
    streams: int, start: Callable[..., Running], folders: dict[str, Path], toy_tokenizer: Any
) -> None:
    running = start(Limits(max_body=20_000), cached=3000)  # room for a part of them: texts leave and come back
    rng = random.Random(streams)
    shared = "The quick brown fox jumps over the lazy dog; "  # beginnings are copied between texts
    asked = [
        (NAMES[at % 3], shared * (at % 2) + f"{at} " + "".join(rng.choices("abcde ", k=at % 20)))
        for at in range(streams)
    ]
    right = expected(folders, toy_tokenizer, asked)
    assert len(set(right)) > streams // 2

    def patient(at: int) -> bool:
        return at % 7 != 3

    found = asyncio.run(load(running, asked, patient))
    wrong = [at for at in range(streams) if patient(at) and found[at] != right[at]]
    assert not wrong, (wrong, asked[wrong[0]], found[wrong[0]], right[wrong[0]])
    service, loop = running.service, running.service.worker.loop
    end = time.monotonic() + 20
    while service.busy or service.worker._live or loop.waiting or loop.running:  # type: ignore[attr-defined]
        assert time.monotonic() < end
        time.sleep(0.01)
    assert not service.unstarted
    assert not service.worker._begun
    assert httpx.get(f"{running.address}/health").json() == {"status": "ok", "waiting": 0, "running": 0}
