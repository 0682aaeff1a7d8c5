"""A run's own peak beside what was predicted for it: the plan, held to account.

The prediction is the plan's, from the config and the shapes of the model, for the largest pass that the run really
made. What is measured is the allocator's peak on CUDA. On a CPU it is the process's resident memory, of which the
interpreter and its libraries have a share: what the process holds when the first pass begins, the model apart. That
share is measured and added to the prediction, so that only the rest of it is put to the test.

Passes are noted as the loader made them, so that a beginning that documents share counts once. In preference tuning
the reference's passes come first and keep nothing; it is the policy's training passes that are noted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from luthier.config import Config
from luthier.models.device import peak_memory_gib
from luthier.models.load import read_model_config
from luthier.models.policy import Policy
from luthier.models.recompute import Mode
from luthier.plan.engine import Pass
from luthier.plan.memory import memory_of, starting_values
from luthier.plan.read import engine_of, training_shape

log = logging.getLogger("luthier")


@dataclass(frozen=True)
class Peak:
    """In GiB. `before`: the interpreter's share, part of both figures; 0 on CUDA."""

    predicted: float
    measured: float
    before: float

    def __str__(self) -> str:
        more = "more" if self.measured >= self.predicted else "less"
        share = abs(self.measured / self.predicted - 1)
        started = f"; {self.before:.2f} of both are the interpreter and its libraries" if self.before else ""
        return (
            f"peak memory: {self.predicted:.2f} GiB predicted, {self.measured:.2f} GiB measured, {share:.1%} {more}"
            f"{started}"
        )

    def summary(self) -> dict[str, float]:
        """For the run's report."""
        return {"predicted_peak_gib": self.predicted, "measured_peak_gib": self.measured}


class PeakWatch:
    """Notes what a run does, from before its model is loaded until its end.

    Args:
        vocabulary: size of the tokenizer. processes: how many share the run.
    """

    def __init__(
        self, config: Config, device: torch.device, dtype: torch.dtype, vocabulary: int, processes: int = 1
    ) -> None:
        self.processes = processes
        self.config, self.device, self.dtype, self.vocabulary = config, device, dtype, vocabulary
        self.before = 0.0 if device.type == "cuda" else _resident_gib()
        self.earlier = 0.0 if device.type == "cuda" else peak_memory_gib(device)
        self.beside: float | None = None
        self.largest: Pass | None = None

    def follow(self, policy: Policy, masters: Iterable[torch.Tensor]) -> None:
        """Note the passes of a policy in training; `masters` are what gradients are added up in."""

        def note(module: Any, args: tuple[Any, ...]) -> None:
            if self.beside is None and self.before:  # the first pass of all, where the reference's copy is there
                # Of what is shared out over processes, this one's share.
                own = (p.to_local() if hasattr(p, "to_local") else p for p in module.parameters())
                held = sum(p.nbytes for p in own) / 2**30
                self.beside = _resident_gib() - held
            if not (module.training and torch.is_grad_enabled()):
                return
            batch = args[0]
            if self.largest is None or len(batch.input_ids) > self.largest.tokens:
                several = any(master.grad is not None for master in masters)
                self.largest = Pass.of(batch.lengths, batch.parents, len(batch.position_N), several=several)

        policy.register_forward_pre_hook(note)

    def peak(self, modes: Sequence[Mode]) -> Peak | None:
        """Prediction and measurement, or None with a line that says why not.

        Args:
            modes: what each layer recomputes.
        """
        if self.largest is None:
            return None
        config = self.config
        try:
            model_config = read_model_config(config.model)
            shape = training_shape(config, model_config, tokens=self.vocabulary)
        except Exception as error:  # a family that the plan cannot read must not cost a run that has ended
            log.info("peak memory was not predicted: %s: %s", type(error).__name__, error)
            return None
        engine = engine_of(config, model_config, shape, None, cpu=self.device.type == "cpu", gpus=self.processes)
        compute = self.dtype.itemsize
        frozen = min(engine.frozen, compute)
        engine = replace(engine, compute=compute, frozen=frozen, modes=tuple(modes))
        beside = (self.beside or 0.0) - starting_values(shape, engine) / 2**30
        before = max(self.before, beside)
        predicted = before + memory_of(shape, engine, self.largest).total / 2**30
        measured = peak_memory_gib(self.device)
        if self.earlier and measured <= self.earlier:
            log.info(
                "peak memory was not measured: %.2f GiB predicted, and the process had held %.2f GiB before the model "
                "was loaded",
                predicted,
                self.earlier,
            )
            return None
        return Peak(max(predicted, self.earlier), measured, before)


def _resident_gib() -> float:
    """What the process holds now; its peak where the system does not say."""
    status = Path("/proc/self/statm")
    if status.exists():
        import resource

        return int(status.read_text().split()[1]) * resource.getpagesize() / 2**30
    return peak_memory_gib(torch.device("cpu"))
