"""`luthier chat`: a conversation in the terminal, or line by line from a script.

Answers go to standard output as they come, everything else to standard error. The model's chat template writes the
turns; a run that was trained on single instructions gets one at a time.
"""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.errors import ConfigError, LuthierError, ModelError

if TYPE_CHECKING:
    from luthier.generate.conversation import Speaker
    from luthier.generate.rows import Completion
    from luthier.generate.sampling import Sampling

log = logging.getLogger("luthier")

HELP = """\
/reset           begin a new conversation; the system text stays
/system TEXT     set the system text; without a text there is none
/adapter NAME    go on with another of the models that were given; without a name they are listed
/undo            take the last message and its answer back
/save FILE       add the conversation to a JSONL file, as training data with messages
/help            this list
/exit            leave, as Ctrl-D does
A message that begins with a slash is written with two. A backslash at the end of a line goes on in the next.
Ctrl-C stops an answer; what there is of it stays."""


def command(
    models: Annotated[
        list[str], typer.Argument(metavar="RUN_OR_MODEL...", help="Runs, adapters, model folders or hub ids.")
    ],
    system: Annotated[str | None, typer.Option(help="System text, for formats that have one.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer. Default: the model's own, else 512.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. Default: the model's own.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this much probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from so many tokens; 0: from all.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1, what is there already gets less likely.")
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends an answer; may be repeated.")
    ] = None,
) -> int:
    """Talk to a model or a run; /help in the conversation lists what else there is.

    From a pipe, each line is a message. Exit status: 0, or 1 if a line of a pipe could not be answered or done.
    """
    if greedy and (temperature, top_p, top_k) != (None, None, None):
        raise ConfigError("--greedy leaves nothing to sample: drop it, or --temperature, --top-p and --top-k")

    # As late as this, so that --help does not wait for torch.
    from luthier.generate.sampling import Sampling

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        do_sample=False if greedy else None,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    )
    return Chat(open_speakers(models), sampling, system).run()


# --- who answers ---------------------------------------------------------------------------------------------------


def open_speakers(paths: Sequence[str]) -> dict[str, Callable[[], Speaker]]:
    """Name -> what gives the model of that name; several on one base where they can share it, else each is opened at
    its first word.

    Raises:
        ModelError: nothing loadable there, or two of one name.
    """
    from luthier.data.hub import notice_missing_network
    from luthier.models.assemble import tokenizer_for_inference
    from luthier.models.several import name_of

    names = [name_of(path) for path in paths]
    if len(set(names)) < len(names):
        names = list(paths)
    if len(set(names)) < len(names):
        raise ModelError(f"the same model twice: {', '.join(paths)}")
    if len(paths) == 1:
        return {names[0]: _alone(names[0], paths[0])}
    if not all(Path(path).expanduser().exists() for path in paths):
        notice_missing_network()
    for path in paths:
        tokenizer_for_inference(path)  # says now what is not there
    try:
        return _sharing(names, paths)
    except ModelError as error:
        log.info(
            "they cannot share a base, and each is opened by itself when it is asked: %s", str(error).partition(":")[0]
        )
        return {name: _alone(name, path) for name, path in zip(names, paths, strict=True)}


def _alone(name: str, path: str) -> Callable[[], Speaker]:
    opened: list[Speaker] = []

    def speaker() -> Speaker:
        from luthier.generate.asking import open_engine
        from luthier.generate.conversation import Speaker

        if not opened:
            engine, asking = open_engine(path)
            opened.append(Speaker(name, engine, asking, engine.loop()))
        return opened[0]

    return speaker


def _sharing(names: Sequence[str], paths: Sequence[str]) -> dict[str, Callable[[], Speaker]]:
    from luthier.data.tokenizer import terminator_ids
    from luthier.generate.asking import LONGEST, Asking
    from luthier.generate.conversation import Speaker
    from luthier.generate.engine import Engine, default_terminators
    from luthier.models.several import open_several

    several = open_several(paths, names=names)
    found: dict[str, Speaker] = {}
    for name, path in zip(names, paths, strict=True):
        tokenizer = several.tokenizer_of(name)
        asking = Asking.of(path, tokenizer, several.run_of(name))
        ends = {*terminator_ids(tokenizer, asking.config), *default_terminators(several.model)}
        engine = Engine(several.model, tokenizer, sorted(ends), default_new_tokens=LONGEST)
        loop = next(iter(found.values())).loop if found else several.loop(engine)
        found[name] = Speaker(name, engine, asking, loop, several.adapter_of(name))
    return {name: lambda speaker=speaker: speaker for name, speaker in found.items()}  # type: ignore[misc]


# --- the terminal --------------------------------------------------------------------------------------------------


