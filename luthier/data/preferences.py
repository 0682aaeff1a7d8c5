"""From rows of preference data to a prompt and the answers to it.

A row is a pair (a chosen and a rejected answer), or one answer with a label. Prompt and answers are text or messages;
answers may also be whole conversations, or whole texts, whose common beginning is the prompt. Which columns hold
them, and how turns are written, is said by the entry's type (`config.preference_types`).

The prompt always ends where the model is to write: a common beginning of two conversations goes back to the last place
at which both go on with an answer, one of two texts to the last whole word.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from luthier.config.datasets import DatasetEntry
from luthier.config.preference_types import FORMATS, PreferenceType, preference_type, setting
from luthier.data import report as said
from luthier.data.conversations import EMPTY_ANSWERS, put_system, read_messages, tools_of
from luthier.data.examples import PreferenceExample
from luthier.data.values import Row, fields_of, optional_text, shortened, text_of, type_name
from luthier.errors import DataError

Messages = list[dict[str, Any]]

EMPTY = "empty answers, of which only the end is compared"
UNPAIRED = "pairs, each taken as a desirable and an undesirable answer"
RANKED = "rows of ranked answers, of which the best and the worst are taken"
FURTHER = "conversations that part before their last turn: everything behind their common beginning is compared"
NO_SYSTEM = "rows of plain text with a system text, for which there is no place in them: it is not read"
OTHER_PROMPT = "rows whose prompt is none of the turns of their whole conversations, which are taken as they are"
FLAGS = "messages with a flag that says whether they are trained, which is not read in preference data"


class LeftOut(Exception):
    """A row that is fine and teaches nothing; the text is a reason of `report`."""


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where a row's parts are, by the entry's own keys or by its type."""

    prompt: tuple[str, ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    completion: str
    label: str
    system: str

    @classmethod
    def of(cls, entry: DatasetEntry, kind: PreferenceType) -> _Columns:
        def named(*keys: str, default: tuple[str, ...]) -> tuple[str, ...]:
            own = next((name for key in keys if (name := setting(entry, key))), None)
            return (own,) if own else default

        return cls(
            named("field_prompt", "field_messages", default=kind.prompt) if kind.prompt else (),
            named("field_chosen", default=kind.chosen),
            named("field_rejected", default=kind.rejected),
            setting(entry, "field_completion") or "completion",
            setting(entry, "field_label") or "label",
            setting(entry, "field_system") or "system",
        )


def preference_columns(entry: DatasetEntry, rl: str) -> frozenset[str]:
    """Columns that the entry's type reads."""
    kind = kind_of_preference(entry)
    names = _Columns.of(entry, kind)
    columns = {*names.prompt, names.system}
    columns |= {kind.ranked} if kind.ranked else {*names.chosen, *names.rejected}
    if rl == "kto":
        columns |= {names.completion, names.label}
    if kind.form in ("template", "any"):
        columns.add(entry.field_tools or "tools")
    return frozenset(columns)


def preference_examples(row: Row, entry: DatasetEntry, rl: str, notes: Counter[str]) -> list[PreferenceExample]:
    """What this row is in a run of method `rl`: a pair, or for `kto` answers with labels, two of a pair.

    Raises:
        DataError: without location, for a row that lacks something or has something else there.
        LeftOut: both answers are the same.
    """
    if not row:
        raise DataError("the row is empty")
    reader = _Reader(row, entry, notes)
    if rl == "kto" and not reader.is_pair():
        prompt, answers = reader.single()
        return [reader.example(prompt, answers, reader.label())]
    prompt, answers = reader.pair()
    if answers[0] == answers[1]:
        raise LeftOut(said.IDENTICAL)
    if rl != "kto":
        return [reader.example(prompt, answers, True)]
    notes[UNPAIRED] += 1
    return [reader.example(prompt, (answer,), at == 0) for at, answer in enumerate(answers)]


def prompt_text(entry: DatasetEntry, instruction: str, system: str | None) -> str | None:
    """The entry's format of a prompt; None where the chat template writes it, or nothing does."""
    kind = kind_of_preference(entry)
    if kind.form == "turns":
        assert kind.turns is not None
        before = [("system", system)] if system else []
        return kind.turns.prompt([*before, ("user", instruction)])
    return _own(entry, "prompt_format", prompt=instruction, system=system or "") if kind.form == "text" else None


def reads_messages(row: Row, entry: DatasetEntry) -> bool:
    """Whether an entry without a type has conversations in this row, rather than text."""
    names = _Columns.of(entry, kind_of_preference(entry))
    columns = (*names.prompt, *names.chosen, *names.rejected, names.completion)
    return any(isinstance(row.get(column), list | dict) for column in columns)


def kind_of_preference(entry: DatasetEntry) -> PreferenceType:
    """What a row of the entry is; a config of a preference run has no entry without it."""
    kind = preference_type(entry)
    assert kind is not None
    return kind


def _own(entry: DatasetEntry, key: str, **texts: str) -> str:
    template = setting(entry, key)
    return template.format(**texts) if template else next(iter(texts.values()))


class _Reader:
    """One row, read by its entry's type."""

    def __init__(self, row: Row, entry: DatasetEntry, notes: Counter[str]) -> None:
        self.row = row
        self.entry = entry
        self.notes = notes
        self.kind = kind_of_preference(entry)
        self.names = _Columns.of(entry, self.kind)
        self.as_messages = self.kind.form in ("template", "turns")
        if self.kind.form == "any":
            self.as_messages = reads_messages(row, entry)
        self.written: list[str] = []  # columns that the answers are in

    def is_pair(self) -> bool:
        """For a method without pairs: whether the row is one all the same."""
        if self.kind.ranked:
            return True
        named = setting(self.entry, "field_chosen") or setting(self.entry, "field_rejected")
        unlabelled = self.row.get(self.names.label) is None
        return bool(named) or (unlabelled and self._column(self.names.chosen) is not None)

    def label(self) -> bool:
        value = self._value((self.names.label,))
        if value not in (True, False):
            raise DataError(f"`{self.names.label}` must be true or false (desirable or not), and is {shortened(value)}")
        return bool(value)

    def pair(self) -> tuple[Any, tuple[Any, ...]]:
        """The prompt, and the chosen and the rejected answer."""
        if self.kind.ranked:
            values = self._ranked()
        else:
            values = [self._value(self.names.chosen), self._value(self.names.rejected)]
            self.written = [str(self._column(self.names.chosen)), str(self._column(self.names.rejected))]
        return self._prompt_and_answers(values)

    def single(self) -> tuple[Any, tuple[Any, ...]]:
        """The prompt, and the one answer of a row with a label."""
        names = self.names
        if self.row.get(names.completion) is None and self.kind.form == "template":
            column = self._column(names.prompt)
            if column is not None and isinstance(self.row[column], list):
                # A whole conversation in the column of the messages, whose last turn is the answer.
                self.written = [column]
                return self._in_messages(None, [self.row[column]])
        value = self._value((names.completion,))
        self.written = [names.completion]
        return self._prompt_and_answers([value])

    def example(self, prompt: Any, answers: tuple[Any, ...], desirable: bool) -> PreferenceExample:
        """The example, with turns written out where the type says how."""
        turns = self.kind.turns
        if not self.as_messages:
            frame = " ".join(filter(None, (setting(self.entry, key) for key in FORMATS)))
            return PreferenceExample(prompt, answers, desirable=desirable, frame=frame)
        if turns is None:
            tools = tools_of(self.row, self.entry.field_tools or "tools")
            return PreferenceExample(prompt, answers, tools, desirable)
        text = turns.prompt([(message["role"], message["content"]) for message in prompt])
        ends = tuple(self._one_turn(answer) + turns.end for answer in answers)
        return PreferenceExample(text, ends, desirable=desirable, frame=turns.frame)

    # --- columns

    def _column(self, names: tuple[str, ...]) -> str | None:
        return next((name for name in names if self.row.get(name) is not None), None)

    def _value(self, names: tuple[str, ...]) -> Any:
        column = self._column(names)
        if column is None:
            null = next((name for name in names if name in self.row), None)
            what = f"`{null}` is null" if null else f"{' or '.join(f'`{name}`' for name in names)} is missing"
            raise DataError(f"{what}; {fields_of(self.row)}")
        return self.row[column]

    def _ranked(self) -> list[Any]:
        column = self.kind.ranked
        answers = self._value((column,))
        if not isinstance(answers, list) or len(answers) < 2:
            raise DataError(f"`{column}` must be a list of at least two answers, and is {shortened(answers)}")
        for answer in answers:
            if not isinstance(answer, dict) or not isinstance(answer.get("rank"), int | float):
                raise DataError(f"each of `{column}` must have `answer` and `rank`, a number: {shortened(answer)}")
        best = min(answers, key=lambda answer: answer["rank"])
        worst = max(answers, key=lambda answer: answer["rank"])
        if best["rank"] == worst["rank"]:
            raise DataError(f"`{column}` are all of the same rank")
        self.notes[RANKED] += 1
        self.written = [f"answer` in `{column}"] * 2
        return [best.get("answer"), worst.get("answer")]

    # --- text or messages

    def _prompt_and_answers(self, values: list[Any]) -> tuple[Any, tuple[Any, ...]]:
        column = self._column(self.names.prompt)
        if column is None and self.names.prompt and not self.kind.optional_prompt:
            self._value(self.names.prompt)  # says what is missing
        return self._in_messages(column, values) if self.as_messages else self._in_text(column, values)

    def _in_text(self, column: str | None, values: list[Any]) -> tuple[str, tuple[str, ...]]:
        texts = [text_of(value, f"`{name}`", self.notes) for value, name in zip(values, self.written, strict=True)]
        self.notes[EMPTY] += sum(not text.strip() for text in texts)
        system = optional_text(self.row, self.names.system, self.notes)
        if self.kind.form == "any" and system:
            self.notes[NO_SYSTEM] += 1
        if column is None:
            return self._split_texts(texts)
        prompt = text_of(self.row[column], f"`{column}`", self.notes)
        if not prompt.strip():
            raise DataError(f"the row asks nothing: `{column}` is empty")
        if self.kind.form == "any":
            return prompt, tuple(texts)
        if len(texts) == 1:
            return self._own_prompt(prompt, system), (_own(self.entry, "completion_format", completion=texts[0]),)
        chosen = _own(self.entry, "chosen_format", chosen=texts[0])
        return self._own_prompt(prompt, system), (chosen, _own(self.entry, "rejected_format", rejected=texts[1]))

    def _own_prompt(self, prompt: str, system: str) -> str:
        return _own(self.entry, "prompt_format", prompt=prompt, system=system)

    def _split_texts(self, texts: list[str]) -> tuple[str, tuple[str, ...]]:
        if len(texts) == 1:
            raise DataError(f"`{self.names.prompt[0]}` is missing; {fields_of(self.row)}")
        if texts[0] == texts[1]:
            raise LeftOut(said.IDENTICAL)
        common = _common_beginning(*texts)
        if not common.endswith(tuple(" \t\n\r")):
            # In the middle of a word: back to the space before it, which belongs to the word as tokenizers see it.
            words = max(common.rfind(space) for space in " \t\n\r")
            common = common[: words + (words >= 0 and common[words] != " ")] if words >= 0 else common
        else:
            common = common.removesuffix(" ")
        if not common.strip():
            raise DataError(
                f"there is no `{self.names.prompt[0]}`, and {' and '.join(f'`{name}`' for name in self.written)} "
                "have no common beginning that could be it"
            )
        return common, tuple(text[len(common) :] for text in texts)

    def _in_messages(self, column: str | None, values: list[Any]) -> tuple[Messages, tuple[Messages, ...]]:
        prompt = None if column is None else self._prompt_messages(self.row[column], column)
        sides = []
        for value, name in zip(values, self.written, strict=True):
            if isinstance(value, list | dict):
                sides.append(self._messages(value, name))
                continue
            if prompt is None:
                raise DataError(f"`{name}` must be a list of messages, and is {type_name(value)}: {shortened(value)}")
            sides.append([{"role": "assistant", "content": text_of(value, f"`{name}`", self.notes)}])
        if prompt is None:
            prompt, answers = self._split(sides)
        elif all(side[0]["role"] != "assistant" for side in sides):
            whole, answers = self._split(sides)
            prompt = self._asked(prompt, whole, isinstance(self.row[str(column)], str))
        else:
            answers = tuple(self._behind(prompt, side, name) for side, name in zip(sides, self.written, strict=True))
        system = optional_text(self.row, self.names.system, self.notes)
        if system:
            put_system(prompt, system, self.names.system)
        self.notes[FURTHER] += any(len(answer) > 1 for answer in answers)
        self.notes[EMPTY] += sum(not any(map(_says_something, answer)) for answer in answers)
        return prompt, answers

    def _messages(self, value: list[Any] | dict[str, Any], name: str) -> Messages:
        given = [value] if isinstance(value, dict) else value
        if not given:
            raise DataError(f"`{name}` has no message")
        found: Counter[str] = Counter()
        messages = read_messages(given, name, self.entry, found)
        del found[EMPTY_ANSWERS]  # counted here for the answers that are compared, and no others
        self.notes.update(found)
        for message in messages:
            self.notes[FLAGS] += message.pop("train", None) is not None
        return messages

    def _prompt_messages(self, value: Any, column: str) -> Messages:
        if isinstance(value, list | dict):
            messages = self._messages(value, column)
        else:
            text = text_of(value, f"`{column}`", self.notes)
            if not text.strip():
                raise DataError(f"the row asks nothing: `{column}` is empty")
            messages = [{"role": "user", "content": text}]
        if messages[-1]["role"] == "assistant":
            raise DataError(f"`{column}` ends with an answer: the answers to compare must follow a turn of the user's")
        return messages

    def _asked(self, prompt: Messages, whole: Messages, is_text: bool) -> Messages:
        """The common beginning of whole conversations, which say what is in the column of the prompt once more."""
        asked, said_there = _without_system(prompt), _without_system(whole)
        if is_text:
            self.notes[OTHER_PROMPT] += not any(_alike(asked[0], message) for message in said_there)
        elif len(asked) > len(said_there) or not all(map(_alike, asked, said_there)):
            names = " and ".join(f"`{name}`" for name in self.written)
            column = self._column(self.names.prompt)
            raise DataError(f"{names} are whole conversations that do not begin with `{column}`")
        if prompt[0]["role"] != "system":
            return whole
        if whole[0]["role"] == "system" and not _alike(prompt[0], whole[0]):
            raise DataError(f"`{self.written[0]}` begins with another system text than the prompt")
        return [prompt[0], *said_there]

    def _behind(self, prompt: Messages, side: Messages, name: str) -> Messages:
        """The answer: what is behind the prompt, if the side repeats it, or the whole side."""
        if side[0]["role"] == "assistant":
            return side
        asked, whole = _without_system(prompt), _without_system(side)
        same = len(whole) > len(asked) and all(map(_alike, asked, whole))
        if not same or whole[len(asked)]["role"] != "assistant":
            raise DataError(
                f"`{name}` is a conversation that does not go on from the prompt with an answer: it must begin with "
                "the model's turn, or with the whole prompt"
            )
        if side[0]["role"] == "system":
            if prompt[0]["role"] != "system":
                prompt.insert(0, side[0])
            elif not _alike(prompt[0], side[0]):
                raise DataError(f"`{name}` begins with another system text than the prompt")
        return whole[len(asked) :]

    def _split(self, sides: list[Messages]) -> tuple[Messages, tuple[Messages, ...]]:
        """Whole conversations into what they have in common and the answers behind it."""
        if len(sides) == 1:
            return self._split_last(sides[0], self.written[0])
        first, second = sides
        if first == second:
            raise LeftOut(said.IDENTICAL)
        at = 0
        while at < min(len(first), len(second)) and first[at] == second[at]:
            at += 1
        while at and not all(at < len(side) and side[at]["role"] == "assistant" for side in sides):
            at -= 1
        if not at:
            names = " and ".join(f"`{name}`" for name in self.written)
            raise DataError(f"{names} have no turn in common that both answer: they are answers to different prompts")
        return first[:at], tuple(side[at:] for side in sides)

    def _split_last(self, messages: Messages, name: str) -> tuple[Messages, tuple[Messages, ...]]:
        """One whole conversation, whose last turn is the answer."""
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise DataError(f"`{name}` must end with an answer, behind the turn that it answers")
        return messages[:-1], (messages[-1:],)

    def _one_turn(self, answer: Messages) -> str:
        if len(answer) > 1 or answer[0].get("tool_calls"):
            raise DataError(
                f"answers of type {self.entry.type} are one turn of text; `chat_template.default` takes several turns "
                "and tool calls"
            )
        return str(answer[0]["content"])


def _common_beginning(first: str, second: str) -> str:
    shorter = min(len(first), len(second))
    return first[: next((at for at in range(shorter) if first[at] != second[at]), shorter)]


def _says_something(message: dict[str, Any]) -> bool:
    return bool(str(message["content"]).strip() or message.get("tool_calls"))


def _without_system(messages: Messages) -> Messages:
    return messages[1:] if messages[0]["role"] == "system" else messages


def _alike(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """The same but for spaces around what is said, which datasets trim in one column and not in the other."""
    same = first["content"].strip() == second["content"].strip() and first["role"] == second["role"]
    return bool(same and first.get("tool_calls") == second.get("tool_calls"))
