"""The command line: one table from verb to function, and one place where errors become messages.

`luthier --help` imports neither torch nor pydantic; the module of a verb is imported when the verb is called.
What a user can mend (`LuthierError`) is shown as one message with its exit status, anything else as an
internal error; a traceback appears with `--debug` only.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import luthier
from luthier.errors import LuthierError


@dataclass(frozen=True, slots=True)
class Verb:
    """What a verb runs (`module:function`, a function with typer's annotations) and its line in the help."""

    target: str
    help: str
    takes_overrides: bool = False
    """CONFIG and overrides come first; `--key value` pairs that the function does not know are handed on."""


VERBS: dict[str, Verb] = {
    "train": Verb("luthier.launch.command:command", "Train what a config says.", takes_overrides=True),
    "launch": Verb(
        "luthier.launch.kubernetes.command:command", "Run a config as a Kubernetes Job.", takes_overrides=True
    ),
    "preview": Verb(
        "luthier.data.preview:preview", "Show rows as they will be trained.", takes_overrides=True
    ),
    "inspect": Verb(
        "luthier.data.inspect.command:command", "Say whether data looks large, balanced and clean; show its worst rows."
    ),
    "validate": Verb("luthier.data.preview:validate", "Check a config and its data.", takes_overrides=True),
    "plan": Verb(
        "luthier.plan.command:command", "Say what a run will need: memory, time, cost.", takes_overrides=True
    ),
    "convert": Verb(
        "luthier.config.convert.command:command", "Write another tool's config, script or notebook as one of ours."
    ),
    "prepare": Verb("luthier.data.logs.command:command", "Make training rows of logs."),
    "generate": Verb("luthier.generate.cli:command", "Let a model or a run answer, a prompt or a file of them."),
    "chat": Verb("luthier.generate.chat:command", "Talk to a model or a run in the terminal."),
    "serve": Verb("luthier.serve.command:command", "Let models answer over HTTP, as OpenAI's do."),
    "evaluate": Verb("luthier.evaluate.command:command", "Measure a run or a model, alone or beside its base."),
    "judge": Verb("luthier.evaluate.judge.command:command", "Let a model or a person say whose answers are better."),
    "merge-lora": Verb(
        "luthier.export.command:command", "Merge an adapter, or several, into the base.", takes_overrides=True
    ),
    "push": Verb("luthier.export.push_command:command", "Upload an adapter or a model to the hub."),
    "export": Verb("luthier.export.save:command", "Save a run or a model as adapter, merged, in 4 bits, or as GGUF."),
    "report": Verb("luthier.experiments.report:command", "Show what a run did, or several, as one page."),
    "sweep": Verb(
        "luthier.experiments.study.command:command",
        "Run one config with many settings, and compare them.",
        takes_overrides=True,
    ),
    "demo": Verb("luthier.demo.command:demo", "Train a tiny model and see that it learned."),
    "config-schema": Verb(
        "luthier.config.reference:command", "Print the JSON Schema of the config, for editors."
    ),
    "completion": Verb("luthier.completion:command", "Print a shell's completion script."),
    "doctor": Verb("luthier.doctor:command", "Say what this machine and this installation have."),
}

_PATIENCE_SECONDS = 3.0

TRAIN_USAGE = "luthier train CONFIG [KEY=VALUE | --KEY VALUE]... [OPTIONS]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: that of the process) and give its exit status."""
    remaining = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in remaining
    remaining = [argument for argument in remaining if argument != "--debug"]
    with _messages():
        return _shielded(lambda: _dispatch(remaining, debug), debug)


def _dispatch(arguments: list[str], debug: bool) -> int:
    if not arguments or arguments[0] in ("--help", "-h"):
        print(_help())
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        print(f"luthier {luthier.__version__}")
        return 0
    if name not in VERBS:
        _say(f"error: {_unknown(name)}")
        return 2
    if name == "train" and (not rest or "--help" in rest or "-h" in rest):
        return _train_help(asked=bool(rest))
    return _run_verb(name, rest, debug)


def _train_help(asked: bool) -> int:
    """The help of `luthier train`, which lists the keys of the config; a line of it where no config was given."""
    if not asked:
        _say(f"error: a config is missing: {TRAIN_USAGE}")
        return 2
    from luthier.config.reference import help_text

    print(f"Usage: {TRAIN_USAGE}\n\nTrain what a config says: a YAML file with the keys below. Each can be")
    print("overridden here, and `datasets.0.path=data.jsonl` reaches inside.\n\nOptions")
    for names, text in _options_of(_function(VERBS["train"])):
        print("\n".join([f"  {names}", *textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)]))
    print(f"  --debug\n      Show tracebacks.\n\n{help_text()}")
    return 0


def _options_of(function: Callable[..., Any]) -> Iterator[tuple[str, str]]:
    """Name with metavar, and help, of each option of a verb."""
    import typer

    app = typer.Typer(add_completion=False)
    app.command()(function)
    for each in typer.main.get_command(app).params:
        if each.param_type_name == "option" and "--help" not in each.opts:
            metavar, text = (getattr(each, name, None) or "" for name in ("metavar", "help"))
            yield f"{', '.join(each.opts)} {metavar}".rstrip(), text


