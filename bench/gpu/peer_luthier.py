"""Luthier as its users run it: flat keys, `run`. It is ended as they would end it, by Ctrl-C."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from bench.gpu.clock import LOGGED_EVERY, WARMUP, GpuClock, GpuJob
from bench.peers.luthier import config_of


def settings_of(job: GpuJob) -> dict[str, Any]:
    """The run as flat keys; everything that is not the recipe stays at its default."""
    settings = config_of(job) | {
        "device_map": job.device,
        "bf16": "auto" if job.device == "cuda" else False,
        "sample_packing": job.packing,
        "logging_steps": LOGGED_EVERY,
    }
    return settings | ({"load_in_4bit": True} if job.weights == "nf4" else {})


class Kept(logging.Handler):
    """Everything to the log; what says that a fast path was not taken, and how long passes may be, is kept."""

    telling = ("kept as it is", "document by document", "one per pass", "passes of up to", "out of memory")

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        print(line, flush=True)
        if any(words in line for words in self.telling):
            self.lines.append(line)


def main() -> None:
    job = GpuJob.load(sys.argv[1])
    kept = Kept()
    logging.getLogger("luthier").addHandler(kept)
    logging.getLogger("luthier").setLevel(logging.INFO)
    import yaml

    from luthier import Config, run
    from luthier.data.loader import StepLoader

    assert isinstance(job, GpuJob)
    # A step is known before it is computed; this notes its tokens, by number, since some are asked for twice.
    tokens: dict[int, int] = {}
    step_of = StepLoader.step

    def step(self: StepLoader, index: int) -> Any:
        found = step_of(self, index)
        tokens[index] = found.tokens
        return found

    StepLoader.step = step  # type: ignore[method-assign]
    clock = GpuClock(job, stop=lambda: os.kill(os.getpid(), signal.SIGINT))
    clock.start()
    path = Path(job.scratch) / "run.yml"
    path.write_text(yaml.safe_dump(settings_of(job), sort_keys=False), encoding="utf-8")
    run(Config.load(path))
    metrics = (Path(job.scratch) / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    clock.losses = {row["step"]: row["loss"] for row in map(json.loads, metrics) if "loss" in row}
    clock.note = "; ".join(kept.lines)
    clock.report(["luthier", "torch", "transformers"], [tokens[index] for index in range(WARMUP, clock.last)])


if __name__ == "__main__":
    main()
