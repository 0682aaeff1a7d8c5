"""A contender for tests of `bench.gpu`: behaves as its variant says, and trains nothing."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from bench.gpu.clock import GpuJob


def main() -> None:
    job = GpuJob.load(sys.argv[1])
    if job.variant == "crashes":
        print("a line before")
        raise RuntimeError(f"CUDA out of memory, reading {job.model}")
    if job.variant == "hangs":
        time.sleep(60)
    result = {
        "first_step_ended": time.time(),
        "steps": 4,
        "tokens": 4000,
        "seconds": 2.0,
        "allocated_gib": 1.0,
        "reserved_gib": 1.5,
        "losses": {"5": 2.5},
        "versions": {"stub": "9.9"},
        "note": "",
    }
    Path(job.result).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
