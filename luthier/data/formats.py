"""From rows to examples: what the columns of a row mean.

The instruction formats (`alpaca`, `alpaca_chat.load_qa`, a prompt of the user's own) are all one
`PromptFormat`: text around an instruction, an input and a system text, and then the answer, which is trained.
Conversations are in `conversations`, rows that are tokens already in `pretokenized`, those of preference runs in
`preferences`.

Text is taken as it is: nothing is stripped. A whole number where text belongs is taken as its digits, and
counted; anything else that is not text is an error. Errors carry no location, because a row does not know its
file: whoever reads the rows adds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from string import Formatter

from luthier.config.datasets import DatasetEntry, UserPrompt
from luthier.config.entries import PROMPT_FIELDS, kind_of
from luthier.config.preference_types import is_preference
from luthier.data.conversations import EMPTY_ANSWERS, chat_columns, chat_example
from luthier.data.examples import ChatExample, Example, Segment, TextExample
from luthier.data.preferences import (
    kind_of_preference,
    preference_columns,
    preference_examples,
    prompt_text,
    reads_messages,
)
from luthier.data.pretokenized import TOKEN_COLUMNS, token_example
from luthier.data.readers import open_rows
from luthier.data.values import Row, fields_of, optional_text, required, text_of
from luthier.errors import DataError, LuthierError

_NO_INPUT = frozenset({"no input", "noinput", "<no input>", "<noinput>"})


@dataclass(frozen=True)
class PromptFormat:
    """Text around an instruction. Templates hold `{instruction}`, `{input}`, `{system}` and, at most once,
    `{output}`.

    A row's system text is set by `system_format` and stands in place of the preamble.
    """

    with_input: str
    without_input: str
    system_format: str
    preamble: str = ""
    preamble_without_input: str = ""
    field_instruction: str = "instruction"
    field_input: str = "input"
    field_output: str = "output"
    field_system: str = "system"
    system_prompt: str = ""

    def pieces(self, instruction: str, given: str, system: str | None) -> tuple[str, str]:
        """The text before the answer and the text behind it."""
        system = system or self.system_prompt
        template = self.with_input if given else self.without_input
        before, after, has_system = _parts(template)
        if not system:
            opening = self.preamble if given else self.preamble_without_input
        else:
            opening = "" if has_system else self.system_format.format(system=system)
        return opening + before.format(instruction=instruction, input=given, system=system), after


@lru_cache(maxsize=64)
def _parts(template: str) -> tuple[str, str, bool]:
    """A template in front of `{output}`, the plain text behind it, and whether it has a place for the system
    text."""
    before, after, has_system, behind = "", "", False, False
    for text, name, _, _ in Formatter().parse(template):
        if behind:
            after += text
        else:
            before += text.replace("{", "{{").replace("}", "}}")
        if name == "output":
            behind = True
        elif name is not None:
            before += f"{{{name}}}"
            has_system = has_system or name == "system"
    return before, after, has_system


# The prompts of github.com/tatsu-lab/stanford_alpaca (train.py): the answer follows the colon directly.
ALPACA = PromptFormat(
    with_input="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    without_input="### Instruction:\n{instruction}\n\n### Response:",
    system_format="### System:\n{system}\n\n",
    preamble=(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
    ),
    preamble_without_input=(
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
    ),
)

# Question and answer in the chat style, as Axolotl's type of this name has it.
ALPACA_CHAT_QA = PromptFormat(
    with_input="USER: {instruction}\n{input}\nASSISTANT:",
    without_input="USER: {instruction}\nASSISTANT:",
    system_format="SYSTEM: {system}\n",
    preamble=(
        "Below is an instruction from a USER that describes a task, paired with an input that provides "
        "further context. The ASSISTANT writes a response that concisely and appropriately completes the "
        "request.\n\n"
    ),
    preamble_without_input=(
        "Below is an instruction from a USER that describes a task. "
        "The ASSISTANT writes a response that appropriately and concisely completes the request.\n\n"
    ),
    field_instruction="question",
    field_output="answer",
)

_PROMPTS = {"alpaca": ALPACA, "alpaca_chat.load_qa": ALPACA_CHAT_QA}


def example_of(
    row: Row, entry: DatasetEntry, train_on_inputs: bool, notes: Counter[str] | None = None
) -> Example:
    """What this row is, by its entry's type.

    `notes` counts what a user should know of and what is no error, such as answers that are empty. Raises
    DataError, without location, for a row that lacks a field or has something else in it.
    """
    notes = notes if notes is not None else Counter()
    if not row:
        raise DataError("the row is empty")
    kind = kind_of_entry(entry)
    if kind == "tokens":
        return token_example(row, entry.labels_shifted, notes)
    if kind == "chat_template":
        return chat_example(row, entry, notes)
    if kind == "completion":
        return _completion(row, text_column(entry), notes)
    if kind == "input_output":
        return _segments(row, entry, train_on_inputs, notes)
    return _instruction(row, prompt_format(entry), train_on_inputs, notes)


def examples_of(
    row: Row, entry: DatasetEntry, train_on_inputs: bool, rl: str | None, notes: Counter[str] | None = None
) -> Sequence[Example]:
    """As `example_of`, for a run of method `rl` too, in which a row may be two examples.

    Raises `preferences.LeftOut` for a row in which there is nothing to compare.
    """
    notes = notes if notes is not None else Counter()
    if rl is None:
        return [example_of(row, entry, train_on_inputs, notes)]
    return preference_examples(row, entry, rl, notes)


def prompt_example(
    entry: DatasetEntry,
    instruction: str,
    input: str = "",
    system: str | None = None,
    rl: str | None = None,
) -> Example:
    """The same format without an answer: what a model that was trained on `entry` is to continue.

    `rl` is the run's method: rows without a type are tokens without one, and prompts and answers with one. Then the
    first row says whether these are conversations.
    """
    kind = "preference" if is_preference(entry) else kind_of_entry(entry, rl)
    text = f"{instruction}\n{input}" if input else instruction
    is_chat = kind == "chat_template"
    if kind == "preference":
        written = prompt_text(entry, text, system)
        if written is not None:
            return TextExample((Segment(written, False),), add_eos=False)
        is_chat = kind_of_preference(entry).form == "template" or _has_conversations(entry)
    if is_chat:
        opening = [{"role": "system", "content": system}] if system else []
        return ChatExample([*opening, {"role": "user", "content": text}])
    if kind == "prompt":
        before, _ = prompt_format(entry).pieces(instruction, input, system)
        return TextExample((Segment(before, False),), add_eos=False)
    # Raw text has no places of their own for an input and a system text: what there is, line by line.
    raw = "\n".join(part for part in (system, instruction, input) if part)
    return TextExample((Segment(raw, False),), add_bos=kind != "input_output", add_eos=False)


def _has_conversations(entry: DatasetEntry) -> bool:
    try:
        first = next(iter(open_rows(entry)), None)
    except LuthierError:  # the data is gone or bad: a run's prompts then are plain text
        return False
    return first is not None and reads_messages(first[1], entry)


def columns_of(entry: DatasetEntry, rl: str | None = None) -> frozenset[str]:
    """Columns that the entry's type reads; the others are of no effect, which the report says."""
    kind = kind_of_entry(entry, rl)
    if rl is not None:
        return preference_columns(entry, rl)
    if kind == "tokens":
        return TOKEN_COLUMNS
    if kind == "chat_template":
        return chat_columns(entry)
    if kind == "completion":
        return frozenset({text_column(entry)})
    if kind == "input_output":
        return frozenset({entry.field or "segments"})
    prompt = prompt_format(entry)
    columns = {prompt.field_instruction, prompt.field_output, prompt.field_system}
    # An input that the prompt has no place for is not read.
    return frozenset(columns | ({prompt.field_input} if "{input}" in prompt.with_input else set()))


