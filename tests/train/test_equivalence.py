"""Runs that must be the same run: however a step is cut, packed, recomputed; and TRL's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.config import Config
from luthier.data.dataset import prepare
from luthier.data.tokenizer import load_tokenizer
from luthier.train.run import train
from tests.train.conftest import losses

MakeConfig = Callable[..., Config]


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 8, "gradient_accumulation_steps": 1},
        {"micro_batch_size": 1, "gradient_accumulation_steps": 8},
        {"max_tokens_per_pass": 64},
        {"gradient_checkpointing": True},
        {"attn_implementation": "eager"},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
def test_the_cut_of_a_step_changes_nothing(
    run_config: MakeConfig, tmp_path: Path, changes: dict[str, object]
) -> None:
    """Dropout included: it is seeded by document."""
    base = {"micro_batch_size": 4, "gradient_accumulation_steps": 2, "lora_dropout": 0.2, "seed": 7}
    train(run_config(**base, output_dir=str(tmp_path / "a")))
    train(run_config(**{**base, **changes}, output_dir=str(tmp_path / "b")))
    one, other = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert len(one) == 6
    np.testing.assert_allclose(one, other, atol=2e-6)


def test_dropout_does_something_and_the_seed_decides(run_config: MakeConfig, tmp_path: Path) -> None:
    for name, values in {"none": {}, "some": {"lora_dropout": 0.5}}.items():
        train(run_config(**values, output_dir=str(tmp_path / name)))
    assert not np.allclose(losses(tmp_path / "none")[2:], losses(tmp_path / "some")[2:], atol=1e-5)


def test_full_fine_tuning_is_cut_invariant_too(run_config: MakeConfig, tmp_path: Path) -> None:
    values = {"adapter": None, "lora_r": None, "learning_rate": 1e-3}
    train(run_config(**values, output_dir=str(tmp_path / "a")))
    train(
        run_config(
            **values, micro_batch_size=1, gradient_accumulation_steps=4, output_dir=str(tmp_path / "b")
        )
    )
    np.testing.assert_allclose(losses(tmp_path / "a"), losses(tmp_path / "b"), atol=2e-6)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert not torch.equal(
        again.lm_head.weight,
        AutoModelForCausalLM.from_pretrained(run_config().model.base_model).lm_head.weight,
    )


@pytest.mark.parametrize("accumulation", [1, 4])
def test_twenty_steps_equal_trl(run_config: MakeConfig, tmp_path: Path, accumulation: int) -> None:
    """TRL's SFTTrainer with PEFT, from our initial adapter and in our order of data: each loss within 1e-4."""
    import datasets
    from peft import PeftModel
    from trl import SFTConfig, SFTTrainer

    config = run_config(
        max_steps=20,
        learning_rate=2e-3,
        micro_batch_size=4,
        gradient_accumulation_steps=accumulation,
        shuffle=False,
        lr_scheduler="linear",
        warmup_steps=3,
        weight_decay=0.1,
        num_epochs=10,
        save_steps=20,
    )
    begin = run_config(max_steps=1, learning_rate=1e-30, output_dir=str(tmp_path / "begin"))
    train(begin)  # an adapter at its start: a step this small changes no bit of A, and leaves B at zero
    train(config)

    tokenizer = load_tokenizer(config)
    data = prepare(config, tokenizer).train
    rows = [
        {
            "input_ids": data[i].input_ids.tolist(),
            "completion_mask": (data[i].labels >= 0).astype(int).tolist(),
        }
        for i in range(len(data))
    ]
    base = AutoModelForCausalLM.from_pretrained(config.model.base_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "begin", is_trainable=True)
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(config.model.base_model),
        train_dataset=datasets.Dataset.from_list(rows),
        args=SFTConfig(
            output_dir=str(tmp_path / "trl"),
            max_steps=20,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=accumulation,
            learning_rate=2e-3,
            lr_scheduler_type="linear",
            warmup_steps=3,
            weight_decay=0.1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            train_sampling_strategy="sequential",
            completion_only_loss=True,
            max_length=None,
            disable_tqdm=True,
            gradient_checkpointing=False,
        ),
    )
    trainer.train()
    theirs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    ours = losses(config.output.output_dir)
    assert len(ours) == len(theirs) == 20
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert ours[-1] < ours[0]
