"""The server as OpenAI's own client sees it, and as one sees it who knows no manners."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from luthier.generate.engine import Engine
from luthier.generate.sampling import Sampling
from luthier.models.assemble import open_for_inference
from luthier.models.several import Several
from luthier.serve.service import Limits
from tests.serve.conftest import Running

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=running.api, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path], toy_tokenizer: Any) -> Callable[..., Any]:
    """What a model says by itself, opened and asked without a server."""
    ends = [*map(toy_tokenizer.convert_tokens_to_ids, ("<|endoftext|>", "<|im_end|>"))]
    engines = {}
    for name, path in folders.items():
        model, tokenizer, _ = open_for_inference(str(path))
        engines[name] = Engine(model, tokenizer, ends)

    def ask(name: str, prompt: str, **more: Any) -> Any:
        ids = toy_tokenizer(prompt)["input_ids"]
        [answer] = engines[name].generate([ids], Sampling(do_sample=False, **({"max_new_tokens": 12} | more)))
        return answer

    return ask


def in_template(tokenizer: Any, *messages: tuple[str, str]) -> str:
    said = [{"role": role, "content": content} for role, content in messages]
    return str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))


def test_chat(client: openai.OpenAI, alone: Callable[..., Any], toy_tokenizer: Any) -> None:
    turns = [("system", "Be brief."), ("user", "one"), ("assistant", "two"), ("user", "three")]
    messages: Any = [{"role": role, "content": content} for role, content in turns]
    answer = client.chat.completions.create(model="chat", messages=messages, **GREEDY)
    expected = alone("chat", in_template(toy_tokenizer, *turns))
    [choice] = answer.choices
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == expected.finish_reason
    assert answer.model == "chat"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_ids)
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.total_tokens == len(expected.prompt_ids) + len(expected.token_ids)


def test_streams(client: openai.OpenAI, alone: Callable[..., Any], toy_tokenizer: Any) -> None:
    messages: Any = [{"role": "user", "content": "tell me"}]
    chunks = list(
        client.chat.completions.create(
            model="base", messages=messages, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    expected = alone("base", in_template(toy_tokenizer, ("user", "tell me")))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == expected.finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(expected.token_ids)
    assert {c.usage for c in chunks[:-1]} == {None}
    assert len({c.id for c in chunks}) == 1
    plain = list(client.chat.completions.create(model="base", messages=messages, stream=True, **GREEDY))
    assert all(c.choices for c in plain)


def test_completions(client: openai.OpenAI, alone: Callable[..., Any], toy_tokenizer: Any) -> None:
    ids = toy_tokenizer("The quick")["input_ids"]
    expected = [alone("chat", text).text for text in ("The quick", "0 1 2")]
    answer = client.completions.create(model="chat", prompt=["The quick", "0 1 2"], **GREEDY)
    assert [choice.text for choice in answer.choices] == expected
    assert client.completions.create(model="chat", prompt=ids, **GREEDY).choices[0].text == expected[0]
    pieces = client.completions.create(model="chat", prompt="0 1 2", stream=True, **GREEDY)
    assert "".join(piece.choices[0].text for piece in pieces) == expected[1]


def test_a_run_is_asked_in_its_own_format(client: openai.OpenAI, alone: Callable[..., Any]) -> None:
    system_text: Any = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Add 1 and 2."}]
    answer = client.chat.completions.create(model="alpaca", messages=system_text, **GREEDY)
    prompt = "### System:\nBe kind.\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:"
    assert answer.choices[0].message.content == alone("alpaca", prompt).text
    turns: Any = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    with pytest.raises(openai.BadRequestError, match="single instructions and knows no earlier turns"):
        client.chat.completions.create(model="alpaca", messages=turns)


def test_a_model_without_a_template_completes_only(several: Several, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.serve.errors import ApiError
    from luthier.serve.requests import read_chat, read_text
    from luthier.serve.served import Served

    monkeypatch.setattr(several.tokenizer_of("base"), "chat_template", None)
    served = Served(several, "base", 1000, None)
    with pytest.raises(ApiError, match="no chat template: ask it at /v1/completions"):
        served.rows(read_chat({"model": "base", "messages": [{"role": "user", "content": "x"}]}))
    assert served.rows(read_text({"model": "base", "prompt": "x"}))


def test_runs_of_other_kinds(several: Several, toy_tokenizer: Any) -> None:
    """Raw text with a template still there; pairs of conversations; single questions in another format."""
    from dataclasses import replace

    from luthier.config import Config
    from luthier.serve.errors import ApiError
    from luthier.serve.requests import read_chat
    from luthier.serve.served import Served

    one: Any = [{"role": "user", "content": "x"}]
    more: Any = [*one, {"role": "assistant", "content": "y"}, *one]
    kinds: dict[str, dict[str, Any]] = {
        "chat": {"datasets": [{"path": "d", "type": "completion"}]},
        "base": {"rl": "dpo", "datasets": [{"path": "d", "type": "chat_template.default"}]},
        "alpaca": {"datasets": [{"path": "d", "type": "alpaca_chat.load_qa"}]},
    }
    for name, keys in kinds.items():
        run = Config.from_flat({"base_model": "b", **keys})
        other = Several(several.model, [replace(several.targets[name], run=run)], several.speakers)
        served = Served(other, name, 1000, None)
        ids = served.rows(read_chat({"model": name, "messages": one}))[0].prompt_ids
        if name == "alpaca":
            assert toy_tokenizer.decode(ids).endswith("USER: x\nASSISTANT:")
            with pytest.raises(ApiError, match="single instructions"):
                served.rows(read_chat({"model": name, "messages": more}))
        else:
            assert toy_tokenizer.decode(ids) == in_template(toy_tokenizer, ("user", "x"))
            assert len(served.rows(read_chat({"model": name, "messages": more}))[0].prompt_ids) > len(ids)


def test_requests_that_ask_alike_share_their_choice(several: Several) -> None:
    from luthier.serve.requests import read_text
    from luthier.serve.served import Served

    served = Served(several, "base", 1000, None)

    def row(**more: Any) -> Any:
        return served.rows(read_text({"model": "base", "prompt": "x", **more}))[0]

    first = row(temperature=0.7, seed=1, max_tokens=3)
    assert row(temperature=0.7, seed=2, stop="x", max_tokens=9).chooser is first.chooser
    assert row(temperature=0.8).chooser is not first.chooser
    assert row(temperature=0.7, top_k=5).chooser is not first.chooser
    read = row(temperature=0.7, repetition_penalty=1.5)  # looks at what its own text has so far
    assert read.chooser is not row(temperature=0.7, repetition_penalty=1.5).chooser is not first.chooser
    del first
    assert not served._choosers


def test_whole_numbers_are_numbers(running: Running) -> None:
    """What JSON has for 2.0 is 2, and transformers' processors want the first."""
    for fields in ({"temperature": 2}, {"temperature": 0.5, "repetition_penalty": 2}, {"temperature": 1, "top_p": 1}):
        texts = []
        for kind in (int, float):
            whole = {name: kind(value) if value == int(value) else value for name, value in fields.items()}
            body = {"model": "base", "prompt": "x", "seed": 1, "max_tokens": 6, **whole}
            answer = httpx.post(f"{running.api}/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            texts.append(answer.json()["choices"][0]["text"])
        assert texts[0] == texts[1]


def test_several_answers_stops_and_seeds(
    client: openai.OpenAI, alone: Callable[..., Any], toy_tokenizer: Any
) -> None:
    messages: Any = [{"role": "user", "content": "more"}]
    sampled: dict[str, Any] = dict(model="chat", messages=messages, n=3, temperature=1.5, max_tokens=8)
    first, second, other = (
        [choice.message.content for choice in client.chat.completions.create(**sampled, seed=seed).choices]
        for seed in (1, 1, 2)
    )
    assert first == second != other
    assert len(set(first)) > 1
    streamed = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(**sampled, seed=1, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == first
    whole = alone("chat", in_template(toy_tokenizer, ("user", "more"))).text
    stop = whole[3:5]
    cut = client.chat.completions.create(model="chat", messages=messages, stop=stop, **GREEDY)
    assert cut.choices[0].message.content == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    pieces = list(client.chat.completions.create(model="chat", messages=messages, stop=[stop], stream=True, **GREEDY))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].choices[0].finish_reason == "stop"
    short = client.chat.completions.create(model="chat", messages=messages, temperature=0, max_completion_tokens=2)
    assert short.choices[0].finish_reason == "length"
    assert short.usage is not None
    assert short.usage.completion_tokens == 2


def test_adapters_at_once(running: Running, alone: Callable[..., Any], toy_tokenizer: Any) -> None:
    """Many streams of all models at the same time, from the asynchronous client."""

    async def one(client: openai.AsyncOpenAI, name: str, prompt: str) -> str:
        stream = await client.completions.create(model=name, prompt=prompt, stream=True, **GREEDY)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def every(asked: list[tuple[str, str]]) -> list[str]:
        async with openai.AsyncOpenAI(base_url=running.api, api_key="none") as client:
            return await asyncio.gather(*(one(client, *each) for each in asked))

    asked = [(name, f"say {n}") for n in range(10) for name in ("chat", "base", "alpaca")]
    assert asyncio.run(every(asked)) == [alone(*each).text for each in asked]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "chat", "alpaca"]
    assert client.models.retrieve("chat").owned_by == "luthier"
    with pytest.raises(openai.NotFoundError, match="there is: base, chat, alpaca"):
        client.models.retrieve("other/name")
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found"


