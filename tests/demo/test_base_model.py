"""The shipped base model: it loads offline, knows its little world, and has a template that renders."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.demo import base_model

FOLDER = Path(str(resources.files("luthier.demo") / "base_model"))
MOST_BYTES = 8 * 2**20


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_it_is_a_llama_of_a_few_megabytes_with_tied_embeddings(model: LlamaForCausalLM):
    assert type(model) is LlamaForCausalLM
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < MOST_BYTES
    assert (FOLDER / "README.md").is_file()


def test_fresh_text_is_far_from_a_riddle_to_it(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast):
    assert base_model.perplexity(model, tokenizer, rows=16) < 10 < len(tokenizer) / 50


def test_the_tokenizer_takes_any_text_and_gives_each_digit_a_token(tokenizer: PreTrainedTokenizerFast):
    for text in ("144, 233", "naïve café 日本 \U0001f600", "### Response:\nfoxes"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("2584")["input_ids"]) == ["2", "5", "8", "4"]
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]


def test_the_shipped_tokenizer_is_the_scripts(tokenizer: PreTrainedTokenizerFast):
    made = base_model.train_tokenizer()
    assert made.get_vocab() == tokenizer.get_vocab()
    assert made.chat_template == tokenizer.chat_template


def test_the_chat_template_renders_and_marks_what_the_assistant_says(tokenizer: PreTrainedTokenizerFast):
    messages = [{"role": "user", "content": "one cat"}, {"role": "assistant", "content": "two cats"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|start|>user\none cat<|end|>\n<|start|>assistant\ntwo cats<|end|>\n"
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, on in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(said) == "two cats<|end|>"
    opening = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert opening.endswith("<|start|>assistant\n")


def test_the_learning_rate_warms_up_holds_and_comes_down():
    steps = 1000
    rates = [base_model.learning_rate(step, steps) for step in range(steps)]
    assert rates[0] < base_model.PEAK_LEARNING_RATE / 10
    assert max(rates) == rates[steps // 2] == base_model.PEAK_LEARNING_RATE
    assert 0 < rates[-1] < base_model.PEAK_LEARNING_RATE / 100


def test_training_goes_on_from_its_checkpoint_as_if_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
):
    monkeypatch.setattr(base_model, "train_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(base_model, "SEQUENCE_LENGTH", 16)
    weights = {}
    for name in ("once", "twice"):
        monkeypatch.setattr(
            base_model, "save", lambda model, *rest, name=name: weights.update({name: model.state_dict()})
        )
        if name == "twice":
            with monkeypatch.context() as patch:
                patch.setattr(base_model, "_steps", _interrupted_after(2, base_model._steps))
                with pytest.raises(KeyboardInterrupt):
                    base_model.pretrain(tmp_path / name, 4, tmp_path / f"{name}.pt", 2)
            assert name not in weights
        base_model.pretrain(tmp_path / name, 4, tmp_path / f"{name}.pt", 2)
    assert all(torch.equal(weights["once"][key], weights["twice"][key]) for key in weights["once"])


def _interrupted_after(count: int, steps):
    """The same steps, stopped before the one after `count`."""

    def some(*arguments):
        for number, result in enumerate(steps(*arguments)):
            if number == count:
                raise KeyboardInterrupt
            yield result

    return some
