"""What of a row is asked, by the kind of the run's own data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.config import Config
from luthier.data.formats import ALPACA
from luthier.errors import ConfigError, DataError
from luthier.generate.asking import Asking
from luthier.generate.questions import Place, questions

USER, ASSISTANT = ({"role": role, "content": text} for role, text in (("user", "one"), ("assistant", "two")))
TURNS = [USER, ASSISTANT, {"role": "user", "content": "three"}]
SEVERAL = "is not a single question, and the model's format has no place for more"
CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def asking(tokenizer: Any, entry: dict[str, Any], **keys: Any) -> Asking:
    run = Config.from_flat({"base_model": "m", "datasets": [{"path": "rows.jsonl", **entry}], **keys})
    return Asking.of("run", tokenizer, run)


def asked(tokenizer: Any, form: Asking, row: dict[str, Any], place: Place | None = None) -> str:
    """The text that the model goes on from, or in brackets why there is none."""
    [question] = questions([("rows.jsonl:1", row)], form, place or Place())
    return tokenizer.decode(question.ids) if question.why_not is None else f"[{question.why_not}]"


@pytest.mark.parametrize(
    ("entry", "keys", "row", "text"),
    [
        ({"type": "completion", "field": "body"}, {}, {"body": "x", "text": "y"}, "x"),
        ({"type": "completion"}, {}, {"prompt": "x", "system": "s"}, "s\nx"),
        ({"type": "chat_template", "field_messages": "m"}, {}, {"m": TURNS[:2], "messages": 1}, CHATML.format("one")),
        ({"type": "chat_template"}, {}, {"messages": json.dumps(TURNS[:1])}, CHATML.format("one")),
        ({"type": {"format": "Q {instruction} A", "field_instruction": "q"}}, {}, {"q": "x", "prompt": "y"}, "Q x A"),
        ({"type": "alpaca"}, {}, {"messages": TURNS[:1]}, ALPACA.pieces("one", "", None)[0]),
        ({"type": "alpaca"}, {}, {"instruction": "x", "system": "s"}, ALPACA.pieces("x", "", "s")[0]),
        ({"type": "alpaca"}, {}, {"messages": TURNS}, f"[`messages` {SEVERAL}]"),
        ({"type": "chat_template.default"}, {"rl": "dpo"}, {"messages": TURNS[:1]}, CHATML.format("one")),
        ({"type": "chatml.intel"}, {"rl": "dpo"}, {"question": "x", "prompt": "y"}, CHATML.format("x")),
        ({}, {"rl": "orpo"}, {"prompt": "x"}, "x"),
    ],
)  # fmt: skip
def test_rows_are_asked_as_the_run_was_trained(
    entry: dict[str, Any], keys: dict[str, Any], row: dict[str, Any], text: str, toy_tokenizer: Any
) -> None:
    assert asked(toy_tokenizer, asking(toy_tokenizer, entry, **keys), row) == text


def test_the_format_of_a_preference_run_is_in_its_data(toy_tokenizer: Any, tmp_path: Path) -> None:
    pair = {"chosen": "a", "rejected": "b"}
    for prompt, text in (("x", "one"), (TURNS[:1], CHATML.format("one"))):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": prompt, **pair}) + "\n")
        if prompt != "x":
            turns = {name: [{"role": "assistant", "content": said}] for name, said in pair.items()}
            (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": prompt, **turns}) + "\n")
        form = asking(toy_tokenizer, {"path": str(tmp_path / "rows.jsonl")}, rl="dpo")
        assert asked(toy_tokenizer, form, {"prompt": "one"}) == text


def test_fields_and_raw_text(toy_tokenizer: Any) -> None:
    form = asking(toy_tokenizer, {"type": "alpaca"})
    row = {"instruction": "x", "input": "y", "other": "z", "talk": TURNS[:1], "empty": None}
    assert asked(toy_tokenizer, form, row, Place(field="other")) == ALPACA.pieces("z", "", None)[0]
    assert asked(toy_tokenizer, form, row, Place(field="talk")) == ALPACA.pieces("one", "", None)[0]
    assert asked(toy_tokenizer, form, row, Place(field="empty")) == "[`empty` is empty]"
    raw = Asking.of("run", toy_tokenizer, None, raw=True)
    assert asked(toy_tokenizer, raw, row, Place(raw=True)) == "x"
    assert asked(toy_tokenizer, raw, row, Place(field="other", raw=True)) == "z"
    with pytest.raises(DataError, match="rows.jsonl:1: `talk` is a conversation, and --raw takes text"):
        asked(toy_tokenizer, raw, row, Place(field="talk", raw=True))
    with pytest.raises(DataError, match="no `nothing`; the row has instruction"):
        asked(toy_tokenizer, form, row, Place(field="nothing"))


def test_ready_made_tokens_say_nothing_of_prompts(toy_tokenizer: Any) -> None:
    form = asking(toy_tokenizer, {})
    with pytest.raises(ConfigError, match="--raw"):
        asked(toy_tokenizer, form, {"prompt": "x"})
