"""A process of a run whose training is a stub, without torch: what it does on each rank is said by the config.

`base_model` holds it, such as `1: kill, 0: wait`: a rank that is not named trains well at once. The worker around it
is the real one.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

from luthier.config import Config
from luthier.errors import DataError, ProcessLost, RunError
from luthier.launch import worker

log = logging.getLogger("luthier")
LIMIT_SECONDS = 30
STOPPED = "stopped"


def train(config: Config) -> types.SimpleNamespace:
    rank, folder = os.environ["RANK"], Path(config.output.output_dir)
    doing = dict(each.strip().split(": ") for each in config.model.base_model.split(",") if ": " in each)
    what = doing.get(rank)
    if what is not None and what not in PATIENT:  # others are in the middle of something when it happens
        _until(*(folder / f"ready-{other}" for other in doing if doing[other] in PATIENT))
        (folder / "cause").touch()
    finished = what is None or ACTIONS[what](folder) is not STOPPED
    return types.SimpleNamespace(finished=finished)


def _until(*files: Path) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not all(file.exists() for file in files) and time.monotonic() < deadline:
        time.sleep(0.02)


def _ready(folder: Path) -> None:
    ready = folder / f"ready-{os.environ['RANK']}"
    being_made = ready.with_name(f".{ready.name}")
    being_made.write_text(str(os.getpid()))
    being_made.replace(ready)  # whoever sees it can read it


def _raise(error: BaseException) -> Any:
    def act(folder: Path) -> None:
        raise error

    return act


def _kill(number: int) -> Any:
    def act(folder: Path) -> None:
        log.warning("the last word")
        os.kill(os.getpid(), number)
        time.sleep(LIMIT_SECONDS)

    return act


def _wait(folder: Path) -> str:
    """As in the middle of training: a signal is noted, and what is in hand is done first."""
    noted: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: noted.append(number))
    _ready(folder)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not noted and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    (folder / f"saved-{os.environ['RANK']}").write_text(" ".join(map(str, noted)))
    return STOPPED


def _lose(error: BaseException) -> Any:
    """Notice that the other one is gone, in the middle of training."""

    def act(folder: Path) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _ready(folder)
        _until(folder / "cause")
        time.sleep(0.3)
        raise error

    return act


def _hang(folder: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _ready(folder)
    time.sleep(LIMIT_SECONDS)


def _sleep(folder: Path) -> None:
    _ready(folder)
    time.sleep(LIMIT_SECONDS)


def _speak(folder: Path) -> None:
    print("a print of a library")
    warnings.warn("a warning of a library", stacklevel=1)
    log.info("information")
    log.warning("something is odd")


ACTIONS: dict[str, Any] = {
    "data error": _raise(DataError("rows.jsonl:3: no output")),
    "odd": _raise(ValueError("odd")),
    "lost": _lose(ProcessLost("another of the 2 processes has ended")),
    "gloo": _lose(RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:4711")),
    "memory": _raise(RunError("out of memory at step 3 on rank 1: goes on in passes of up to 128 tokens")),
    "kill": _kill(signal.SIGKILL),
    "crash": _kill(signal.SIGSEGV),
    "exit": lambda folder: os._exit(3),
    "wait": _wait,
    "hang": _hang,
    "sleep": _sleep,
    "speak": _speak,
}

PATIENT = {"gloo", "hang", "lost", "sleep", "wait"}

if __name__ == "__main__":
    stub = types.ModuleType("luthier.train.run")
    stub.train = train  # type: ignore[attr-defined]
    sys.modules["luthier.train.run"] = stub
    sys.exit(worker.main(Path(sys.argv[1])))