def kind_of_entry(entry: DatasetEntry, rl: str | None = None) -> str:
    """`prompt`, `chat_template`, `completion`, `input_output` or `tokens`, or with `rl` `preference`; a config has no
    other."""
    kind = kind_of(entry, rl)
    assert kind is not None
    return kind


# --- prompts with an answer ---------------------------------------------------------------------------------


def _user_format(prompt: UserPrompt) -> PromptFormat:
    assert prompt.format is not None  # a config without one is refused
    return PromptFormat(
        with_input=prompt.format,
        without_input=prompt.no_input_format if prompt.no_input_format is not None else prompt.format,
        system_format=prompt.system_format if prompt.system_format is not None else "{system}",
        system_prompt=prompt.system_prompt or "",
    )


@lru_cache(maxsize=64)
def _named_format(name: str | UserPrompt, fields: tuple[tuple[str, str], ...]) -> PromptFormat:
    base = _user_format(name) if isinstance(name, UserPrompt) else _PROMPTS[name]
    return replace(base, **dict(fields))


def prompt_format(entry: DatasetEntry) -> PromptFormat:
    """The entry's prompt with its own column names, which stand in `type` or beside it."""
    fields: dict[str, str] = {}
    for source in (entry, entry.type if isinstance(entry.type, UserPrompt) else None):
        for name in PROMPT_FIELDS:
            value = getattr(source, name, None)
            if value:
                fields[name] = value
    assert entry.type is not None
    return _named_format(entry.type, tuple(sorted(fields.items())))


