"""Runs a contender in a process of its own: its environment's Python, nobody's caches, a log.

Every run starts cold: caches of data sets, of compiled code and of Luthier's proofs are in the run's own
folder. What is measured from outside, because it is the same for everybody: the moment of the start, the time
until the process is gone, and the most memory that it, or any process that it waited for, held. Keep this
process small: Linux counts the parent's size as the child's until the child's own program is loaded.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from bench.environments import ROOT


@dataclass(frozen=True)
class Finished:
    """A process that ended.

    Attributes:
        started: seconds since the epoch. timed_out: whether its time was up. elsewhere: the part of all cores'
            time that other programs took meanwhile, where the system tells it.
    """

    status: int
    started: float
    seconds: float
    peak_memory_gib: float
    timed_out: bool = False
    elsewhere: float | None = None


def environment(scratch: Path, extra: dict[str, str]) -> dict[str, str]:
    """What a contender's process sees. Threads for every core, and waiting ones sleep: spinning threads cost
    some contenders tenfold as soon as anything else runs. `extra` with an empty value leaves a variable out."""
    cores = str(os.cpu_count() or 1)
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    chosen = inherited | {
        "PYTHONPATH": str(ROOT),
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": cores,
        "MKL_NUM_THREADS": cores,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "huggingface"),
        "LUTHIER_CACHE": str(scratch / "luthier"),
        "XDG_CACHE_HOME": str(scratch / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "TOKENIZERS_PARALLELISM": "true",
        "WANDB_DISABLED": "true",
        "DO_NOT_TRACK": "1",
        **extra,
    }
    return {name: value for name, value in chosen.items() if value or name not in extra}


def run(
    python: str,
    module: str,
    arguments: list[str],
    *,
    scratch: Path,
    log: Path,
    extra: dict[str, str] | None = None,
    timeout: float | None = None,
) -> Finished:
    """Run `python -m module arguments` in `scratch` to its end, or kill it and what it started after `timeout`
    seconds."""
    timed_out = threading.Event()

    def end() -> None:
        timed_out.set()
        os.killpg(child.pid, signal.SIGKILL)

    scratch.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        started, busy_before = time.time(), busy_seconds()
        child = subprocess.Popen(
            [python, "-m", module, *arguments],
            cwd=scratch,
            env=environment(scratch, extra or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        timer = threading.Timer(timeout or threading.TIMEOUT_MAX, end)
        timer.daemon = True
        timer.start()
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
        finally:
            timer.cancel()
        seconds, busy_after = time.time() - started, busy_seconds()
    child.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = usage.ru_maxrss * unit / 2**30
    elsewhere = None
    if busy_before is not None and busy_after is not None:
        others = busy_after - busy_before - usage.ru_utime - usage.ru_stime
        elsewhere = max(0.0, others / (seconds * (os.cpu_count() or 1)))
    return Finished(child.returncode, started, seconds, peak, timed_out.is_set(), elsewhere)


def busy_seconds() -> float | None:
    """Seconds that all cores together have worked since the machine started; None where it is not told."""
    try:
        fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    # What a virtual machine's host gave to others (steal) is as lost as what programs here took.
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def tail(log: Path, lines: int = 4) -> str:
    """The end of a log, for a message."""
    text = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " / ".join(line.strip() for line in text[-lines:])
