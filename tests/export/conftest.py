"""Base models on disk in several files, and PEFT's adapters for them with every matrix away from its start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.models.families import toy_model

IDS = torch.randint(3, 120, (1, 23), generator=torch.Generator().manual_seed(3))
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "mixtral": ["q_proj", "o_proj"],
    "phi3": ["qkv_proj", "gate_up_proj", "down_proj"],
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def loaded(folder: Path) -> PreTrainedModel:
    """As transformers loads it, in fp32; every weight must be there and have its place."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def randomise(model: torch.nn.Module, seed: int, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(family, **config changes) -> a folder with a model in files of at most 20 kB; made once."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", seed: int = 0, **changes: Any) -> Path:
        name = f"{family}-{seed}-{changes}"
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"base-{family}")
            toy_model(family, seed, **changes).save_pretrained(made[name], max_shard_size="20kB")
        return made[name]

    return make


@pytest.fixture
def peft_adapter(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """(base folder, **LoraConfig) -> PEFT's model in fp32, and the folder of its adapter."""
    made = 0

    def make(base: Path, *, seed: int = 5, **values: Any) -> tuple[Any, Path]:
        nonlocal made
        made += 1
        model = loaded(base)
        targets = TARGETS.get(model.config.model_type, ["q_proj", "v_proj", "o_proj", "down_proj"])
        settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, **values}
        if model.config.model_type == "gpt2":
            settings["fan_in_fan_out"] = True
        torch.manual_seed(seed)
        theirs = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        randomise(theirs, seed)
        folder = tmp_path / f"adapter-{made}"
        theirs.save_pretrained(folder)
        return theirs.eval(), folder

    return make
