"""Without a network the hub is given up at once, and only where it is asked for."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub import constants

from luthier.config import DatasetEntry
from luthier.data import hub
from luthier.data.readers import open_rows
from luthier.errors import DataError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Addresses that were tried; none can be reached."""
    tried: list[Any] = []

    def refuse(address: Any, timeout: float) -> None:
        tried.append(address)
        raise OSError("no way")

    import datasets

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    hub.notice_missing_network.cache_clear()
    yield tried
    hub.notice_missing_network.cache_clear()


def test_a_missing_network_is_noticed_once(asked: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "luthier")
    for _ in range(2):
        with pytest.raises(DataError, match="nobody/nothing: neither a file or folder here"):
            open_rows(DatasetEntry(path="nobody/nothing"))
    assert asked == [("huggingface.co", 443)]
    assert caplog.text.count("only what is on this machine is used") == 1


def test_who_has_a_proxy_or_is_offline_is_not_asked(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy"})
    hub.notice_missing_network()
    hub.notice_missing_network.cache_clear()
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.notice_missing_network()
    assert asked == []
