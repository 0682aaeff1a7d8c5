"""The client of Weights & Biases, and what may go wrong with it, as messages.

The client tries for a while before it says that there is no network; one connection says so at once, and then
nothing is asked of it.
"""

from __future__ import annotations

import importlib
import os
import re
import socket
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from luthier.config.artifact_names import ArtifactName
from luthier.errors import ConfigError, LuthierError, RunError

_SECONDS = 5.0  # for one connection
_ENDPOINT = "https://api.wandb.ai"
_NO_LOGIN = re.compile(r"no api key|not logged in|wandb login|api_key not configured|log in", re.IGNORECASE)
_REFUSED = re.compile(r"\b40[13]\b|permission|unauthori[sz]ed|forbidden|credentials|invalid api key", re.IGNORECASE)
_ABSENT = re.compile(r"not found|\b404\b|does not exist|unable to fetch artifact|could not find", re.IGNORECASE)


class Unreachable(RunError):
    """There is no way to the server now: what is kept here may do."""


def wandb_module(what: str) -> Any:
    """The package.

    Args:
        what: needs it, for the message.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"{what} needs the package wandb, which is not installed ({error}): pip install 'luthier[wandb]'"
        ) from error


def endpoint() -> str:
    return os.environ.get("WANDB_BASE_URL", _ENDPOINT).rstrip("/")


def why_unreachable() -> str | None:
    """Why nothing can be asked of the server; None: it answers, or that cannot be told."""
    if os.environ.get("WANDB_MODE", "online") in ("offline", "disabled"):
        return f"WANDB_MODE is {os.environ['WANDB_MODE']}"
    place = urlsplit(endpoint())
    if getproxies() or place.hostname is None:  # behind a proxy a connection of our own says nothing
        return None
    try:
        socket.create_connection(
            (place.hostname, place.port or (80 if place.scheme == "http" else 443)), timeout=_SECONDS
        ).close()
    except OSError as error:
        return str(error.strerror or error)
    return None


def find(name: ArtifactName) -> Any:
    """The artifact, as the client has it.

    Raises:
        Unreachable: there is no way to the server. ConfigError: not installed, not logged in, no such artifact.
    """
    wandb = wandb_module(str(name))
    if (reason := why_unreachable()) is not None:
        raise Unreachable(f"{name}: {endpoint()} cannot be reached ({reason})")
    try:
        return wandb.Api().artifact(name.qualified)
    except Exception as error:  # the client's own kinds, ValueError, and those of its HTTP library
        raise explained(error, str(name)) from error


def explained(error: BaseException, name: str) -> LuthierError:
    """One message for what the server or the client did."""
    if isinstance(error, LuthierError):
        return error
    said = " ".join(str(error).split())[:300]
    kind = type(error).__name__
    if _NO_LOGIN.search(said) and not os.environ.get("WANDB_API_KEY"):
        return ConfigError(f"{name}: nobody is logged in at {endpoint()}: set WANDB_API_KEY or run `wandb login`")
    if _ABSENT.search(said):
        return ConfigError(
            f"{name}: {endpoint()} has no such artifact, version or alias, or hides it from this account ({said}); the "
            "form is wandb:entity/project/name:v0"
        )
    if _REFUSED.search(said) or kind == "AuthenticationError":
        return ConfigError(
            f"{name}: {endpoint()} does not accept this account: set WANDB_API_KEY or run `wandb login` ({said})"
        )
    return RunError(f"{name}: Weights & Biases failed: {kind}: {said}")
