"""Keys and values of the texts that are being written, and attention over them.

A text has a slot: a place in one tensor per layer. A pass of the model is flat: the last token of every text that is
being written, then whole prompts, all laid end to end, no prompt padded (`models.attention` hands each layer's
query, key and value here). What a slot holds stays readable until another text takes it, so that a prompt which
begins like an earlier one, in this batch or a conversation's last turn, copies what they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from luthier.models.attention import attend

# Places over texts from which on a call for each text costs a CPU less than one call with a mask.
UNEVEN = 3


@dataclass
class _Pass:
    """What a pass computes: the texts in slots 0 to `writing` - 1 by a token each, and parts of prompts.

    Attributes:
        before: tokens that each of the writing texts has in its slot. prompts: (slot, tokens it has, tokens to come).
        rows, places: (writing,) int64, where the new keys go. longest: keys that a step of fixed shapes attends over,
            whatever the texts' lengths, of which it knows the places alone; None in every other pass.
    """

    writing: int
    before: list[int]
    prompts: list[tuple[int, int, int]]
    rows: Tensor
    places: Tensor
    masks: dict[int | None, Tensor | None]
    longest: int | None = None


class Slots:
    """Room for texts side by side; grows as they do.

    Attributes:
        lengths: tokens that each slot holds, of a text or of one that has ended. one_by_one: whether texts of very
            unequal length attend in a call for each, where calls are cheap, and not all in one with a mask. moves:
            how often keys and values have got other addresses.
    """

    def __init__(self, device: torch.device) -> None:
        self.one_by_one = device.type == "cpu"
        self.device = device
        self.lengths: list[int] = []
        self.room = self.moves = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._pass: _Pass | None = None

    def resize(self, slots: int, room: int) -> None:
        """So many slots of so many tokens; what fits of what is in them stays."""
        if (slots, room) != (len(self.lengths), self.room):
            for layer, (keys, values) in self._layers.items():
                self._layers[layer] = _resized(keys, slots, room), _resized(values, slots, room)
            self.lengths = self.lengths[:slots] + [0] * (slots - len(self.lengths))
            self.room = room
            self.moves += 1

    def copy(self, source: int, target: int, tokens: int) -> None:
        """The first tokens of one slot into another."""
        if source != target:
            for pair in self._layers.values():
                for kept in pair:
                    kept[target, :, :tokens] = kept[source, :, :tokens]
        self.lengths[target] = tokens

    def swap(self, one: int, other: int) -> None:
        if one == other:
            return
        longest = max(self.lengths[one], self.lengths[other])
        for pair in self._layers.values():
            for kept in pair:
                first = kept[one, :, :longest].clone()
                kept[one, :, :longest] = kept[other, :, :longest]
                kept[other, :, :longest] = first
        self.lengths[one], self.lengths[other] = self.lengths[other], self.lengths[one]

    def begin(self, writing: int, prompts: Sequence[tuple[int, int]]) -> Tensor:
        """Say what the next pass holds: a token for each of the slots 0 to `writing` - 1, then `prompts` as (slot, new
        tokens). Returns the positions of its tokens, (T,) int64; afterwards the slots count them."""
        before = self.lengths[:writing]
        parts = [(slot, self.lengths[slot], new) for slot, new in prompts]
        positions = before + [place for _, start, new in parts for place in range(start, start + new)]
        of_pass = torch.tensor(positions, device=self.device)
        self._pass = _Pass(
            writing, before, parts, torch.arange(writing, device=self.device), of_pass[:writing], {}
        )
        self.count(writing)
        for slot, start, new in parts:
            self.lengths[slot] = start + new
        return of_pass

    def begin_fixed(self, places: Tensor, longest: int) -> None:
        """Say that the next pass is a token for each of the first slots, which goes to `places`, (writing,) int64, and
        sees what is before it among the first `longest` keys. What is computed depends on nothing else here, so that
        it may be captured once and replayed with other places. `count` says that it has happened."""
        writing = places.shape[0]
        rows = torch.arange(writing, device=self.device)
        self._pass = _Pass(writing, [], [], rows, places, {}, longest)

    def count(self, writing: int) -> None:
        """The texts in slots 0 to `writing` - 1 have a token more."""
        for slot in range(writing):
            self.lengths[slot] += 1

    def spare(self, slots: range) -> list[int]:
        """A place in each of these slots that may be written to: behind what it holds. One that is full holds a token
        less from now on."""
        for slot in slots:
            self.lengths[slot] = min(self.lengths[slot], self.room - 1)
        return [self.lengths[slot] for slot in slots]

    def logits(
        self, model: Any, ids_T: Tensor, positions_T: Tensor, last_R: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        """(R, V): the pass that has been described. `last_R`: the place of each text's last token among the T;
        `lengths`: new tokens of each text."""
        output = model(
            input_ids=ids_T[None],
            position_ids=positions_T[None],
            # As in training (`models.policy`): never read, it keeps transformers from making one.
            attention_mask=positions_T.new_empty(1, 1, 1, 1),
            use_cache=False,
            logits_to_keep=last_R,
            document_lengths=tuple(lengths),
            cached=self,
        )
        return cast(Tensor, output.logits[0])

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int | None, **options: Any
    ) -> Tensor:
        """Attention of a layer in the pass that has been described; keeps its keys and values.

        Args:
            query: (1, heads, T, head_dim). key, value: (1, kv_heads, T, head_dim) of the new tokens.
            window: tokens that one sees, itself included. options: as `models.attention.attend` takes them.

        Returns:
            (1, heads, T, head_dim).
        """
        assert self._pass is not None
        if layer not in self._layers:
            shape = (len(self.lengths), key.shape[1], self.room)
            # Zeros and not whatever lies there: a masked key's value is multiplied by 0, and 0 times nan is nan.
            self._layers[layer] = (key.new_zeros(*shape, key.shape[3]), value.new_zeros(*shape, value.shape[3]))
        keys, values = self._layers[layer]
        outs = []
        writing = self._pass.writing
        if writing == 1 and self._pass.longest is None:  # as below, in half the time
            place = self._pass.before[0]
            keys[0, :, place], values[0, :, place] = key[0, :, 0], value[0, :, 0]
        elif writing:
            keys[self._pass.rows, :, self._pass.places] = key[0, :, :writing].transpose(0, 1)
            values[self._pass.rows, :, self._pass.places] = value[0, :, :writing].transpose(0, 1)
        if writing:
            outs += self._written(query[:, :, :writing], keys, values, window, options)
        start = writing
        for slot, before, new in self._pass.prompts:
            stop = start + new
            keys[slot, :, before : before + new] = key[0, :, start:stop]
            values[slot, :, before : before + new] = value[0, :, start:stop]
            seen = slice(0, before + new)
            outs.append(
                attend(
                    query[:, :, start:stop],
                    keys[slot : slot + 1, :, seen],
                    values[slot : slot + 1, :, seen],
                    mask=None,
                    causal=True,
                    before=before,
                    window=window,
                    **options,
                )
            )
            start = stop
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def _written(
        self, query: Tensor, keys: Tensor, values: Tensor, window: int | None, options: dict[str, Any]
    ) -> list[Tensor]:
        """The last token of every text against all before it: (1, heads, writing, head_dim), in one or several parts.

        The heads that share keys are queries of one call, so that keys are not copied for each.
        """
        assert self._pass is not None
        kv_heads = keys.shape[1]
        options = options | {"causal": False, "window": None}
        # A sink is a head's own, and has to find its head.
        grouped = options.get("sinks") is None
        fixed = self._pass.longest is not None
        # As below, with half as many steps, which is what a single text's time goes to.
        if self._pass.writing == 1 and not fixed:
            stop = self._pass.before[0] + 1
            seen = slice(0 if window is None else max(0, stop - window), stop)
            rows = query.reshape(1, kv_heads, -1, query.shape[3]) if grouped else query
            out = attend(rows, keys[:1, :, seen], values[:1, :, seen], mask=None, **options)
            return [out.reshape(1, query.shape[1], 1, -1)]
        rows = query[0].transpose(0, 1).unflatten(1, (kv_heads, -1) if grouped else (-1, 1))
        longest = self._pass.longest or max(self._pass.before) + 1
        if self.one_by_one and not fixed and longest * len(self._pass.before) > UNEVEN * sum(self._pass.before):
            found = []
            for slot, before in enumerate(self._pass.before):
                seen = slice(0 if window is None else max(0, before + 1 - window), before + 1)
                one = keys[slot : slot + 1, :, seen], values[slot : slot + 1, :, seen]
                found.append(attend(rows[slot : slot + 1], *one, mask=None, **options))
            out = torch.cat(found)
        else:
            writing = self._pass.writing
            mask = self._mask(window, longest)
            out = attend(rows, keys[:writing, :, :longest], values[:writing, :, :longest], mask=mask, **options)
        return [out.flatten(1, 2).transpose(0, 1)[None]]

    def _mask(self, window: int | None, longest: int) -> Tensor | None:
        """(writing, 1, 1, longest) boolean: which keys a text's last token sees; None: all."""
        assert self._pass is not None
        masks = self._pass.masks
        if window not in masks:
            place = torch.arange(longest, device=self.device)
            own = self._pass.places[:, None]
            if self._pass.longest is not None:  # a spare row may be beyond the keys, and has to see one of them
                own = own.clamp(max=longest - 1)
            mask = place <= own
            if window is not None:
                mask &= place > own - window
            alike = self._pass.longest is None and min(self._pass.before) + 1 == longest
            equal = alike and (window is None or window >= longest)
            masks[window] = None if equal else mask[:, None, None]
        return masks[window]


def _resized(kept: Tensor, slots: int, room: int) -> Tensor:
    resized = kept.new_zeros(slots, kept.shape[1], room, kept.shape[3])
    both, tokens = min(slots, kept.shape[0]), min(room, kept.shape[2])
    resized[:both, :, :tokens] = kept[:both, :, :tokens]
    return resized