def _instruction(row: Row, prompt: PromptFormat, train_on_inputs: bool, notes: Counter[str]) -> TextExample:
    instruction = required(row, prompt.field_instruction, notes)
    answer = required(row, prompt.field_output, notes)
    given = optional_text(row, prompt.field_input, notes)
    system = optional_text(row, prompt.field_system, notes)
    if not instruction.strip() and not given.strip():
        raise DataError(f"the row asks nothing: `{prompt.field_instruction}` is empty")
    if not answer:
        notes[EMPTY_ANSWERS] += 1
    if given.strip().lower() in _NO_INPUT:
        notes["inputs that only say that there is none, taken as they are"] += 1
    before, after = prompt.pieces(instruction, given, system)
    return TextExample((Segment(before, train_on_inputs), Segment(answer + after, True)))


# --- plain text ---------------------------------------------------------------------------------------------


def text_column(entry: DatasetEntry) -> str:
    """The column of the text, for types that have one column only."""
    own = entry.type.field if isinstance(entry.type, UserPrompt) else None
    return own or entry.field or "text"


def _completion(row: Row, field: str, notes: Counter[str]) -> TextExample:
    text = required(row, field, notes)
    if not text:
        raise DataError(f"`{field}` is empty")
    return TextExample((Segment(text, True),))


def _segments(row: Row, entry: DatasetEntry, train_on_inputs: bool, notes: Counter[str]) -> TextExample:
    """Segments are the whole document: no token is put before, between or behind them."""
    field = entry.field or "segments"
    given = row.get(field)
    if not isinstance(given, list) or not given:
        raise DataError(f"`{field}` must be a list of segments {{label, text}}; {fields_of(row)}")
    segments = []
    for number, segment in enumerate(given, start=1):
        where = f"segment {number} of `{field}`"
        if not isinstance(segment, dict) or "text" not in segment or "label" not in segment:
            raise DataError(f"{where} must have `label` (true or false) and `text`")
        if segment["label"] not in (True, False):
            raise DataError(f"{where}: `label` must be true or false, not {segment['label']!r}")
        text = text_of(segment["text"], f"`text` in {where}", notes)
        segments.append(Segment(text, bool(segment["label"]) or train_on_inputs))
    return TextExample(tuple(segments), add_bos=False, add_eos=False)
