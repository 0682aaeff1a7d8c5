"""Luthier as its users run it: a YAML, `Config.load`, `run`. The rows of `metrics.jsonl` are read as they come.

Each row is stamped when it appears in the file, so that a step's time holds everything that happens between
two steps, writing the row among it.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

from bench.peers.common import Clock, Job, job_of_command_line

# Beside the recipe: recomputation as the neighbours have it on, a base in 4 bits, the reference before the first step.
VARIANTS: dict[str, dict[str, object]] = {
    "default": {},
    "lean": {"gradient_checkpointing": True},
    "qlora": {"adapter": "qlora"},
    "precomputed": {"precompute_ref_log_probs": True},
}
NOTES = {
    "default": "",
    "lean": "gradient_checkpointing: true",
    "qlora": "the base in NF4 with double quantisation, so that its loss is another",
    "precomputed": "the reference's log-probs are computed before the first step, in no figure but its time",
}


def config_of(job: Job) -> dict[str, object]:
    """The run as flat keys."""
    verbatim: dict[str, object] = {
        "field_instruction": "prompt",
        "field_output": "output",
        "format": "{instruction}",
        "no_input_format": "{instruction}",
        "field_input": "none",
    }
    if job.task == "sft":
        task: dict[str, object] = {"train_on_inputs": job.whole}
        fields: dict[str, object] = {"type": verbatim}
    else:
        task, fields = {"rl": job.task}, {}
    recipe: dict[str, object] = {
        "base_model": job.model,
        "datasets": [{"path": job.rows, "ds_type": "json", **fields}],
        **task,
        "output_dir": str(Path(job.scratch) / "out"),
        "adapter": "lora",
        "lora_r": job.lora_r,
        "lora_alpha": job.lora_alpha,
        "lora_dropout": 0.0,
        "lora_target_linear": True,
        "sequence_len": job.sequence_len,
        "micro_batch_size": job.micro_batch_size,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "shuffle": False,
        "max_steps": job.steps,
        "learning_rate": job.learning_rate,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "seed": job.seed,
        "device_map": "cpu",
        "bf16": False,
    }
    return recipe | VARIANTS[job.variant]


class Tail(threading.Thread):
    """Stamps the rows of a metrics file as they appear."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.path, self.done = path, threading.Event()
        self.stamps: list[tuple[float, float]] = []  # the time, and the process's CPU seconds

    def run(self) -> None:
        seen = 0
        while not self.done.wait(0.005):
            size = self.path.stat().st_size if self.path.exists() else 0
            if size > seen:
                now, seen = (time.time(), time.process_time()), size
                rows = self.path.read_text(encoding="utf-8").count("\n")
                self.stamps += [now] * (rows - len(self.stamps))


def main() -> None:
    job = job_of_command_line()
    import yaml

    from luthier import Config, run

    config = Path(job.scratch) / "run.yml"
    config.write_text(yaml.safe_dump(config_of(job), sort_keys=False), encoding="utf-8")
    metrics = Path(job.scratch) / "out" / "metrics.jsonl"
    tail = Tail(metrics)
    tail.start()
    run(Config.load(config))
    tail.done.set()
    tail.join()

    clock, before = Clock(note=NOTES[job.variant]), 0
    rows = [row for row in map(json.loads, metrics.read_text(encoding="utf-8").splitlines()) if "loss" in row]
    clock.began = tail.stamps[0][0] - rows[0]["seconds"]
    for row, (at, worked) in zip(rows, tail.stamps, strict=True):
        clock.end(tokens=row["tokens"] - before, loss=row["loss"], at=at, worked=worked)
        before = row["tokens"]
    clock.report(job, ["luthier", "torch", "transformers"])


if __name__ == "__main__":
    main()
