"""Which characters of a rendered conversation the model has to write itself.

A template gives no account of where a message went: it trims, adds headers, drops the reasoning of earlier
turns. But it can be asked again. A trained answer begins where the same conversation, cut off before it, ends with
a generation header, and it ends with the token that ends its turn; both are found by rendering parts of the
conversation, or by putting something else in a message's place and comparing with the full text.

That takes two or three renders for every turn. The quick way takes at most one for all of them, which finds the
contents (`places`); then what stands around an answer is compared with what the template is known to put there
(`chat.Habits`). Wherever something does not fit, the slow way decides, and the first rows go both ways. Where
neither finds a turn, the row is an error: a wrong mask is worse than none.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from luthier.data.chat import ChatTemplate, Message, Span, Tools
from luthier.data.places import PlaceFinder, Places, text_of
from luthier.errors import DataError

log = logging.getLogger("luthier")

_STAND_IN = chr(0x10FFFD) + "luthier" + chr(0x10FFFC)
_COMPARED_ROWS = 8


@dataclass(slots=True, frozen=True)
class Turn:
    """A turn's characters: `start:end` without its terminator, which may be missing."""

    start: int
    end: int
    terminator: Span | None


class TurnFinder:
    """Finds turns in the conversations of one template."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._places = PlaceFinder(template)
        self._quick_is_right = True
        self._compared = 0

    def find(
        self, messages: Sequence[Message], tools: Tools, full: str, wanted: Sequence[int]
    ) -> dict[int, Turn]:
        """The wanted messages' turns in `full`, which is the render of all messages.

        Raises:
            DataError: a turn cannot be told from what surrounds it.
        """
        found: dict[int, Turn] = {}
        if self._quick_is_right and wanted:
            quick = _Quick(self.template, messages, full, self._places.places(messages, tools, full))
            found = {at: turn for at in wanted if (turn := quick.turn(at)) is not None}
        missing = [at for at in wanted if at not in found]
        slow = _Slow(self.template, messages, tools, full)
        if found and self._compared < _COMPARED_ROWS:
            self._compare(found, slow)
        if not self._quick_is_right:
            missing = list(wanted)
        for at in missing:
            found[at] = slow.turn(at)
        return found

    def _compare(self, found: dict[int, Turn], slow: _Slow) -> None:
        """Hold the quick way's turns against the slow one's, on the first rows of a dataset."""
        self._compared += 1
        for at, turn in found.items():
            try:
                exact = slow.turn(at)
            except DataError:
                continue
            if exact != turn:
                self._quick_is_right = False
                log.info(
                    "the chat template treats turns unevenly: each is searched for by itself, which is slower"
                )
                return


class _Quick:
    """Turns by what stands around the contents, whose places are known."""

    def __init__(self, template: ChatTemplate, messages: Sequence[Message], full: str, at: Places) -> None:
        self._template = template
        self._messages = messages
        self._full = full
        self._at = at

    def turn(self, index: int) -> Turn | None:
        if self._messages[index].get("role") == "assistant":
            return self._answer(index)
        return self._other(index)

    def _answer(self, index: int) -> Turn | None:
        start, content = self._start(index), self._at.get(2 * index)
        if start is None or (content is not None and self._template.ends.search(self._full, start, content)):
            return None
        message = self._messages[index]
        content_end = self._at.get(2 * index + 1)
        if message.get("tool_calls"):
            limit = self._limit(index)
            matches = (
                list(self._template.ends.finditer(self._full, start, limit)) if limit is not None else []
            )
            if not matches or (content_end is not None and matches[-1].start() < content_end):
                return None
            return Turn(start, matches[-1].start(), matches[-1].span())
        if content_end is None or content_end < start:
            return None
        for kept in _both_ways(_trailing(message)):
            for ending in sorted(self._template.habits.endings, key=len, reverse=True):
                if self._full.startswith(kept + ending, content_end):
                    end = content_end + len(kept + ending)
                    last = self._last_token(ending)
                    return Turn(start, end - len(last), (end - len(last), end)) if last else None
        return None

    def _last_token(self, ending: str) -> str:
        matches = list(self._template.ends.finditer(ending))
        return matches[-1].group() if matches and matches[-1].end() == len(ending) else ""

    def _start(self, index: int) -> int | None:
        """The end of the generation header, told by what stands behind the message before."""
        if index == 0:
            return None
        before = self._messages[index - 1]
        at = self._at.get(2 * index - 1)
        habits = self._template.habits
        opening, gap = habits.openings.get(str(before.get("role"))), habits.gaps.get(str(before.get("role")))
        if at is None or opening is None or before.get("tool_calls"):
            return None
        for kept in _both_ways(_trailing(before)):
            if self._full.startswith(kept + opening, at):
                return at + len(kept + opening)
        if gap is not None and (header := opening[len(gap) :]):
            for kept in _both_ways(_trailing(before)):
                place = at + len(kept + gap)
                if self._full.startswith(kept + gap, at):
                    part = _header_part(self._template, self._full[place:], header)
                    return place + part if part else None
        return None

    def _other(self, index: int) -> Turn | None:
        """Turns of other roles: their content, and a terminator between it and the next content."""
        start, end, limit = self._at.get(2 * index), self._at.get(2 * index + 1), self._limit(index)
        if start is None or end is None or limit is None or end < start:
            return None
        if (text := text_of(self._messages[index])) != text.strip():
            return None  # whether these spaces are the content's or the template's cannot be told from here
        match = self._template.ends.search(self._full, end, limit)
        return Turn(start, match.start() if match else end, match.span() if match else None)

    def _limit(self, index: int) -> int | None:
        """A place behind this turn and before the next one's content."""
        if index + 1 == len(self._messages):
            return len(self._full)
        return self._at.get(2 * index + 2)


