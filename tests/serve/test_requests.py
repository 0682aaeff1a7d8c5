"""Bodies of requests: what is taken, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from luthier.serve.errors import ApiError
from luthier.serve.requests import MAX_CHOICES, parse, read_chat, read_text

ASK = [{"role": "user", "content": "hello"}]


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": ASK, **more}


def text(**more: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "hello", **more}


def refused(call: Any, *args: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(*args)
    assert caught.value.status == 400
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    return caught.value


def test_what_asks_for_nothing_is_taken() -> None:
    """What clients send by habit."""
    asked = read_chat(
        chat(
            n=None,
            stop=None,
            tools=[],
            tool_choice="auto",
            logprobs=False,
            response_format={"type": "text"},
            frequency_penalty=0.0,
            presence_penalty=0,
            logit_bias={},
            user="me",
            metadata={"a": "b"},
            store=True,
        )
    )
    assert asked.n == 1
    assert asked.messages == ASK
    assert read_text(text(best_of=3, n=3, echo=False, suffix="", logprobs=None)).choices == 3


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True},
        {"top_logprobs": 2},
        {"logit_bias": {"5": 1}},
        {"frequency_penalty": 0.5},
        {"presence_penalty": -1},
        {"reasoning_effort": "high"},
        {"audio": {"voice": "x"}},
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(field: dict[str, Any]) -> None:
    error = refused(read_chat, chat(**field))
    assert error.param == next(iter(field))
    assert f"{error.param}: not supported" in error.message


@pytest.mark.parametrize("field", [{"echo": True}, {"logprobs": 0}, {"best_of": 4}, {"suffix": "x"}])
def test_of_completions_too(field: dict[str, Any]) -> None:
    """`logprobs: 0` of a completion asks for the log-prob of what was written; it is no `false`."""
    assert refused(read_text, text(**field)).param == next(iter(field))


def test_unknown_fields_are_named_together() -> None:
    error = refused(read_chat, chat(temprature=1, zzz=2))
    assert error.message == "unrecognized request arguments: temprature, zzz"
    assert error.code == "unknown_parameter"
    assert refused(read_chat, chat(prompt="x")).param == "prompt"
    assert refused(read_text, text(messages=ASK)).param == "messages"


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ({"temperature": "1"}, "temperature: must be a number"),
        ({"temperature": True}, "temperature: must be a number"),
        ({"temperature": -1}, "temperature must be 0"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"temperature": 1e-40}, "temperature must be 0 .greedy. or at least"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty must be 0.01 to 100"),
        ({"repetition_penalty": 1e9}, "repetition_penalty must be 0.01 to 100"),
        ({"max_tokens": 0}, " max_tokens must be at least 1"),
        ({"max_completion_tokens": 0}, "max_completion_tokens must be at least 1"),
        ({"max_tokens": 1.5}, "max_tokens: must be a whole number"),
        ({"max_tokens": 10**400}, "max_tokens: must be a whole number"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "different things"),
        ({"n": 0}, "n: 0"),
        ({"n": MAX_CHOICES + 1}, f"must be 1 to {MAX_CHOICES}"),
        ({"seed": "x"}, "seed: must be a whole number"),
        ({"stop": [1]}, "stop: must be a text"),
        ({"stop": [""]}, "a stop string is empty"),
        ({"stop": ["x"] * 33}, "at most 32"),
        ({"stream": 1}, "stream: must be true or false"),
        ({"stream_options": {"include_usage": True}}, "only with stream: true"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other: unknown"),
        ({"stream": True, "stream_options": []}, "stream_options: must be an object"),
        ({"model": None}, "model: missing"),
        ({"model": 5}, "model: must be a text"),
        ({"messages": []}, "a list of messages is needed"),
        ({"messages": "hello"}, "a list of messages is needed"),
        ({"messages": ["hello"]}, r"messages\[0\]: must be an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'tool' is none of"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "is none of"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content: must be a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text is understood, not image"),
        ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, r"messages\[0\].name: not supported"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "no valid text"),
        ({"messages": [*ASK, {"role": "assistant", "content": "so"}]}, "must be the user's"),
    ],
)
def test_malformed_fields(field: dict[str, Any], says: str) -> None:
    with pytest.raises(ApiError, match=says) as found:
        read_chat(chat(**field))
    assert found.value.param in field


@pytest.mark.parametrize("prompt", [None, "", [], [[]], [1, "x"], ["x", [1]], [True], {"a": 1}, 7, [1.0]])
def test_malformed_prompts(prompt: Any) -> None:
    if prompt == "":  # a text, though an empty one: whether it can be gone on from, the tokenizer says
        assert read_text(text(prompt=prompt)).prompts == [""]
        return
    assert refused(read_text, text(prompt=prompt)).param == "prompt"


def test_kinds_of_prompts() -> None:
    assert read_text(text(prompt="a")).prompts == ["a"]
    assert read_text(text(prompt=["a", "b"], n=2)).choices == 4
    assert read_text(text(prompt=[1, 2])).prompts == [[1, 2]]
    assert read_text(text(prompt=[[1], [2]])).prompts == [[1], [2]]
    refused(read_text, text(prompt=["a"] * 65, n=2))


def test_parts_and_roles() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": [], "annotations": []},
        {"role": "user", "content": "d"},
    ]
    assert read_chat(chat(messages=messages)).messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b'{"n": NaN}', b"[" * 100_000, b'{"a": 1} x', b"null"]
)
def test_bodies_that_are_no_json_object(body: bytes) -> None:
    refused(parse, body)


def test_a_body_is_what_it_says() -> None:
    assert parse(json.dumps(chat()).encode()) == chat()
