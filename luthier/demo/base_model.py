"""Makes the demo's base model: a small Llama, trained from scratch on the text of `corpus`.

    python -m luthier.demo.base_model --out luthier/demo/base_model

Everything is seeded: the tokenizer, the initial weights, the stream of text. One pass over fresh documents,
packed into rows of 128 tokens; AdamW; the learning rate is warmed up, held, and brought down to nothing over
the last two fifths of the steps (so a run can be extended from its checkpoint without having been planned longer).
The result is a folder that `AutoModelForCausalLM` and `AutoTokenizer` open, with a model card.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.demo import words
from luthier.demo.corpus import documents

SEQUENCE_LENGTH = 128
ROWS_PER_STEP = 8
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 60
DECAY_SHARE = 0.4
DEFAULT_STEPS = 1800
SEED = 20261
HELD_OUT_SEED = SEED + 1
END, START, PAD = "<|end|>", "<|start|>", "<|pad|>"

_HEADINGS = (
    "Below",
    " instruction",
    " Instruction",
    " Input",
    " Response",
    " Write",
    "Write",
    "Which",
    "What",
)

# One pre-token per digit, and words with the space before them, as in GPT-2; punctuation stays apart from words, so
# that a word behind a colon is the same token as at the beginning of an answer.
_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(vocab_size: int = 1400, document_count: int = 30_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer made from the first documents of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, START, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Words that begin a line stand without a space, which is rare in prose and common in answers: said often
    # enough here to become single tokens too, like the headings of the usual instruction templates.
    tables = (words.PLURALS, words.OPPOSITES, words.YOUNG, words.KINDS)
    known = sorted(
        {word for table in tables for word in (*table, *table.values())} | {*words.DAYS, *words.MONTHS}
    )
    texts = documents(SEED, 0, document_count) + [*known, *(f" {word}" for word in known), *_HEADINGS] * 200
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=_CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model: four Llama layers with tied embeddings."""
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=160,
            intermediate_size=448,
            num_hidden_layers=4,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@dataclass
class TextStream:
    """Rows of token ids cut from the endless corpus, and where in it they end."""

    tokenizer: PreTrainedTokenizerFast
    seed: int
    next_document: int = 0
    left_over: tuple[int, ...] = ()

    def rows(self, count: int) -> torch.Tensor:
        """The next rows, shape (count, SEQUENCE_LENGTH + 1): each row's labels are its ids moved by one."""
        need = count * (SEQUENCE_LENGTH + 1)
        ids = list(self.left_over)
        while len(ids) < need:
            texts = documents(self.seed, self.next_document, 64)
            self.next_document += 64
            for document_ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]:
                ids += [*document_ids, self.tokenizer.eos_token_id]
        self.left_over = tuple(ids[need:])
        return torch.tensor(ids[:need]).view(count, -1)


def row_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over all positions of `rows`, shape (rows, length + 1)."""
    input_ids = rows[:, :-1]
    # A document sees only itself, as it will be alone when the model is used.
    ends = torch.eq(input_ids, torch.tensor(model.config.eos_token_id)).long()
    document = ends.cumsum(1) - ends
    same = document[:, :, None] == document[:, None, :]
    mask = (same & torch.ones(same.shape[1:], dtype=torch.bool).tril())[:, None]
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: int = 96) -> float:
    """Perplexity per token on documents of a stream that the model was not trained on."""
    stream = TextStream(tokenizer, HELD_OUT_SEED)
    losses = [row_loss(model, stream.rows(8)).item() for _ in range(rows // 8)]
    return math.exp(sum(losses) / len(losses))


def learning_rate(step: int, steps: int) -> float:
    """Warm up, hold, then straight down to zero over the last `DECAY_SHARE` of the steps."""
    decay = max(1, round(steps * DECAY_SHARE))
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / decay)


def _optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def pretrain(out: Path, steps: int, checkpoint: Path, checkpoint_every: int) -> None:
    """Trains to step `steps`, from `checkpoint` on where that file exists, and saves the model to `out`."""
    tokenizer = train_tokenizer()
    model = new_model(tokenizer)
    optimizer = _optimizer(model)
    stream = TextStream(tokenizer, SEED)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, stream.next_document = state["step"], state["next_document"]
        stream.left_over = tuple(state["left_over"])
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    for step, (loss, seconds) in enumerate(_steps(model, optimizer, stream, first, steps), start=first + 1):
        if step % 100 == 0 or step == steps:
            speed = ROWS_PER_STEP * SEQUENCE_LENGTH / seconds
            print(f"step {step}/{steps}  loss {loss:.4f}  {speed:.0f} tokens/s", flush=True)
        if step % checkpoint_every == 0:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "next_document": stream.next_document,
                "left_over": list(stream.left_over),
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    save(model, tokenizer, out, steps)


def _steps(
    model: LlamaForCausalLM, optimizer: torch.optim.AdamW, stream: TextStream, first: int, steps: int
) -> Iterator[tuple[float, float]]:
    for step in range(first, steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = row_loss(model, stream.rows(ROWS_PER_STEP))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item(), time.perf_counter() - began


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, steps: int) -> None:
    """Writes model (16 bit), tokenizer and model card, which gives the perplexity of the saved weights."""
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    stored = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    value = perplexity(stored, tokenizer)
    print(f"held-out perplexity {value:.3f}; saved to {out}", flush=True)
    (out / "README.md").write_text(_card(stored, steps, value), encoding="utf-8")


def _card(model: LlamaForCausalLM, steps: int, held_out: float) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    tokens = steps * ROWS_PER_STEP * SEQUENCE_LENGTH
    config = model.config
    shape = (
        f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
        f"{config.num_attention_heads} heads, tied embeddings"
    )
    return f"""---
license: apache-2.0
language: en
library_name: transformers
---

# Luthier's demo base model

A language model small enough to be part of a Python package: {parameters:,} parameters, Llama architecture
({shape}), {config.vocab_size:,} tokens
of byte-level BPE, with every digit a token of its own. Weights are stored in 16 bit (fp16).

It was trained from scratch on {tokens:,} tokens of text that the package's own scripts write (`corpus.py`,
`talks.py`): little stories, sequences of numbers, plurals, opposites, animals and their young, kinds of things,
days and months, told in sentences, talks and entries of a dictionary. No other text was used. Held-out
perplexity, on documents of the same kinds that it was not trained on: **{held_out:.2f}** per token
({config.vocab_size:,} would be guessing).

It continues prose and talks. It has seen no instructions: asked in an instruction template, it goes on with
more text and does not stop. Teaching it that is what `luthier demo` does. It knows nothing beyond its little
world, and is of no use outside of demonstrations and tests.

Made by

    python -m luthier.demo.base_model --out luthier/demo/base_model --steps {steps}

on one CPU core. The chat template is a plain one (`<|start|>role`, newline, text, `<|end|>`), with
`{{% generation %}}` marks around the assistant's turns; `<|end|>` also ends every document.
"""


def _main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's base model from scratch.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help=f"default: {DEFAULT_STEPS}")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("base-model-training.pt"), help="gone on from if it is there"
    )
    parser.add_argument("--checkpoint-every", type=int, default=250, help="steps (default: 250)")
    arguments = parser.parse_args()
    pretrain(arguments.out, arguments.steps, arguments.checkpoint, arguments.checkpoint_every)


if __name__ == "__main__":
    _main()