def test_what_the_client_gets_to_see_of_a_mistake(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "x"}]
    with pytest.raises(openai.BadRequestError, match="response_format: not supported") as caught:
        client.chat.completions.create(model="chat", messages=messages, response_format={"type": "json_object"})
    assert caught.value.param == "response_format"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="chat", prompt="x " * 600)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="is empty"):
        client.completions.create(model="chat", prompt="")
    with pytest.raises(openai.BadRequestError, match="999 is no token"):
        client.completions.create(model="chat", prompt=[1, 999])


def test_a_key(start: Callable[..., Running]) -> None:
    guarded = start(api_key="secret")
    for given in (None, "Bearer wrong", "secret", b"Bearer \xff"):
        headers: Any = {} if given is None else {"Authorization": given}
        for method, path in (("GET", "models"), ("POST", "completions"), ("POST", "chat/completions")):
            answer = httpx.request(method, f"{guarded.api}/{path}", headers=headers, json={})
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{guarded.address}/metrics").status_code == 401
    assert httpx.get(f"{guarded.address}/health").status_code == 200
    assert openai.OpenAI(base_url=guarded.api, api_key="secret").models.list().data
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=guarded.api, api_key="Secret").models.list()


def test_limits(start: Callable[..., Running]) -> None:
    small = start(Limits(max_tokens=5, max_body=2000, body_seconds=0.5))
    ask = {"model": "base", "prompt": "x"}
    assert httpx.post(f"{small.api}/completions", json=ask).json()["usage"]["completion_tokens"] <= 5
    over = httpx.post(f"{small.api}/completions", json={**ask, "max_tokens": 6})
    assert (over.status_code, over.json()["error"]["param"]) == (400, "max_tokens")
    for length in (2001, 8001, 500_000):
        answer = httpx.post(f"{small.api}/completions", json={**ask, "prompt": "y" * length})
        assert answer.status_code == 413
        assert "2000 bytes" in answer.json()["error"]["message"]
    in_pieces = (b"z" * 500 for _ in range(10))  # no length is said beforehand
    answer = httpx.post(
        f"{small.api}/completions", content=in_pieces, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413
    host, port = small.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert b" 408 " in slow.recv(1000)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405), ("GET", "/docs", 404)],
)
def test_other_routes(running: Running, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, running.address + path)
    assert answer.status_code == status
    assert answer.json()["error"]["type"]


