"""What a layer keeps for its backward pass, and what it makes again there.

Five modes, each of which keeps less than the one before and makes more again:

    keep      everything
    norms     the outputs of norms are made again from their inputs, which are kept anyway
    mlp       and so are gate and up of the MLP (`kernels.tiled_mlp`), in tiles of tokens where a pass is long
    layer     only the layer's input is kept; the layer runs a second time, without what nothing reads of it
    offload   and that input lies in the host's memory until the backward pass comes to the layer

The second computation is the first one, so losses and gradients are the same to the last bit, but for the order of
sums where the MLP of a long pass is tiled. Layers that are not fused know keep, layer and offload only.

Autograd asks for what it saved through a pair of hooks (`torch.autograd.graph.saved_tensors_hooks`), which is all
that this needs: what is packed is a way to make a tensor instead of the tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch.autograd.graph import saved_tensors_hooks

Mode = Literal["keep", "norms", "mlp", "layer", "offload"]
MODES: tuple[Mode, ...] = ("keep", "norms", "mlp", "layer", "offload")

# Tokens of an MLP's tile: multiplies are at full speed with fewer, and each tile reads the weights once more.
TILE = {"cpu": 2048, "cuda": 8192}
TILE_ELSEWHERE = 4096

Getter = Callable[[], torch.Tensor]

_again: ContextVar[bool] = ContextVar("again", default=False)


def runs_again() -> bool:
    """Whether a layer is run a second time now, for what its backward needs."""
    return _again.get()


@contextmanager
def remade(tensor: torch.Tensor, make: Getter) -> Iterator[None]:
    """Inside, whatever autograd saves of a tensor (itself or views of it) is made again by `make` when it is read."""
    place = tensor.untyped_storage().data_ptr() if tensor.requires_grad else None

    def pack(saved: torch.Tensor) -> Any:
        if place is None or saved.untyped_storage().data_ptr() != place or saved.numel() == 0:
            return saved
        return (saved.size(), saved.stride(), saved.storage_offset())

    def unpack(kept: Any) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        with torch.no_grad():
            return make().as_strided(*kept)

    with saved_tensors_hooks(pack, unpack):
        yield


class _Enough(Exception):
    """Ends a second run: all that was saved in the first is there."""


class _Run:
    """One run of a function under autograd, of which the input alone is kept."""

    def __init__(self, function: Callable[[torch.Tensor], Any], needs_grad: bool, get: Getter) -> None:
        self.function, self.needs_grad, self.get = function, needs_grad, get
        self.count = 0
        self.made: list[torch.Tensor | None] = []

    def pack(self, saved: torch.Tensor) -> int:
        self.count += 1
        return self.count - 1

    def unpack(self, index: int) -> torch.Tensor:
        if not self.made or self.made[index] is None:
            self._again()
        found = self.made[index]
        assert found is not None
        self.made[index] = None  # each is read once, and what has been read is free to go
        return found

    def _again(self) -> None:
        made: list[torch.Tensor | None] = []

        def collect(saved: torch.Tensor) -> None:
            made.append(saved.detach())
            if len(made) == self.count:
                raise _Enough

        x = self.get().detach().requires_grad_(self.needs_grad)
        token = _again.set(True)
        try:
            with torch.enable_grad(), saved_tensors_hooks(collect, _never):
                self.function(x)
        except _Enough:
            pass
        finally:
            _again.reset(token)
        if len(made) < self.count:
            raise RuntimeError(
                f"recomputation saved {len(made)} tensors, and {self.count} in the first run; this model computes "
                "something else when it is run again: set gradient_checkpointing: false"
            )
        self.made = made


def _never(packed: Any) -> torch.Tensor:
    raise AssertionError("nobody runs backward through a second run")


def recomputed(
    function: Callable[[torch.Tensor], Any], x: torch.Tensor, keep: Callable[[torch.Tensor], Getter]
) -> Any:
    """function(x), of which nothing is kept for backward but what `keep` makes of x.

    Args:
        function: computes the same when it is called again; other tensors that it uses live elsewhere.
        keep: x -> a function that gives x back, to be called in backward.
    """
    run = _Run(function, x.requires_grad, keep(x.detach()))
    with saved_tensors_hooks(run.pack, run.unpack):
        return function(x)


def kept_here(x: torch.Tensor) -> Getter:
    """Keeps x where it is."""
    return lambda: x


class Host:
    """Layer inputs in the host's memory. On CUDA the copies run beside the computation, on a stream of their own,
    and backward has the next layer's input on its way while it computes one. On a CPU, which is the host, an input
    stays where it is.

    Args:
        copies: how tensors travel; by the device of the first one if not given.
    """

    def __init__(self, copies: Copies | None = None) -> None:
        self.copies = copies
        self._last: weakref.ref[_Away] | None = None

    def __call__(self, x: torch.Tensor) -> Getter:
        if self.copies is None:
            if x.device.type != "cuda":
                return kept_here(x)
            self.copies = CudaCopies(x.device)
        away = _Away(self.copies, x, self._last)
        self._last = weakref.ref(away)
        return away.get


class _Away:
    """One tensor in the host's memory, and what was sent before it, which backward will ask for after it."""

    def __init__(self, copies: Copies, x: torch.Tensor, before: weakref.ref[_Away] | None) -> None:
        self.copies, self.before = copies, before
        self.there = copies.send(x)
        self.coming: Any = None

    def fetch(self) -> None:
        if self.coming is None:
            self.coming = self.copies.fetch(self.there)

    def get(self) -> torch.Tensor:
        self.fetch()
        coming, self.coming = self.coming, None
        before = self.before() if self.before is not None else None
        if before is not None:  # one is on its way while this one is used: never more than two are on the device
            before.fetch()
        return self.copies.arrived(coming)


class Copies:
    """How tensors travel to the host and back: here by plain copies, which wait for one another."""

    def send(self, x: torch.Tensor) -> Any:
        return x.clone()

    def fetch(self, there: Any) -> Any:
        return there.clone()

    def arrived(self, coming: Any) -> torch.Tensor:
        return coming


class CudaCopies(Copies):
    """Copies through pinned memory on a side stream."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def send(self, x: torch.Tensor) -> Any:
        there = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            there.copy_(x, non_blocking=True)
        x.record_stream(self.stream)  # its memory is not given to others before the copy is done
        return there

    def fetch(self, there: Any) -> Any:
        with torch.cuda.stream(self.stream):  # behind the copy that sent it
            x = there.to(self.device, non_blocking=True)
            return x, self.stream.record_event()

    def arrived(self, coming: Any) -> torch.Tensor:
        x, event = coming
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        x.record_stream(current)
        return x
