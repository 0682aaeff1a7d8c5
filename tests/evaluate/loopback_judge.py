"""A server on this machine that speaks as much of the chat API as a judge needs, and misbehaves as told."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Asked:
    """One request: what was asked, by which rules, and when; `answered` once a whole response has gone out."""

    question: str
    first: str
    second: str
    request: dict[str, Any]
    headers: dict[str, str]
    time: float
    answered: bool = False


@dataclass
class Say:
    """What to answer with. `body`: the raw response; else `content` in the frame of a completion."""

    content: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    usage: tuple[int, int] | None = (100, 20)
    promise: int | None = None  # bytes that Content-Length claims
    hang_up: bool = False
    finish_reason: str = "stop"


def verdict(choice: Any, argument: str = "because") -> Say:
    return Say(json.dumps({"argument": argument, "choice": choice}))


def longer(asked: Asked) -> Say:
    """A judge with a rule: the longer answer is better."""
    first, second = len(asked.first), len(asked.second)
    return verdict(0 if first == second else 1 if first > second else 2)


class LoopbackJudge:
    """`behave(number, asked)` decides about each request, counted from 1. `asked`: all of them."""

    def __init__(self) -> None:
        self.behave: Callable[[int, Asked], Say] = lambda number, asked: longer(asked)
        self.asked: list[Asked] = []
        self._lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                judge.handle(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1#rule-1"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def orders(self) -> list[tuple[str, str, str]]:
        """(question, first, second) of every request, in the order in which they came."""
        return [(each.question, each.first, each.second) for each in self.asked]

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        import time

        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        (message,) = request["messages"]
        parts = [
            re.search(f"<{tag}>\n(.*?)\n</{tag}>", message["content"], re.DOTALL)[1]  # type: ignore[index]
            for tag in ("question", "answer_1", "answer_2")
        ]
        asked = Asked(*parts, request=request, headers=dict(handler.headers), time=time.monotonic())
        with self._lock:
            self.asked.append(asked)
            number = len(self.asked)
        say = self.behave(number, asked)
        if say.hang_up:
            handler.connection.shutdown(2)
            return
        body = say.body
        if body is None:
            choice = {"message": {"role": "assistant", "content": say.content}, "finish_reason": say.finish_reason}
            response: dict[str, Any] = {"model": request["model"], "choices": [choice]}
            if say.usage is not None:
                response["usage"] = dict(zip(("prompt_tokens", "completion_tokens"), say.usage, strict=True))
            body = json.dumps(response).encode()
        try:
            handler.send_response(say.status)
            for name, value in say.headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(body) if say.promise is None else say.promise))
            handler.end_headers()
            handler.wfile.write(body)
            asked.answered = True
        except OSError:  # the client has left
            pass
