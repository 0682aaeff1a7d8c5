"""What every contender's script shares: the job that it is given, and the clock that it reports by.

The time of a step runs from the end of the step before to its own end, whatever the contender does in
between; so nothing can be left out of it. Only the standard library is imported here.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

# Of a batch. TRL's ORPO has the two answers of its pairs apart.
MASKS = ("attention_mask", "chosen_attention_mask", "rejected_attention_mask")


@dataclass(frozen=True)
class Job:
    """What is to be trained; the same for everybody.

    Attributes:
        model, rows, scratch, result: a model folder, a JSONL, a folder to write to, the file to report in.
        whole: the loss is over prompt and answer; else over the answer alone; of the task `sft` only.
        variant: of this contender. task: of `bench.rows`, which says what the rows hold.
    """

    model: str
    rows: str
    scratch: str
    result: str
    steps: int
    whole: bool = True
    variant: str = "default"
    task: str = "sft"
    micro_batch_size: int = 2
    gradient_accumulation_steps: int = 4
    sequence_len: int = 1024
    learning_rate: float = 2e-4
    lora_r: int = 16
    lora_alpha: int = 32
    seed: int = 0

    @classmethod
    def load(cls, path: str | Path) -> Job:
        """Read a job as `save` wrote it."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def save(self, path: Path) -> None:
        """Write the job for the contender's process."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def read_rows(self) -> list[dict[str, Any]]:
        """The rows, with the fields of the task."""
        with open(self.rows, encoding="utf-8", newline="\n") as file:
            return [json.loads(line) for line in file]


def job_of_command_line() -> Job:
    """The job that the script was started with."""
    return Job.load(sys.argv[1])


@dataclass
class Clock:
    """Collects the steps of a run.

    Attributes:
        tokens: real tokens of the step that is going on; no padding.
        note: what a reader of the table must know of this contender.
        worked: CPU seconds of the process at the end of each step, all threads together.
    """

    tokens: int = 0
    note: str = ""
    began: float | None = None
    ends: list[float] = field(default_factory=list)
    worked: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)

    def begin(self) -> None:
        """The first step begins now; later calls change nothing."""
        self.began = self.began or time.time()

    def end(
        self,
        tokens: int | None = None,
        loss: float | None = None,
        at: float | None = None,
        worked: float | None = None,
    ) -> None:
        """A step ends now, or ended at `at`, when the process had `worked` for so many CPU seconds."""
        self.ends.append(at or time.time())
        self.worked.append(time.process_time() if worked is None else worked)
        self.counts.append(self.tokens if tokens is None else tokens)
        self.losses.append(loss)
        self.tokens = 0

    def loss(self, step: int, value: float) -> None:
        """The loss of a step, counted from 1, where it is known only after the end."""
        if 1 <= step <= len(self.losses):
            self.losses[step - 1] = value

    def report(self, job: Job, packages: Sequence[str]) -> None:
        """Write the result; the first of `packages` is the contender itself."""
        starts = [self.began, *self.ends]
        steps: list[dict[str, Any]] = [
            {"tokens": tokens, "seconds": None if start is None else end - start, "loss": loss}
            for tokens, start, end, loss in zip(self.counts, starts, self.ends, self.losses, strict=False)
        ]
        for step, before, after in zip(steps[1:], self.worked, self.worked[1:], strict=False):
            step["cpu_seconds"] = after - before
        result = {
            "steps": steps,
            "first_step_began": self.began,
            "first_step_ended": self.ends[0],
            "peak_memory_gib": peak_memory_gib(),
            "versions": {name: version_of(name) for name in packages} | {"python": platform.python_version()},
            "note": self.note,
        }
        Path(job.result).write_text(json.dumps(result), encoding="utf-8")


def version_of(package: str) -> str:
    """The version that is installed, or that an imported checkout states."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return str(sys.modules[package].__version__)


def peak_memory_gib() -> float:
    """The most memory that this process has had resident."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def real_tokens(inputs: dict[str, Any]) -> Any:
    """Tokens of a padded or a flat batch that are no padding, as a number or as a tensor that nobody has waited for.

    Both answers of a pair are counted, each with the prompt; KTO's mismatched ones, which its trainer makes, are not.
    """
    masks = [inputs[name] for name in MASKS if name in inputs and inputs[name].dim() == 2]
    return sum(mask.sum() for mask in masks) if masks else inputs["input_ids"].numel()


def watch_trainer(trainer: Any, clock: Clock) -> None:
    """Read a transformers `Trainer`: tokens as they come into the model, ends of steps, losses."""
    from transformers import TrainerCallback

    inner = trainer.training_step

    def training_step(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        clock.tokens += int(real_tokens(inputs))
        return inner(model, inputs, *args, **kwargs)

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.end()

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any
        ) -> None:
            if logs and "loss" in logs:
                clock.loss(state.global_step, float(logs["loss"]))

    trainer.training_step = training_step
    trainer.add_callback(Watch())
