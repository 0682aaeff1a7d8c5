"""`luthier serve` from its command line to its end."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from luthier.cli import main
from luthier.serve import command as command_module
from luthier.serve.server import address_of, is_loopback, listen

BASE = Path(__file__).resolve().parents[2] / "luthier" / "demo" / "base_model"


@pytest.fixture
def started(folders: dict[str, Path]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and where it listens."""
    arguments = ["serve", *map(str, folders.values()), "--port", "0", "--grace", "20", "--name", "b", "--name", "c"]
    process = subprocess.Popen(
        [sys.executable, "-m", "luthier", *arguments, "--name", "a"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "LUTHIER_API_KEY": "from-the-environment", "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            if found := re.fullmatch(r"ready: b, c, a at (http://127\.0\.0\.1:\d+/v1)\n", line):
                break
        else:
            pytest.fail("".join(lines))
        yield process, found[1]
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(20)
        process.stderr.close()


def test_a_shutdown_by_signal(started: tuple[subprocess.Popen[str], str]) -> None:
    """What runs when SIGTERM comes is answered to its end, and the process ends well."""
    process, api = started
    client = openai.OpenAI(base_url=api, api_key="from-the-environment", max_retries=0)
    assert httpx.get(f"{api}/models").status_code == 401
    body: dict[str, Any] = dict(model="c", prompt="x", temperature=1.0, seed=1, n=10, max_tokens=300)
    texts, ends = [""] * 10, [""] * 10
    first = threading.Event()

    def read() -> None:
        for chunk in client.completions.create(**body, stream=True):
            choice = chunk.choices[0]
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason or ""
            first.set()

    expected = [choice.text for choice in client.completions.create(**body).choices]
    reader = threading.Thread(target=read)
    reader.start()
    assert first.wait(30)
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    assert "shutting down; 1 request in progress, 20 seconds at most" in process.stderr.readline()
    with pytest.raises(openai.InternalServerError, match="shutting down"):  # a 503
        client.completions.create(model="c", prompt="x")
    reader.join(60)
    assert texts == expected
    assert all(ends)
    assert process.wait(30) == 0
    assert process.stderr.read() == "stopped\n"


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ([str(BASE), "--name", "a", "--name", "b", "--port", "0"], 2, "2 names for 1 model:"),
        ([str(BASE), "--name", "", "--port", "0"], 2, "a name is empty"),
        ([str(BASE), str(BASE), "--port", "0"], 2, "two models are called 'base_model': name them all"),
        ([__file__, "--port", "0"], 1, "is a file: give the folder"),
        (["/nothing/here", "--port", "0"], 1, "/nothing/here"),
        ([str(BASE), "--api-key", ""], 2, "the API key must be"),
        ([str(BASE), "--api-key", "two words"], 2, "the API key must be"),
        ([str(BASE), "--host", "203.0.113.7", "--port", "0"], 1, "cannot listen on 203.0.113.7"),
        ([str(BASE), "--port", "70000"], 2, "less than or equal to 65535"),
    ],
)
def test_what_cannot_be_served(
    arguments: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *arguments]) == status
    assert says in capsys.readouterr().err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        assert main(["serve", str(BASE), "--port", str(taken.getsockname()[1])]) == 1
    assert "--port 0 takes a free one" in capsys.readouterr().err


def test_without_the_packages(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_module, "find_spec", lambda name: None if name == "fastapi" else object())
    assert main(["serve", str(BASE)]) == 2
    assert "luthier serve needs fastapi: pip install 'luthier[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "level"), [(None, logging.WARNING), ("secret", logging.INFO)])
def test_more_than_loopback_is_said(
    key: str | None, level: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Ends:
        def run(self, sockets: list[socket.socket]) -> None:
            pass

    monkeypatch.setattr("luthier.serve.server.server_of", lambda *args: Ends())
    with caplog.at_level(logging.INFO, "luthier"):
        command_module.command([str(BASE)], host="0.0.0.0", port=0, api_key=key)
    [record] = [record for record in caplog.records if "open to everyone" in record.message]
    assert record.levelno == level
    assert ("there is no key" in record.message) == (key is None)


def test_addresses() -> None:
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("::")
    with listen("localhost", 0) as sock:
        assert is_loopback(sock.getsockname()[0])
        assert re.fullmatch(r"http://(127\.0\.0\.1|\[::1\]):\d+", address_of(sock))
