"""What a row of a dataset means, before any tokenizer has seen it.

`formats` turns rows into one of these kinds of example, `render` turns examples into token ids and labels.
The kinds differ in who decides where the tokens begin and end: for a `TextExample` the format (segments of
text), for a `ChatExample` the chat template, for a `TokenExample` whoever made the data. A `PreferenceExample`, which
`preferences` makes, is answers to a prompt, as text or as conversations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, frozen=True)
class Segment:
    """A stretch of text, all of it trained or none of it."""

    text: str
    trained: bool


@dataclass(slots=True, frozen=True)
class TextExample:
    """Plain text in segments. The EOS that `add_eos` appends is trained if the last segment is."""

    segments: tuple[Segment, ...]
    add_bos: bool = True
    add_eos: bool = True


@dataclass(slots=True, frozen=True)
class ChatExample:
    """A conversation in the form that chat templates take.

    A message has `role` and `content` (and `tool_calls` and whatever else the template reads). Its key
    `train` (true, false, or absent) says whether it is trained, before the roles are asked. `tools` is a list
    of JSON schemas of functions, or None.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


@dataclass(slots=True, frozen=True)
class TokenExample:
    """Tokens made elsewhere: `labels` are aligned with `input_ids` (-100 = not trained, the trainer shifts).

    `lengths` are the tokens of each document inside the row and sum to `len(input_ids)`.
    """

    input_ids: list[int]
    labels: list[int]
    lengths: tuple[int, ...]


@dataclass(slots=True, frozen=True)
class PreferenceExample:
    """Answers to one prompt: two, of which the first is preferred to the second, or one that is desirable or not.

    Attributes:
        prompt: text, or the messages before the answer. answers: likewise text, or messages of which the first is the
            model's.
        tools: JSON schemas of functions, for messages.
        frame: what the format itself wrote around a row's text; its special tokens are meant to be ones.
    """

    prompt: str | list[dict[str, Any]]
    answers: tuple[str | list[dict[str, Any]], ...]
    tools: list[dict[str, Any]] | None = None
    desirable: bool = True
    frame: str = ""


Example = TextExample | ChatExample | TokenExample | PreferenceExample
