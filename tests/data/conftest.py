"""Toy tokenizers with templates of one's choice, and seeded random conversations."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from luthier.config import Config, DatasetEntry

Message = dict[str, Any]

_WORDS = [
    "hello",
    "the",
    "answer",
    "is",
    "42",
    "naïve",
    "日本",
    "🚀🚀",
    "\n",
    "\n\n",
    "code()",
    "'x'",
    '"y"',
    "###",
]
_WORDS += ["user", "assistant", "Response:", "{a}", "<b>"]
_CONTROL = re.compile(
    r"<[|｜][^\s<>{}'\"+]*?[|｜]>|</?s>|<(?:start|end)_of_turn>|<\|?turn\|?>|<end_of_utterance>"
)


@pytest.fixture(scope="session")
def tokenizer_with(toy_tokenizer: Any) -> Callable[..., Any]:
    """Makes a byte-level tokenizer whose special tokens are those in a template's text, or named."""
    from transformers import PreTrainedTokenizerFast

    source = toy_tokenizer.backend_tokenizer.to_str()

    def make(template: str | None = None, tokens: tuple[str, ...] = (), bos: str | None = "<bos>") -> Any:
        from tokenizers import Tokenizer

        control = sorted({*_CONTROL.findall(template or ""), *tokens})
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(source),
            bos_token=bos,
            eos_token="</s>",
            additional_special_tokens=control,
            clean_up_tokenization_spaces=False,
        )
        # As Qwen3 has them: whole tokens that are not special, since the model may write and read them as text.
        tokenizer.add_tokens(sorted(set(re.findall("</?(?:think|tool_call)>", template or ""))))
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def trl_templates() -> dict[str, str]:
    """Templates of real families, as TRL ships them; the names with `_training` carry generation marks."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}


@pytest.fixture(scope="session")
def chat_config() -> Callable[..., tuple[Config, DatasetEntry]]:
    """A config with one dataset of conversations; keywords that an entry has go there."""

    def make(entry: dict[str, Any] | None = None, **flat: Any) -> tuple[Config, DatasetEntry]:
        dataset = {"path": "rows.jsonl", "type": "chat_template", **(entry or {})}
        config = Config.from_flat({"base_model": "toy", "datasets": [dataset], **flat})
        return config, config.data.datasets[0]

    return make


@pytest.fixture(scope="session")
def random_chats() -> Callable[..., Iterator[list[Message]]]:
    """Conversations of one to four questions and answers, a third of them odd: empty, or with spaces at their ends."""

    def text(draw: random.Random, odd: bool) -> str:
        count = draw.choice([0, 1, 1, 3, 8]) if odd else draw.randint(1, 8)
        words = [draw.choice(_WORDS) for _ in range(count)]
        said = " ".join(words)
        if not odd:
            return f"w{said.strip()}w"
        return draw.choice(["", " ", "\n"]) * (draw.random() < 0.3) + said + draw.choice(["", " ", "\n\n"])

    def make(seed: int, count: int, *, odd: bool = True, system: bool = True) -> Iterator[list[Message]]:
        draw = random.Random(seed)
        for _ in range(count):
            messages: list[Message] = []
            if system and draw.random() < 0.4:
                messages.append({"role": "system", "content": text(draw, False)})
            for _ in range(draw.randint(1, 4)):
                messages.append({"role": "user", "content": text(draw, odd)})
                messages.append({"role": "assistant", "content": text(draw, odd)})
            yield messages

    return make
