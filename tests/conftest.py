"""What many tests share: a real toy tokenizer, a toy model folder, and the public data beside the checkout.

Everything here is small enough to be made anew in each session, in well under a second.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Before anything imports torch: see `luthier/__init__.py`. No test may reach the hub.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

TOY_TEXT = [
    "Below is an instruction that describes a task. Write a response that completes the request.",
    "### Instruction:\nContinue the sequence.\n\n### Input:\n1, 1, 2, 3, 5\n\n### Response:\n8, 13, 21",
    "The quick brown fox jumps over the lazy dog; the five boxing wizards jump quickly.",
    "user assistant system tool: What is the capital of France? The capital of France is Paris.",
    "def add(a, b):\n    return a + b\n",
    "日本語の文章と中文的句子 \U0001f600 \U0001f680 naïve café",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 100 1000",
]

TOY_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def pytest_configure() -> None:
    """Triton's kernels run in its interpreter where there is no GPU; triton asks when it is first imported,
    which transformers' models do."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs an accelerator where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator, and torch sees none"))


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test out of the user's caches and away from inherited settings."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "luthier-cache"))


@pytest.fixture(scope="session")
def toy_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 500 entries: any text round-trips; ChatML template; eos is
    `<|im_end|>`'s neighbour `<|endoftext|>`, so that the end of a document and the end of a turn are
    different tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TOY_TEXT * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=TOY_CHATML,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


@pytest.fixture(scope="session")
def toy_llama_dir(toy_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer random Llama (grouped queries, about 100k parameters) and the toy
    tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(toy_tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            eos_token_id=toy_tokenizer.eos_token_id,
            pad_token_id=toy_tokenizer.pad_token_id,
            bos_token_id=None,
            tie_word_embeddings=False,
        )
    )
    torch.random.set_rng_state(state)
    folder = tmp_path_factory.mktemp("toy-llama")
    model.save_pretrained(folder)
    toy_tokenizer.save_pretrained(folder)
    return folder


def _shared(name: str) -> Path:
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"needs the public data file {path}, which is kept beside the checkout and is not there")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data; `shared_data / NAME`."""
    return _shared("")


@pytest.fixture(scope="session")
def alpaca_path() -> Path:
    """Alpaca's 52,002 rows."""
    return _shared("alpaca_52k.jsonl")


@pytest.fixture(scope="session")
def gsm8k_train_path() -> Path:
    """GSM8K's training rows: question, answer."""
    return _shared("gsm8k_train.jsonl")


@pytest.fixture(scope="session")
def gsm8k_test_path() -> Path:
    """GSM8K's test rows: question, answer."""
    return _shared("gsm8k_test.jsonl")
