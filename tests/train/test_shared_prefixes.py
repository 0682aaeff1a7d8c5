"""Runs with and without shared prefixes are the same run; what was saved is in the metrics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.config import Config
from luthier.train import checkpoint
from luthier.train.run import train
from tests.train.conftest import losses

MakeConfig = Callable[..., Config]


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("train_on_inputs", [False, True])
def test_twenty_steps_with_shared_prefixes_equal_those_without(
    run_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, train_on_inputs: bool
) -> None:
    caplog.set_level("INFO", logger="luthier")
    values = dict(
        micro_batch_size=4,
        max_steps=20,
        learning_rate=2e-3,  # where rounding does not grow: at 1e-2 two cuts of the unshared run part as well
        num_epochs=10,
        val_set_size=6,
        eval_steps=10,
        train_on_inputs=train_on_inputs,
    )
    folders = {name: tmp_path / name for name in ("auto", "off", "cut")}
    train(run_config(**values, output_dir=str(folders["auto"])))
    assert "shared prefixes: about" in caplog.text
    caplog.clear()
    train(run_config(**values, share_prefixes=False, output_dir=str(folders["off"])))
    assert "shared prefixes" not in caplog.text
    train(run_config(**values, max_tokens_per_pass=300, output_dir=str(folders["cut"])))
    rows = {name: _rows(folder) for name, folder in folders.items()}
    for name in ("auto", "cut"):
        np.testing.assert_allclose(losses(folders[name]), losses(folders["off"]), atol=2e-6)
        for row, other in zip(rows[name], rows["off"], strict=True):
            assert row.get("tokens") == other.get("tokens")
            assert row.get("eval_loss") == pytest.approx(other.get("eval_loss"), abs=2e-6)
            for key in ("token_accuracy", "eval_token_accuracy"):
                assert row.get(key) == pytest.approx(other.get(key), abs=1e-3)
    last = {name: [row for row in found if "tokens" in row][-1] for name, found in rows.items()}
    assert last["off"]["computed_tokens"] == last["off"]["tokens"]
    assert last["auto"]["computed_tokens"] < 0.8 * last["auto"]["tokens"]
    assert last["auto"]["computed_tokens"] < last["cut"]["computed_tokens"] < last["cut"]["tokens"]


def test_dropout_turns_sharing_off_and_it_is_said(
    run_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="luthier")
    train(run_config(lora_dropout=0.1, max_steps=1))
    assert caplog.text.count("documents share no prefixes: lora_dropout is drawn for each document") == 1
    row = _rows(tmp_path / "run")[0]
    assert row["computed_tokens"] == row["tokens"]


def test_a_resumed_run_with_shared_prefixes_is_exact(run_config: MakeConfig, tmp_path: Path) -> None:
    train(run_config(max_steps=6, output_dir=str(tmp_path / "whole")))
    half = run_config(max_steps=6, save_steps=3, output_dir=str(tmp_path / "half"))
    train(half)
    checkpoint._remove(tmp_path / "half" / "checkpoint-6")
    train(half.replace("go on", resume_from_checkpoint="auto"))
    one, other = _rows(tmp_path / "whole"), _rows(tmp_path / "half")
    for key in ("loss", "grad_norm", "tokens", "computed_tokens"):
        assert [row[key] for row in one] == [row[key] for row in other]
