"""Which rows are questions, and answers to many prompts at once."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.config import Config
from luthier.data.held_out import held_out
from luthier.data.tokenizer import terminator_ids
from luthier.errors import RunError
from luthier.evaluate import answers
from luthier.evaluate.answers import Answer, Question, greedy_answers, question_of
from luthier.generate.slots import Slots
from luthier.models import attention


def questions(tokenizer: Any, tmp_path: Path, rows: list[dict[str, Any]], **entry: Any) -> list[Question | None]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.from_flat({"base_model": "toy", "datasets": [{"path": str(path), **entry}]})
    documents = held_out(config, tokenizer).documents
    return [question_of(documents, n, tokenizer, terminator_ids(tokenizer, config)) for n in range(len(documents))]


def test_a_prompt_with_an_answer(toy_tokenizer: Any, tmp_path: Path) -> None:
    (found,) = questions(toy_tokenizer, tmp_path, [{"instruction": "Add.", "output": " 13\n"}], type="alpaca")
    assert found is not None and found.ends
    assert toy_tokenizer.decode(found.prompt_ids).endswith("Add.\n\n### Response:")
    assert found.expected == " 13\n"
    assert found.tokens == len(toy_tokenizer(" 13\n")["input_ids"])


def test_of_a_conversation_the_last_answer(toy_tokenizer: Any, tmp_path: Path) -> None:
    turns = [("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", "2 it is")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (found,) = questions(toy_tokenizer, tmp_path, [row], type="chat_template")
    assert found is not None and found.ends and found.expected == "2 it is"
    # Just what generation starts from.
    asked = toy_tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False)
    assert found.prompt_ids == asked


def test_an_answer_without_an_end_is_told_apart(toy_tokenizer: Any, tmp_path: Path) -> None:
    row = {"segments": [{"label": False, "text": "Add: "}, {"label": True, "text": "13"}]}
    (found,) = questions(toy_tokenizer, tmp_path, [row], type="input_output")
    assert found is not None and not found.ends and found.expected == "13"


@pytest.mark.parametrize(
    ("row", "entry"),
    [
        ({"text": "all of it is trained"}, {"type": "completion"}),
        ({"instruction": "Add.", "output": "13"}, {"type": "alpaca", "train_on_inputs": True}),
        ({"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]}, {}),
    ],
)
def test_no_question_in_raw_text_in_trained_prompts_and_in_packed_rows(
    row: dict[str, Any], entry: dict[str, Any], toy_tokenizer: Any, tmp_path: Path
) -> None:
    assert questions(toy_tokenizer, tmp_path, [row], **entry) == [None]


@pytest.fixture(scope="module")
def model(toy_llama_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(toy_llama_dir).eval()


PROMPTS = ["The quick brown", "Add 1 and 2.", "", "one " * 600, "日本語", "The capital of France is"]


def test_answers_are_those_of_generate_and_what_cannot_be_asked_says_why(
    model: Any, toy_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": 7, "pad_token_id": 0}
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 3.0)  # many a model has one of its own
    prompts = [toy_tokenizer(text)["input_ids"] for text in PROMPTS]
    done: list[None] = []
    found = greedy_answers(
        model, toy_tokenizer, [7], prompts, max_new_tokens=6, on_done=lambda: done.append(None)
    )
    assert len(done) == len(prompts)
    for place, prompt in enumerate(prompts):
        if place in (2, 3):
            assert found[place].skipped and not found[place].stopped
            continue
        ids = torch.tensor([prompt])
        said = model.generate(ids, max_new_tokens=6, **plain)[0, len(prompt) :]
        text = toy_tokenizer.decode(said, skip_special_tokens=True)
        assert found[place].text == text
        assert found[place].shown == (text if 7 in said else f"{text} ...")


def test_batches_get_smaller_where_memory_ends_and_no_answer_is_lost(
    model: Any, toy_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attention.register()
    model = copy.deepcopy(model)  # what an engine has found out about a model holds for its attention then
    model.set_attn_implementation(attention.NAME)
    prompts = [toy_tokenizer(f"Add {n}.")["input_ids"] for n in range(8)]
    expected = greedy_answers(model, toy_tokenizer, [7], prompts, max_new_tokens=4)
    resize, room = Slots.resize, 2 * (max(map(len, prompts)) + 4)
    monkeypatch.setattr(answers, "MAX_CACHED_TOKENS", 2 * room)

    def short(self: Slots, slots: int, tokens: int) -> None:
        if slots * tokens > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        resize(self, slots, tokens)

    monkeypatch.setattr(Slots, "resize", short)
    with caplog.at_level(logging.WARNING, "luthier"):
        assert greedy_answers(model, toy_tokenizer, [7], prompts, max_new_tokens=4) == expected
    assert f"out of memory with batches of up to {2 * room} tokens: going on with {room}" in caplog.text
    room = 3
    with pytest.raises(RunError, match="single prompt"):
        greedy_answers(model, toy_tokenizer, [7], prompts, max_new_tokens=4)


def test_what_was_cut_off_is_never_right() -> None:
    from luthier.evaluate.exact_match import is_exact

    assert is_exact(Answer("13", True).shown, "13")
    assert not is_exact(Answer("13", False).shown, "13")
