"""Answers in the shapes of OpenAI's interface: a whole one, and the chunks of a stream."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from luthier.generate.rows import Completion, Row


class Shape:
    """How the answers to one request look; `chat` or plain completions."""

    def __init__(self, model: str, created: int, *, chat: bool, usage: bool = False) -> None:
        self.chat, self._usage = chat, usage
        name = "chatcmpl" if chat else "cmpl"
        self._head = {"id": f"{name}-{uuid.uuid4().hex}", "created": created, "model": model}

    def whole(self, completions: Sequence[Completion], usage: dict[str, int]) -> dict[str, Any]:
        choices = []
        for index, one in enumerate(completions):
            said: dict[str, Any] = {"text": one.text}
            if self.chat:
                said = {"message": {"role": "assistant", "content": one.text, "refusal": None}}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": one.finish_reason})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": usage}

    def opening(self, index: int) -> bytes:
        """The first chunk of a chat's answer, which says whose it is; nothing for plain completions."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None) if self.chat else b""

    def piece(self, index: int, text: str) -> bytes:
        return self._chunk(index, {"content": text}, None)

    def end(self, index: int, finish_reason: str) -> bytes:
        return self._chunk(index, {}, finish_reason)

    def usage(self, usage: dict[str, int]) -> bytes:
        """The last chunk, where it was asked for."""
        return self._event([], usage) if self._usage else b""

    def _chunk(self, index: int, delta: dict[str, str], finish_reason: str | None) -> bytes:
        said: dict[str, Any] = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        return self._event([{"index": index, **said, "logprobs": None, "finish_reason": finish_reason}], None)

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        chunk: dict[str, Any] = {**self._head, "object": kind, "choices": choices}
        if self._usage:
            chunk["usage"] = usage
        return sse(chunk)


def sse(data: dict[str, Any]) -> bytes:
    """An event of a stream (server-sent events)."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


DONE = b"data: [DONE]\n\n"


def usage_of(prompt_tokens: int, rows: Sequence[Row]) -> dict[str, int]:
    written = sum(len(row.token_ids) for row in rows)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
    }