def _run_verb(name: str, arguments: list[str], debug: bool) -> int:
    import typer

    verb = VERBS[name]
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    settings: dict[str, Any] = {"help_option_names": ["--help", "-h"]}
    if verb.takes_overrides:
        settings["ignore_unknown_options"] = True
    function = _function(verb)

    @functools.wraps(function)
    def shielded(*args: Any, **kwargs: Any) -> None:
        # Inside typer, which would turn Ctrl-C into "Aborted!" and swallow broken pipes.
        if status := _shielded(lambda: function(*args, **_fetched(name, kwargs)), debug):
            raise SystemExit(status)

    app.command(context_settings=settings, epilog="--debug shows tracebacks.")(shielded)
    command = typer.main.get_command(app)
    if verb.takes_overrides:
        taking = {name for each in command.params if not getattr(each, "is_flag", True) for name in each.opts}
        arguments = [as_option(argument, taking) for argument in arguments]
    try:
        command.main(args=arguments, prog_name=f"luthier {name}")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


# Parameters of verbs whose values are texts, or places to write to.
_NO_SOURCES = {"message", "output", "out", "prompt", "push", "repo", "stop", "system"}
# Verbs that take `DIR:0.5`.
_WEIGHTED = {"merge-lora"}


def _fetched(verb: str, values: dict[str, Any]) -> dict[str, Any]:
    """A verb's arguments with folders of this machine in place of artifacts of Weights & Biases: wherever a verb
    takes a model, a run or data, it may be one."""

    def one(value: Any) -> Any:
        if isinstance(value, (str, Path)) and str(value).startswith("wandb:"):
            from luthier.artifacts.source import local_source

            return type(value)(local_source(str(value), weighted=verb in _WEIGHTED))
        return [one(each) for each in value] if isinstance(value, list) else value

    return {name: value if name in _NO_SOURCES else one(value) for name, value in values.items()}


def as_option(argument: str, options: Collection[str]) -> str:
    """One of the verb's own options that is written as keys of the config are (`--num_processes 2`,
    `num_processes=2`), as typer knows it; any other argument as it is. A key goes before an option."""
    name, equals, value = argument.partition("=")
    key = name.removeprefix("--").replace("-", "_")
    option = f"--{key.replace('_', '-')}"
    if option not in options or not (name.startswith("--") or (equals and not name.startswith("-"))):
        return argument
    from luthier.config.schema import FIELDS

    return argument if key in FIELDS else f"{option}{equals}{value}"


def _function(verb: Verb) -> Callable[..., Any]:
    module, _, name = verb.target.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _shielded(call: Callable[[], Any], debug: bool) -> int:
    """The exit status of a call, with its errors shown as messages."""
    try:
        status = call()
        sys.stdout.flush()
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        _say(f"{_rank()}interrupted")
        return 130
    except BrokenPipeError:
        # Whoever read our output has had enough (`| head`); Python must not complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        if not isinstance(error, OSError):
            _let_the_first_speak()
        heading, text, status = explained(error, debug)
        _say(f"{heading}: {_rank()}{text}")
        return status
    return status if isinstance(status, int) else 0


def explained(error: BaseException, debug: bool) -> tuple[str, str, int]:
    """An error as a message: "error" or "internal error", the text, and the exit status."""
    if isinstance(error, LuthierError):
        return "error", str(error), error.exit_status
    if isinstance(error, OSError):
        # The system refuses: a full disk, a folder without permission. The modules name the common cases
        # better.
        where = f"{error.filename}: " if error.filename else ""
        return "error", f"{where}{error.strerror or error}" + ("" if debug else " (--debug shows where)"), 1
    again = "" if debug else " (run again with --debug and report it)"
    return "internal error", f"{type(error).__name__}: {error}{again}", 1


class Plain(logging.Formatter):
    """The message alone; what is worse than information begins with its level."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


@contextlib.contextmanager
def _messages() -> Iterator[None]:
    """While a command runs, what the package logs goes to standard error."""
    logger = logging.getLogger("luthier")
    before = (logger.level, logger.propagate)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Plain("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items())
    return f"""\
Usage: luthier VERB [ARGUMENTS]...

Fine-tune open language models from one YAML file.

Verbs (each has --help):
{verbs}

Options:
  --debug    show the traceback of an error
  --version  show the version
  --help     show this help

First steps: luthier demo, then luthier train CONFIG."""


def _unknown(name: str) -> str:
    import difflib

    if name.startswith("-"):
        return f"there is no option {name} before the verb; see luthier --help."
    near = difflib.get_close_matches(name, VERBS, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    if not near and name.endswith((".yml", ".yaml")):
        meant = f" Did you mean luthier train {name}?"
    return f"there is no verb {name}.{meant} The verbs are {', '.join(VERBS)}."


def _rank() -> str:
    """Which of several processes speaks, for all but the first; see `train.distributed`."""
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
    return f"rank {rank}: " if rank != "0" else ""


def _let_the_first_speak() -> None:
    """Several processes mostly fail for the same reason: the others wait, and a launcher that sees the first one end
    ends them meanwhile."""
    if _rank():
        time.sleep(_PATIENCE_SECONDS)


def _say(message: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(f"{message}\n", end="", file=sys.stderr)  # in one piece, whatever else writes there


if __name__ == "__main__":
    sys.exit(main())
