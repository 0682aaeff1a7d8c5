"""What goes wrong: queues that are full, memory that ends, steps that fail, clients that leave, a server that stops."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
import torch

from luthier.serve.service import Limits
from tests.serve.conftest import Running


def ask(running: Running, prompt: str, **more: Any) -> httpx.Response:
    body = {"model": "base", "prompt": prompt, "temperature": 0, "max_tokens": 6, **more}
    return httpx.post(f"{running.api}/completions", json=body, timeout=60)


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


@contextmanager
def held(running: Running) -> Iterator[None]:
    """Inside, no step is made."""
    loop, gate = running.service.worker.loop, threading.Event()
    step = loop.step

    def wait_first() -> Any:
        gate.wait(30)
        return step()

    loop.step = wait_first  # type: ignore[method-assign]
    try:
        yield
    finally:
        loop.step = step  # type: ignore[method-assign]
        gate.set()


@contextmanager
def slowed(running: Running) -> Iterator[None]:
    """Inside, an answer of 400 tokens takes four seconds or more: what ends sooner has been given up."""
    loop = running.service.worker.loop
    step = loop.step

    def slow() -> Any:
        time.sleep(0.01)
        return step()

    loop.step = slow  # type: ignore[method-assign]
    try:
        yield
    finally:
        loop.step = step  # type: ignore[method-assign]


def written(running: Running) -> float:
    """Tokens of all answers, by the metrics."""
    page = httpx.get(f"{running.address}/metrics").text
    return sum(map(float, re.findall(r"^luthier_generated_tokens_total\S* (\S+)$", page, re.MULTILINE)))


@contextmanager
def failing(running: Running, error: Exception, times: int = 1, texts: int = 1) -> Iterator[None]:
    """Inside, the next passes of so many texts or more fail."""
    loop: Any = running.service.worker.loop
    logits, left = loop.logits, [times]

    def fail_first(*args: Any) -> Any:
        if left[0] and len(loop.running) >= texts:
            left[0] -= 1
            raise error
        return logits(*args)

    loop.logits = fail_first
    try:
        yield
    finally:
        loop.logits = logits


def test_a_fault_of_the_servers_own_is_an_answer_too(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("a fault of some kind")

    served = running.service.model("base")
    monkeypatch.setattr(served, "rows", broken)
    answer = ask(running, "x")
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    until(lambda: "a fault of some kind" in caplog.text)  # behind the answer
    page = httpx.get(f"{running.address}/metrics").text
    assert re.search(r'luthier_requests_total\{endpoint="/v1/completions",model="base",status="500"\} [1-9]', page)
    monkeypatch.undo()
    assert ask(running, "x").status_code == 200


def test_scores_that_are_no_numbers_stay_with_their_text(start: Callable[..., Running]) -> None:
    """A text for which the model overflows gets some token; those that run beside it are as they would be alone."""
    running = start()
    alone = ask(running, "beside it").json()["choices"][0]["text"]
    loop: Any = running.service.worker.loop
    logits = loop.logits

    def overflowing(*args: Any) -> Any:
        found = logits(*args)
        for at, row in enumerate(loop.running):
            if row.chooser.do_sample:
                found[at] = float("nan")
        return found

    loop.logits = overflowing
    try:
        with ThreadPoolExecutor(2) as pool:
            with held(running):
                both = [pool.submit(ask, running, "ill", temperature=1.0), pool.submit(ask, running, "beside it")]
                until(lambda: len(running.service.unstarted) == 2)
            answers = [one.result() for one in both]
    finally:
        loop.logits = logits
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[1].json()["choices"][0]["text"] == alone


def test_a_full_queue(start: Callable[..., Running]) -> None:
    running = start(Limits(max_queue=3))
    with ThreadPoolExecutor(4) as pool:
        with held(running):
            waiting = [pool.submit(ask, running, f"wait {n}") for n in range(3)]
            until(lambda: len(running.service.unstarted) == 3)
            turned_away = ask(running, "too late")
            assert turned_away.status_code == 429
            assert turned_away.json()["error"]["code"] == "queue_full"
            assert int(turned_away.headers["Retry-After"]) > 0
            with pytest.raises(openai.RateLimitError):
                openai.OpenAI(base_url=running.api, api_key="x", max_retries=0).completions.create(
                    model="base", prompt="too late"
                )
        assert [answer.result().status_code for answer in waiting] == [200] * 3
    assert ask(running, "again").status_code == 200
    never = ask(running, "x", n=4)
    assert (never.status_code, "the queue here holds 3" in never.text) == (400, True)


def test_out_of_memory(start: Callable[..., Running]) -> None:
    """What ran gets a 503, what waited its answer."""
    running = start(cached=4096)
    expected = ask(running, "the third").json()["choices"]
    loop: Any = running.service.worker.loop
    loop.clear()
    loop.max_rows = 2
    with ThreadPoolExecutor(3) as pool, failing(running, torch.OutOfMemoryError("no room"), texts=2):
        with held(running):
            answers = []
            for n, prompt in enumerate(("the first", "the second", "the third")):
                answers.append(pool.submit(ask, running, prompt))
                until(lambda n=n: len(running.service.unstarted) == n + 1)  # type: ignore[misc]
        first, second, third = (answer.result() for answer in answers)
    for lost in (first, second):
        assert lost.status_code == 503
        assert lost.json()["error"]["code"] == "memory"
        assert "Retry-After" in lost.headers
    assert third.json()["choices"] == expected
    assert loop.max_cached_tokens == 2048
    assert running.service.worker.healthy
    assert "luthier_lost_answers_total" in httpx.get(f"{running.address}/metrics").text


def test_memory_that_ends_in_the_middle_of_a_stream(start: Callable[..., Running]) -> None:
    running = start()
    client = openai.OpenAI(base_url=running.api, api_key="x", max_retries=0)
    stream = client.completions.create(model="base", prompt="x", temperature=0, max_tokens=400, stream=True)
    iterator = iter(stream)
    next(iterator)
    with failing(running, RuntimeError("CUDA out of memory. Tried to allocate")), pytest.raises(
        openai.APIError, match="out of memory"
    ):
        list(iterator)
    assert ask(running, "again").status_code == 200


def test_a_step_that_fails(start: Callable[..., Running]) -> None:
    running = start()
    with failing(running, RuntimeError("a mistake"), times=3):
        for _ in range(3):
            answer = ask(running, "x")
            assert answer.status_code == 500
            assert "a mistake" not in answer.text  # the log has it
        sick = httpx.get(f"{running.address}/health")
        assert (sick.status_code, sick.json()["status"]) == (503, "failing")
    assert ask(running, "x").status_code == 200
    assert httpx.get(f"{running.address}/health").json() == {"status": "ok", "waiting": 0, "running": 0}


def test_half_of_several_answers(start: Callable[..., Running]) -> None:
    """Where one of a request's answers is lost, the others are not written on."""
    running = start()
    loop: Any = running.service.worker.loop
    loop.max_rows = 2
    with slowed(running):
        with failing(running, torch.OutOfMemoryError("no room")):
            assert ask(running, "x", n=5, max_tokens=300).status_code == 503
        until(lambda: not running.service.busy and not running.service.worker._live)
    assert not loop.waiting
    assert not loop.running
    assert written(running) < 300


