"""A toy run: a llama of a few thousand weights and short arithmetic rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.config import Config


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Sixty Alpaca rows of very different lengths."""
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for n in range(60):
            words = " ".join(str(n * k % 97) for k in range(1 + n * 7 % 40))
            row = {
                "instruction": f"Add {n} and {n + 1}.",
                "input": words if n % 3 else "",
                "output": f"{2 * n + 1}",
            }
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """Forty-eight pairs; some prompts occur twice, some answers begin alike."""
    path = tmp_path / "pairs.jsonl"
    with path.open("w") as file:
        for n in range(48):
            topic = n % 40
            words = " ".join(str(topic * k % 97) for k in range(1 + topic * 7 % 30))
            row = {
                "prompt": f"Add {topic} and {topic + 1}, and leave alone: {words}\n",
                "chosen": f"The sum is {2 * topic + 1}, {n}",
                "rejected": f"The sum is {'not known ' * (n % 5)}to me, {n}" if n % 2 else f"No. {n}",
            }
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def run_config(rows_file: Path, toy_llama_dir: Path, tmp_path: Path) -> Callable[..., Config]:
    """Flat keys -> Config of a quick LoRA run on the toy model."""

    def make(**values: Any) -> Config:
        return Config.from_flat(
            {
                "base_model": str(toy_llama_dir),
                "datasets": [{"path": str(rows_file), "type": "alpaca"}],
                "adapter": "lora",
                "lora_r": 4,
                "micro_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "learning_rate": 1e-2,
                "max_steps": 6,
                "logging_steps": 1,
                "sequence_len": 512,
                "bf16": False,  # a CPU with matrix units for bf16 would use them
                "output_dir": str(tmp_path / "run"),
                **values,
            }
        )

    return make


def losses(folder: str | Path) -> list[float]:
    """The training losses in a run folder, step by step."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]
