"""`luthier serve`: runs, adapters and models behind OpenAI's interface."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from luthier.errors import ConfigError

log = logging.getLogger("luthier")

_NEEDS = ("fastapi", "uvicorn", "prometheus_client")


def command(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="Run folder, adapter, model folder, or hub id. Several: adapters of one base, with or without it.",
        ),
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[
        list[str] | None, typer.Option(help="A model's name for clients, once for each, in their order.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="LUTHIER_API_KEY",
            show_envvar=True,
            help="Clients must send it. Better in the variable: a command line is seen by every user of the machine.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer that may be asked for. Default: the model's context.")
    ] = None,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Texts that may wait for their first token; beyond, clients get a 429.")
    ] = 1024,
    max_body: Annotated[int, typer.Option(min=1, help="Longest body of a request, in bytes.")] = 4 * 2**20,
    max_cached_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Keys and values over all texts at once. Default: by the memory that is free."),
    ] = None,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests have to end at a shutdown.")
    ] = 30.0,
) -> None:
    """Serve runs, adapters or a model at /v1/chat/completions and /v1/completions, as OpenAI does."""
    missing = [package for package in _NEEDS if find_spec(package) is None]
    if missing:
        raise ConfigError(f"luthier serve needs {', '.join(missing)}: pip install 'luthier[serve]'")
    if api_key is not None and (not api_key.isascii() or not api_key.isprintable() or api_key.split() != [api_key]):
        raise ConfigError("the API key must be ASCII characters without spaces (--api-key, LUTHIER_API_KEY)")

    # As late as this, so that --help does not wait for torch.
    from luthier.data.hub import notice_missing_network
    from luthier.generate.batches import cached_tokens
    from luthier.models.several import open_several
    from luthier.serve.app import create_app
    from luthier.serve.server import address_of, is_loopback, listen, server_of
    from luthier.serve.service import Limits, Service

    sock = listen(host, port)  # before minutes of loading
    try:
        if not all(Path(run).expanduser().exists() for run in runs):
            notice_missing_network()
        several = open_several(runs, names=name or ())
        limits = Limits(max_tokens, max_queue, max_body)
        service = Service(several, limits, max_cached_tokens or cached_tokens(several.model))
        address = address_of(sock)
        if not is_loopback(sock.getsockname()[0]):
            whom = "who has the key" if api_key else "and there is no key: set LUTHIER_API_KEY"
            say = log.info if api_key else log.warning
            say("%s is open to everyone who can reach this machine, %s; nothing is encrypted", address, whom)

        def ready() -> None:
            log.info("ready: %s at %s/v1", ", ".join(several.names), address)

        server_of(create_app(service, api_key), service, grace, ready).run(sockets=[sock])
    finally:
        sock.close()
    log.info("stopped")
