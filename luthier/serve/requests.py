"""From the body of a request to what is asked for, with nothing passed over.

A field that would change the answer and is not done here is an error that names it, unless it has the value that
changes nothing; so is a field that OpenAI's interface does not have. Only what says who is asking, and for what bill,
is taken and not looked at.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from luthier.errors import ConfigError
from luthier.generate.sampling import Sampling
from luthier.serve.errors import bad

MAX_CHOICES = 128  # answers to one request: its prompts times n
MAX_STOPS = 32

_SAMPLING = frozenset({"n", "seed", "stop", "temperature", "top_p", "top_k", "repetition_penalty", "max_tokens"})
_COMMON = _SAMPLING | {"model", "stream", "stream_options"}
_CHAT = _COMMON | {"messages", "max_completion_tokens"}
_TEXT = _COMMON | {"prompt"}
# Who asks, and how that is billed and stored: no part of an answer.
_NOT_OF_THE_ANSWER = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    }
)
# What is not done here -> the values beside null that ask for nothing.
_NOT_HERE: dict[str, tuple[Any, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}
_ROLES = ("system", "developer", "user", "assistant")

Message = dict[str, str]


@dataclass(frozen=True)
class Asked:
    """A request. `messages` of a chat, `prompts` (texts, or token ids) otherwise; `n` answers to each prompt."""

    model: str
    sampling: Sampling
    messages: list[Message] | None = None
    prompts: list[str] | list[list[int]] | None = None
    n: int = 1
    stream: bool = False
    include_usage: bool = False

    @property
    def choices(self) -> int:
        return self.n * (1 if self.prompts is None else len(self.prompts))


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a body."""
    try:
        found = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # a text that is no UTF-8 is a ValueError too
        raise bad(f"the body is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise bad("the body must be a JSON object")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def read_chat(body: Mapping[str, Any]) -> Asked:
    """A request to /v1/chat/completions."""
    common = _common(body, _CHAT)
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise bad("messages: a list of messages is needed", "messages")
    messages = [_message(message, f"messages[{at}]") for at, message in enumerate(given)]
    if messages[-1]["role"] != "user":
        raise bad("messages: the last one must be the user's, which is answered", "messages")
    return _checked(Asked(messages=messages, **common))


def read_text(body: Mapping[str, Any]) -> Asked:
    """A request to /v1/completions."""
    common = _common(body, _TEXT)
    prompt = body.get("prompt")
    if isinstance(prompt, str) or _is_ids(prompt):
        prompt = [prompt]
    texts = isinstance(prompt, list) and all(isinstance(one, str) for one in prompt)
    if not prompt or not (texts or (isinstance(prompt, list) and all(map(_is_ids, prompt)))):
        raise bad("prompt: a text, token ids, or a list of either is needed", "prompt")
    if texts:
        for one in prompt:
            _check_text(one, "prompt")
    return _checked(Asked(prompts=prompt, **common))


def _checked(asked: Asked) -> Asked:
    if asked.choices > MAX_CHOICES:
        raise bad(f"n: {asked.choices} answers in one request; at most {MAX_CHOICES}", "n")
    return asked


def _common(body: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    _refuse(body, known)
    field = _Fields(body)
    model = field.take("model", "a text", lambda v: isinstance(v, str))
    if model is None:
        raise bad("model: missing", "model")
    most, other = field.number("max_tokens", whole=True), field.number("max_completion_tokens", whole=True)
    if most is not None and other is not None and most != other:
        raise bad("max_tokens and max_completion_tokens say different things: leave one out", "max_tokens")
    n = field.number("n", whole=True)
    if n is not None and not 1 <= n <= MAX_CHOICES:
        raise bad(f"n: {n}; it must be 1 to {MAX_CHOICES}", "n")
    stream = field.flag("stream")
    options = field.take("stream_options", "an object", lambda v: isinstance(v, dict)) or {}
    if options and not stream:
        raise bad("stream_options: only with stream: true", "stream_options")
    # Padding of chunks against listeners is of no use without encryption, and changes no text.
    if unknown := set(options) - {"include_usage", "include_obfuscation"}:
        raise bad(f"stream_options.{min(unknown)}: unknown", "stream_options")
    try:
        sampling = Sampling(
            max_new_tokens=most if other is None else other,
            temperature=field.number("temperature"),
            top_p=field.number("top_p"),
            top_k=field.number("top_k", whole=True),
            repetition_penalty=field.number("repetition_penalty"),
            stop=_stops(body.get("stop")),
            seed=field.number("seed", whole=True),
        )
    except ConfigError as error:
        text = str(error).replace("max_new_tokens", "max_tokens" if other is None else "max_completion_tokens")
        raise bad(text, next((name for name in sorted(known) if re.search(rf"\b{name}\b", text)), None)) from error
    usage = _Fields(options).flag("include_usage")
    return {"model": model, "sampling": sampling, "n": n or 1, "stream": stream, "include_usage": usage}


def _refuse(body: Mapping[str, Any], known: frozenset[str]) -> None:
    unknown = sorted(set(body) - known - _NOT_OF_THE_ANSWER - set(_NOT_HERE))
    if unknown:
        raise bad(f"unrecognized request arguments: {', '.join(unknown)}", unknown[0], "unknown_parameter")
    for name, harmless in _NOT_HERE.items():
        value = body.get(name)
        if value is None or any(type(value) is type(one) and value == one for one in harmless):
            continue
        if name == "best_of" and value == body.get("n"):
            continue
        raise bad(f"{name}: not supported by this server; leave it out", name, "unsupported_parameter")


class _Fields:
    """Values of a body, checked one by one; null is as good as absent."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.body = body

    def take(self, name: str, what: str, fits: Callable[[Any], bool]) -> Any:
        value = self.body.get(name)
        if value is not None and not fits(value):
            raise bad(f"{name}: must be {what}", name)
        return value

    def number(self, name: str, whole: bool = False) -> Any:
        kinds = int if whole else (int, float)

        def fits(value: Any) -> bool:
            if isinstance(value, bool) or not isinstance(value, kinds):
                return False
            return abs(value) < 2**63 and math.isfinite(value)

        return self.take(name, "a whole number" if whole else "a number", fits)

    def flag(self, name: str) -> bool:
        return bool(self.take(name, "true or false", lambda value: isinstance(value, bool)))


def _stops(given: Any) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(stops, list) or not all(isinstance(one, str) for one in stops) or len(stops) > MAX_STOPS:
        raise bad(f"stop: must be a text or a list of at most {MAX_STOPS} texts", "stop")
    for one in stops:
        _check_text(one, "stop")
    return tuple(stops)


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, dict):
        raise bad(f"{where}: must be an object", "messages")
    role = given.get("role")
    if role not in _ROLES:
        raise bad(f"{where}.role: {role!r} is none of {', '.join(_ROLES)}", "messages")
    for name, value in given.items():
        # Clients send an answer back as they got it, with fields that say nothing.
        if name not in ("role", "content") and value not in (None, [], {}, ""):
            raise bad(f"{where}.{name}: not supported by this server; leave it out", "messages")
    content = given.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{at}]") for at, part in enumerate(content))
    if not isinstance(content, str):
        raise bad(f"{where}.content: must be a text, or a list of parts of text", "messages")
    _check_text(content, f"{where}.content")
    return {"role": "system" if role == "developer" else role, "content": content}


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise bad(f"{where}: only text is understood, not {kind}", "messages")
    return str(part["text"])


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a pair of surrogates, which JSON can write
        raise bad(f"{where}: no valid text: {error.reason}", where.partition("[")[0]) from error


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)
