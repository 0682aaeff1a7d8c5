"""Continuous batching: every step is one flat pass over the last tokens of all running texts and the prompts of those
that join, so that no text waits for another one's end and no prompt is padded.

A text joins as soon as there is a slot for it, and leaves with its last token. What it shares with the text of another
slot, running or ended, is copied and not computed: a template, a system prompt, a conversation so far. Where memory
for keys and values ends, the text that joined last makes room; it keeps what it has written, and is read again later.

Iterations as the unit of scheduling: Orca (Yu et al. 2022, section 4.1). Reuse of beginnings: SGLang (Zheng et al.
2023, section 3), here by slot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from luthier.generate import graphs
from luthier.generate.rows import Row
from luthier.generate.sampling import Chooser
from luthier.generate.slots import Slots
from luthier.models.attention import flat_pass

# Tokens of prompts in one pass, unless a single prompt has more: all of them are in the model's MLPs at once.
PROMPT_TOKENS = 4096
# Tokens of a common beginning from which on a prompt waits a step for another one that computes it.
SHARED_FROM = 8
# Tokens by which the room of all slots grows: each time what they hold is copied.
GROW = 64


class Speakers(graphs.Marks, Protocol):
    """Adapters that one model has side by side (`models.several`)."""

    def speaking(self, names: Sequence[str | None], lengths: Sequence[int]) -> AbstractContextManager[None]:
        """Inside, a pass is of texts of these adapters, each of so many tokens, end to end."""
        ...


def whose(
    speakers: Speakers | None, rows: Sequence[Row], lengths: Sequence[int]
) -> AbstractContextManager[None]:
    """Says for a pass which adapter each of its texts has."""
    return nullcontext() if speakers is None else speakers.speaking([row.adapter for row in rows], lengths)


class Loop(Protocol):
    """Rows in, tokens out, a step at a time.

    Attributes:
        max_cached_tokens: keys and values over all texts; may be changed between steps.
    """

    max_cached_tokens: int

    @property
    def waiting(self) -> Collection[Row]:
        """Rows that no pass holds."""
        ...

    def submit(self, rows: Iterable[Row]) -> None: ...
    def cancel(self, row: Row) -> None: ...
    def clear(self) -> None:
        """Forget all rows and give the memory back."""
        ...

    def step(self) -> list[Row]:
        """The rows that have got a token, with those that are done now; empty: there is nothing to do."""
        ...


class Continuous:
    """The loop for models that take flat passes.

    Attributes:
        max_cached_tokens: keys and values over all slots; a single text may have more. max_rows: texts at once.
        speakers: of a model that several adapters share; without, every text has the model as it is.
        waiting: in the order in which they join. running: row i is in slot i. graphs: captured steps, on a GPU.
    """

    def __init__(
        self, model: Any, *, max_cached_tokens: int, max_rows: int = 256, speakers: Speakers | None = None
    ) -> None:
        self.model, self.speakers = model, speakers
        self.device = model.get_input_embeddings().weight.device
        self.max_cached_tokens, self.max_rows = max_cached_tokens, max_rows
        self.waiting: deque[Row] = deque()
        self.slots = Slots(self.device)
        self.graphs = graphs.for_loop(model, self.slots, speakers)
        # Whose text is in a slot. The first `_count` are running, the others have left, at a step of that number.
        self._texts: list[Row] = []
        self._left: dict[Row, int] = {}
        self._count = self._steps = 0

    @property
    def running(self) -> list[Row]:
        return self._texts[: self._count]

    def submit(self, rows: Iterable[Row]) -> None:
        self.waiting.extend(rows)

    def cancel(self, row: Row) -> None:
        """Take a row back that is not done."""
        if row in self.running:
            self._leave(row)
        elif row in self.waiting:
            self.waiting.remove(row)

    def clear(self) -> None:
        """Forget all rows and give the memory back."""
        self.waiting.clear()
        self.slots.resize(0, 0)
        if self.graphs is not None:
            self.graphs.clear()
        self._texts, self._left, self._count = [], {}, 0

    @torch.no_grad()
    def step(self) -> list[Row]:
        """One pass. Not under `inference_mode`: a tensor that a module keeps from here (rotary tables, cast adapter
        weights) must serve a backward pass later."""
        self._steps += 1
        self._let_go_what_does_not_fit()
        writing = self._count
        self._join()
        rows = self.running
        if not rows:
            return []
        ids = [row.last_id for row in rows[:writing]]
        prompts = []
        for slot in range(writing, len(rows)):
            unread = rows[slot].ids[self.slots.lengths[slot] :]
            prompts.append((slot, len(unread)))
            ids += unread
        if self.graphs is None or prompts:
            logits = self.logits(ids, writing, prompts)
        else:
            adapters = [row.adapter for row in rows]
            logits = self.graphs.logits(ids, adapters, lambda: self.logits(ids, writing, []))
        choose(rows, logits)
        for row in rows:
            if row.done:
                self._leave(row)
        return rows

    def logits(self, ids: Sequence[int], writing: int, prompts: list[tuple[int, int]]) -> Tensor:
        """(rows, V): what follows the last token of each text."""
        lengths = [1] * writing + [unread for _, unread in prompts]
        positions_T = self.slots.begin(writing, prompts)
        ids_T = torch.tensor(ids, device=self.device)
        last_R = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        with flat_pass(), whose(self.speakers, self.running, lengths):
            return self.slots.logits(self.model, ids_T, positions_T, last_R, lengths)

    # --- who is in which slot ---------------------------------------------------------------------------------

    def _let_go_what_does_not_fit(self) -> None:
        """Room for a token more in every running text. Where there is none, those that joined last wait again."""
        while self._count > 1 and self._count * self._longest() > self.max_cached_tokens:
            self.waiting.appendleft(self._leave(self.running[-1]))
        if self._count and self._longest() > self.slots.room:
            self._resize(self._count, self._wider())

    def _wider(self) -> int:
        """Room for texts that have outgrown theirs. What is captured is lost whenever slots move, so there they move
        seldom: to twice the longest text's length, as far as texts may get there and memory holds them."""
        longest = self._longest()
        if self.graphs is None:
            return longest + GROW
        most = max(len(row.prompt_ids) + row.limit for row in self.running)
        return max(longest + GROW, min(2 * longest, most, self.max_cached_tokens // self._count))

    def _longest(self) -> int:
        return max(row.length for row in self.running)

    def _join(self) -> None:
        """As many waiting rows as there is room for, and as one pass should read."""
        first, unread = self._count, 0
        later: list[Row] = []
        while self.waiting and self._count < self.max_rows:
            row = self.waiting[0]
            needed = max(_soon(text) for text in [*self.running, row])
            most = self.max_cached_tokens // (self._count + 1)
            if self._count and needed > most:
                break
            room = max(needed, min(self.slots.room, most))
            shared, source = self._most_shared(row, [*range(first), *range(self._count, len(self._texts))])
            coming, _ = self._most_shared(row, range(first, self._count), coming=True)
            if coming >= max(shared + 1, SHARED_FROM):  # in this very pass: in the next one it can be copied
                later.append(self.waiting.popleft())
                continue
            if unread and unread + row.length - shared > PROMPT_TOKENS:
                break
            self._take_slot(self.waiting.popleft(), room, source, shared)
            unread += row.length - shared
        self.waiting.extendleft(reversed(later))

    def _most_shared(self, row: Row, slots: Iterable[int], coming: bool = False) -> tuple[int, int | None]:
        """How many tokens this row's text has in common with the beginning of what one of the slots holds, or is about
        to (`coming`), and which. The last token is not counted: its logits are needed."""
        ids, most, source = row.ids, 0, None
        for slot in slots:
            text = self._texts[slot]
            held = text.length if coming else self.slots.lengths[slot]
            if text.adapter == row.adapter and (found := common(ids, text.ids, min(held, len(ids) - 1))) > most:
                most, source = found, slot
        return most, source

    def _take_slot(self, row: Row, room: int, source: int | None, shared: int) -> None:
        """The next slot, with what another one shares with the row in it."""
        place = self._count
        if source is None and place < len(self._texts):  # nothing to keep: the oldest text goes
            source = min(range(place, len(self._texts)), key=lambda slot: self._left.get(self._texts[slot], 0))
        if source is not None and source >= place:
            self._swap(source, place)
        self._resize(place + 1, room)
        if source is not None and source < place:
            self.slots.copy(source, place, shared)
        self.slots.lengths[place] = shared
        self._texts[place : place + 1] = [row]
        self._left.pop(row, None)
        self._count += 1

    def _leave(self, row: Row) -> Row:
        self._count -= 1
        self._swap(self._texts.index(row), self._count)
        self._left[row] = self._steps
        return row

    def _swap(self, one: int, other: int) -> None:
        self.slots.swap(one, other)
        self._texts[one], self._texts[other] = self._texts[other], self._texts[one]

    def _resize(self, slots: int, room: int) -> None:
        """So many slots at least, of so much room; those that have been left stay as long as memory holds them."""
        now = len(self.slots.lengths)
        wanted = now if slots <= now else max(slots, min(2 * now, self.max_rows))
        self.slots.resize(max(slots, min(wanted, self.max_cached_tokens // room)), room)
        for row in self._texts[len(self.slots.lengths) :]:
            self._left.pop(row, None)
        del self._texts[len(self.slots.lengths) :]


def _soon(row: Row) -> int:
    """Tokens that a text will have before its slot grows."""
    return row.length + min(GROW, row.limit - len(row.token_ids))


def common(one: list[int], other: list[int], most: int) -> int:
    """How many ids two lists begin with alike, up to `most`."""
    low, high = 0, min(most, len(one), len(other))
    while low < high:  # a comparison of slices takes no Python for each id
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def choose(rows: Sequence[Row], logits_RV: Tensor) -> None:
    """Give every row its next token, or the log-probs that it wants in place of one."""
    by_chooser: dict[Chooser | None, list[int]] = {}
    for place, row in enumerate(rows):
        by_chooser.setdefault(None if row.scores_of is not None else row.chooser, []).append(place)
    for chooser, places in by_chooser.items():
        chosen = [rows[place] for place in places]
        logits = logits_RV if len(places) == len(rows) else logits_RV[torch.tensor(places, device=logits_RV.device)]
        if chooser is None:
            for row, logps_V in zip(chosen, logits.float().log_softmax(-1).cpu(), strict=True):
                row.logps, row.ended = logps_V[list(row.scores_of or ())].tolist(), True
            continue
        # A chooser that reads what is there so far has a single row.
        ids = torch.tensor([chosen[0].ids if chooser.reads_history else [0]] * len(chosen), device=logits.device)
        for row, token_id in zip(chosen, chooser(ids, logits, [row.draws for row in chosen]).tolist(), strict=True):
            row.take(token_id)