class Chat:
    """Reads messages and commands until their end, from standard input."""

    def __init__(self, speakers: dict[str, Callable[[], Speaker]], sampling: Sampling, system: str | None) -> None:
        from luthier.generate.conversation import Conversation

        self.speakers, self.sampling = speakers, sampling
        self.talk = Conversation(system=system or None)
        self.terminal = sys.stdin.isatty()
        self.failed = False
        self.speaker = next(iter(speakers.values()))()
        self.commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset, "/system": self._system, "/adapter": self._adapter, "/undo": self._undo,
            "/save": self._save, "/help": lambda _: log.info("%s", HELP),
        }  # fmt: skip

    def run(self) -> int:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # a stray byte is a blot in a message
        if self.terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (gives `input` its history and its editing)
            log.info("%s. /help lists commands; Ctrl-C stops an answer, Ctrl-D leaves", self.speaker.name)
        self._say_form()
        while (line := self._read()) is not None:
            if not line.strip():
                continue
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if not self._obey(line):
                        break
                else:
                    self._answer(line[1:] if line.startswith("//") else line)
            except LuthierError as error:
                self._complain(str(error))
            except OSError as error:
                if isinstance(error, BrokenPipeError):
                    raise
                self._complain(f"{error.filename}: {error.strerror}")
        return int(self.failed and not self.terminal)

    def _complain(self, message: str) -> None:
        self.failed = True
        log.error("%s", message)

    def _say_form(self) -> None:
        """Where a message stands for itself."""
        if not self.speaker.asking.is_chat:
            kind = self.speaker.asking.entry.type
            named = kind if isinstance(kind, str) else "a prompt of its own"
            log.info("%s has no turns (%s): each message stands for itself, and none before it is read",
                     self.speaker.name, named)  # fmt: skip

    def _read(self) -> str | None:
        """The next message or command; None: there is none."""
        lines: list[str] = []
        while True:
            try:
                line = self._line("... " if lines else f"{self.speaker.name}> ")
            except KeyboardInterrupt:
                if not self.terminal:
                    raise
                print()
                log.info("(Ctrl-D or /exit leaves)")
                lines = []
                continue
            if line is None:
                return "\n".join(lines) if lines else None
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _line(self, prompt: str) -> str | None:
        if not self.terminal:
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        try:
            return input(prompt)
        except EOFError:
            print()
            return None

    # --- answers --------------------------------------------------------------------------------------------------

    def _answer(self, text: str) -> None:
        from luthier.models.memory import is_out_of_memory

        def ended(completion: Completion, stopped: bool) -> None:
            print(flush=True)
            if stopped:
                log.info("(stopped%s)", "" if completion.text else " before its first word: the message is taken back")
            elif completion.finish_reason == "length":
                log.info("(cut off after %d tokens, see --max-new-tokens)", len(completion.token_ids))

        try:
            with _interrupts(self.terminal) as stopped:
                for piece in self.talk.ask(self.speaker, text, self.sampling, stopped, ended):
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            message = "out of memory, and the message is taken back: /reset, or a smaller --max-new-tokens"
        else:
            return
        print(flush=True)
        self.speaker.loop.clear()  # outside of the except block: while there is a traceback, its frames hold the pass
        self._complain(message)

    # --- commands -------------------------------------------------------------------------------------------------

    def _obey(self, line: str) -> bool:
        """Do what a command says; False: leave."""
        name, _, rest = line.strip().partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name not in self.commands:
            self._complain(f"there is no command {name}; /help lists them, and // begins a message with a slash")
        else:
            self.commands[name](rest.strip())
        return True

    def _reset(self, _: str) -> None:
        self.talk.reset()
        log.info("a new conversation")

    def _system(self, text: str) -> None:
        before, self.talk.system = self.talk.system, text or None
        if text:
            try:
                self.speaker.asking.ids(self.speaker.asking.example("?", "", text))
            except LuthierError:
                self.talk.system = before
                raise
        log.info("the system text is set, for the conversation so far too" if text else "no system text")

    def _adapter(self, name: str) -> None:
        if not name:
            for each in self.speakers:
                log.info("%s %s", "*" if each == self.speaker.name else " ", each)
        elif name not in self.speakers:
            self._complain(f"there is no {name} here: {', '.join(self.speakers)}")
        else:
            self.speaker = self.speakers[name]()
            log.info("%s goes on", name)
            self._say_form()

    def _undo(self, _: str) -> None:
        if self.talk.undo():
            log.info("the last message and its answer are taken back")
        else:
            self._complain("there is nothing to take back")

    def _save(self, name: str) -> None:
        from luthier.generate.jsonl import line_of

        rows = self.talk.rows(self.speaker.asking.is_chat)
        if not name or not rows:
            self._complain("/save FILE: there is nothing to save yet" if name else "/save needs the name of a file")
            return
        path = Path(name).expanduser()
        with path.open("ab") as file:
            file.write(b"".join(line_of(row) for row in rows))
        log.info("%s: %d %s added", path, len(rows), "row" if len(rows) == 1 else "rows")


@contextlib.contextmanager
def _interrupts(watched: bool) -> Iterator[Callable[[], bool]]:
    """While entered, the first Ctrl-C is noted, for the next token, and a second one interrupts at once."""
    noted: list[bool] = []

    def note(*_: object) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(True)

    if not watched or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)
