"""Toy models of many families, random weights, built from configs in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_COMMON: dict[str, Any] = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)

# Families that every promise about adapters and packing is tested on.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {},
    "gemma2": {
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 10.0,
    },
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi3": {},
    "smollm3": {"no_rope_layers": [1, 0]},
}

# Further ones with a head or an attention of their own kind.
OTHERS: dict[str, dict[str, Any]] = {
    "gemma": {},
    "granite": {
        "logits_scaling": 4.0,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
    },
    "cohere": {"logit_scale": 0.25},
    "olmo2": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "phi": {"num_key_value_heads": 4},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
}

# Families whose documents cannot share a pass, each for a reason of its own.
ALONE: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba": {"state_size": 4},
}


def toy_config(family: str) -> Any:
    extra = {**FAMILIES, **OTHERS, **ALONE}[family]
    values = {**_COMMON, **extra}
    if family in ("gpt2", "bloom", "opt", "mamba"):
        for name in ("head_dim", "num_key_value_heads", "intermediate_size"):
            values.pop(name)
    return AutoConfig.for_model(family, **values)


def toy_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """An fp32 model with weights large enough that every part of it shows in the logits."""
    config = toy_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15)
            elif "norm" not in name:
                parameter.normal_(0, 0.05)
    return model
