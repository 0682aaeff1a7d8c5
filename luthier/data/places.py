"""Where the contents of a conversation's messages stand in its rendered text.

Searching for a content is not enough: it may be short, occur twice, or read like a header. Instead a mark that no
text holds is put at each end of every content, and the conversation is rendered once more; if it is the same text
without the marks, they stand where the contents are. What stands between the contents is remembered, so that the
next conversation of the same roles needs no second render: its text is put together and compared.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from luthier.data.chat import ChatTemplate, Message, Tools
from luthier.errors import DataError

# Two characters of a private plane for each message: its content's beginning and end.
_FIRST_MARK = 0xF0000
_LAST_MARK = 0xFFFFD
_ANY_MARK = re.compile(f"[{chr(_FIRST_MARK)}-{chr(_LAST_MARK)}]")
_KEPT_FRAMES = 256

Places = dict[int, int]
"""Message n's content, without spaces at its ends, is `text[places[2 * n]:places[2 * n + 1]]`; what is not known
for certain is missing."""


class PlaceFinder:
    """Finds contents in the texts of one template."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._frames: dict[tuple[str, ...], list[str]] = {}

    def places(self, messages: Sequence[Message], tools: Tools, full: str) -> Places:
        """Places in `full`, the render of these messages; none at all if marks would change it."""
        shape = _shape(messages)
        if shape in self._frames and (found := _in_frame(self._frames[shape], messages, full)):
            return found
        found = self._marked_places(messages, tools, full)
        if shape and len(found) == 2 * len(messages) and len(self._frames) < _KEPT_FRAMES:
            edges = [0, *(place for _, place in sorted(found.items())), len(full)]
            self._frames[shape] = [full[start:end] for start, end in list(pairwise(edges))[::2]]
        return found

    def _marked_places(self, messages: Sequence[Message], tools: Tools, full: str) -> Places:
        if len(messages) * 2 > _LAST_MARK - _FIRST_MARK or _ANY_MARK.search(full):
            return {}
        try:
            marked = self._template.text(
                [_marked(message, 2 * at) for at, message in enumerate(messages)], tools
            )
        except DataError:
            return {}
        found: Places = {}
        seen_twice: set[int] = set()
        for count, match in enumerate(_ANY_MARK.finditer(marked)):
            number = ord(match.group()) - _FIRST_MARK
            if number in found:
                seen_twice.add(number)
            found[number] = match.start() - count
        in_order = [found[number] for number in sorted(found)]
        # Out of order: Gemma 4 puts what an answer says beside a tool call behind the tool's result.
        if _ANY_MARK.sub("", marked) != full or in_order != sorted(in_order):
            return {}
        return {number: place for number, place in found.items() if number not in seen_twice}


def text_of(message: Message) -> str:
    """A message's content as one text."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return ""


def _shape(messages: Sequence[Message]) -> tuple[str, ...]:
    """The roles, if nothing but them and plain contents makes the text; else nothing."""
    plain = all(
        message.keys() == {"role", "content"}
        and isinstance(message["content"], str)
        and message["content"].strip()
        for message in messages
    )
    return tuple(str(message["role"]) for message in messages) if plain else ()


def _in_frame(frame: Sequence[str], messages: Sequence[Message], full: str) -> Places:
    """Places if the text is these contents (kept whole, or trimmed) in a known frame."""
    for trimmed in (False, True):
        found: Places = {}
        pieces, at = [frame[0]], len(frame[0])
        for number, (message, behind) in enumerate(zip(messages, frame[1:], strict=True)):
            core = message["content"].strip()
            content = core if trimmed else message["content"]
            start = at + content.index(core)
            found[2 * number], found[2 * number + 1] = start, start + len(core)
            pieces += [content, behind]
            at += len(content) + len(behind)
        if at == len(full) and "".join(pieces) == full:
            return found
    return {}


def _marked(message: Message, number: int) -> Message:
    """A copy with marks inside the outer spaces of its content, which templates may trim."""
    content: Any = message.get("content")
    first, last = chr(_FIRST_MARK + number), chr(_FIRST_MARK + number + 1)
    if isinstance(content, str) and (core := content.strip()):
        return {**message, "content": content.replace(core, first + core + last, 1)}
    texts = [at for at, part in enumerate(content) if _is_text(part)] if isinstance(content, list) else []
    if not texts:
        return message
    parts = [dict(part) if isinstance(part, dict) else part for part in content]
    core = parts[texts[0]]["text"].lstrip()
    parts[texts[0]]["text"] = parts[texts[0]]["text"][: -len(core)] + first + core
    core = parts[texts[-1]]["text"].rstrip()
    parts[texts[-1]]["text"] = core + last + parts[texts[-1]]["text"][len(core) :]
    return {**message, "content": parts}


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str) and bool(part["text"].strip())
