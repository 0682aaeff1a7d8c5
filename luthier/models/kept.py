"""What layers keep for backward in each mode of recomputation, and what a backward pass needs beside it: counted.

A few short passes of the very model run, one layer of each kind, while every allocation is watched. So the figures
are those of this model, with its adapters, its dropout and whatever of it is fused, and not those of a table. They
are taken at three lengths, so that what grows with the square of a document (attention with explicit scores) shows,
and with two documents in a pass, since on a CPU attention keeps its output once more where it has to be put together.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from luthier.models.kinds import looks, one_of_each_layer
from luthier.models.layers import Recomputation, fused_mlps, layers_of
from luthier.models.load import decoder_of, embeddings_of
from luthier.models.policy import Policy
from luthier.models.recompute import MODES, Mode

# Tokens of the passes that are counted, half of them in each document. That is a prime, which no width of a model has
# as a factor: so a tensor's size tells whether it grows with the pass or is a weight, a copy of one, or a gradient.
_LENGTHS = (62, 122, 254)
# Tokens of an MLP's tile while counting, so that tiles are told from what has all tokens; their share is added.
_TILE = 8
# What one layer's backward needs beside what it kept, as a factor on that, where its MLP is not fused: experts have
# tokens in numbers of their own, which are not recognised.
_UNFUSED = 1.3
# Tensors of a tile, as wide as the MLP, that are there at once in backward: gate, up, their product and its gradient.
_WIDE = 4


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors made inside that are alive, and the most there were, on one kind of device.

    Args:
        unit: only tensors whose number of elements it divides.
    """

    def __init__(self, device: str = "cpu", unit: int = 1) -> None:
        super().__init__()
        self.device, self.unit, self.alive, self.peak = device, unit, 0, 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device:
                storage = tensor.untyped_storage()
                counts = tensor.numel() % self.unit == 0
                if counts and storage._cdata not in given and storage._cdata not in self._known:
                    self._note(storage)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: Any) -> None:
            self.alive -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.alive += size
        self.peak = max(self.peak, self.alive)


@dataclass(frozen=True)
class Growth:
    """Bytes as a function of a pass: for each token, and for each pair of tokens of a document."""

    token: float
    pair: float

    def of(self, tokens: int, longest: int) -> float:
        return tokens * (self.token + self.pair * min(longest, tokens))

    @classmethod
    def through(cls, counted: list[float]) -> Growth:
        """Through what was counted at `_LENGTHS`; what does not grow with a pass is left out."""
        pair, token, _ = np.polyfit(_LENGTHS, counted, 2)
        if pair < 1e-3:
            return cls(max(0.0, (counted[2] - counted[1]) / (_LENGTHS[2] - _LENGTHS[1])), 0.0)
        return cls(max(0.0, float(token)), 2 * float(pair))


@dataclass(frozen=True)
class Kept:
    """What was counted: of each layer in each mode; and beside all that (the inside of a backward, the last norm), at
    the height of a pass in each mode.

    Attributes:
        wide: bytes of a tile's row, which `beside` has for modes that make the MLP again.
    """

    layers: list[dict[Mode, Growth]]
    beside: dict[Mode, Growth]
    wide: int
    tile: int

    def bytes(self, modes: list[Mode], tokens: int, longest: int) -> float:
        """Of a pass with a mode for each layer."""
        kept = sum(
            layer[mode].of(tokens, longest) for layer, mode in zip(self.layers, modes, strict=True)
        )
        beside = 0.0
        for mode in set(modes):
            tile = self.wide * min(tokens, self.tile) if mode in ("mlp", "layer", "offload") else 0
            beside = max(beside, self.beside[mode].of(tokens, longest) + tile)
        return kept + beside

    def choose(self, tokens: int, longest: int, room: float) -> list[Mode]:
        """The least recomputation with which a pass of so many tokens has room, else what needs least. Cheap ones
        first; and the first layers before the last, whose second run meets the memory of all others."""
        modes: list[Mode] = ["keep"] * len(self.layers)
        best, least = list(modes), self.bytes(modes, tokens, longest)
        for stage in MODES[1:4]:
            for index, layer in enumerate(self.layers):
                if least <= room:
                    return best
                if layer[stage].of(tokens, longest) < layer[modes[index]].of(tokens, longest):
                    modes[index] = stage
                    size = self.bytes(modes, tokens, longest)  # may rise: a layer's second run has its own needs
                    if size < least:
                        best, least = list(modes), size
        return best

    def tokens(self, modes: list[Mode], longest: int, room: float, most: int) -> int:
        """The most tokens of a pass that have room, up to `most`; at least the longest document."""
        low, high = longest, max(longest, most)
        while low < high:
            middle = (low + high + 1) // 2
            if self.bytes(modes, middle, longest) <= room:
                low = middle
            else:
                high = middle - 1
        return low


