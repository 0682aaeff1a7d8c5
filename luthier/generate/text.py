"""Ids to text, whole or a piece at a time.

A token is not a piece of text: an emoji may take four of them, and a sentencepiece decoder drops the space of
the first word it sees. Both are right again when a few ids before are decoded along with the new ones and
their text is cut off, and when nothing is shown that still ends in a half character.
"""

from collections.abc import Sequence
from typing import Any

CONTEXT = 6  # ids of the prompt decoded along with the answer
HALF = "\ufffd"  # what a decoder writes for bytes that are no character (yet)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of the ids without special tokens; spaces stay as they were trained."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def continuation(tokenizer: Any, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
    """Text of `token_ids` as it goes on from the prompt."""
    context = list(prompt_ids[-CONTEXT:])
    return decode(tokenizer, [*context, *token_ids])[len(decode(tokenizer, context)) :]


class TextStream:
    """The same text, piece by piece: the pieces joined are `continuation`, and none splits a character."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]):
        self.tokenizer = tokenizer
        self.ids = list(prompt_ids[-CONTEXT:])
        self.window = 0  # where decoding begins
        self.read = len(self.ids)  # up to here it has been given out
        self.before = decode(tokenizer, self.ids)

    def push(self, token_id: int) -> str:
        """What this token makes certain; often all of its text, sometimes none."""
        self.ids.append(token_id)
        text = decode(self.tokenizer, self.ids[self.window :])
        if text.endswith(HALF):
            return ""
        return self._give(text)

    def flush(self) -> str:
        """What was held back, once no token follows."""
        return self._give(decode(self.tokenizer, self.ids[self.window :]))

    def _give(self, text: str) -> str:
        piece = text[len(self.before) :]
        if piece:
            self.window, self.read = self.read, len(self.ids)
            self.before = decode(self.tokenizer, self.ids[self.window :])
        return piece


class StopStrings:
    """Watches a growing text for the first stop string in it, and holds back what may become one."""

    def __init__(self, stop: Sequence[str] = ()):
        self.stop = tuple(stop)
        self.held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The part of the text that is certainly before any stop string."""
        text = self.held + piece
        places = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if places:
            self.found, self.held = True, ""
            return text[: min(places)]
        keep = max((self._overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once no text follows."""
        held, self.held = self.held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        longest = min(len(text), len(stop) - 1)
        return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
