"""Real runs in two processes that `luthier train` starts: one is killed, one runs out of memory; both go on exactly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from luthier.config import Config
from luthier.train.run import train
from tests.train.conftest import losses

MakeConfig = Callable[..., Config]
ROOT = Path(__file__).parents[2]
TRAIN = [sys.executable, "-m", "luthier", "train"]
ON_TWO = ["--num-processes", "2", "--resume_from_checkpoint", "auto"]


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("WORLD_SIZE", None)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)


def _written(config: Config) -> str:
    path = Path(f"{config.output.output_dir}.yml")
    path.write_text(config.to_yaml())
    return str(path)


def _process_of_rank(launcher: int, rank: int) -> int:
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_text().split("\0")
        except (OSError, IndexError, ValueError):
            continue
        if parent == launcher and f"RANK={rank}" in environment:
            return int(folder.name)
    raise AssertionError(f"rank {rank} of {launcher} is not there")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")
def test_a_killed_process_ends_all_and_the_run_goes_on_exactly(run_config: MakeConfig, tmp_path: Path) -> None:
    values = dict(gradient_accumulation_steps=1, learning_rate=1e-3, lr_scheduler="constant", num_epochs=1000)
    values |= dict(max_steps=4000, save_steps=4, lora_dropout=0.1)
    config = run_config(**values)
    folder = Path(config.output.output_dir)
    file = _written(config)

    with started(*TRAIN, file, *ON_TWO) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
            if (folder / "checkpoint-4").exists() and len(losses(folder)) >= 6:
                break
        killed = _process_of_rank(process.pid, 1)
        os.kill(killed, signal.SIGKILL)
        began = time.monotonic()
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - began < 30  # 5 to 8 where nothing else runs; without the launcher's doing, never
    assert process.returncode == 1
    *_, message = said.splitlines()
    assert message.startswith(f"error: rank 1 (process {killed}) was killed by SIGKILL"), said
    assert "--resume_from_checkpoint auto goes on from checkpoint-" in message
    assert said.count("error: ") == 1 and "Traceback" not in said and "rank 0" not in said, said
    before = losses(folder)
    steps = len(before) + 3

    with started(*TRAIN, file, *ON_TWO, "--max_steps", str(steps)) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    command = json.loads((folder / "environment.json").read_text())["command"]
    assert command[1:] == ["train", file, *ON_TWO, "--max_steps", str(steps)], "the user's, not that of a process"
    after = losses(folder)
    assert len(after) == steps
    assert after[: len(before)] == before, "those after the checkpoint were computed anew, to the last bit"
    # And to rounding they are those of a single process that nobody has killed.
    train(run_config(**values | dict(gradient_accumulation_steps=2, max_steps=steps, output_dir=str(tmp_path / "one"))))
    np.testing.assert_allclose(after, losses(tmp_path / "one"), rtol=1e-5)


@pytest.mark.slow
def test_one_that_runs_out_of_memory_says_the_budget_that_the_run_goes_on_with(
    run_config: MakeConfig, tmp_path: Path
) -> None:
    values = dict(max_tokens_per_pass=400, share_prefixes="off", adapter=None, lora_r=None, learning_rate=1e-3)
    config = run_config(**values, resume_from_checkpoint="auto", dataset_prepared_path=str(tmp_path / "prepared"))
    file = _written(config)
    with started(sys.executable, "-m", "tests.launch.scarce", file) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert (tmp_path / "tokenised").read_text() == "rank 0\n", "the others read what the first one has tokenised"
    (message,) = [line for line in said.splitlines() if "out of memory" in line]
    assert message.startswith("error: out of memory at step 1 on rank 1 in a pass of ")
    assert "error: " not in said.replace(message, ""), said
    tokens = int(message.split("in a pass of ")[1].split()[0])
    assert f"goes on in passes of up to {tokens // 2} tokens" in message
    with started(*TRAIN, file, *ON_TWO) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0 and f"passes of up to {tokens // 2} tokens" in said, said
    noted = json.loads((Path(config.output.output_dir) / "environment.json").read_text())
    assert noted["processes"] == 2 and noted["tokens_per_pass"] == tokens // 2
