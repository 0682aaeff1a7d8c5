"""Whether the Hugging Face hub can be reached, asked once and only where something of it is needed.

Its client tries each of its requests six times, for half a minute together, before it says that there is no
network. One connection says so at once; what is on this machine is then used without asking the hub.
"""

from __future__ import annotations

import logging
import socket
import sys
from functools import lru_cache
from urllib.parse import urlsplit
from urllib.request import getproxies

log = logging.getLogger("luthier")

_SECONDS = 5.0  # for one connection; a hub that takes longer cannot be downloaded from either


@lru_cache(maxsize=1)
def notice_missing_network() -> None:
    """Put the hub's client into offline mode, for this process, where there is no way to the hub."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or (reason := why_unreachable()) is None:
        return
    log.info("%s cannot be reached (%s): only what is on this machine is used", constants.ENDPOINT, reason)
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # it copies the setting when it is imported
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def why_unreachable() -> str | None:
    """What the system says of a connection to the hub that fails; None: there is one, or it cannot be told."""
    from huggingface_hub import constants

    endpoint = urlsplit(constants.ENDPOINT)
    # Behind a proxy a connection of our own says nothing.
    if getproxies() or endpoint.hostname is None:
        return None
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname, port), timeout=_SECONDS).close()
    except OSError as error:
        return str(error.strerror or error)
    return None
