"""CUDA graphs: a step in which every running text gets one token is captured once, and from then on replayed.

Such a step launches some hundred small kernels, and a GPU is often done with one before Python has launched the next. A
graph launches all of them in one call, but does each time exactly what was captured: the same shapes at the same
addresses. So a captured step is of a number of texts and a number of keys that are powers of two, reads its ids, places
and speakers from buffers, and sees by a mask what each text has. Rows beyond the texts there are write a token behind
what their slot holds, where nobody reads it.

No capture is trusted. Its first replay, of a later step than the one it was made in, is compared with the ordinary
pass, whose keys and logits are what counts then; where they differ, or where a capture fails, the model's steps are
ordinary ones from then on, and one line says so.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from luthier.generate.slots import Slots
from luthier.models.attention import flat_pass
from luthier.models.isolation import same_vectors

log = logging.getLogger("luthier")

# A capture takes as long as three passes, and its proof one more: it is made when a step comes up so often.
CAPTURE_AT = 4
# Keys of the smallest captured steps; fewer would cost no less.
LEAST_KEYS = 128
# Captures that a loop keeps; the one that has been used least recently goes.
MOST = 32


class Marks(Protocol):
    """Says for a captured pass which adapter each row has (`models.speakers`)."""

    def marked(self, others: Mapping[str, Tensor]) -> AbstractContextManager[None]: ...


class Recorder(Protocol):
    """Makes captures that are used one at a time, and may share what they need in between."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """What does again whatever `run` does to tensors, in place and without its Python."""
        ...


@dataclass
class State:
    """What has come of captures on a model: why there are none, how many proved right, how many steps they made."""

    why_off: str = ""
    captured: int = 0
    replayed: int = 0


_states: WeakKeyDictionary[Any, State] = WeakKeyDictionary()


def state_of(model: Any) -> State:
    """Over all loops on the model."""
    return _states.setdefault(model, State())


def recorder_for(device: torch.device) -> Callable[[torch.device], Recorder] | None:
    """How steps are captured on a device; None: not at all. Where several processes compute, a pass may wait for the
    others, which no graph can."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return CudaRecorder if device.type == "cuda" and not several else None


def for_loop(model: Any, slots: Slots, speakers: Marks | None) -> Graphs | None:
    recorder = recorder_for(slots.device)
    return None if recorder is None or state_of(model).why_off else Graphs(model, slots, speakers, recorder)


class _Kind(NamedTuple):
    """What a captured step's shapes depend on: rows, keys, and the adapters that speak."""

    rows: int
    keys: int
    adapters: tuple[str, ...]


@dataclass
class _Step:
    """A captured step.

    Attributes:
        inputs: (2 + adapters, rows) int64: ids, places, and for each adapter where a row is not its own.
        logits_RV: where a replay writes them; shared by all captures of so many rows.
    """

    inputs: Tensor
    logits_RV: Tensor
    replay: Callable[[], None]
    proven: bool = False


