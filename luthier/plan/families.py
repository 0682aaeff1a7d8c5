"""Published sizes of a few families, for the question which of them a set of cards can train. Shapes only."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from luthier.errors import ConfigError

_Sizes = dict[str, tuple[int, ...]]

# hidden, MLP, layers, heads, key heads, head, vocabulary, tied (1 or 0)
_TABLES: dict[str, tuple[str, int, _Sizes]] = {
    "llama-2": (
        "llama",
        4096,
        {
            "7B": (4096, 11008, 32, 32, 32, 128, 32000, 0),
            "13B": (5120, 13824, 40, 40, 40, 128, 32000, 0),
            "70B": (8192, 28672, 80, 64, 8, 128, 32000, 0),
        },
    ),
    "llama-3": (
        "llama",
        131072,
        {
            "1B": (2048, 8192, 16, 32, 8, 64, 128256, 1),
            "3B": (3072, 8192, 28, 24, 8, 128, 128256, 1),
            "8B": (4096, 14336, 32, 32, 8, 128, 128256, 0),
            "70B": (8192, 28672, 80, 64, 8, 128, 128256, 0),
            "405B": (16384, 53248, 126, 128, 8, 128, 128256, 0),
        },
    ),
    "qwen2.5": (
        "qwen2",
        32768,
        {
            "0.5B": (896, 4864, 24, 14, 2, 64, 151936, 1),
            "1.5B": (1536, 8960, 28, 12, 2, 128, 151936, 1),
            "3B": (2048, 11008, 36, 16, 2, 128, 151936, 1),
            "7B": (3584, 18944, 28, 28, 4, 128, 152064, 0),
            "14B": (5120, 13824, 48, 40, 8, 128, 152064, 0),
            "32B": (5120, 27648, 64, 40, 8, 128, 152064, 0),
            "72B": (8192, 29568, 80, 64, 8, 128, 152064, 0),
        },
    ),
    "qwen3": (
        "qwen3",
        40960,
        {
            "0.6B": (1024, 3072, 28, 16, 8, 128, 151936, 1),
            "1.7B": (2048, 6144, 28, 16, 8, 128, 151936, 1),
            "4B": (2560, 9728, 36, 32, 8, 128, 151936, 1),
            "8B": (4096, 12288, 36, 32, 8, 128, 151936, 0),
            "14B": (5120, 17408, 40, 40, 8, 128, 151936, 0),
            "32B": (5120, 25600, 64, 64, 8, 128, 151936, 0),
        },
    ),
    "gemma-2": (
        "gemma2",
        8192,
        {
            "2B": (2304, 9216, 26, 8, 4, 256, 256000, 1),
            "9B": (3584, 14336, 42, 16, 8, 256, 256000, 1),
            "27B": (4608, 36864, 46, 32, 16, 128, 256000, 1),
        },
    ),
    "gemma-3": (
        "gemma3_text",
        131072,
        {
            "1B": (1152, 6912, 26, 4, 1, 256, 262144, 1),
            "4B": (2560, 10240, 34, 8, 4, 256, 262208, 1),
            "12B": (3840, 15360, 48, 16, 8, 256, 262208, 1),
            "27B": (5376, 21504, 62, 32, 16, 128, 262208, 1),
        },
    ),
    "mistral": (
        "mistral",
        32768,
        {
            "7B": (4096, 14336, 32, 32, 8, 128, 32768, 0),
            "12B (Nemo)": (5120, 14336, 40, 32, 8, 128, 131072, 0),
            "24B (Small)": (5120, 32768, 40, 32, 8, 128, 131072, 0),
        },
    ),
    "smollm2": (
        "llama",
        8192,
        {
            "135M": (576, 1536, 30, 9, 3, 64, 49152, 1),
            "360M": (960, 2560, 32, 15, 5, 64, 49152, 1),
            "1.7B": (2048, 8192, 24, 32, 32, 64, 49152, 1),
        },
    ),
}
FAMILIES = tuple(_TABLES)


def sizes(family: str) -> dict[str, Any]:
    """Size -> transformers config, from the smallest to the largest.

    Raises:
        ConfigError: no such family in the table.
    """
    if family not in _TABLES:
        raise ConfigError(f"--family: {family!r} is not in the table; there are {', '.join(_TABLES)}")
    model_type, positions, rows = _TABLES[family]
    return {size: _config(model_type, positions, row) for size, row in rows.items()}


def family_of(model_config: Any) -> str | None:
    """The family that a model is of, told by its type and vocabulary; None where the table has none like it."""
    text = model_config.get_text_config(decoder=True)
    for name, (model_type, _, rows) in _TABLES.items():
        if text.model_type == model_type and any(row[6] == text.vocab_size for row in rows.values()):
            return name
    return None


def _config(model_type: str, positions: int, row: tuple[int, ...]) -> Any:
    hidden, inner, layers, heads, key_heads, head, vocabulary, tied = row
    return AutoConfig.for_model(
        model_type,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head,
        vocab_size=vocabulary,
        tie_word_embeddings=bool(tied),
        max_position_embeddings=positions,
        dtype="bfloat16",
    )
