"""Started by a launcher in several processes: runs of configs one after another, or one command line.

    in_processes.py runs CONFIG...           each run's final masters go to <output_dir>/masters-<rank>.safetensors
    in_processes.py train CONFIG...          `luthier train`, one after another
    in_processes.py full RANK TOKENS CONFIG  `luthier train` where a pass of more tokens finds no memory on one rank
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from luthier.cli import main
from luthier.config import Config
from luthier.train import run, spread

RANK = os.environ["RANK"]


def runs(files: list[str]) -> None:
    made: list[Any] = []
    masters_of = spread.Masters

    def noted(*arguments: Any, **options: Any) -> Any:
        made.append(masters_of(*arguments, **options))
        return made[-1]

    spread.Masters = noted  # type: ignore[assignment, misc]
    for file in files:
        if status := main(["train", file]):
            sys.exit(status)
        tensors = {name: master.detach().clone() for name, master in made[-1].masters.items()}
        save_file(tensors, Path(Config.load(file).output.output_dir) / f"masters-{RANK}.safetensors")


def full(rank: str, limit: str, file: str) -> None:
    build = run.build_policy

    def built(*arguments: Any, **options: Any) -> torch.nn.Module:
        policy = build(*arguments, **options)
        forward = policy.forward

        def limited(batch: Any) -> Any:
            if policy.training and len(batch.input_ids) > int(limit):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(batch)

        policy.forward = limited  # type: ignore[method-assign, assignment]
        return policy

    if rank == RANK:
        run.build_policy = built  # type: ignore[assignment]
    sys.exit(main(["train", file]))


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "runs":
        runs(rest)
    elif what == "train":
        sys.exit(max(main(["train", file]) for file in rest))
    else:
        full(*rest)