def test_clients_that_leave(start: Callable[..., Running]) -> None:
    """While they wait, in the middle of a stream, and while a whole answer is made."""
    running = start()
    service, loop = running.service, running.service.worker.loop

    async def leave(after: int, stream: bool) -> None:
        body = {"model": "base", "prompt": "go on", "temperature": 0, "max_tokens": 450, "stream": stream}
        async with httpx.AsyncClient() as client:
            if not stream:
                with pytest.raises(httpx.ReadTimeout):
                    await client.post(f"{running.api}/completions", json=body, timeout=0.3)
                return
            async with client.stream("POST", f"{running.api}/completions", json=body) as answer:
                async for _ in answer.aiter_lines():
                    after -= 1
                    if after < 0:
                        break

    async def every() -> None:
        await asyncio.gather(*(leave(n, True) for n in range(4)), leave(0, False))

    with slowed(running):
        asyncio.run(every())
        until(lambda: not service.busy and not service.worker._live)
    assert written(running) < 500  # of five answers of 252 tokens, where the model's context ends
    with held(running):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{running.api}/completions", json={"model": "base", "prompt": "x"}, timeout=0.2)
        until(lambda: not service.busy)
    until(lambda: not service.busy and not service.worker._live)
    assert not loop.waiting
    assert not loop.running  # type: ignore[attr-defined]
    assert "luthier_vanished_clients_total 6.0" in httpx.get(f"{running.address}/metrics").text
    assert (service.waiting, service.running) == (0, 0)


def test_memory_is_given_back_when_nobody_asks(start: Callable[..., Running]) -> None:
    running = start(idle_seconds=0.1)
    assert ask(running, "x").status_code == 200
    loop: Any = running.service.worker.loop
    until(lambda: not loop._texts and not loop.slots.lengths)
    assert ask(running, "x").status_code == 200


@pytest.mark.parametrize(("grace", "signals"), [(30.0, 1), (0.0, 1), (30.0, 2)])
def test_a_shutdown(start: Callable[..., Running], grace: float, signals: int) -> None:
    """What runs ends, if there is time for it; what comes is turned away."""
    running = start(grace=grace)
    client = openai.OpenAI(base_url=running.api, api_key="x", max_retries=0)
    body: dict[str, Any] = dict(model="base", prompt="x", temperature=0, max_tokens=300)
    expected = client.completions.create(**body).choices[0]
    stream = iter(client.completions.create(**body, stream=True))
    text = next(stream).choices[0].text
    gate = held(running)
    with gate:
        running.server.handle_exit(15, None)
        until(lambda: running.service.draining)
        if signals == 2:
            running.server.handle_exit(15, None)
            until(lambda: running.server.should_exit)
        elif grace:
            turned_away = ask(running, "y")
            assert turned_away.status_code == 503
            assert turned_away.json()["error"]["code"] == "shutting_down"
            assert httpx.get(f"{running.address}/health").status_code == 503
    if grace and signals == 1:
        pieces = list(stream)
        assert text + "".join(piece.choices[0].text for piece in pieces) == expected.text
        assert pieces[-1].choices[0].finish_reason == expected.finish_reason
    else:
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
    until(lambda: running.server.should_exit)
    until(lambda: not running.service.worker._thread.is_alive())
