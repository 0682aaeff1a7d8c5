"""A prompt on its way to an answer: what it asks for, what it has got, and when it is done."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.generate.sampling import Chooser
from luthier.generate.text import StopStrings, TextStream, continuation


@dataclass
class Completion:
    """One answer. `token_ids` hold the terminator or stop string that ended it, `text` does not."""

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str  # "stop": it ended by itself; "length": max_new_tokens or the context window ended it


@dataclass(eq=False)
class Row:
    """A prompt on its way.

    Attributes:
        limit: new tokens that it may get. draws: its own random stream. adapter: whose words it wants; None is the
            model as it is. scores_of: token ids whose log-probs as its next token are wanted, in place of a token.
        ended: by a terminator or a stop string. piece: what the last token added to the text, if it is followed.
    """

    index: int
    prompt_ids: list[int]
    limit: int
    chooser: Chooser
    draws: random.Random
    terminators: frozenset[int]
    adapter: str | None = None
    scores_of: Sequence[int] | None = None
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    ended: bool = False
    text: TextStream | None = None  # followed in the loop for a stream, and for stop strings
    watch: StopStrings = field(default_factory=StopStrings)
    piece: str = ""

    @property
    def done(self) -> bool:
        return self.ended or len(self.token_ids) >= self.limit

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def last_id(self) -> int:
        return (self.token_ids or self.prompt_ids)[-1]

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.token_ids

    def take(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.ended = token_id in self.terminators
        if self.text is None:
            return
        self.piece = "" if self.ended else self.watch.push(self.text.push(token_id))
        if self.watch.found:
            self.ended = True
        elif self.done:
            self.piece += self.watch.push(self.text.flush()) + self.watch.flush()

    def completion(self, tokenizer: Any) -> Completion:
        ids = self.token_ids
        spoken = ids[:-1] if ids and ids[-1] in self.terminators else ids
        text = continuation(tokenizer, self.prompt_ids, spoken)
        places = [place for place in (text.find(string) for string in self.watch.stop) if place >= 0]
        if places:
            text = text[: min(places)]
        return Completion(self.prompt_ids, ids, text, "stop" if self.ended else "length")
