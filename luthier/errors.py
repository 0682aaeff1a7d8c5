"""What a user can mend.

Every problem that has its cause outside Luthier (a config, a dataset, a model folder, a full disk) is raised
as one of these, with one message that says what is wrong, where, and what to do about it. The command line
prints that message and ends with `exit_status`; the traceback appears with `--debug` only. Anything else that
reaches the command line is a bug in Luthier, and is reported as one.
"""

from __future__ import annotations


class LuthierError(Exception):
    """A problem that the user can mend; its text is complete and is shown as it is."""

    exit_status: int = 1


class ConfigError(LuthierError):
    """The config or the command line asks for something that is not there or contradicts itself."""

    exit_status = 2


class DataError(LuthierError):
    """A dataset cannot be read, a row is malformed, or nothing in it would be trained."""


class ModelError(LuthierError):
    """A model, tokenizer or adapter cannot be found, loaded, or changed in the way that was asked for."""


class RunError(LuthierError):
    """A run cannot start, go on, or write what it made."""


class ProcessLost(RunError):
    """Another process of the run is gone: the consequence of an error that is told where it happened."""


def cannot_load(what: str, name: str, error: Exception) -> ModelError:
    """One message for the many ways in which transformers says that something cannot be loaded.

    Args:
        what: "model" or "tokenizer". name: its path or hub id. error: what transformers raised.
    """
    text = " ".join(str(error).split())
    lowered = text.lower()
    if "gated" in lowered or "401" in text or "403" in text:
        hint = (
            "it is gated or private: accept its licence on the hub, then set HF_TOKEN or run `hf auth login`"
        )
    elif "trust_remote_code" in lowered:
        hint = "it needs Python code of its own: read that code, then set trust_remote_code: true"
    elif "couldn't connect" in lowered or "offline" in lowered or "connection" in lowered:
        hint = "it is not on this machine, and the hub cannot be reached; check the path or the network"
    elif "not a valid model identifier" in lowered or "404" in text or "repo id must" in lowered:
        hint = (
            "there is no such folder here and no such name on the hub; check base_model and tokenizer_config"
        )
    elif "ignore_mismatched_sizes" in lowered:
        hint = "the shapes of its weights are not those that its config.json describes"
    elif "couldn't instantiate the backend tokenizer" in lowered:
        hint = "its files are not a tokenizer that transformers knows; name another with tokenizer_config"
    else:
        hint = f"{type(error).__name__}: {text[:300]}"
    return ModelError(f"cannot load the {what} {name!r}: {hint}")
