"""What is measured: shapes of models, workloads, and who takes part in which."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.rows import TASKS
from bench.shapes import SHAPES, Shape

GPU_SHAPES = {
    # Llama-3.1-8B's.
    "8b": Shape(
        "llama", 128_256, 4096, 14_336, 32, 32, 8, 128, 131_072, 500_000.0, tie_word_embeddings=False
    ),
    # Qwen3-4B's.
    "4b": Shape("qwen3", 151_936, 2560, 9728, 36, 32, 8, 128, 40_960, 1_000_000.0),
    # Qwen3-0.6B's.
    "0.6b": SHAPES["0.6b-vocab"],
    # For the tests.
    "micro": SHAPES["micro"],
}


@dataclass(frozen=True)
class Workload:
    """How rows become steps.

    Attributes:
        micro_batch_size, gradient_accumulation_steps: of rows, or with `packing` of packed rows of `sequence_len`.
        rows: in the file that everybody reads.
    """

    micro_batch_size: int
    gradient_accumulation_steps: int
    sequence_len: int
    packing: bool
    rows: int
    what: str


WORKLOADS = {
    "recipe": Workload(2, 4, 2048, False, 1600, "batches of 2 rows, 4 accumulated, lengths as they come"),
    "packed": Workload(8, 1, 2048, True, 10_000, "8 packed rows of 2,048 tokens a step, 16,384 in one batch"),
}
# Of the tests' shape, which trains on a CPU.
MICRO_WORKLOADS = {
    "recipe": Workload(2, 2, 256, False, 64, WORKLOADS["recipe"].what),
    "packed": Workload(2, 1, 256, True, 128, "2 packed rows of 256 tokens a step"),
}


@dataclass(frozen=True)
class Contender:
    """One line of a table.

    Attributes:
        module: run with a job. variant: given to it with the job. needs: packages without which it is skipped.
        workloads, tasks: that it takes part in.
    """

    name: str
    module: str
    variant: str
    needs: tuple[str, ...] = ()
    workloads: tuple[str, ...] = ("recipe", "packed")
    tasks: tuple[str, ...] = ("sft",)


_TRL = ("trl", "peft", "datasets")

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("luthier", "bench.gpu.peer_luthier", "default", ("pydantic", "datasets"), tasks=TASKS),
        # As its notebooks have it; for packs that and `packing=True`.
        Contender("unsloth", "bench.gpu.peer_unsloth", "default", ("unsloth", *_TRL)),
        # Without recomputation.
        Contender("unsloth-tuned", "bench.gpu.peer_unsloth", "tuned", ("unsloth", *_TRL)),
        # Defaults of its config, but for a model in bf16.
        Contender("trl", "bench.gpu.peer_trl", "default", _TRL, ("recipe",), TASKS),
        Contender("trl-liger", "bench.gpu.peer_trl", "liger", (*_TRL, "liger_kernel"), tasks=TASKS),
        # Without recomputation; of the tasks whose rows nobody packs.
        Contender("trl-tuned", "bench.gpu.peer_trl", "tuned", _TRL, ("recipe",), TASKS[1:]),
    )
}


@dataclass(frozen=True)
class Case:
    """A model's shape under a workload; `weights` is bf16, fp32 on a CPU, or nf4; `task` one of `bench.rows`."""

    shape: str
    workload: str
    weights: str
    task: str = "sft"

    @property
    def name(self) -> str:
        task = "" if self.task == "sft" else f" {self.task}"
        return f"{self.shape} {self.workload} {self.weights}{task}"

    def work(self) -> Workload:
        """Of the task; where two answers are compared, batches are of pairs of at most 1,024 tokens an answer."""
        work = (MICRO_WORKLOADS if self.shape == "micro" else WORKLOADS)[self.workload]
        return work if self.task == "sft" else replace(work, sequence_len=min(1024, work.sequence_len))
