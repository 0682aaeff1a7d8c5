"""TRL's preference trainers with PEFT on a toy model, as a measure for runs of our own: the same adapter at the start,
the same rows in the same order, the same optimizer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

Row = dict[str, Any]

BATCH, STEPS, RATE = 4, 20, 2e-3


@dataclass(frozen=True)
class TrlRun:
    """What a trainer did: the loss of each step, all that it logged with it, its evaluation of held-out rows at the end
    (`eval_` in front), and the adapter in PEFT's format."""

    losses: list[float]
    rows: list[dict[str, float]]
    evaluation: dict[str, float]
    adapter: dict[str, torch.Tensor]


def pairs(count: int = BATCH * STEPS) -> list[Row]:
    """Prompts of very different lengths, answers too; some answers begin alike, some prompts occur twice."""
    draw = random.Random(0)
    rows = []
    for n in range(count):
        topic = n - n % 3 % 2  # every third row asks what the one before it asked
        words = " ".join(str(topic * k % 97) for k in range(1 + topic * 7 % 20))
        rows.append(
            {
                "prompt": f"Add {topic} and {topic + 1}, and leave alone {words}.\n",
                "chosen": f"The sum is {2 * topic + 1}{'!' * draw.randrange(4)}",
                "rejected": f"The sum is unknown {'to me ' * draw.randrange(5)}" if n % 2 else f"No, {n}",
            }
        )
    return rows


def unpaired(count: int = BATCH * STEPS) -> list[Row]:
    """Answers with labels; most batches have both kinds, the third and the sixth one kind alone."""
    draw = random.Random(1)
    rows = []
    for n, row in enumerate(pairs(count)):
        good = {2: True, 5: False}.get(n // BATCH, draw.random() < 0.5)
        rows.append({"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good})
    return rows


def write_adapter(base_model: Path, folder: Path) -> None:
    """A LoRA of rank 4 whose A and B are both far from zero."""
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=modules, init_lora_weights=False)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.08)
    model.save_pretrained(folder)


def trl_run(
    method: str,
    base_model: Path,
    adapter: Path,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    folder: Path,
    **options: Any,
) -> TrlRun:
    """Train `dpo`, `kto`, `orpo` or `simpo` with TRL: a batch a step, AdamW with no decay at a constant rate.

    Args:
        options: what the method's config of TRL takes further, `beta` for one.
    """
    trainer_class, config_class, own = _trainer(method)
    args = config_class(
        output_dir=str(folder), max_steps=len(rows) // BATCH, learning_rate=RATE,
        per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH,
        lr_scheduler_type="constant", optim="adamw_torch", weight_decay=0.0, max_grad_norm=1.0, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=512,
        train_sampling_strategy="sequential", disable_tqdm=True, **own, **options,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    trainer = trainer_class(
        model=PeftModel.from_pretrained(base, adapter, is_trainable=True),
        args=args,
        processing_class=AutoTokenizer.from_pretrained(base_model),
        train_dataset=datasets.Dataset.from_list(list(rows)),
        eval_dataset=datasets.Dataset.from_list(list(held_out)),
    )
    trainer.train()
    trainer.evaluate()
    evaluation = trainer.state.log_history[-1]
    logged = [row for row in trainer.state.log_history if "loss" in row]
    state = get_peft_model_state_dict(trainer.model, adapter_name="default")
    tensors = {name: tensor.detach().clone() for name, tensor in state.items()}
    return TrlRun([row["loss"] for row in logged], logged, evaluation, tensors)


def _trainer(method: str) -> tuple[Any, Any, dict[str, Any]]:
    if method == "dpo":
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer, DPOConfig, {}
    if method == "kto":
        from trl import KTOConfig, KTOTrainer

        return KTOTrainer, KTOConfig, {}
    if method == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer, ORPOConfig, {}
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return CPOTrainer, CPOConfig, {"loss_type": "simpo"}
