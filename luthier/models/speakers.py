"""A pass over texts of several adapters: whose each token is, and linear layers that ask.

An adapted linear layer keeps every adapter's A and B beside its weight. The base's multiply is one for all tokens, and
an adapter's two small ones run on its own tokens alone, so that a text pays for its own adapter and for no other, and a
text of the base for none (Punica, Chen et al. 2023, section 3, and S-LoRA, Sheng et al. 2023, section 5, are this with
kernels of their own).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from luthier.errors import ModelError
from luthier.models.frozen import FrozenLinear

APART = "start one server for each, or merge them first (`luthier merge-lora`)"

# Rows of a layer's input: a stretch of them, their places (int64), or a column that is true for all others.
Tokens = slice | torch.Tensor


class Speakers:
    """Whose the tokens of a pass are; one for all layers of a model.

    A layer's input has a row for each token of the pass, or one for each text (the head's, where only the last token's
    logits are wanted). Which of the two it is, its number of rows says; where the numbers are equal, so are the rows.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._rows: dict[int, dict[str, Tokens]] = {}

    @contextmanager
    def speaking(self, names: Sequence[str | None], lengths: Sequence[int]) -> Iterator[None]:
        """Inside, a pass is of texts of these adapters (None: the base), each of so many tokens, end to end."""
        ones = [1] * len(names)
        self._rows = {} if not any(names) else {n: self._places(names, per) for n, per in _sizes(lengths, ones)}
        try:
            yield
        finally:
            self._rows = {}

    @contextmanager
    def marked(self, others: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside, a pass has a token of each text, and of each adapter `others`, (rows, 1) boolean, is true where a row
        is not its own: a pass that may be captured once and replayed for whoever speaks then, since every adapter
        named multiplies all rows."""
        self._rows = {next(iter(others.values())).shape[0]: dict(others)} if others else {}
        try:
            yield
        finally:
            self._rows = {}

    def of(self, rows: int) -> dict[str, Tokens]:
        """Adapter -> its rows in an input of so many; empty where only the base speaks.

        Raises:
            ModelError: the input is neither of all tokens nor of all texts.
        """
        if not self._rows:
            return {}
        if rows not in self._rows:
            raise ModelError(
                f"an adapted layer got {rows} rows in a pass of {max(self._rows)} tokens, and cannot tell whose they "
                f"are: this model takes one adapter at a time; {APART}"
            )
        return self._rows[rows]

    def _places(self, names: Sequence[str | None], lengths: Sequence[int]) -> dict[str, Tokens]:
        stretches: dict[str, list[tuple[int, int]]] = {}
        start = 0
        for name, length in zip(names, lengths, strict=True):
            if name is not None:
                own = stretches.setdefault(name, [])
                if own and own[-1][1] == start:
                    own[-1] = (own[-1][0], start + length)
                else:
                    own.append((start, start + length))
            start += length
        return {name: self._tokens(own) for name, own in stretches.items()}

    def _tokens(self, stretches: list[tuple[int, int]]) -> Tokens:
        if len(stretches) == 1:
            return slice(*stretches[0])
        return torch.tensor([place for start, stop in stretches for place in range(start, stop)], device=self.device)


def _sizes(lengths: Sequence[int], ones: Sequence[int]) -> list[tuple[int, Sequence[int]]]:
    return [(len(ones), ones), (sum(lengths), lengths)]


class SeveralLinear(FrozenLinear):
    """A linear layer with the low-rank additions of several adapters, each for the tokens of its own texts.

    Attributes:
        added: adapter -> A transposed (in, r) and s B transposed (r, out), in the compute dtype.
    """

    def __init__(
        self, base: nn.Module, speakers: Speakers, added: dict[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        super().__init__(base)
        self.speakers, self.added = speakers, added

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain = self.storage == "dense" and self.weight.dtype == x.dtype
        out = F.linear(x, self.plain_weight, self.bias) if plain else super().forward(x)
        self.add(x, out)
        return out

    def add(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Add to the base's output (..., out), which may be a part of a wider one, what the adapters make of x."""
        flat, sums = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        for name, tokens in self.speakers.of(flat.shape[0]).items():
            if name not in self.added:  # this adapter leaves the layer as it is
                continue
            a, b = self.added[name]
            if isinstance(tokens, slice):
                sums[tokens].addmm_(flat[tokens] @ a, b)
            elif tokens.dtype == torch.bool:
                sums.addmm_((flat @ a).masked_fill(tokens, 0), b)
            else:
                sums.index_add_(0, tokens, (flat.index_select(0, tokens) @ a) @ b)