def test_a_body_of_another_kind(running: Running) -> None:
    """As a web page can have a browser send it."""
    body = json.dumps({"model": "base", "prompt": "x"})
    answer = httpx.post(f"{running.api}/completions", content=body, headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415
    assert "application/json" in answer.json()["error"]["message"]


def test_metrics(start: Callable[..., Running]) -> None:
    own = start()
    answer = httpx.post(f"{own.api}/completions", json={"model": "chat", "prompt": "x", "max_tokens": 3}).json()
    httpx.post(f"{own.api}/completions", json={"model": "none", "prompt": "x"})
    page = httpx.get(f"{own.address}/metrics").text
    figures = {name: float(value) for name, value in re.findall(r"^(luthier\S+) (\S+)$", page, re.MULTILINE)}
    path = 'endpoint="/v1/completions"'
    assert figures[f'luthier_requests_total{{{path},model="chat",status="200"}}'] == 1
    assert figures[f'luthier_requests_total{{{path},model="",status="404"}}'] == 1
    assert figures['luthier_generated_tokens_total{model="chat"}'] == answer["usage"]["completion_tokens"]
    assert figures['luthier_prompt_tokens_total{model="chat"}'] == answer["usage"]["prompt_tokens"]
    assert figures['luthier_first_token_seconds_count{model="chat"}'] == 1
    assert figures['luthier_answer_seconds_count{model="chat"}'] == 1
    assert (figures["luthier_waiting_texts"], figures["luthier_running_texts"]) == (0, 0)


def test_a_field_whose_name_is_no_text(running: Running) -> None:
    body = b'{"model": "base", "prompt": "x", "\\ud800": 1}'
    kind = {"Content-Type": "application/json"}
    answer = httpx.post(f"{running.api}/completions", content=body, headers=kind, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "\\ud800"
