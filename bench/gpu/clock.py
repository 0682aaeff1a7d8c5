"""The job of a contender on a GPU, and the clock that it reports by.

A device works on after Python has gone ahead, so only a wait for it ends a time. Waiting after every step would
slow down whoever does not wait by itself; so after the warm-up the clock waits twice: at the beginning of the
measured steps and at their end, whose number follows from the time of the first two. It sees steps through a
hook that torch calls after every optimizer's step, the same for everybody.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.peers.common import Job, peak_memory_gib, real_tokens, version_of

WARMUP, PROBE, FEWEST = 4, 2, 3  # steps
LOGGED_EVERY = 5  # steps; everybody reads its loss this often, which waits for the device


@dataclass(frozen=True)
class GpuJob(Job):
    """What is to be trained.

    Attributes:
        steps: most of them. seconds: to measure for. packing: rows are packed into such of `sequence_len`.
        device: cuda or cpu. weights: bf16, fp32 or nf4.
    """

    packing: bool = False
    device: str = "cuda"
    weights: str = "bf16"
    seconds: float = 6.0


@dataclass
class GpuClock:
    """Counts steps and their tokens.

    Attributes:
        tokens: of steps that have ended, numbers or tensors that are read at the end. losses: by step, of the
            last `LOGGED_EVERY`. stop: called once when enough is measured. note: for a reader of the table.
    """

    job: GpuJob
    stop: Callable[[], None] = lambda: None
    note: str = ""
    tokens: list[Any] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    ended: int = 0
    last: int = 0
    first_step_ended: float = 0.0
    began: float = 0.0
    seconds: float = 0.0
    _going_on: list[Any] = field(default_factory=list)

    def start(self) -> None:
        """Listen to every optimizer from now on."""
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(lambda *_: self.step_ended())

    def count(self, tokens: Any) -> None:
        """Tokens of the step that is going on; a tensor is not looked at before the end."""
        self._going_on.append(tokens)

    def step_ended(self) -> None:
        """An optimizer has stepped."""
        self.tokens.append(self._going_on)
        self._going_on = []
        self.ended += 1
        if self.ended == 1:
            self.first_step_ended = self._now()
        if self.ended == WARMUP:
            self.began = self._now()
        if self.ended == WARMUP + PROBE:
            each = (self._now() - self.began) / PROBE
            left = max(FEWEST, math.ceil(self.job.seconds / each) - PROBE)
            self.last = min(self.ended + left, self.job.steps)
        if self.ended == self.last:
            self.seconds = self._now() - self.began
            self.stop()

    def tokens_of(self, steps: range) -> list[int]:
        """Real tokens of steps, counted from 0."""
        return [sum(int(part) for part in self.tokens[step]) for step in steps]

    def report(self, packages: Sequence[str], tokens: Sequence[int] | None = None) -> None:
        """Write the result.

        Args:
            packages: whose versions are kept, the contender itself first. tokens: of the measured steps, where
                the contender says them by itself.
        """
        if not self.seconds:
            raise SystemExit(
                f"only {self.ended} steps ended, too few to measure; {self.job.steps} were asked for"
            )
        allocated, reserved = self._memory()
        measured = list(tokens) if tokens is not None else self.tokens_of(range(WARMUP, self.last))
        result = {
            "first_step_ended": self.first_step_ended,
            "steps": len(measured),
            "tokens": sum(measured),
            "seconds": self.seconds,
            "allocated_gib": allocated,
            "reserved_gib": reserved,
            "losses": self.losses,
            "versions": {name: version_of(name) for name in packages},
            "note": self.note,
        }
        Path(self.job.result).write_text(json.dumps(result), encoding="utf-8")

    def _now(self) -> float:
        if self.job.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.time()

    def _memory(self) -> tuple[float, float]:
        """Most memory that tensors took, and that was taken for them, in GiB."""
        if self.job.device != "cuda":
            return peak_memory_gib(), peak_memory_gib()
        import torch

        return torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30


def watch(trainer: Any, clock: GpuClock) -> None:
    """Read a transformers `Trainer`: tokens as they come into the model, losses; and end it when asked to."""
    from transformers import TrainerCallback

    inner, over = trainer.training_step, []
    clock.stop = lambda: over.append(True)

    def training_step(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        clock.count(real_tokens(inputs))
        return inner(model, inputs, *args, **kwargs)

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> Any:
            control.should_training_stop = control.should_training_stop or bool(over)
            return control

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any
        ) -> None:
            if logs and "loss" in logs:
                clock.losses[state.global_step] = float(logs["loss"])

    trainer.training_step = training_step
    trainer.add_callback(Watch())
    clock.start()
