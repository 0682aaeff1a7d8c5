"""Is it right on this GPU: the kernels' tests and those marked `gpu`, before anything is measured."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from bench import process
from bench.environments import ROOT

# What runs in Triton on a GPU, and the tests that need one.
ARGUMENTS = ["tests/kernels", "tests/generate/test_gpu.py", "tests/models/test_gpu.py", "tests/train/test_gpu.py"]
CHOSEN = "triton or gpu"


def check(
    python: str, folder: Path, extra: dict[str, str], timeout: float, arguments: list[str] | None = None
) -> dict[str, Any]:
    """Run the tests in a process of its own; its summary, and the names of what failed."""
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    log = folder / "check.log"
    given = arguments or [str(ROOT / part) for part in ARGUMENTS]
    done = process.run(
        python,
        "pytest",
        [
            "--rootdir",
            str(ROOT),
            "-c",
            str(ROOT / "pyproject.toml"),
            "-rfE",  # the project's own settings make it quiet already
            "-p",
            "no:cacheprovider",
            *workers,
            *(["-m", "not slow", "-k", CHOSEN] if arguments is None else []),
            *given,
        ],
        scratch=folder / "check",
        log=log,
        extra=extra | {"OMP_NUM_THREADS": "2"},
        timeout=timeout,
    )
    return {"seconds": round(done.seconds, 1)} | read(
        log.read_text(encoding="utf-8", errors="replace"), done.timed_out
    )


def read(text: str, timed_out: bool) -> dict[str, Any]:
    """What pytest's output comes to."""
    counts = re.findall(r"^(?:=+ )?((?:\d+ \w+(?:, )?)+) in [\d.]+s", text, re.MULTILINE)
    failed = re.findall(r"^(?:FAILED|ERROR) (.+)$", text, re.MULTILINE)
    if timed_out:
        summary = "not finished in their time"
    else:
        summary = counts[-1] if counts else "pytest said nothing that is understood: " + text.strip()[-300:]
    return {
        "summary": summary,
        "failed": failed,
        "right": "passed" in summary and not failed and not timed_out,
    }
