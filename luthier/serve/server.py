"""A server from its address to its end: a socket, a line that says where, and a shutdown in two steps.

The first signal turns new requests away (503) and lets those that are here end, for a while; then, or at a second
signal, they are told that they will not, and the sockets close.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from ipaddress import ip_address
from types import FrameType

import uvicorn
from fastapi import FastAPI

from luthier.errors import RunError
from luthier.serve.service import Service

log = logging.getLogger("luthier")

# Connections that wait to be taken up; hundreds of clients may come in the same moment.
_BACKLOG = 1024
# For what is written already to reach its clients.
_LAST_WORDS_SECONDS = 5


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 takes a free one.

    Raises:
        RunError: the address is taken, or none of this machine's.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=kind, backlog=_BACKLOG)
    except OSError as error:
        raise RunError(
            f"cannot listen on {host} port {port}: {_why(error)}; choose another --host or --port "
            "(--port 0 takes a free one)"
        ) from error


def _why(error: OSError) -> str:
    """Without the address, which Python adds behind what the system says."""
    return str(error.strerror or error).partition(" (while attempting")[0]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def server_of(app: FastAPI, service: Service, grace: float, ready: Callable[[], None]) -> uvicorn.Server:
    """What serves until a signal; `ready` is called once requests are taken. `grace`: seconds for requests that run
    at a shutdown."""
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_LAST_WORDS_SECONDS,
    )
    return _Server(config, service, grace, ready)


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, service: Service, grace: float, ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._service, self._grace, self._ready = service, grace, ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started and not self.should_exit:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """In the main thread, between two of its instructions. uvicorn's own would close the sockets at once, and
        raise the signal again at the end."""
        self._signals += 1
        if self._loop is None or not self.started:
            self.should_exit = True
        elif self._signals == 1:
            self._loop.call_soon_threadsafe(self._drain)
        elif self._signals == 2:
            self._service.hurry = True
        else:
            self.should_exit = self.force_exit = True

    def _drain(self) -> None:
        self._draining = asyncio.ensure_future(self._drained())

    async def _drained(self) -> None:
        here = len({id(job) for job in self._service.jobs.values()})
        log.info("shutting down; %d request%s in progress, %g seconds at most", here, "s"[: here != 1], self._grace)
        await self._service.drain(self._grace)
        self.should_exit = True
