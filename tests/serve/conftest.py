"""A server in this process, on a port of its own, with a toy base and two adapters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from luthier.models.several import Several, open_several
from luthier.serve.app import create_app
from luthier.serve.server import address_of, listen, server_of
from luthier.serve.service import Limits, Service
from tests.models.toy_folders import adapter_folder, base_folder


@dataclass
class Running:
    service: Service
    address: str
    server: Any

    @property
    def api(self) -> str:
        return f"{self.address}/v1"


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Any) -> dict[str, Path]:
    """A base with a chat template, an adapter without a run, and a run that was trained on Alpaca's rows."""
    top = tmp_path_factory.mktemp("served")
    base = base_folder(top / "base", "llama", toy_tokenizer)
    chat = adapter_folder(top / "chat", base, 1, r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"])
    alpaca = adapter_folder(top / "alpaca", base, 2, r=2, lora_alpha=4, target_modules=["k_proj", "o_proj"])
    run = f"base_model: {base}\nadapter: lora\ndatasets: [{{path: rows.jsonl, type: alpaca}}]\n"
    (alpaca / "config.yaml").write_text(run, encoding="utf-8")
    return {"base": base, "chat": chat, "alpaca": alpaca}


@pytest.fixture(scope="session")
def several(folders: dict[str, Path]) -> Several:
    return open_several([str(path) for path in folders.values()])


@pytest.fixture(scope="session")
def start(several: Several) -> Iterator[Callable[..., Running]]:
    """Starts servers on the same model; all of them end with the session."""
    ends: list[Callable[[], None]] = []

    def begin(
        limits: Limits | None = None, api_key: str | None = None, cached: int = 16384, grace: float = 5, **more: Any
    ) -> Running:
        service = Service(several, limits or Limits(), cached, **more)
        sock, ready = listen("127.0.0.1", 0), threading.Event()
        server = server_of(create_app(service, api_key), service, grace, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        assert ready.wait(30)

        def end() -> None:
            server.should_exit = True
            thread.join(30)
            sock.close()

        ends.append(end)
        return Running(service, address_of(sock), server)

    yield begin
    for end in ends:
        end()


@pytest.fixture(scope="session")
def running(start: Callable[..., Running]) -> Running:
    return start()
