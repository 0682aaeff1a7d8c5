"""One process of `bench.scaling`: measures collectives, or trains with a clock at everything that is sent.

    python -m bench.scaling_worker links OUT          inside of a launcher: bus bandwidth of each collective
    python -m bench.scaling_worker train CONFIG OUT   alone, or inside of a launcher: seconds of each step

Process 0 writes OUT, a JSON file.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import distributed

# Bytes of a message, up to the largest in which gradients are added up.
SIZES = (2**20, 2**22, 2**24, 2**26)
ROUNDS, WARM = 9, 2
# torch's names for them, from 2.13 on and before.
_NEW = hasattr(distributed, "all_gather_single")
_GATHER, _SCATTER = (
    ("all_gather_single", "reduce_scatter_single") if _NEW else ("all_gather_into_tensor", "reduce_scatter_tensor")
)


def main(what: str, *arguments: str) -> int:
    found = links() if what == "links" else train(arguments[0])
    if int(os.environ.get("RANK", "0")) == 0:
        Path(arguments[-1]).write_text(json.dumps(found), encoding="utf-8")
    return 0


def links() -> dict[str, dict[str, float]]:
    """Collective -> bytes of its message -> bytes a second through each process (`plan.links`)."""
    distributed.init_process_group("gloo")
    ranks = distributed.get_world_size()
    found: dict[str, dict[str, float]] = {"all_reduce": {}, "all_gather": {}, "reduce_scatter": {}}
    for size in SIZES:
        whole, part = torch.zeros(size // 4), torch.zeros(size // 4 // ranks)
        calls: dict[str, Callable[[], Any]] = {
            "all_reduce": partial(distributed.all_reduce, whole),
            "all_gather": partial(getattr(distributed, _GATHER), whole, part),
            "reduce_scatter": partial(getattr(distributed, _SCATTER), part, whole),
        }
        for name, call in calls.items():
            found[name][str(size)] = size * _each(name, ranks) / _seconds(call)
    distributed.destroy_process_group()
    return found


def _each(collective: str, ranks: int) -> float:
    """The part of a collective's bytes that goes through each process."""
    return (ranks - 1) / ranks * (2 if collective == "all_reduce" else 1)


def _seconds(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(WARM + ROUNDS):
        distributed.barrier()
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return median(times[WARM:])


def train(config: str) -> dict[str, list[float]]:
    """Of each step: seconds of all of it, in collectives on tensors, in adding gradients up with its copies, and of
    waiting for the other process before that; bytes through this process, and how many collectives they were."""
    from luthier.config import Config
    from luthier.train import run
    from luthier.train.distributed import Processes

    spent = dict.fromkeys(("collectives", "adding_up", "waiting", "sent", "number"), 0.0)
    steps: dict[str, list[float]] = {name: [] for name in ("step", *spent)}
    ended = [time.perf_counter()]

    def clocked(owner: Any, name: str, part: str) -> None:
        inner = getattr(owner, name)

        def outer(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*arguments, **options)
            finally:
                spent[part] += time.perf_counter() - began

        setattr(owner, name, outer)

    def counted(name: str) -> None:
        inner = getattr(distributed, name)

        def outer(*arguments: Any, **options: Any) -> Any:
            size = max(a.nbytes for a in (*arguments, *options.values()) if isinstance(a, torch.Tensor))
            spent["sent"] += size * _each(name, distributed.get_world_size())
            spent["number"] += 1
            return inner(*arguments, **options)

        setattr(distributed, name, outer)

    for name in ("all_reduce", _GATHER, _SCATTER):
        counted(name)
        clocked(distributed, name, "collectives")
    clocked(Processes, "_sum", "adding_up")
    clocked(Processes, "gather", "waiting")
    add_up = Processes.add_up

    def stepped(*arguments: Any, **options: Any) -> Any:
        said = add_up(*arguments, **options)
        now = time.perf_counter()
        steps["step"].append(now - ended[0])
        for part, value in spent.items():
            steps[part].append(value)
            spent[part] = 0.0
        ended[0] = now
        return said

    Processes.add_up = stepped  # type: ignore[method-assign]
    run.train(Config.load(config))
    return steps


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
