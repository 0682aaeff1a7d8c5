"""What is judged: the questions, and the answers of the two sides.

A side is a model (a run, an adapter, a model folder, a hub id) or a file of answers. A model answers greedily, in the
format of its training; each answer is written down as it ends, under a key of everything that it depends on, so that
a command that was cut off goes on where it was. A file of answers holds what a model elsewhere said, by prompt.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.conversations import ROLES
from luthier.data.files import kind_of, read_file
from luthier.errors import ConfigError, DataError, ModelError
from luthier.evaluate.results import digest
from luthier.generate import asking as asking_module
from luthier.generate.identity import ADAPTER_CONFIG, MODEL_CONFIG, model_files, model_names, resolved
from luthier.generate.jsonl import Rows

if TYPE_CHECKING:
    from luthier.data.examples import Example
    from luthier.generate.engine import Engine

log = logging.getLogger("luthier")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Prompt:
    """One question. `question`: as a judge reads it, and what answers are matched by. `messages`: a conversation."""

    question: str
    instruction: str
    input: str = ""
    system: str | None = None
    messages: tuple[dict[str, Any], ...] = ()


@dataclass
class Answers:
    """The answers of one side by question. `unanswered`: question -> why there is none; `cut`: stopped by length."""

    by_question: dict[str, str]
    unanswered: dict[str, str]
    cut: int = 0


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        target: as the user wrote it. names: what the model and those that it was made from are called: resolved paths,
            hub ids, names in a file of answers. fingerprint: changes when the model or the file does.
    """

    target: str
    is_file: bool
    names: frozenset[str]
    fingerprint: str


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """Questions of a text file (one a line) or of rows with `prompt` or `question`, with `instruction` and `input`, or
    with `messages` or `conversations`; repeated ones once.

    Raises:
        DataError: no such file, nothing in it, or a row without a question.
    """
    prompts: dict[str, Prompt] = {}
    repeated = 0
    for where, row in _rows_of(path):
        prompt = _prompt_of(row, where)
        repeated += prompt.question in prompts
        prompts.setdefault(prompt.question, prompt)
    if not prompts:
        raise DataError(f"{path}: there is no prompt in it")
    if repeated:
        log.info("%s: repeated prompts, each of which is asked once: %d", path, repeated)
    found = list(prompts.values())
    if limit is not None and limit < len(found):
        log.info("%s: the first %d of %d prompts", path, limit, len(found))
        return found[:limit]
    return found


