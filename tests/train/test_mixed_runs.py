"""Runs over mixed datasets: as many steps as the mix has, the same to the last bit when they go on, and what they had
of each dataset in their folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.config import Config
from luthier.errors import RunError
from luthier.experiments.report import run_page
from luthier.experiments.run_files import read_run
from luthier.train.run import train

MakeConfig = Callable[..., Config]


@pytest.fixture
def mixed(run_config: MakeConfig, rows_file: Path, tmp_path: Path) -> MakeConfig:
    """The sixty rows, and ten others three times as often."""
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"instruction": f"Mine {n}", "output": f"{n} " * 3}) + "\n" for n in range(10)))

    def make(own_keys: dict[str, Any], **values: Any) -> Config:
        entries = [{"path": str(own), "type": "alpaca", **own_keys}, {"path": str(rows_file), "type": "alpaca"}]
        flat = {"datasets": entries, "max_steps": None, "micro_batch_size": 3, "gradient_accumulation_steps": 1}
        return run_config(**(flat | values))

    return make


def _rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "tokens_per_second", "eta_seconds", "peak_memory_gib")
    return [{name: value for name, value in row.items() if name not in timed} for row in found]


def test_a_run_goes_as_often_through_each_dataset_as_asked(mixed: MakeConfig, tmp_path: Path) -> None:
    config = mixed({"epochs": 3}, num_epochs=0.5, val_set_size=7, evals_per_epoch=2, lora_dropout=0.1)
    result = train(config)
    folder = tmp_path / "run"
    mix = json.loads((folder / "summary.json").read_text())["mix"]
    own, big = mix["sources"]
    assert own["documents"] + big["documents"] == 63
    assert own["examples"] == 3 * own["documents"] and own["unseen"] == 0
    assert abs(big["examples"] - big["documents"] / 2) <= 0.5
    assert result.state.step == mix["steps"] == -(-(own["examples"] + big["examples"]) // 3)
    assert own["trained_tokens"] + big["trained_tokens"] == result.state.trained_tokens
    rows = _rows(folder)
    assert [row["epoch"] for row in rows if "epoch" in row][-1] == pytest.approx(0.5)
    assert json.loads((folder / "environment.json").read_text())["data"]["mix"] == mix
    page = run_page(read_run(folder))
    assert "What the steps had of each" in page and f"<td class=\"n\">{own['examples']}</td>" in page


@pytest.mark.parametrize(
    "keys",
    [
        {"mix_strategy": "interleave"},
        pytest.param({"sample_packing": True, "sequence_len": 256, "micro_batch_size": 2}, marks=pytest.mark.slow),
        pytest.param({"mix_strategy": "temperature", "shuffle": False}, marks=pytest.mark.slow),
    ],
)
def test_going_on_is_the_same_to_the_last_bit(keys: dict[str, Any], mixed: MakeConfig, tmp_path: Path) -> None:
    def config(**more: Any) -> Config:
        flat = {"num_epochs": 1.5, "lora_dropout": 0.2, "save_steps": 10, "micro_batch_size": 6}
        return mixed({"weight": 1.5}, **(flat | keys | more))

    whole = train(config(output_dir=str(tmp_path / "whole")))
    places = sorted(int(path.name[11:]) for path in (tmp_path / "whole").glob("checkpoint-*"))
    middle = tmp_path / "whole" / f"checkpoint-{places[len(places) // 2]}"
    assert 0 < places[len(places) // 2] < whole.state.step
    train(config(resume_from_checkpoint=str(middle), output_dir=str(tmp_path / "run")))
    after = [row for row in _rows(tmp_path / "whole") if row["step"] > places[len(places) // 2]]
    assert [row for row in _rows(tmp_path / "run") if row["step"] > places[len(places) // 2]] == after
    if "mix_strategy" in keys:
        for other in ({"weight": 2}, {}):
            goes_on = {"resume_from_checkpoint": str(middle), "output_dir": str(tmp_path / "new")}
            changed = mixed(other, num_epochs=1.5, lora_dropout=0.2, micro_batch_size=6, **keys, **goes_on)
            with pytest.raises(RunError, match="what differs: mix"):
                train(changed)


@pytest.mark.parametrize("rl", ["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_preferences_of_half_a_dataset(rl: str, run_config: MakeConfig, pairs_file: Path, tmp_path: Path) -> None:
    entries = [{"path": str(pairs_file), "weight": 0.5}, {"path": f"{pairs_file}#8", "weight": 3}]
    keys = {"datasets": entries, "rl": rl, "max_steps": None, "num_epochs": 1, "learning_rate": 1e-3}
    precomputed = {"precompute_ref_log_probs": True} if rl == "dpo" else {}
    train(run_config(**keys, **precomputed))
    losses = [row["loss"] for row in _rows(tmp_path / "run") if "loss" in row]
    train(run_config(**keys, output_dir=str(tmp_path / "again")))
    assert losses == pytest.approx([row["loss"] for row in _rows(tmp_path / "again") if "loss" in row], rel=1e-5)
    assert len(losses) == (12 if rl == "dpo" else 24)  # 24 and 24 pairs, in steps of 4; kto takes pairs apart
