"""The texts in a row: what is asked and what is answered, whatever the format writes around them."""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from luthier.config import DatasetEntry
from luthier.data.examples import ChatExample, Example, PreferenceExample, TextExample, TokenExample
from luthier.data.formats import examples_of, kind_of_entry, prompt_format
from luthier.data.values import Row

_ALONE = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # scripts that are written without spaces
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")


@dataclass(slots=True)
class View:
    """A row's texts.

    Attributes:
        prompt: what stands before the first answer, without a system text. answers: what is trained, each for itself.
        system: its system text. more: further turns of the user's. given: the input of an instruction; None if the
            format has none. label: desirable or not, for rows with a label. pair: the answers are chosen and rejected.
        calls: an answer that calls a tool says nothing else.
    """

    prompt: str
    answers: tuple[str, ...]
    system: str = ""
    more: str = ""
    given: str | None = None
    label: bool | None = None
    pair: bool = False
    calls: bool = False
    opaque: bool = False

    @property
    def text(self) -> str:
        """All but the system text."""
        return "\n".join(part for part in (self.prompt, self.more, *self.answers) if part)


def views_of(row: Row, entry: DatasetEntry, train_on_inputs: bool, rl: str | None) -> list[View]:
    """The texts of a row's examples. Raises DataError as `examples_of` does, and `preferences.LeftOut`."""
    examples = examples_of(row, entry, train_on_inputs, rl, Counter())
    if rl is None and kind_of_entry(entry) == "prompt":
        return [_instruction(row, entry)]
    return [_view(example, rl) for example in examples]


def _instruction(row: Row, entry: DatasetEntry) -> View:
    names = prompt_format(entry)
    texts = [
        "" if row.get(name) is None else str(row[name])
        for name in (names.field_instruction, names.field_input, names.field_output, names.field_system)
    ]
    instruction, given, output, system = texts
    has_input = "{input}" in names.with_input and names.field_input in row
    prompt = f"{instruction}\n{given}" if given and has_input else instruction
    return View(prompt, (output,), system, given=given if has_input else None)


def _view(example: Example, rl: str | None) -> View:
    if isinstance(example, TokenExample):
        return View("", (" ".join(map(str, example.input_ids)),), opaque=True)
    if isinstance(example, TextExample):
        prompt = "".join(segment.text for segment in example.segments if not segment.trained)
        return View(prompt, ("".join(segment.text for segment in example.segments if segment.trained),))
    if isinstance(example, ChatExample):
        return _conversation(example.messages)
    assert isinstance(example, PreferenceExample)
    system, prompt = ("", example.prompt) if isinstance(example.prompt, str) else _asked(example.prompt)
    answers = tuple(answer if isinstance(answer, str) else "\n".join(map(_said, answer)) for answer in example.answers)
    label = example.desirable if rl == "kto" else None
    return View(prompt, answers, system, label=label, pair=len(answers) == 2)


def _conversation(messages: Sequence[dict[str, Any]]) -> View:
    first = next((at for at, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    system, prompt = _asked(messages[:first])
    answers = [message for message in messages if message["role"] == "assistant"]
    more = "\n".join(_said(message) for message in messages[first:] if message["role"] != "assistant")
    return View(prompt, tuple(map(_said, answers)), system, more, calls=any("tool_calls" in each for each in answers))


def _asked(messages: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """System text, and the rest."""
    system = [_said(message) for message in messages if message["role"] == "system"]
    return "\n".join(system), "\n".join(_said(message) for message in messages if message["role"] != "system")


def _said(message: dict[str, Any]) -> str:
    text = str(message.get("content") or "")
    calls = message.get("tool_calls")
    return text if not calls else f"{text}{json.dumps(calls, ensure_ascii=False)}"


def words_of(text: str) -> list[str]:
    """Words in lower case without punctuation; of scripts without spaces, characters."""
    return _WORD.findall(text.lower())


def hashed_words(text: str) -> npt.NDArray[np.uint64]:
    """A number for each word."""
    return np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words_of(text)], dtype=np.uint64)
