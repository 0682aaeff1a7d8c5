"""The same notebook with TRL's trainers and with ours: the same losses in fp32, and the same adapter at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from peft import get_peft_model_state_dict

import luthier
from tests.api.conftest import COMMON, STEPS, Row, losses

QUIET = {"gradient_checkpointing": False}


def as_text(row: Row) -> Row:
    return {"text": f"### Instruction:\n{row['instruction']} {row['input']}\n\n### Response:\n{row['output']}"}


def as_completion(row: Row) -> Row:
    return {"prompt": f"{row['instruction']} {row['input']}\n", "completion": f"The sum is {row['output']}"}


def as_messages(row: Row) -> Row:
    return {
        "messages": [
            {"role": "user", "content": row["instruction"] + row["input"]},
            {"role": "assistant", "content": row["output"]},
        ]
    }


def as_tokens(row: Row) -> Row:
    length = 3 + len(row["input"])
    ids = [5 + (7 * k + length) % 400 for k in range(length)]
    return {"input_ids": ids, "labels": [-100, -100, *ids[2:]]}


def as_pair(row: Row) -> Row:
    return {
        "prompt": f"{row['instruction']} {row['input']}\n",
        "chosen": f"The sum is {row['output']}",
        "rejected": f"The sum is unknown{row['output']}",
    }


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-4) -> None:
    assert len(losses(ours)) == len(losses(theirs)) == STEPS
    np.testing.assert_allclose(losses(ours), losses(theirs), atol=tolerance)
    assert losses(ours)[-1] < losses(ours)[0]
    mine, other = (get_peft_model_state_dict(trainer.model) for trainer in (ours, theirs))
    assert mine.keys() == other.keys()
    for name in mine:
        # Adam divides by the root of a second moment: where gradients are near zero, rounding decides the sign.
        np.testing.assert_allclose(mine[name].detach(), other[name].detach(), atol=2e-3, err_msg=name)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (as_text, {}),
        (as_completion, {}),
        (as_messages, {}),
        pytest.param(as_completion, {"completion_only_loss": False}, marks=pytest.mark.slow),
        pytest.param(as_tokens, {}, marks=pytest.mark.slow),
    ],
    ids=["text", "completion", "messages", "whole-completion", "tokens"],
)
def test_sft(
    shape: Callable[[Row], Row],
    options: dict[str, Any],
    rows: list[Row],
    peft_model: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    import trl

    data = datasets.Dataset.from_list([shape(row) for row in rows])
    given = dict(processing_class=tokenizer, train_dataset=data)
    common = {**COMMON, **options, "max_length": 256}
    ours = luthier.SFTTrainer(
        model=peft_model(), args=luthier.SFTConfig(output_dir=str(tmp_path / "ours"), **common), **given
    )
    ours.train()
    theirs = trl.SFTTrainer(
        model=peft_model(), args=trl.SFTConfig(output_dir=str(tmp_path / "theirs"), **common, **QUIET), **given
    )
    theirs.train()
    assert_same(ours, theirs)


@pytest.mark.parametrize("method", ["ORPO", "DPO"])
def test_preferences(
    method: str, rows: list[Row], peft_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    import trl
    from trl.experimental import orpo

    home = orpo if method == "ORPO" else trl
    data = datasets.Dataset.from_list([as_pair(row) for row in rows])
    given = dict(processing_class=tokenizer, train_dataset=data)
    # One pass a step: with several, TRL's ORPO means the likelihood over each of them, and not over the step's tokens.
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    common = {**COMMON, **batch, "beta": 0.2, "max_length": 256}
    results = []
    for place, more in ((luthier, {}), (home, QUIET)):
        args = getattr(place, f"{method}Config")(output_dir=str(tmp_path / place.__name__), **common, **more)
        model = peft_model(init_lora_weights=True)
        for name, parameter in model.named_parameters():  # TRL's reference is the base, ours what the run begins with
            if "lora_B" in name:
                parameter.data.zero_()
        trainer = getattr(place, f"{method}Trainer")(model=model, args=args, **given)
        trainer.train()
        results.append(trainer)
    assert_same(*results)


def test_our_model_in_trls_own_trainer(toy_llama_dir: Path, rows: list[Row], tokenizer: Any, tmp_path: Path) -> None:
    """What FastLanguageModel gives is a PEFT model like any other: TRL trains it as it trains PEFT's own."""
    import torch
    import trl
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    from tests.api.conftest import TARGETS

    ours, _ = luthier.FastLanguageModel.from_pretrained(str(toy_llama_dir), load_in_4bit=False)
    ours = luthier.FastLanguageModel.get_peft_model(ours, r=4, lora_alpha=8, random_state=7)
    plain = AutoModelForCausalLM.from_pretrained(toy_llama_dir, dtype=torch.float32)
    peft = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    set_peft_model_state_dict(peft, get_peft_model_state_dict(ours))
    found = []
    for name, model in (("ours", ours), ("peft", peft)):
        trainer = trl.SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list([as_text(row) for row in rows]),
            args=trl.SFTConfig(output_dir=str(tmp_path / name), **{**COMMON, **QUIET, "max_steps": 6}),
        )
        trainer.train()
        found.append(losses(trainer))
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    assert found[0][-1] < found[0][0]
