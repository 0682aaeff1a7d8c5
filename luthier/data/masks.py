"""What of a conversation is trained: roles, flags and options, as stretches of its text and then as labels.

Where a template marks with `{% generation %}` what the model writes, its word is taken; `spans` finds the
turns of all other templates, and of conversations in which not just every answer is trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.data.chat import ChatTemplate, Message, Span, clean
from luthier.data.encode import Encoded
from luthier.data.examples import ChatExample
from luthier.data.spans import Turn, TurnFinder
from luthier.errors import DataError

UNTRAINED = -100
"""Label of a token that is not trained, as everywhere in torch and transformers."""

SPECIAL_TEXT = "rows with text that reads like a special token and becomes it"
LEFT_OUT = "rows of which the chat template leaves something out"

_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


@dataclass(slots=True, frozen=True)
class Options:
    """The keys of a dataset entry that say which turns are trained."""

    roles: tuple[str, ...] = ("assistant",)
    train_on_eos: str = "turn"
    train_on_inputs: bool = False


def trained_characters(
    template: ChatTemplate, finder: TurnFinder, example: ChatExample, options: Options
) -> tuple[str, list[Span] | None]:
    """A conversation's text and the stretches of it that are trained; None stands for all of it.

    Raises:
        DataError: the template refuses the conversation, or a trained turn cannot be found in its text.
    """
    messages = clean(example.messages)
    if not messages:
        raise DataError("the conversation has no messages")
    if options.train_on_inputs:
        full = template.text(messages, example.tools)
        barred = [at for at, message in enumerate(example.messages) if message.get("train") is False]
        if not barred:
            return full, None
        turns = finder.find(messages, example.tools, full, barred)
        return full, _outside(_from_turns([turns[at] for at in barred], False), len(full))
    asked = [_is_trained(message, options.roles) for message in example.messages]
    answers = [message.get("role") == "assistant" for message in messages]
    full, marks = template.text_and_marks(messages, example.tools)
    only_last_end = options.train_on_eos == "last"
    if marks and asked == answers:
        spans = _from_marks(template, full, marks, only_last_end)
    else:
        wanted = [at for at, trained in enumerate(asked) if trained]
        turns = finder.find(messages, example.tools, full, wanted)
        spans = _from_turns([turns[at] for at in wanted], only_last_end)
    if options.train_on_eos == "all":
        spans += [match.span() for match in template.ends.finditer(full)]
    return full, spans


def answer_characters(
    template: ChatTemplate, finder: TurnFinder, example: ChatExample, first: int
) -> tuple[str, list[Span]]:
    """A conversation's text and the answers from message `first` on, each from behind the header that generation
    starts with, as every answer to compare must be. Marks of the template, which may take in the header, are asked
    only where the turns cannot be found.

    Raises:
        DataError: the template refuses the conversation, or an answer cannot be found in its text.
    """
    messages = clean(example.messages)
    answers = [at for at, message in enumerate(messages) if message.get("role") == "assistant"]
    wanted = [at for at in answers if at >= first]
    full = template.text(messages, example.tools)
    try:
        turns = finder.find(messages, example.tools, full, wanted)
    except DataError:
        full, marks = template.text_and_marks(messages, example.tools)
        if len(marks) != len(answers):
            raise
        return full, _from_marks(template, full, marks, False)[-len(wanted) :]
    return full, _from_turns([turns[at] for at in wanted], False)


def labels_of(tokens: Encoded, spans: Sequence[Span] | None) -> list[int]:
    """Labels aligned with the tokens; a token that holds a trained character is trained."""
    if spans is None:
        return list(tokens.ids)
    labels = [UNTRAINED] * len(tokens.ids)
    for start, end in spans:
        if start < end:
            first, last = tokens.tokens(start, end)
            labels[first:last] = tokens.ids[first:last]
    return labels


def chat_notes(messages: Sequence[Message], text: str, template: ChatTemplate) -> Iterator[tuple[str, str]]:
    """What a user should know of a rendered conversation: pairs of a note and its detail."""
    contents = [content for message in messages if isinstance(content := message.get("content"), str)]
    special = next(filter(None, map(template.special_tokens.search, contents)), None)
    if special is not None:
        yield SPECIAL_TEXT, special.group()
    missing = next((said for message in messages for said in _left_out(message, text, template)), None)
    if missing is not None:
        yield LEFT_OUT, missing


def _is_trained(message: Message, roles: Sequence[str]) -> bool:
    """A message's own `train` decides, where there is one; else its role."""
    said = message.get("train")
    return bool(said) if said is not None else message.get("role") in roles


def _from_turns(turns: Sequence[Turn], only_last_end: bool) -> list[Span]:
    spans = []
    for number, turn in enumerate(turns):
        if turn.terminator is not None and (not only_last_end or number == len(turns) - 1):
            spans.append((turn.start, turn.terminator[1]))
        else:
            spans.append((turn.start, turn.end))
    return spans


def _outside(spans: Sequence[Span], length: int) -> list[Span]:
    """What the spans, which are in order, leave of a text."""
    edges = [0, *(edge for span in spans for edge in span), length]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _from_marks(template: ChatTemplate, full: str, marks: Sequence[Span], only_last_end: bool) -> list[Span]:
    """The template's own blocks, taken at their word, except that a turn's terminator is always trained."""
    spans = []
    for number, (start, end) in enumerate(marks):
        following = marks[number + 1][0] if number + 1 < len(marks) else len(full)
        inside = list(template.ends.finditer(full, start, end))
        terminator = inside[-1].span() if inside and not full[inside[-1].end() : end].strip() else None
        if terminator is None:
            # The block ends before the turn does; only spaces may stand between its end and the terminator.
            behind = template.ends.search(full, end, following)
            if behind is not None and not full[end : behind.start()].strip():
                terminator, end = behind.span(), behind.end()
        if terminator is not None and only_last_end and number < len(marks) - 1:
            end = terminator[0]
        spans.append((start, end))
    return spans


def _left_out(message: Message, text: str, template: ChatTemplate) -> Iterator[str]:
    """What a message says and its conversation's text does not: roles, reasoning, calls that were skipped."""
    for key in ("content", *_REASONING_KEYS):
        said: Any = message.get(key)
        for part in re.split("</?think>", said) if isinstance(said, str) else ():
            core = part.strip()
            # Templates that write JSON (Llama 3.1's tool results) have the text with its quotes escaped.
            if core and core not in text and json.dumps(core, ensure_ascii=False)[1:-1] not in text:
                shown = core if len(core) <= 40 else core[:37] + "..."
                yield f"{key} of role {message.get('role')}: {shown!r}"
    if message.get("tool_calls") and not template.habits.writes_calls:
        yield f"tool calls of role {message.get('role')}"
