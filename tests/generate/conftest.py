"""Toy models of several families, and a tokenizer whose tokens are bytes, so that characters get split."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<|end|>"]
SMALL = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,  # large, so that the next token is never a near tie and answers differ
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# family -> (config class, values over SMALL)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral-sliding": ("MistralConfig", {"sliding_window": 8}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    # The angles change at the 25th token: within some answers, and between the lengths of the prompts.
    "phi3-longrope": (
        "Phi3Config",
        {
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [3.0] * 4,
            },
        },
    ),
    "gpt2": ("GPT2Config", {}),
    "bloom": ("BloomConfig", {}),
    "falcon_h1": (
        "FalconH1Config",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    ),
}


def build(family: str, **changes: Any) -> Any:
    """A model with random weights, in eval mode."""
    name, values = FAMILIES[family]
    config = getattr(transformers, name)(**(SMALL | values | changes))
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session")
def toy_model() -> Callable[..., Any]:
    return build


@pytest.fixture(scope="session", params=FAMILIES)
def any_family(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte after four special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|end|>"],
    )


@pytest.fixture(scope="session")
def llama() -> Any:
    return build("llama")
