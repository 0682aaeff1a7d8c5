"""A toy model for notebooks, and what TRL's own trainers make of the same notebook."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.api import said

Row = dict[str, Any]

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 20

# Both sides take the rows in their order, so that the steps are the same ones.
COMMON: dict[str, Any] = dict(
    max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=2e-3,
    lr_scheduler_type="linear", warmup_steps=3, weight_decay=0.1, optim="adamw_torch", logging_steps=1,
    save_strategy="no", report_to="none", use_cpu=True, bf16=False, seed=7, train_sampling_strategy="sequential",
    disable_tqdm=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _says_everything_anew() -> None:
    said.forget()


@pytest.fixture
def rows() -> list[Row]:
    """Questions of very different lengths, with an input, a text and an answer."""
    found = []
    for n in range(80):
        words = " ".join(str(n * k % 97) for k in range(1 + n * 7 % 20))
        question = {"instruction": f"Add {n} and {n + 1}.", "input": words if n % 3 else ""}
        found.append({**question, "output": f"{2 * n + 1}"})
    return found


@pytest.fixture
def peft_model(toy_llama_dir: Path) -> Callable[[], Any]:
    """A model from plain transformers in a PEFT wrapper, with the same adapter each time, whose B is not zero."""

    def make(**options: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        base = AutoModelForCausalLM.from_pretrained(toy_llama_dir, dtype=torch.float32)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
        model = get_peft_model(base, LoraConfig(**settings))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        return model

    return make


@pytest.fixture
def tokenizer(toy_llama_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(toy_llama_dir)


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]
