"""The doors for preferences: KTO and CPO's SimPO are the runs of their keys, and an evaluation outside of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.errors import ConfigError, DataError, RunError
from tests.api.conftest import COMMON, Row

CONFIGS = {"DPO": luthier.DPOConfig, "ORPO": luthier.ORPOConfig, "KTO": luthier.KTOConfig, "CPO": luthier.CPOConfig}


def pairs(rows: list[Row]) -> list[Row]:
    return [
        {"prompt": row["instruction"] + "\n", "chosen": f"The sum is {row['output']}", "rejected": f"Ask {n}"}
        for n, row in enumerate(rows)
    ]


def labelled(rows: list[Row]) -> list[Row]:
    both = [(row["prompt"], row[which], which == "chosen") for row in pairs(rows) for which in ("chosen", "rejected")]
    return [dict(zip(("prompt", "completion", "label"), each, strict=True)) for each in both]


@pytest.fixture
def trainer(
    peft_model: Callable[..., Any], tokenizer: Any, rows: list[Row], tmp_path: Path
) -> Callable[..., Any]:
    """trainer(kind, model, **arguments): of two steps, with held-out rows."""

    def make(kind: str, model: Any = None, **arguments: Any) -> Any:
        known = labelled(rows) if kind == "KTO" else pairs(rows)
        loss = {"CPO": {"loss_type": "simpo"}}.get(kind, {})
        args = {**COMMON, "max_steps": 2, "output_dir": str(tmp_path / kind), **loss, **arguments}
        return getattr(luthier, f"{kind}Trainer")(
            model=peft_model() if model is None else model, args=CONFIGS[kind](**args), processing_class=tokenizer,
            train_dataset=known[:24], eval_dataset=known[24:30],
        )  # fmt: skip

    return make


def figures(found: dict[str, Any]) -> dict[str, float]:
    left_out = ("eval_runtime", "step", "epoch")
    return {name: value for name, value in found.items() if name.startswith("eval_") and name not in left_out}


@pytest.mark.parametrize(
    "kind", ["DPO", "KTO", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ORPO", "CPO"))]
)
def test_an_evaluation_after_the_run_is_the_runs_last(kind: str, trainer: Callable[..., Any]) -> None:
    """Also of an adapter that begins elsewhere than at nothing, whose start is the reference."""
    made = trainer(kind, eval_strategy="steps", eval_steps=2)
    before = made.evaluate()
    if kind == "DPO":
        assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)  # the model against itself
        assert before["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert not made.output_dir.exists()
    made.train()
    in_run = json.loads((made.output_dir / "metrics.jsonl").read_text().splitlines()[-1])
    after = made.evaluate()
    assert figures(after).keys() == figures(in_run).keys() >= {"eval_loss"}
    assert figures(after) == pytest.approx(figures(in_run), abs=2e-5)
    assert abs(after["eval_loss"] - before["eval_loss"]) > 1e-3
    assert made.evaluate(made.eval_dataset[:4], metric_key_prefix="test")["test_loss"] > 0


def test_a_reference_that_is_not_kept(trainer: Callable[..., Any], toy_llama_dir: Path) -> None:
    def whole() -> Any:
        return luthier.FastLanguageModel.from_pretrained(str(toy_llama_dir), full_finetuning=True)[0]

    made = trainer("DPO", whole())
    assert made.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    made.train()
    with pytest.raises(RunError, match="the model before training, and is not kept"):
        made.evaluate()
    made = trainer("ORPO", whole())
    made.train()
    assert made.evaluate()["eval_loss"] > 0  # without a reference nothing is missing


def test_kto_and_simpo_are_runs_of_their_keys(trainer: Callable[..., Any]) -> None:
    kto = trainer("KTO", desirable_weight=1.5, undesirable_weight=0.5, beta=0.3).config.preference
    assert (kto.rl, kto.rl_beta, kto.kto_desirable_weight, kto.kto_undesirable_weight) == ("kto", 0.3, 1.5, 0.5)
    simpo = trainer("CPO", beta=2.0, simpo_gamma=1.2, cpo_alpha=0.0, label_smoothing=0.1).config.preference
    assert (simpo.rl, simpo.rl_beta, simpo.simpo_gamma, simpo.cpo_alpha) == ("simpo", 2.0, 1.2, 0.0)
    assert simpo.label_smoothing == 0.1


def test_what_kto_and_cpo_do_not_take(trainer: Callable[..., Any], peft_model: Callable[..., Any], rows: Any) -> None:
    with pytest.raises(ConfigError, match='loss_type="hinge" is not built here: write loss_type="simpo"'):
        trainer("CPO", loss_type="hinge")
    with pytest.raises(ConfigError, match="AlphaPO"):
        trainer("CPO", alpha=0.5)
    with pytest.raises(ConfigError, match='write loss_type="kto"'):
        trainer("KTO", loss_type="apo_zero_unpaired")
    with pytest.raises(ConfigError, match="KTOTrainer: ref_model"):
        luthier.KTOTrainer(model=peft_model(), ref_model=object())
    with pytest.raises(DataError, match="no label: an answer is"):
        luthier.KTOTrainer(model=peft_model(), train_dataset=[{"prompt": "a", "completion": "b"}])
