"""A process of a run, in which a pass of more than 200 tokens finds no memory on rank 1; who tokenises is noted in
<output_dir>/../tokenised.

    python scarce.py CONFIG    trains in two such processes
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from luthier import cli
from luthier.config import Config
from luthier.data import dataset
from luthier.launch import processes, worker
from luthier.train import run

LIMIT = 200


def prepare() -> None:
    build, tokenise = run.build_policy, dataset._tokenise_all

    def built(*arguments: Any, **options: Any) -> torch.nn.Module:
        policy = build(*arguments, **options)
        forward = policy.forward

        def limited(batch: Any) -> Any:
            if policy.training and len(batch.input_ids) > LIMIT:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(batch)

        policy.forward = limited  # type: ignore[method-assign]
        return policy

    def noted(writer: Any, entries: Any, opened: Any, config: Config, tokenizer: Any) -> Any:
        with (Path(config.output.output_dir).parent / "tokenised").open("a") as file:
            file.write(f"rank {os.environ['RANK']}\n")
        return tokenise(writer, entries, opened, config, tokenizer)

    dataset._tokenise_all = noted
    if os.environ["RANK"] == "1":
        run.build_policy = built  # type: ignore[assignment]


if __name__ == "__main__":
    if "RANK" in os.environ:
        prepare()
        sys.exit(worker.main(Path(sys.argv[1])))
    processes.WORKER = "tests.launch.scarce"
    sys.exit(cli.main(["train", sys.argv[1], "--num-processes", "2"]))
