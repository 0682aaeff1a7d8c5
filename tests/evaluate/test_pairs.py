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


def train_kto(folder: Path, toy_llama_dir: Path, rows: list[dict[str, object]], **keys: object) -> Path:
    from luthier.train.run import train as run

    data = folder / "answers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, object] = {
        "base_model": str(toy_llama_dir),
        "datasets": [{"path": str(data)}],
        "val_set_size": 14,
        "rl": "kto",
        "rl_beta": 0.3,
        "adapter": "lora",
        "lora_r": 4,
        "micro_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "sequence_len": 512,
        "bf16": False,
        "output_dir": str(folder / "run"),
    }
    run(Config.from_flat(config | keys))
    return folder / "run"


def labelled_rows(count: int = 40) -> list[dict[str, object]]:
    def answer(n: int) -> str:
        return f"The sum is {2 * n + 1}" if n % 3 else "No, that is not known to me"

    return [
        {"prompt": f"Add {n} and {n + 1}.\n", "completion": answer(n), "label": n % 3 > 0, "of": {"kind": f"k{n % 2}"}}
        for n in range(count)
    ]


def test_labelled_answers_have_the_rewards_of_the_runs_log(
    tmp_path: Path, toy_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_kto(tmp_path, toy_llama_dir, labelled_rows(), kto_desirable_weight=5.0, learning_rate=3e-3)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(logged) if "eval_loss" in row)
    assert cli.main(["evaluate", str(run), "--by", "of.kind"]) == 0
    out, err = capsys.readouterr()
    assert "14 answers" in err and "rewards are against the base" in err
    assert not [line for line in out.splitlines()[:-1] if len(line) > 80] and "reward, good" in out
    result = json.loads((run / "evaluation" / "validation.json").read_text())
    lines = [json.loads(line) for line in (run / "evaluation" / "validation.jsonl").read_text().splitlines()]
    whole = result["figures"]["all"]
    assert abs(last["eval_rewards/margins"]) > 0.01 and last["eval_kl"] > 0  # there is something to be wrong about
    for name, of_log in {
        "desirable_logp": "logps/chosen",
        "undesirable_logp": "logps/rejected",
        "desirable_reward": "rewards/chosen",
        "undesirable_reward": "rewards/rejected",
        "reward_margin": "rewards/margins",
        "reward_accuracy": "rewards/accuracies",
        "kl": "kl",
    }.items():
        figure = whole["target"][name]
        assert figure["value"] == pytest.approx(last[f"eval_{of_log}"], abs=2e-5, rel=1e-6), name
        assert figure["low"] <= figure["value"] <= figure["high"]
    assert whole["compare"].keys() == whole["difference"].keys() == {"desirable_logp", "undesirable_logp"}
    # Line by line, and by group.
    assert len(lines) == whole["rows"] == 14
    for line in lines:
        assert line["desirable"] == line["expected"].startswith("The sum") and line["prompt"].startswith("Add ")
        moved = line["target"]["logp"] - line["compare"]["logp"]
        assert line["target"]["reward"] == pytest.approx(0.3 * moved, abs=1e-9)
        assert line["target"]["right"] == ((moved > last["eval_kl"]) == line["desirable"])
    for value, group in result["figures"]["by"]["of.kind"].items():
        mine = [line["target"] for line in lines if line["by"]["of.kind"] == value and line["desirable"]]
        expected = np.mean([each["reward"] for each in mine])
        assert group["target"]["desirable_reward"]["value"] == pytest.approx(expected)


def test_answers_of_one_label_of_pairs_and_without_a_base(tmp_path: Path, toy_llama_dir: Path) -> None:
    pairs = [{"prompt": f"Add {n}.\n", "chosen": f"It is {n}", "rejected": "No"} for n in range(5)]
    files = {"good": labelled_rows()[1:3], "pairs": pairs}
    found = {}
    for name, rows in files.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = tmp_path / f"{name}.yml"
        config.write_text(f"base_model: elsewhere\nrl: kto\ndatasets:\n  - path: {data}\n")
        path, result = evaluate_data(str(toy_llama_dir), data=[str(config)], output=tmp_path / "out")
        found[name] = result["figures"]["all"], path.with_suffix(".jsonl").read_text().splitlines()
    # A model that is no run says nothing of what it was before: there are no rewards.
    assert found["good"][0]["target"].keys() == {"desirable_logp"}
    assert found["pairs"][0]["target"].keys() == {"desirable_logp", "undesirable_logp"}
    assert found["pairs"][0]["rows"] == 5 and len(found["pairs"][1]) == 10
    assert [json.loads(line)["desirable"] for line in found["pairs"][1]] == [True, False] * 5


@pytest.mark.parametrize("rl", ["dpo", "kto"])
def test_rewards_of_a_run_that_began_with_an_adapter_are_against_that(
    rl: str, tmp_path: Path, toy_llama_dir: Path
) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    first = train_kto(tmp_path / "first", toy_llama_dir, labelled_rows(), val_set_size=0)
    rows: list[dict[str, object]] = labelled_rows()
    if rl == "dpo":
        rows = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "None of it"} for row in rows]
    run = train_kto(tmp_path / "second", toy_llama_dir, rows, rl=rl, lora_model_dir=str(first))
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(logged) if "eval_loss" in row)
    figures = evaluate_data(str(run))[1]["figures"]["all"]["target"]
    for name, of_log in {"reward_margin": "margins", "reward_accuracy": "accuracies"}.items():
        assert figures[name]["value"] == pytest.approx(last[f"eval_rewards/{of_log}"], abs=2e-5), name