class Graphs:
    """The captured steps of one loop."""

    def __init__(
        self, model: Any, slots: Slots, speakers: Marks | None, recorder: Callable[[torch.device], Recorder]
    ) -> None:
        self.model, self.slots, self.speakers = model, slots, speakers
        self.state = state_of(model)
        self._new_recorder = recorder
        self._like: Tensor | None = None  # a row of logits, for their width and dtype
        self.clear()

    def clear(self) -> None:
        """Drop all captures and give their memory back."""
        self._steps: dict[_Kind, _Step] = {}
        self._seen: Counter[_Kind] = Counter()
        self._logits: dict[int, Tensor] = {}
        self._recorder: Recorder | None = None  # a pool of memory that all captures have left cannot be used again
        self._moves = self.slots.moves

    def logits(
        self, ids: Sequence[int], adapters: Sequence[str | None], ordinary: Callable[[], Tensor]
    ) -> Tensor:
        """(rows, V) of a step in which the texts of the first slots get a token each; good until the next one.

        Args:
            ids: the texts' last tokens. adapters: theirs. ordinary: makes the step without a capture.
        """
        if self.state.why_off:
            return ordinary()
        if self.slots.moves != self._moves:
            self.clear()
        kind = self._kind(adapters)
        if (step := self._steps.pop(kind, None)) is None:
            self._seen[kind] += 1
            if self._seen[kind] >= CAPTURE_AT and self._like is not None:
                self._capture(kind, self._inputs(kind, ids, adapters), self._like)
            logits = ordinary()
            if self._like is None:
                self._like = logits.new_empty(1, logits.shape[1])
            return logits
        self._steps[kind] = step  # the most recently used one is the last
        step.inputs.copy_(self._inputs(kind, ids, adapters))
        step.replay()
        found = step.logits_RV[: len(ids)]
        if step.proven:
            self.slots.count(len(ids))
            self.state.replayed += 1
            return found
        found = found.clone()
        expected = ordinary()  # after the replay: what it writes to the slots is right
        self._prove(step, found, expected)
        return expected

    def _kind(self, adapters: Sequence[str | None]) -> _Kind:
        """So many rows and keys that a step of these texts fits."""
        texts = len(adapters)
        rows = min(_power_of_two(texts), len(self.slots.lengths))
        keys = min(max(LEAST_KEYS, _power_of_two(max(self.slots.lengths[:texts]) + 1)), self.slots.room)
        return _Kind(rows, keys, tuple(sorted({name for name in adapters if name is not None})))

    def _inputs(self, kind: _Kind, ids: Sequence[int], adapters: Sequence[str | None]) -> Tensor:
        """As `_Step.inputs`, not yet on the device: one copy."""
        texts = len(ids)
        spare = range(texts, kind.rows)
        filled = [[*ids, *(ids[0] for _ in spare)], [*self.slots.lengths[:texts], *self.slots.spare(spare)]]
        for name in kind.adapters:
            filled.append([int(other != name) for other in adapters] + [1 for _ in spare])
        return torch.tensor(filled)

    def _capture(self, kind: _Kind, inputs: Tensor, like: Tensor) -> None:
        """Capture the step at hand. What it writes to the slots, the ordinary pass behind it writes again."""
        try:
            if kind.rows not in self._logits:
                self._logits[kind.rows] = like.new_empty(kind.rows, like.shape[1])
            held, logits_RV = inputs.to(self.slots.device), self._logits[kind.rows]

            def run() -> None:
                self.slots.begin_fixed(held[1], kind.keys)
                with flat_pass(), self._speaking(kind.adapters, held):
                    last_R = torch.arange(kind.rows, device=held.device)
                    logits_RV.copy_(self.slots.logits(self.model, held[0], held[1], last_R, (1,) * kind.rows))

            if self._recorder is None:
                self._recorder = self._new_recorder(self.slots.device)
            self._steps[kind] = _Step(held, logits_RV, self._recorder.capture(run))
            if len(self._steps) > MOST:
                gone = next(iter(self._steps))
                del self._steps[gone], self._seen[gone]
        except Exception as error:  # whatever it is, the step can be made without a capture
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        else:
            return
        self._turn_off(why)  # outside of the except block: its traceback holds the pass's tensors

    def _speaking(self, names: Sequence[str], inputs: Tensor) -> AbstractContextManager[None]:
        if self.speakers is None or not names:
            return nullcontext()
        return self.speakers.marked({name: inputs[2 + at, :, None].bool() for at, name in enumerate(names)})

    def _prove(self, step: _Step, found: Tensor, expected: Tensor) -> None:
        if not same_vectors(found, expected, self.model.get_input_embeddings().weight.dtype):
            worst = float((found.float() - expected.float()).abs().max())
            self._turn_off(f"a replayed step's logits differ from the ordinary one's by {worst:.1e}")
            return
        step.proven = True
        self.state.captured += 1
        if self.state.captured == 1:
            log.info("steps in which texts only go on are replayed as CUDA graphs")

    def _turn_off(self, why: str) -> None:
        self.clear()
        self.state.why_off = why
        log.info("no CUDA graphs on this model: %s", why)


def _power_of_two(number: int) -> int:
    """The smallest one that is no smaller."""
    return int(1 << (number - 1).bit_length())


class CudaRecorder:
    """torch's CUDA graphs, on a stream of their own, with a pool of memory for all of a recorder's.

    A capture must not wait for the device. What does is found before, in a pass that is no capture, since one that
    breaks off leaves traces in some versions of torch.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = _side_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """RuntimeError: the pass waits for the device, or cannot be captured for another reason."""
        current = torch.cuda.current_stream(self.device)
        graph = torch.cuda.CUDAGraph()
        # The outer context also puts the stream back after a capture that fails, which `torch.cuda.graph` does not.
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            self._stream.wait_stream(current)
            try:
                run()  # what is made at first use: workspaces, kernels that are tuned or compiled
                if _waits(run):
                    raise RuntimeError("a pass of it waits for the device")
                # Other threads may go on using the device.
                options: dict[str, Any] = {"stream": self._stream, "capture_error_mode": "thread_local"}
                with torch.cuda.graph(graph, pool=self._pool, **options):
                    run()
            finally:
                current.wait_stream(self._stream)
        return graph.replay


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the process: cuBLAS keeps a workspace for each stream that it has been called on."""
    return torch.cuda.Stream(device)


def _waits(run: Callable[[], None]) -> bool:
    """Whether a pass waits for the device, as far as torch notices. It warns, since an error would also be raised in
    whichever other thread waits."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return any("called a synchronizing" in str(one.message) for one in seen)
