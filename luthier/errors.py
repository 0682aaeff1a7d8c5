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