def _rows_of(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    kind = kind_of(path)
    if kind is None:
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # Windows marks the beginning of a file
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not valid UTF-8 ({error.reason}). Save the file as UTF-8") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", {"prompt": line.strip()}
        return
    for number, row in read_file(path, kind):
        if isinstance(row, DataError):
            raise DataError(f"{path}:{number}: {row}")
        yield f"{path}:{number}", row


def _prompt_of(row: dict[str, Any], where: str) -> Prompt:
    there = {name: value for name, value in row.items() if value is not None}  # what a table says by null
    prompt = next((there[name] for name in ("prompt", "question", "instruction") if name in there), None)
    system = there.get("system")
    messages = prompt if isinstance(prompt, list) else None
    if prompt is None:
        messages = there.get("messages", there.get("conversations"))
    if messages is not None:
        return _conversation(messages, where)
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(
            f"{where}: a row needs a text under prompt or question, or instruction and input, or a conversation under "
            f"messages or conversations; this one has {', '.join(there) or 'nothing'}"
        )
    added = row.get("input") or ""
    if not isinstance(added, str) or not isinstance(system, str | None):
        raise DataError(f"{where}: input and system must be text")
    question = f"{prompt}\n\n{added}" if added.strip() else prompt
    return Prompt(_with_system(question.strip(), system), prompt, added, system or None)


def _conversation(messages: Any, where: str) -> Prompt:
    if not isinstance(messages, list):
        raise DataError(f"{where}: a conversation must be a list of messages")
    turns = [_turn(message, where) for message in messages]
    while turns and turns[-1]["role"] == "assistant":  # the answers of the data, not asked for here
        turns.pop()
    if not turns or turns[-1]["role"] != "user":
        raise DataError(f"{where}: the conversation has no user turn that an answer could follow")
    system = turns[0]["content"] if turns[0]["role"] == "system" else None
    spoken = turns[1:] if system is not None else turns
    if len(spoken) == 1:
        question = _with_system(spoken[0]["content"].strip(), system)
    else:
        question = "\n\n".join(f"{turn['role']}: {turn['content'].strip()}" for turn in turns)
    return Prompt(question, turns[-1]["content"], "", system, tuple(turns))


def _turn(message: Any, where: str) -> dict[str, Any]:
    """A message as chat templates take it; ShareGPT's names of its parts and roles are known."""
    if isinstance(message, dict):
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            named = {name: value for name, value in message.items() if name not in ("from", "value")}
            return {**named, "role": ROLES.get(role, role), "content": content}
    raise DataError(f"{where}: each message must be an object with role and content (or from and value), both text")


def _with_system(question: str, system: str | None) -> str:
    return f"system: {system.strip()}\n\nuser: {question}" if system and system.strip() else question


# --- the two sides -------------------------------------------------------------------------------------------------


def open_side(target: str) -> Side:
    """Find out what a side is, without loading anything. ModelError: it is nothing."""
    path = Path(target).expanduser()
    if path.is_file():
        said = {row[name] for _, row in _rows_of(path) for name in ("model", "generator") if row.get(name)}
        names = {path.stem, *(str(name) for name in said)}
        names |= {name for model in said for name in model_names(str(model))}
        return Side(target, True, frozenset(names), digest(path.read_text(encoding="utf-8", errors="replace")))
    check_model(target)
    return Side(target, False, frozenset(model_names(target)), fingerprint(target))


def check_model(target: str) -> None:
    """Refuse what cannot be a model before another one has answered for hours. ModelError says what is missing."""
    folder = Path(target).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in (ADAPTER_CONFIG, MODEL_CONFIG)):
        raise ModelError(f"{target}: neither {ADAPTER_CONFIG} nor {MODEL_CONFIG} is here; has its run ended?")
    if not folder.exists() and not HUB_ID.fullmatch(target):
        raise ModelError(f"{target}: there is no such file or folder here, and it is no name on the hub")


def base_of(tuned: str) -> str:
    """What a run, an adapter or a merged model was trained from. ConfigError: nothing says so."""
    names = model_names(tuned)
    if len(names) < 2:
        raise ConfigError(f"base: {tuned} does not say what it was trained from; name the base by its path or hub id")
    return names[1]


def is_base_of(model: str, tuned: str) -> bool:
    """Whether the one was trained from the other, however its path is spelled."""
    return model_names(tuned)[1:2] == [resolved(model)]


def fingerprint(target: str) -> str:
    """Changes whenever the files of a model or of its bases do."""
    return digest(model_files(target))


def answers_of(side: Side, prompts: Sequence[Prompt], kept: Path, max_new_tokens: int | None) -> Answers:
    """The answers of a side to the prompts; those of a model are kept in the JSONL `kept`, itself a file of answers."""
    if side.is_file:
        return _answers_of_file(side, prompts)
    with Rows(kept) as rows:
        keys = {p.question: digest([side.fingerprint, max_new_tokens, *_content(p)]) for p in prompts}
        stored = {row["key"]: row for row in rows.stored if "key" in row}
        missing = [p for p in prompts if keys[p.question] not in stored]
        if missing:
            log.info("%s: %d of %d answers are to be generated", side.target, len(missing), len(prompts))

            def keep(prompt: Prompt, values: dict[str, Any]) -> None:
                key = keys[prompt.question]
                stored[key] = {"key": key, "prompt": prompt.question, "model": side.target, **values}
                rows.append(stored[key])

            _generate(side.target, missing, max_new_tokens, keep)
    found = {p.question: stored[keys[p.question]] for p in prompts}
    skipped = {question: row["skipped"] for question, row in found.items() if row.get("skipped")}
    return Answers(
        {question: row["answer"] for question, row in found.items() if question not in skipped},
        skipped,
        sum(bool(row.get("cut")) for row in found.values()),
    )


