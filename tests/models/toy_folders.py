"""Toy models and adapters on disk, for what opens them by their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.models.families import toy_model


def base_folder(folder: Path, family: str, tokenizer: Any) -> Path:
    model = toy_model(family, vocab_size=len(tokenizer), eos_token_id=None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapter_folder(folder: Path, base: Path, seed: int, **settings: Any) -> Path:
    """What PEFT writes, with a B that is not 0."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder
