"""Samples during a run: which prompts, which rows."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.config import Config
from luthier.data.dataset import Document, prepare
from luthier.data.formats import prompt_example
from luthier.data.render import Renderer
from luthier.evaluate.samples import Sampler, stopped_share, validation_prompts
from luthier.generate.engine import Engine
from luthier.generate.sampling import Sampling


@pytest.fixture(scope="module")
def engine(toy_llama_dir: Path, toy_tokenizer: Any) -> Engine:
    from transformers import AutoModelForCausalLM

    return Engine(AutoModelForCausalLM.from_pretrained(toy_llama_dir), toy_tokenizer)


def test_a_row_says_what_was_asked_and_how_it_ended(engine: Engine, toy_tokenizer: Any) -> None:
    prompts = [
        ("hello", toy_tokenizer("hello")["input_ids"]),
        ("2 + 2", toy_tokenizer("2 + 2")["input_ids"], "4"),
        ("too long", [5] * 512),
    ]
    sampler = Sampler(prompts, Sampling(max_new_tokens=4, temperature=0.5, top_p=0.9, seed=1))
    rows = sampler.rows(engine, step=7)
    assert [row["step"] for row in rows] == [7, 7, 7]
    assert [row["prompt"] for row in rows] == ["hello", "2 + 2", "too long"]
    assert [row["expected"] for row in rows] == [None, "4", None]
    assert {(row["max_new_tokens"], row["temperature"], row["top_p"]) for row in rows} == {(4, 0.5, 0.9)}
    completions = engine.generate([prompt[1] for prompt in prompts[:2]], sampler.sampling)
    assert [row["text"] for row in rows[:2]] == [completion.text for completion in completions]
    assert rows[2]["stopped"] is False
    assert "context window 512" in rows[2]["skipped"]
    assert rows == sampler.rows(engine, step=7)  # the same seed, the same samples


def test_the_share_of_samples_that_stopped() -> None:
    assert (
        stopped_share([{"stopped": True}, {"stopped": False}, {"stopped": True}, {"stopped": True}]) == 0.75
    )
    assert stopped_share([]) == 0.0


@pytest.mark.parametrize("kind", ["alpaca", "chat_template"])
def test_validation_prompts_are_those_of_generation(kind: str, tmp_path: Path, toy_llama_dir: Path) -> None:
    """Cut out of the rendered rows, they equal what `prompt_ids` makes of the row itself."""
    from luthier.data.tokenizer import load_tokenizer

    rows = [(f"Say {word} twice.", f"{word} {word}") for word in ("one", "two", "three", "four", "five")]
    text = "".join(
        f'{{"instruction": "{ask}", "output": "{answer}"}}\n'
        if kind == "alpaca"
        else f'{{"messages": [{{"role": "user", "content": "{ask}"}}, '
        f'{{"role": "assistant", "content": "{answer}"}}]}}\n'
        for ask, answer in rows
    )
    (tmp_path / "rows.jsonl").write_text(text)
    entry = {"path": str(tmp_path / "rows.jsonl"), "type": kind}
    config = Config.from_flat(
        {"base_model": str(toy_llama_dir), "datasets": [entry], "test_datasets": [entry], "sequence_len": 256}
    )
    tokenizer = load_tokenizer(config)
    validation = prepare(config, tokenizer).validation
    assert validation is not None
    prompts = validation_prompts(validation, tokenizer, 3)
    renderer, first = Renderer(tokenizer, config), config.data.datasets[0]
    expected = {tuple(renderer.prompt_ids(prompt_example(first, ask), first)): answer for ask, answer in rows}
    assert len(prompts) == 3
    assert len({prompt.label for prompt in prompts}) == 3
    for prompt in prompts:
        assert (prompt.expected or "").strip() == expected[tuple(prompt.prompt_ids)]
    assert len(validation_prompts(validation, tokenizer, 99)) == 5


class OneDocument:
    """A dataset of one document."""

    def __init__(self, input_ids: list[int], labels: list[int]):
        self.document = Document(np.array(input_ids), np.array(labels))

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Document:
        return self.document


def test_a_raw_text_is_prompted_with_its_beginning(toy_tokenizer: Any) -> None:
    ids = toy_tokenizer("The quick brown fox jumps over the lazy dog.")["input_ids"]
    prompt = validation_prompts(OneDocument(ids, ids), toy_tokenizer, 1)[0]  # type: ignore[arg-type]
    assert list(prompt.prompt_ids) == ids[: len(ids) // 2]
    assert prompt.label + (prompt.expected or "") == "The quick brown fox jumps over the lazy dog."


def test_the_first_answer_of_several_is_expected(toy_tokenizer: Any) -> None:
    parts = ["question", "answer", "more", "second"]
    ids = [toy_tokenizer(part)["input_ids"] for part in parts]
    labels = [[-100] * len(ids[0]), ids[1], [-100] * len(ids[2]), ids[3]]
    document = OneDocument([*chain(*ids)], [*chain(*labels)])
    prompt = validation_prompts(document, toy_tokenizer, 1)[0]  # type: ignore[arg-type]
    assert (prompt.label, prompt.expected) == ("question", "answer")