def _answers_of_file(side: Side, prompts: Sequence[Prompt]) -> Answers:
    path = Path(side.target).expanduser()
    said: dict[str, str] = {}
    null: set[str] = set()
    for where, row in _rows_of(path):
        if row.get("skipped"):
            continue
        name = next((name for name in ("answer", "output") if name in row), None)
        if name is None or not isinstance(row[name], str | None):
            raise DataError(
                f"{where}: a row of answers needs a text under answer or output; this one has {', '.join(row)}"
            )
        question, answer = _prompt_of(row, where).question, row[name]
        if answer is None:
            null.add(question)
            continue
        if said.setdefault(question, answer) != answer:
            raise DataError(f"{where}: this prompt has another answer further up; keep one of the two")
    wanted = {p.question for p in prompts}
    if spare := len(said.keys() - wanted):
        log.info("%s: %d answers belong to none of the prompts and are not used", side.target, spare)
    there = {question: answer for question, answer in said.items() if question in wanted}
    missing = wanted - said.keys()
    return Answers(there, {question: "null" if question in null else "not in the file" for question in missing})


def _content(prompt: Prompt) -> list[Any]:
    return [prompt.instruction, prompt.input, prompt.system, list(prompt.messages)]


def _generate(
    target: str, prompts: Sequence[Prompt], max_new_tokens: int | None, keep: Callable[[Prompt, dict[str, Any]], None]
) -> None:
    """Answer the prompts greedily; `keep` gets each answer as it ends. The model's memory is free afterwards."""
    from luthier.models.memory import free_unused

    engine, ids_of = open_engine(target)
    device = engine.model.get_input_embeddings().weight.device
    _ask_all(engine, prompts, [ids_of(prompt) for prompt in prompts], max_new_tokens, keep)
    del engine
    free_unused(device)


def _ask_all(
    engine: Engine,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[list[int]],
    max_new_tokens: int | None,
    keep: Callable[[Prompt, dict[str, Any]], None],
) -> None:
    from luthier.generate.batches import in_batches
    from luthier.generate.sampling import Sampling

    sampling = Sampling(max_new_tokens=max_new_tokens, do_sample=False)
    done: set[int] = set()
    for place, ids in enumerate(prompt_ids):
        if (reason := engine.why_not(ids)) is not None:
            keep(prompts[place], {"answer": "", "skipped": f"the prompt {reason}"})
            done.add(place)

    def ask(waiting: list[int]) -> None:
        def ended(index: int, completion: Any) -> None:
            cut = completion.finish_reason == "length"
            keep(prompts[waiting[index]], {"answer": completion.text, "cut": cut})
            done.add(waiting[index])

        engine.generate([prompt_ids[place] for place in waiting], sampling, on_done=ended)

    in_batches(engine, prompt_ids, done.__contains__, ask, "--max-new-tokens bounds the answer")


def open_engine(target: str) -> tuple[Engine, Callable[[Prompt], list[int]]]:
    """The engine of a model, and how it gets a prompt: in the format of its training."""
    engine, asking = asking_module.open_engine(target)
    return engine, lambda prompt: asking.ids(_example(prompt, asking))


def _example(prompt: Prompt, asking: asking_module.Asking) -> Example:
    from luthier.data.examples import ChatExample

    if asking.is_chat and prompt.messages:
        return ChatExample(list(prompt.messages))
    turns = [m for m in prompt.messages if m["role"] != "system"]
    if len(turns) > 1:
        raise DataError(
            f"the prompt {prompt.question[:60]!r} is a conversation of several turns, and {asking.entry.path} was "
            "trained in a format that has one; leave such prompts out"
        )
    return asking.example(prompt.instruction, prompt.input, prompt.system)
