"""Toy models of every family that is exported to GGUF, with tokenizers of the kinds that those families have."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from tests.conftest import TOY_CHATML, TOY_TEXT

_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MORE_TEXT = [
    "1234567890 2026 11 21 12345 99 100 1000 10000",
    "THE END IS NIGH; we'll see, WE'LL SEE, they've said so. IT'S",
    "a  b   c    d\n\n\ne\t\tf  1   2",
    "éàü çñ ÅÄÖ Привет мир שלום",
]

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 512, "factor": 2.0,
            "short_factor": [1.0, 1.1, 1.3, 1.5, 2.0, 2.5, 3.0, 4.0],
            "long_factor": [2.0, 2.2, 2.6, 3.0, 4.0, 5.0, 6.0, 8.0]}  # fmt: skip
BY_KIND = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

# name -> (model_type, tokenizer, config)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama3": ("llama", "llama3", {"rope_parameters": LLAMA3}),
    "llama-linear-biases": (
        "llama",
        "gpt2",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "smollm": ("llama", "smollm", {"tie_word_embeddings": True}),
    "mistral": ("mistral", "sentencepiece", {"sliding_window": None}),
    "smollm3": ("smollm3", "llama3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
    "qwen2": ("qwen2", "qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", "qwen2", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma": ("gemma", "gemma", {}),
    "gemma2": (
        "gemma2",
        "gemma",
        {
            "sliding_window": 6,
            "query_pre_attn_scalar": 16,
            "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": 10.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        "gemma",
        {"sliding_window": 6, "query_pre_attn_scalar": 16, "num_hidden_layers": 6, "rope_parameters": BY_KIND},
    ),
    "phi3": ("phi3", "sentencepiece", {"sliding_window": None}),
    "phi3-long": (
        "phi3",
        "sentencepiece",
        {"sliding_window": None, "rope_parameters": LONGROPE, "original_max_position_embeddings": 512},
    ),
}

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}


def _byte_level(cuts: list[Any], *, normalizer: Any = None, whole_words: bool = False) -> Tokenizer:
    core = Tokenizer(models.BPE(ignore_merges=whole_words))
    core.normalizer = normalizer
    core.pre_tokenizer = pre_tokenizers.Sequence(cuts) if len(cuts) > 1 else cuts[0]
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|begin|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*TOY_TEXT, *MORE_TEXT] * 3, trainer)
    return core


def _split(expression: str) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(expression), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


@cache
def _sentencepiece() -> bytes:
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TOY_TEXT, *MORE_TEXT] * 10),
        model_writer=out,
        vocab_size=480,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        bos_id=1,
        eos_id=2,
        unk_id=0,
        minloglevel=2,
        num_threads=1,
    )
    return out.getvalue()


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerBase:
    """As such families come: gpt2, llama3, qwen2, smollm (byte-level), sentencepiece, gemma."""
    import tempfile

    if kind in ("sentencepiece", "gemma"):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "tokenizer.model").write_bytes(_sentencepiece())
            name = "LlamaTokenizer" if kind == "sentencepiece" else "GemmaTokenizer"
            settings = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            settings |= {"pad_token": "</s>"} if kind == "sentencepiece" else {}
            (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings))
            found = AutoTokenizer.from_pretrained(folder)
        found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        found.chat_template = TOY_CHATML
        return found
    cuts = {
        "gpt2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "llama3": _split(_CASELESS + r"\p{N}{1,3}" + _TAIL),
        "qwen2": _split(_CASELESS + r"\p{N}" + _TAIL),
    }[kind]
    core = _byte_level(
        cuts, normalizer=normalizers.NFC() if kind == "qwen2" else None, whole_words=kind == "llama3"
    )
    if kind == "llama3":
        core.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", core.token_to_id("<|begin|>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|begin|>" if kind == "llama3" else None,
        eos_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=TOY_CHATML,
        clean_up_tokenization_spaces=False,
    )


def save_model(name: str, folder: Path, **changes: Any) -> Path:
    """A model of `MODELS` with random weights in fp32, its embeddings with rows for no token, and its tokenizer."""
    family, kind, settings = MODELS[name]
    words = tokenizer(kind)
    values = {
        **COMMON,
        "vocab_size": len(words) + 5,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        **settings,
        **changes,
    }
    if family.startswith("gemma"):
        values["tie_word_embeddings"] = True
    config = AutoConfig.for_model(family, **values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            # Norms too, which some families store less one.
            parameter.normal_(0.3 if "norm" in path else 0.0, 0.15)
    model.save_pretrained(folder, max_shard_size="50kB")
    words.save_pretrained(folder)
    return folder
