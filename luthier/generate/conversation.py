"""A conversation with a model: its turns, what of them the model reads, and the next answer as it comes.

The loop is kept between turns, and with it the keys and values of what was read: a turn computes what is new. Where the
context window is full, the oldest turns are read no longer, which is said; they stay in the conversation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from luthier.data.examples import ChatExample
from luthier.errors import DataError
from luthier.generate.asking import Asking
from luthier.generate.engine import Engine, evaluating
from luthier.generate.rows import Completion
from luthier.generate.sampling import Sampling

log = logging.getLogger("luthier")

# Of the window, what is kept free for an answer: as much as it may be long, but no more than this share.
FOR_ANSWER = 0.25

Message = dict[str, Any]


@dataclass
class Speaker:
    """A model in a conversation.

    Attributes:
        adapter: what its rows ask for on a model that several share. loop: of the engine, the same for all turns.
    """

    name: str
    engine: Engine
    asking: Asking
    loop: Any
    adapter: str | None = None


@dataclass
class Conversation:
    """Turns so far, without the system text.

    Attributes:
        first: turns before this one are read no longer.
    """

    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    first: int = 0

    def reset(self) -> None:
        self.messages, self.first = [], 0

    def undo(self) -> bool:
        """Take the last question and its answer back; False: there is none."""
        places = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        if not places:
            return False
        del self.messages[places[-1] :]
        self.first = min(self.first, len(self.messages))
        return True

    def rows(self, in_turns: bool) -> list[dict[str, list[Message]]]:
        """As rows of training data: one, or, where each question stood for itself (not `in_turns`), one for each."""
        opening = [{"role": "system", "content": self.system}] if self.system else []
        pairs = [self.messages[place : place + 2] for place in range(0, len(self.messages), 2)]
        parts = [self.messages] if in_turns else pairs
        return [{"messages": [*opening, *part]} for part in parts if part]

    def ask(
        self,
        speaker: Speaker,
        text: str,
        sampling: Sampling,
        stopped: Callable[[], bool],
        on_end: Callable[[Completion, bool], None],
    ) -> Iterator[str]:
        """The answer to the next turn, piece by piece. `on_end` gets it as a whole, and whether it was stopped.

        `stopped` is asked after every token: an answer that was stopped stays as far as it came, and where there is
        nothing of it, so does the question not.

        Raises:
            DataError: the turn has no room in the window, or the template refuses it; it is not part of the
                conversation then.
        """
        self.messages.append({"role": "user", "content": text})
        kept = False
        try:
            ids = self._fitting(speaker, sampling)
            [row] = speaker.engine.rows([ids], sampling, follow=True)
            row.adapter = speaker.adapter
            speaker.loop.submit([row])
            was_stopped = False
            with evaluating(speaker.engine.model):
                try:
                    while not row.done and speaker.loop.step():
                        if row.piece:
                            yield row.piece
                        if was_stopped := stopped() and not row.done:
                            break
                finally:
                    if not row.done:
                        speaker.loop.cancel(row)
            completion = row.completion(speaker.engine.tokenizer)
            if completion.text or not was_stopped:
                self.messages.append({"role": "assistant", "content": completion.text})
                kept = True
            on_end(completion, was_stopped)
        finally:
            if not kept:
                self.messages.pop()

    def _fitting(self, speaker: Speaker, sampling: Sampling) -> list[int]:
        """Ids of as many turns as the window holds with an answer; says where that is fewer than before."""
        window = speaker.engine.window
        ids = self._ids(speaker, self.first)
        if window is None:
            return ids
        longest = sampling.resolve(speaker.engine.model, speaker.engine.default_new_tokens).max_new_tokens
        room = window - min(longest, int(FOR_ANSWER * window))
        first = self.first
        while len(ids) > room and first < len(self.messages) - 1:
            first += 2
            ids = self._ids(speaker, first)
        if reason := speaker.engine.why_not(ids):
            raise DataError(f"the message {reason}")
        if first > self.first:
            log.warning(
                "the context window of %d tokens is full: the first %d turns are no longer read (/reset begins anew)",
                window, first // 2,
            )  # fmt: skip
            self.first = first
        return ids

    def _ids(self, speaker: Speaker, first: int) -> list[int]:
        if not speaker.asking.is_chat:
            return speaker.asking.ids(speaker.asking.example(self.messages[-1]["content"], "", self.system))
        opening = [{"role": "system", "content": self.system}] if self.system else []
        return speaker.asking.ids(ChatExample([*opening, *self.messages[first:]]))
