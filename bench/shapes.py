"""The models that are trained: real shapes with random weights, made once, so that nothing is downloaded.

    python -m bench.shapes SHAPE FOLDER        makes a model folder with weights and a tokenizer

The tokenizer is a real one, trained on the rows themselves: their lengths in tokens are then as with a model's
own tokenizer. A vocabulary larger than what such text can fill has rows that no token uses, as real ones do.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from bench.rows import all_rows

END, PAD = "<|endoftext|>", "<|pad|>"
LARGEST_TOKENIZER = 32_000
ROWS_FOR_TOKENIZER = 20_000


@dataclass(frozen=True)
class Shape:
    """A decoder's shape; `family` is a transformers model type, `stored` the dtype of its files."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 8192
    rope_theta: float = 100_000.0
    tie_word_embeddings: bool = True
    stored: str = "float32"

    def linears(self) -> list[tuple[str, int, int]]:
        """Name, inputs and outputs of a layer's linear maps."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        return [
            ("q_proj", hidden, queries),
            ("k_proj", hidden, keys),
            ("v_proj", hidden, keys),
            ("o_proj", queries, hidden),
            ("gate_proj", hidden, inner),
            ("up_proj", hidden, inner),
            ("down_proj", inner, hidden),
        ]

    def multiplied_parameters(self) -> int:
        """Parameters that every token is multiplied with: all linear maps and the head, no embedding."""
        layer = sum(inputs * outputs for _, inputs, outputs in self.linears())
        return self.num_hidden_layers * layer + self.vocab_size * self.hidden_size


SHAPES = {
    # Two layers, for the benchmark's own tests.
    "micro": Shape("llama", 512, 64, 128, 2, 4, 2, 16),
    # 9M parameters: where Python and memory traffic weigh as much as the multiplies.
    "tiny": Shape("llama", 8192, 256, 768, 8, 4, 4, 64),
    # SmolLM2-135M's.
    "135m": Shape("llama", 49_152, 576, 1536, 30, 9, 3, 64),
    # Qwen3-0.6B's, with the large vocabulary of its family, in bf16 as it is published; everybody computes in fp32.
    "0.6b-vocab": Shape(
        "qwen3", 151_936, 1024, 3072, 28, 16, 8, 128, rope_theta=1_000_000.0, stored="bfloat16"
    ),
}


def build(shape: Shape, folder: Path, seed: int = 0) -> None:
    """Write the model folder: config, random weights, tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = build_tokenizer(min(shape.vocab_size, LARGEST_TOKENIZER))
    values: dict[str, Any] = asdict(shape)
    stored = getattr(torch, values.pop("stored"))
    config = AutoConfig.for_model(
        values.pop("family"),
        **values,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=None,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(stored)
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.rename(partial, folder)


def build_tokenizer(size: int) -> Any:
    """Byte-level BPE of at most `size` entries, with an end and a padding token and no beginning."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (row["text"] for row in islice(all_rows(), min(ROWS_FOR_TOKENIZER, 4 * size)))
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )


if __name__ == "__main__":
    build(SHAPES[sys.argv[1]], Path(sys.argv[2]))
