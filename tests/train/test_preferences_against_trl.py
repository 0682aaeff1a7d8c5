"""Twenty steps of each method, equal to TRL's trainers: loss and figures of each step and of an evaluation, and the
adapter at the end."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from luthier.config import Config
from luthier.train.run import train
from tests.train.trl_preferences import (
    BATCH,
    RATE,
    STEPS,
    Row,
    pairs,
    trl_run,
    unpaired,
    write_adapter,
)

DPO = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
ORPO = (*DPO, "nll_loss", "log_odds_chosen", "log_odds_ratio")
# TRL's KTO has no accuracies, and figures of a side only where a step has answers of it.
KTO = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "kl")

slow = pytest.mark.slow
# Ours, TRL's, and what both log.
CASES = [
    pytest.param({"rl": "dpo"}, {}, DPO, id="dpo", marks=slow),
    pytest.param(
        {"rl": "dpo", "rpo_alpha": 0.5},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        DPO,
        id="dpo-with-nll",
    ),
    pytest.param({"rl": "ipo"}, {"loss_type": ["ipo"]}, DPO, id="ipo", marks=slow),
    pytest.param({"rl": "dpo", "dpo_loss_type": "hinge"}, {"loss_type": ["hinge"]}, DPO, id="hinge", marks=slow),
    pytest.param(
        {"rl": "dpo", "precompute_ref_log_probs": True},
        {"precompute_ref_log_probs": True},
        DPO,
        id="dpo-precomputed",
        marks=slow,
    ),
    pytest.param(
        {"rl": "kto", "kto_desirable_weight": 1.2, "kto_undesirable_weight": 0.7},
        {"desirable_weight": 1.2, "undesirable_weight": 0.7},
        KTO,
        id="kto",
    ),
    pytest.param({"rl": "orpo"}, {}, ORPO, id="orpo"),
    pytest.param(
        {"rl": "simpo", "rl_beta": 2.0, "simpo_gamma": 1.4},
        {"beta": 2.0, "simpo_gamma": 1.4, "cpo_alpha": 0.0},
        DPO,
        id="simpo",
        marks=slow,
    ),
    pytest.param(
        {"rl": "simpo", "rl_beta": 2.0, "simpo_gamma": 1.4, "cpo_alpha": 0.5, "label_smoothing": 0.1},
        {"beta": 2.0, "simpo_gamma": 1.4, "cpo_alpha": 0.5, "label_smoothing": 0.1},
        (*DPO, "nll_loss"),
        id="simpo-with-nll",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def adapter(toy_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    write_adapter(toy_llama_dir, folder)
    return folder


@pytest.mark.parametrize(("ours", "theirs", "figures"), CASES)
def test_twenty_steps_equal_trl(
    toy_llama_dir: Path, adapter: Path, tmp_path: Path,
    ours: dict[str, Any], theirs: dict[str, Any], figures: tuple[str, ...],
) -> None:  # fmt: skip
    method = "dpo" if ours["rl"] == "ipo" else ours["rl"]
    rows = unpaired() if method == "kto" else pairs()
    # One batch: TRL's evaluation is the mean of its batches' means, whatever they hold.
    held_out = rows[3 : 3 + BATCH]
    options = {"beta": 0.1, **theirs}
    expected = trl_run(method, toy_llama_dir, adapter, rows, held_out, tmp_path / "trl", **options)
    found, evaluation, tensors = _our_run(toy_llama_dir, adapter, rows, held_out, tmp_path, **ours)
    assert len(found) == len(expected.losses) == STEPS
    np.testing.assert_allclose([row["loss"] for row in found], expected.losses, atol=1e-4)
    for one, other in zip(found, expected.rows, strict=True):
        _same_figures(one, other, figures)
    assert len({round(loss, 3) for loss in expected.losses}) > 10
    assert "eval_logps/chosen" in evaluation
    _same_figures(evaluation, expected.evaluation, [f"eval_{name}" for name in ("loss", *figures)])
    assert set(tensors) == set(expected.adapter)
    start = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected.adapter[name], atol=1e-4, rtol=0)
        assert (tensor - start[name]).abs().max() > 1e-2, name  # they went far enough for it to mean something


def _our_run(
    base_model: Path, adapter: Path, rows: list[Row], held_out: list[Row], folder: Path, **values: Any
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, torch.Tensor]]:
    """Rows of training, the row of the evaluation after it, and the adapter."""
    data, validation, output = folder / "rows.jsonl", folder / "held-out.jsonl", folder / "ours"
    for path, content in ((data, rows), (validation, held_out)):
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    train(
        Config.from_flat(
            {
                "base_model": str(base_model), "adapter": "lora", "lora_model_dir": str(adapter), "lora_r": 4,
                "lora_alpha": 8, "lora_target_linear": True, "datasets": [{"path": str(data)}],
                "test_datasets": [{"path": str(validation)}], "eval_steps": STEPS, "shuffle": False,
                "micro_batch_size": BATCH, "gradient_accumulation_steps": 1, "max_steps": STEPS,
                "learning_rate": RATE, "lr_scheduler": "constant", "optimizer": "adamw_torch",
                "weight_decay": 0.0, "max_grad_norm": 1.0, "logging_steps": 1, "sequence_len": 512, "bf16": False,
                "output_dir": str(output), **values,
            }
        )
    )  # fmt: skip
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    (evaluation,) = (row for row in logged if "eval_loss" in row)
    training = [row for row in logged if "loss" in row]
    return training, evaluation, load_file(output / "adapter_model.safetensors")


def _same_figures(ours: dict[str, Any], theirs: dict[str, float], names: Iterable[str]) -> None:
    for name in names:
        assert (name in ours) == (name in theirs), (ours["step"], name)
        if name not in ours:
            continue
        if name == "rewards/accuracies" and ours["step"] == 1 and abs(theirs["rewards/margins"]) < 1e-5:
            continue  # policy and reference are the same: what is compared is rounding
        # log-probs of whole answers are sums of up to a hundred nats
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-4), (ours["step"], name)
