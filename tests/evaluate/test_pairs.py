"""Pairs of answers: `luthier evaluate` gives the figures of the run's own log, pair by pair."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from luthier import cli
from luthier.config import Config
from luthier.evaluate.data_eval import evaluate_data


def train(folder: Path, toy_llama_dir: Path, rl: str) -> Path:
    from luthier.train.run import train as run

    rows = [
        {
            "prompt": f"Add {n} and {n + 1}.\n",
            "chosen": f"The sum is {2 * n + 1}",
            "rejected": "No, that is not known to me" if n % 2 else f"{n}",
            "kind": "long" if n % 2 else "short",
        }
        for n in range(36)
    ]
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "base_model": str(toy_llama_dir),
        "datasets": [{"path": str(data)}],
        "val_set_size": 12,
        "rl": rl,
        "adapter": "lora",
        "lora_r": 4,
        "micro_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "sequence_len": 512,
        "bf16": False,
        "output_dir": str(folder / "run"),
    }
    run(Config.from_flat(config))
    return folder / "run"


@pytest.mark.parametrize("rl", ["dpo", "orpo"])
def test_rewards_are_those_of_the_runs_log(
    rl: str, tmp_path: Path, toy_llama_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(tmp_path, toy_llama_dir, rl)
    path, found = evaluate_data(str(run), by=["kind"])
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(logged) if "eval_loss" in row)
    whole = found["figures"]["all"]
    figures = whole["target"]
    assert figures["reward_margin"]["value"] == pytest.approx(last["eval_rewards/margins"], abs=1e-5)
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert len(lines) == whole["rows"] == 12
    for side in ("chosen", "rejected"):
        logps = [
            row["target"][f"{side}_logp"] / (row["target"][f"{side}_tokens"] if rl == "orpo" else 1) for row in lines
        ]
        assert np.mean(logps) == pytest.approx(last[f"eval_logps/{side}"], abs=1e-4)
    assert all(row["prompt"].startswith("Add ") and row["expected"].startswith("The sum is ") for row in lines)
    assert {row["rejected"] == "No, that is not known to me" for row in lines} == {True, False}
    groups = found["figures"]["by"]["kind"]
    assert sum(group["rows"] for group in groups.values()) == 12
    if rl == "dpo":  # against the base, which has to be there
        assert figures["reward_accuracy"]["value"] == pytest.approx(last["eval_rewards/accuracies"])
        assert found["compare"] == str(toy_llama_dir) and "prefers_chosen" in whole["difference"]
    else:
        assert figures["prefers_chosen"]["value"] == pytest.approx(last["eval_rewards/accuracies"])
        assert found["compare"] is None and "reward_accuracy" not in figures
    # Rows of prompts and answers: the run is measured as any other.
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"instruction": "Add 1 and 2.", "output": "3"}) + "\n")
    _, other = evaluate_data(str(run), data=[str(plain)], type="alpaca")
    assert {"loss", "exact_match"} <= other["figures"]["all"]["target"].keys()


def test_single_answers_with_labels_are_one_message(
    tmp_path: Path, toy_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "kto.yml"
    config.write_text("base_model: x\ndatasets:\n  - {path: rows.jsonl}\nrl: kto\nrl_beta: 0.1\n")
    assert cli.main(["evaluate", str(toy_llama_dir), "--data", str(config)]) == 2
    assert capsys.readouterr().err.startswith("error: rl: kto: rows are single answers")