class _Lost(Exception):
    """No comparison shows where a message is; the text says what the template does."""

    def __init__(self, what: str = "rewrites what was said before") -> None:
        super().__init__(what)


class _Slow:
    """Turns one by one, by rendering parts of the conversation and by replacing contents."""

    def __init__(self, template: ChatTemplate, messages: Sequence[Message], tools: Tools, full: str) -> None:
        self._template = template
        self._messages = list(messages)
        self._tools = tools
        self._full = full

    def turn(self, index: int) -> Turn:
        """Raises DataError if the turn cannot be told from what surrounds it."""
        role = self._messages[index].get("role")
        try:
            return self._answer(index) if role == "assistant" else self._other(index)
        except _Lost as lost:
            raise DataError(
                f"message {index + 1} ({role}): this turn cannot be found in the conversation's text: the chat "
                f"template {lost}; mark what the model writes with {{% generation %}} in the template, or use another "
                "chat_template"
            ) from None

    def _other(self, index: int) -> Turn:
        start, end = self._region(index)
        limit = self._region(index + 1)[0] if index + 1 < len(self._messages) else len(self._full)
        match = self._template.ends.search(self._full, end, limit)
        return Turn(start, match.start() if match else end, match.span() if match else None)

    def _answer(self, index: int) -> Turn:
        message = self._messages[index]
        start, block_end = self._start(index), self._block_end(index)
        limit = block_end if block_end is not None else self._region(index + 1)[0]
        search_from = start
        if self._template.ends.search(text_of(message)):
            search_from = max(start, self._region(index)[1])  # an end inside the content is not the turn's
        matches = list(self._template.ends.finditer(self._full, search_from, limit))
        if matches:
            return Turn(start, matches[-1].start(), matches[-1].span())
        end = block_end if message.get("tool_calls") else self._region(index)[1]
        if end is None or not start <= end <= limit:
            raise _Lost
        if index + 1 < len(self._messages) and self._template.eot_tokens:
            # A token that ends turns, as the user says, and opens the next message for the template (GLM 4).
            behind = self._template.ends.search(self._full, end, self._region(index + 1)[0])
            if behind is not None and behind.group() in self._template.eot_tokens:
                return Turn(start, behind.start(), behind.span())
        return Turn(start, end, None)

    def _start(self, index: int) -> int:
        opened = self._cut(index, header=True)
        if opened is not None and self._full.startswith(opened):
            return len(opened)
        closed = self._cut(index, header=False)
        if closed is not None and self._full.startswith(closed):
            header = opened[len(closed) :] if opened is not None and opened.startswith(closed) else ""
            if part := _header_part(self._template, self._full[len(closed) :], header):
                return len(closed) + part
        # Earlier turns read otherwise in the cut conversation: look for the header between the two contents.
        after = self._region(index - 1)[1] if index else 0
        before = self._region(index)[0] if not self._messages[index].get("tool_calls") else len(self._full)
        between = self._full[after : max(before, after)]
        header = self._template.habits.header
        for length in reversed(_header_cuts(self._template, header)):
            if (place := between.find(header[:length])) >= 0:
                return after + place + length
        raise _Lost

    def _block_end(self, index: int) -> int | None:
        """The end of what the template writes for this message, if it writes the same when cut off there."""
        if index + 1 == len(self._messages):
            return len(self._full)
        block = self._cut(index + 1, header=False)
        return len(block) if block is not None and self._full.startswith(block) else None

    def _cut(self, count: int, header: bool) -> str | None:
        if count == 0:
            return None
        try:
            return self._template.text(self._messages[:count], self._tools, header)
        except DataError:
            return None

    def _region(self, index: int) -> Span:
        """Where the text changes if a message says something else."""
        if _STAND_IN[0] in self._full:
            raise _Lost
        changed = [dict(message) for message in self._messages]
        changed[index]["content"] = _STAND_IN
        try:
            other = self._template.text(changed, self._tools)
        except DataError:
            raise _Lost from None
        if other.count(_STAND_IN) != 1:
            role = self._messages[index].get("role")
            raise _Lost(f"leaves out, changes or repeats what message {index + 1} ({role}) says")
        start = _same(self._full, other)
        most = min(len(self._full), len(other)) - start
        behind = _same(self._full[::-1][:most], other[::-1][:most])
        return start, len(self._full) - behind


def _same(first: str, second: str) -> int:
    """Number of characters with which both begin, found by halving."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _header_cuts(template: ChatTemplate, header: str) -> list[int]:
    """Lengths to which a header may be cut: its lines, and its added tokens with what stands before them.

    In earlier turns a template may leave out the rest of the header, as an empty think block.
    """
    first = template.added_tokens.search(header)
    least = first.end() if first else len(header)
    cuts = {at for match in template.added_tokens.finditer(header) for at in match.span()}
    cuts |= {match.end() for match in re.finditer("\n", header)} | {len(header)}
    return sorted(at for at in cuts if at >= least > 0)


def _header_part(template: ChatTemplate, text: str, header: str) -> int:
    """How much of a header a text begins with: all of it, or as far as it may be cut; 0 for none."""
    same = _same(text, header)
    return max((at for at in _header_cuts(template, header) if at <= same), default=0)


def _both_ways(spaces: str) -> tuple[str, ...]:
    """A template keeps the spaces at a content's end, or trims them."""
    return (spaces, "") if spaces else ("",)


def _trailing(message: Message) -> str:
    text = text_of(message)
    return text[len(text.rstrip()) :]