def count(policy: Policy, recomputation: Recomputation) -> Kept:
    """Count a policy's layers in all modes that they know; leaves no trace."""
    before, tile, was_training = list(recomputation.modes), recomputation.tile, policy.training
    dropout = policy.dropout.lengths, policy.dropout.seeds
    kinds = [looks(layer) for layer in recomputation.layers]
    found: dict[Mode, list[list[float]]] = {}
    beside: dict[Mode, Growth] = {}
    wide = max(
        (_WIDE * m.module.down_proj.in_features for layer in recomputation.layers for m in fused_mlps(layer)),
        default=0,
    )
    try:
        policy.train()
        recomputation.tile = _TILE
        with one_of_each_layer(policy.model):
            _run(policy, _LENGTHS[0])  # makes what is made once
        for mode in MODES[:4]:
            if mode == "layer" and not recomputation.knows(0, "layer"):
                break
            recomputation.set_all(mode)
            with one_of_each_layer(policy.model):
                runs = [_run(policy, length) for length in _LENGTHS]
            found[mode] = [list(column) for column in zip(*(kept for kept, _ in runs), strict=True)]
            beside[mode] = Growth.through([peak for _, peak in runs])
    finally:
        recomputation.tile = tile
        recomputation.set(before)
        policy.train(was_training)
        policy.dropout.lengths, policy.dropout.seeds = dropout
    for mode in MODES[1:]:
        if mode not in found:  # what is not known there is what comes before it
            found[mode], beside[mode] = found[MODES[MODES.index(mode) - 1]], beside[MODES[MODES.index(mode) - 1]]
    keeps = [max(column) for column in zip(*found["keep"], strict=True)]
    for mode in MODES[2:] if not all(map(fused_mlps, recomputation.layers)) else ():
        inside = Growth.through([_UNFUSED * kept for kept in keeps])
        beside[mode] = max(beside[mode], inside, key=lambda growth: growth.of(_LENGTHS[2], _LENGTHS[2]))
    layers = [
        {mode: Growth.through(found[mode][kinds.index(kind)]) for mode in MODES} for kind in kinds
    ]
    return Kept(layers, beside, wide * _itemsize(policy), tile)


def _itemsize(policy: Policy) -> int:
    return int(torch.empty(0, dtype=policy.model.dtype).element_size())


def _run(policy: Policy, length: int) -> tuple[list[float], float]:
    """A pass of two documents, forward and backward: bytes that each layer keeps, and what there is beside at the
    most, of tensors that grow with the pass."""
    embeddings = embeddings_of(policy.model)
    device = embeddings.weight.device
    trace, growing = Allocations(device.type), Allocations(device.type, length // 2)
    alive: list[tuple[int, int]] = []
    lengths = (length // 2,) * 2
    policy.dropout.lengths, policy.dropout.seeds = lengths, (0, 1)
    ids = torch.randint(
        int(embeddings.weight.shape[0]), (length,), generator=torch.Generator().manual_seed(0)
    ).to(device)
    cu_seqlens = torch.tensor([0, length // 2, length], dtype=torch.int32, device=device)
    with ExitStack() as stack:
        for layer in layers_of(decoder_of(policy.model)):
            stack.enter_context(_watched(layer, lambda: alive.append((trace.alive, growing.alive))))
        # Layers after the first get an input that has a gradient, and the first one stands for them.
        inputs: list[torch.Tensor] = []
        handle = embeddings.register_forward_hook(lambda m, a, out: _with_gradient(out, inputs))
        stack.enter_context(_hooked(handle))
        stack.enter_context(torch.enable_grad())
        with trace, growing:
            positions = torch.arange(length // 2, device=device).repeat(2)
            hidden = policy.hidden(ids, positions, lengths, cu_seqlens)
            torch.autograd.grad(hidden, inputs, torch.ones_like(hidden))
    pairs = list(zip(alive[::2], alive[1::2], strict=True))
    of_layers = sum(end[1] - start[1] for start, end in pairs)
    return [float(end[0] - start[0]) for start, end in pairs], float(growing.peak - of_layers)


def _with_gradient(out: torch.Tensor, inputs: list[torch.Tensor]) -> torch.Tensor:
    inputs[:] = [out if out.requires_grad else out.requires_grad_(True)]
    return inputs[0]


@contextmanager
def _watched(layer: Any, note: Callable[[], None]) -> Iterator[None]:
    before = layer.register_forward_pre_hook(lambda m, a: note())
    after = layer.register_forward_hook(lambda m, a, out: note())
    with _hooked(before), _hooked(after):
        yield


@contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
