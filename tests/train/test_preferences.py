"""Preference runs that must be the same run: however a step is cut, shared, recomputed, resumed or prepared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from luthier.config import Config
from luthier.data.dataset import prepare
from luthier.data.tokenizer import load_tokenizer
from luthier.models.policy import Policy
from luthier.train.run import train
from tests.train.conftest import losses

MakeConfig = Callable[..., Config]
SIDES = ("chosen", "rejected")
METHODS = ["orpo", "dpo", "ipo", "kto", "simpo"]
# In eight answers or pairs a step; small enough steps that rounding does not grow.
BASE: dict[str, Any] = dict(
    micro_batch_size=4, gradient_accumulation_steps=2, max_steps=6, learning_rate=2e-3, num_epochs=10
)


@pytest.fixture
def prefer(run_config: MakeConfig, pairs_file: Path) -> MakeConfig:
    """Flat keys -> Config of a quick preference run."""

    def make(rl: str, **values: Any) -> Config:
        data = {"datasets": [{"path": str(pairs_file)}]}
        return run_config(**{**BASE, **data, "rl": rl, **values})

    return make


def rows_of(folder: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def assert_same_rows(one: Path, other: Path, atol: float = 1e-5) -> None:
    left, right = rows_of(one), rows_of(other)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        figures = [name for name in a if "/" in name or name in ("loss", "eval_loss", "nll_loss", "kl", "eval_kl")]
        assert figures and set(figures) <= set(b)
        for name in figures:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=atol), (a["step"], name)


@pytest.mark.parametrize("rl", METHODS)
def test_the_cut_of_a_step_changes_nothing(prefer: MakeConfig, tmp_path: Path, rl: str) -> None:
    """Dropout included: both answers to a prompt see the same mask over it. Evaluation too."""
    base = {"lora_dropout": 0.2, "seed": 7, "val_set_size": 9, "eval_steps": 3}
    cuts: dict[str, dict[str, Any]] = {
        "4x2": {},
        "8x1-recomputed": {
            "micro_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": True,
            "attn_implementation": "eager",
        },
        "1x8-small-passes-unshared": {
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 8,
            "max_tokens_per_pass": 100,
            "share_prefixes": "off",
        },
    }
    for name, changes in cuts.items():
        train(prefer(rl, **{**base, **changes}, output_dir=str(tmp_path / name)))
    first, *others = cuts
    assert len(losses(tmp_path / first)) == 6
    expected = load_file(tmp_path / first / "adapter_model.safetensors")
    for other in others:
        assert_same_rows(tmp_path / first, tmp_path / other)
        for name, tensor in load_file(tmp_path / other / "adapter_model.safetensors").items():
            torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=0)


@pytest.mark.parametrize("rl", ["dpo", "kto"])
@pytest.mark.parametrize("adapter", ["lora", None])
def test_log_probs_of_the_reference_computed_beforehand(
    prefer: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, rl: str, adapter: str | None
) -> None:
    """The same run, and a second one finds them; another start does not."""
    caplog.set_level("INFO", logger="luthier")
    values: dict[str, Any] = {"val_set_size": 9, "eval_steps": 3}
    if adapter is None:
        values |= {"adapter": None, "lora_r": None, "learning_rate": 1e-3}
    train(prefer(rl, **values, output_dir=str(tmp_path / "live")))
    assert "log-probs of" not in caplog.text
    for name, said in (("first", "computing the log-probs of"), ("again", "rows, from the cache")):
        caplog.clear()
        train(prefer(rl, **values, precompute_ref_log_probs=True, output_dir=str(tmp_path / name)))
        assert caplog.text.count(said) == 2  # training and validation
        assert_same_rows(tmp_path / "live", tmp_path / name)
    assert losses(tmp_path / "first") == losses(tmp_path / "again")
    caplog.clear()
    other = tmp_path / "other-start"
    shutil.copytree(prefer(rl).model.base_model, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][3] += 0.5
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    train(prefer(rl, **values, base_model=str(other), precompute_ref_log_probs=True, output_dir=str(tmp_path / "o")))
    assert "rows, from the cache" not in caplog.text


@pytest.mark.parametrize("rl", ["dpo", "kto", "orpo"])
def test_a_resumed_run_goes_on_to_the_last_bit(prefer: MakeConfig, tmp_path: Path, rl: str) -> None:
    """Its reference is the start of the run, not where it goes on from."""
    full = dict(adapter=None, lora_r=None, learning_rate=1e-3)
    values: dict[str, Any] = dict(**full, save_steps=2, val_set_size=9, eval_steps=2)
    train(prefer(rl, **values, output_dir=str(tmp_path / "whole")))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(tmp_path / "cut" / name)
    train(prefer(rl, **values, output_dir=str(tmp_path / "cut"), resume_from_checkpoint="auto"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    one, other = rows_of(tmp_path / "whole"), rows_of(tmp_path / "cut")
    for a, b in zip(one, other, strict=True):
        assert {k: v for k, v in a.items() if "rewards" in k} == {k: v for k, v in b.items() if "rewards" in k}


@pytest.mark.parametrize("rl", METHODS)
def test_figures_are_those_of_the_documents_one_by_one(prefer: MakeConfig, tmp_path: Path, rl: str) -> None:
    """Against transformers' own forward of each answer alone, before and after training."""
    config = prefer(rl, val_set_size=9, eval_steps=6, adapter=None, lora_r=None, learning_rate=1e-3)
    train(config)
    found = [row for row in rows_of(tmp_path / "run") if "eval_loss" in row][-1]
    data = prepare(config, load_tokenizer(config)).validation
    assert data is not None
    tuned, start = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (tmp_path / "run", config.model.base_model)
    )

    @torch.no_grad()
    def answer(model: Any, ids: np.ndarray, labels: np.ndarray) -> tuple[float, int]:
        tokens = torch.from_numpy(ids.astype(np.int64))
        logps = model(tokens[None]).logits[0, :-1].log_softmax(-1)
        own = logps.gather(-1, tokens[1:, None])[:, 0]
        mask = torch.from_numpy(labels[1:] >= 0)
        return float(own[mask].sum()), int(mask.sum())

    figures: dict[str, list[float]] = {f"{what}/{side}": [] for what in ("rewards", "logps") for side in SIDES}
    beta = config.preference.rl_beta
    for index in range(len(data)):
        document = data[index]
        tokens = len(document.input_ids)
        for n, part in enumerate(np.split(np.arange(tokens), np.cumsum(document.lengths or (tokens,))[:-1])):
            ids, labels = document.input_ids[part], document.labels[part].copy()
            labels[: document.prompt] = -100
            (now, n_tokens), (before, _) = (answer(model, ids, labels) for model in (tuned, start))
            side = "chosen" if (n == 0 if document.pair else document.desirable) else "rejected"
            mean = rl in ("orpo", "simpo")
            figures[f"logps/{side}"].append(now / n_tokens if mean else now)
            figures[f"rewards/{side}"].append(beta * (now / n_tokens if mean else now - before))
    for name, values in figures.items():
        assert found[f"eval_{name}"] == pytest.approx(np.mean(values), rel=1e-4, abs=1e-4), name


def test_a_step_that_runs_out_of_memory_is_repeated_in_smaller_passes(
    prefer: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the passes over mismatched answers too, which come first."""
    train(prefer("kto", output_dir=str(tmp_path / "plain")))
    forward = Policy.forward
    seen: list[int] = []

    def short_of_memory(self: Any, batch: Any) -> Any:
        if len(batch.input_ids) > 150 and self.training is (len(seen) > 0):
            seen.append(len(batch.input_ids))
            raise RuntimeError("not enough memory: you tried to allocate 7 bytes")
        return forward(self, batch)

    monkeypatch.setattr(Policy, "forward", short_of_memory)
    train(prefer("kto", output_dir=str(tmp_path / "short")))
    assert len(seen) >= 2
    assert_same_rows(tmp_path / "plain", tmp_path / "short")
