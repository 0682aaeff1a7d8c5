"""Where the runs of a study go: GPUs shared out among jobs, or a CPU's threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from luthier.config import Config
from luthier.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"
# On Linux a process that can reach no GPU has none of these, and torch need not be asked.
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_PATIENCE_SECONDS = 120


@dataclass(frozen=True)
class Slot:
    """A place for one run at a time: what its environment has beside ours, and how it is called (empty: a CPU)."""

    environment: Mapping[str, str] = field(default_factory=dict)
    name: str = ""


def slots(jobs: int | None, gpus: int, configs: Iterable[Config]) -> list[Slot]:
    """As many places as runs go on at a time.

    Args:
        jobs: how many; None: one on each GPU (or group of `gpus`), and one on a CPU.

    Raises:
        ConfigError: a run is to have more GPUs than there are.
    """
    devices = [] if all(_on_cpu(config) for config in configs) else visible_devices()
    if devices and gpus > len(devices):
        raise ConfigError(f"gpus: each run is to have {gpus}, and {len(devices)} are visible")
    groups = [devices[start : start + gpus] for start in range(0, len(devices) - gpus + 1, gpus)]
    number = jobs or max(1, len(groups))
    shared = _shared_out(number)
    if not groups:
        return [Slot(shared)] * number
    chosen = [groups[index % len(groups)] for index in range(number)]
    return [Slot({**shared, VISIBLE: ",".join(each)}, f"GPU {','.join(each)}") for each in chosen]


def visible_devices() -> list[str]:
    """GPUs as `CUDA_VISIBLE_DEVICES` names them, those that it already limits us to."""
    if sys.platform.startswith("linux") and not any(Path(path).exists() for path in _DRIVERS):
        return []
    # In a process of its own: torch would stay in ours for as long as the study goes.
    ask = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=True).stdout
        count = int(said.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return []
    limited = os.environ.get(VISIBLE)
    names = [str(index) for index in range(count)] if limited is None else limited.split(",")
    return [name.strip() for name in names[:count]]


def _shared_out(jobs: int) -> dict[str, str]:
    """Threads for each of several runs; spinning ones would slow the others down. What the caller set stays."""
    if jobs == 1:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = {"OMP_NUM_THREADS": str(max(1, cores // jobs)), "OMP_WAIT_POLICY": "PASSIVE"}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def _on_cpu(config: Config) -> bool:
    return config.model.device_map in ("cpu", {"": "cpu"})
