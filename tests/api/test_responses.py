"""Unsloth's helpers: which tokens train after `train_on_responses_only`, and templates by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.data.dataset import TokenDataset, documents_of
from luthier.data.tokenizer import load_tokenizer
from luthier.errors import ConfigError, DataError
from tests.api.conftest import COMMON

ASK, REPLY = "### Question:\n", "### Answer:\n"


@pytest.fixture
def sft(peft_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def make(train_dataset: Any, **options: Any) -> Any:
        args = luthier.SFTConfig(**{**COMMON, "max_steps": 2, "output_dir": str(tmp_path / "run"), **options})
        return luthier.SFTTrainer(
            model=peft_model(), args=args, processing_class=tokenizer, train_dataset=train_dataset,
            eval_dataset=list(train_dataset)[:1],
        )  # fmt: skip

    return make


def trained(trainer: Any) -> list[str]:
    """What is trained of each row, as the run will read it."""
    given = trainer.output_dir / "given"
    trainer._rows.write(given / "train.jsonl", must_be_same=False)
    trainer._save_tokenizer(given / "tokenizer")
    tokenizer = load_tokenizer(trainer.config)
    store, _, _ = documents_of(trainer.config.data.datasets, trainer.config, tokenizer)
    documents = TokenDataset(store)
    labels = [documents[index].labels.tolist() for index in range(len(documents))]
    return [str(tokenizer.decode([label for label in own if label != -100])) for own in labels]


def test_answers_in_finished_text(sft: Callable[..., Any], tokenizer: Any) -> None:
    eos = tokenizer.eos_token
    texts = [
        f"{ASK}One?\n{REPLY}First.\n{ASK}Two?\n{REPLY}Second.{eos}",
        f"Before.\n{ASK}Three?\n{REPLY}Third.",
    ]
    whole = trained(sft([{"text": text} for text in texts]))
    assert "Question" in whole[0]
    trainer = sft([{"text": text} for text in texts])
    assert luthier.train_on_responses_only(trainer, instruction_part=ASK, response_part=REPLY) is trainer
    assert trained(trainer) == [f"First.\nSecond.{eos}", f"Third.{eos}"]
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.train().global_step == 2


def test_answers_in_conversations(sft: Callable[..., Any]) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]}]
    assert "Hi" in trained(sft(rows))[0]
    trainer = luthier.train_on_responses_only(sft(rows), instruction_part="x", response_part="y")
    (answer,) = trained(trainer)
    assert "Hello there" in answer and "Hi" not in answer
    assert trainer.config.data.test_datasets[0].train_on_inputs is False


def test_where_no_answer_can_be_told(sft: Callable[..., Any]) -> None:
    rows = [{"text": "a b c"}]
    with pytest.raises(ConfigError, match="write instruction_part"):
        luthier.train_on_responses_only(sft(rows))
    with pytest.raises(DataError, match="is in none of train_dataset's first rows"):
        luthier.train_on_responses_only(sft(rows), instruction_part=ASK, response_part=REPLY)
    with pytest.raises(ConfigError, match="say by their labels"):
        luthier.train_on_responses_only(sft([{"input_ids": [5, 6]}]), instruction_part=ASK, response_part=REPLY)
    with pytest.raises(ConfigError, match="last_response_only=True is not built here"):
        luthier.train_on_responses_only(sft(rows), ASK, REPLY, last_response_only=True)
    with pytest.raises(ConfigError, match="trains answers only, by itself"):
        luthier.train_on_responses_only(object(), ASK, REPLY)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "opens"),
    [("chatml", "<|im_start|>user"), ("llama-3", "<|start_header_id|>user"), ("qwen-2.5", "<|im_start|>user"),
     ("gemma-3", "<start_of_turn>user"), ("vicuna_old", "USER: Hi"), ("{{ messages[0].content }}!", "Hi!")],
)  # fmt: skip
def test_templates_by_the_names_that_notebooks_have(name: str, opens: str, tokenizer: Any) -> None:
    assert luthier.get_chat_template(tokenizer, chat_template=name) is tokenizer
    assert opens in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)


def test_the_end_of_an_answer_is_the_eos(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="luthier")
    luthier.get_chat_template(tokenizer, "vicuna", map_eos_token=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    before = tokenizer.eos_token
    luthier.get_chat_template(tokenizer, "llama-3", map_eos_token=False)
    assert tokenizer.eos_token == before
    luthier.get_chat_template(tokenizer, "llama-3")
    assert tokenizer.eos_token == "<|eot_id|>"
    luthier.get_chat_template(tokenizer, "gemma")
    assert "no token of this tokenizer" in caplog.text


def test_templates_that_there_are_not(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="there is no template 'llama-3.1' here; there are alpaca, chatml"):
        luthier.get_chat_template(tokenizer, "llama-3.1")
    with pytest.raises(ConfigError, match="mapping: templates here read"):
        luthier.get_chat_template(tokenizer, "chatml", mapping={"role": "from", "content": "value"})
    with pytest.raises(ConfigError, match="system_message: put it into the rows"):
        luthier.get_chat_template(tokenizer, "chatml", system_message="Be kind.")
