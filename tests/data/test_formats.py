"""Rows to examples: each type's own text, and what is said of rows that are not what their type expects."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from luthier.config import DatasetEntry, UserPrompt
from luthier.data.examples import ChatExample, Segment, TextExample, TokenExample
from luthier.data.formats import columns_of, example_of, prompt_example
from luthier.data.readers import open_rows
from luthier.errors import DataError

# The prompts as github.com/tatsu-lab/stanford_alpaca publishes them (train.py, PROMPT_DICT).
STANFORD_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
STANFORD_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def entry(**keys: Any) -> DatasetEntry:
    return DatasetEntry(path="rows.jsonl", **keys)


def text_of(row: dict[str, Any], inputs: bool = False, **keys: Any) -> list[tuple[str, bool]]:
    example = example_of(row, entry(**keys), inputs)
    assert isinstance(example, TextExample)
    return [(segment.text, segment.trained) for segment in example.segments]


def chat_of(row: dict[str, Any], **keys: Any) -> ChatExample:
    example = example_of(row, entry(type="chat_template", **keys), False)
    assert isinstance(example, ChatExample)
    return example


def tokens_of(row: dict[str, Any], notes: Counter[str] | None = None, **keys: Any) -> TokenExample:
    example = example_of(row, entry(**keys), False, notes)
    assert isinstance(example, TokenExample)
    return example


# --- alpaca and its like


def test_alpaca_is_stanfords_prompt() -> None:
    row = {"instruction": "Add {braces}.", "input": "1 {input}", "output": " 2\n"}
    assert text_of(row, type="alpaca") == [
        (STANFORD_INPUT.replace("{input}", "1 {input}").replace("{instruction}", "Add {braces}."), False),
        (" 2\n", True),
    ]
    for missing in ({}, {"input": ""}, {"input": None}):
        assert text_of({"instruction": "Add.", "output": "2", **missing}, type="alpaca") == [
            (STANFORD_NO_INPUT.format(instruction="Add."), False),
            ("2", True),
        ]
    assert text_of(row, inputs=True, type="alpaca")[0][1]


def test_alpaca_system_text_stands_in_place_of_the_preamble() -> None:
    row = {"instruction": "Add.", "output": "2", "system": "Be brief."}
    assert text_of(row, type="alpaca")[0][0] == (
        "### System:\nBe brief.\n\n### Instruction:\nAdd.\n\n### Response:"
    )


def test_alpaca_fields_can_be_renamed() -> None:
    row = {"q": "Add.", "i": "1", "a": "2", "s": "Be brief.", "instruction": "not this"}
    names = {"field_instruction": "q", "field_input": "i", "field_output": "a", "field_system": "s"}
    assert text_of(row, type="alpaca", **names) == [
        ("### System:\nBe brief.\n\n### Instruction:\nAdd.\n\n### Input:\n1\n\n### Response:", False),
        ("2", True),
    ]
    assert columns_of(entry(type="alpaca", **names)) == {"q", "i", "a", "s"}


def test_question_and_answer_in_chat_style() -> None:
    assert text_of({"question": "Why?", "answer": "So."}, type="alpaca_chat.load_qa") == [
        (
            "Below is an instruction from a USER that describes a task. The ASSISTANT writes a response that "
            "appropriately and concisely completes the request.\n\nUSER: Why?\nASSISTANT:",
            False,
        ),
        ("So.", True),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "x", "out": "y"}, "`output` is missing; the row has the fields: instruction, out"),
        ({"instruction": None, "output": "y"}, "`instruction` is null"),
        ({"instruction": "x", "output": 1.5}, "`output` must be text, and is a number with a fraction: 1.5"),
        ({"instruction": "x", "output": True}, "`output` must be text, and is true or false"),
        ({"instruction": "x", "output": ["y"]}, "`output` must be text, and is a list"),
        ({"instruction": "x", "output": "y", "input": {}}, "`input` must be text, and is an object"),
        ({"instruction": " ", "output": "y"}, "the row asks nothing"),
        ({"instruction": "x", "output": "a\ud83d"}, r"`output` holds half of a surrogate pair \(.ud83d"),
        ({}, "the row is empty"),
    ],
)
def test_bad_alpaca_rows(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        example_of(row, entry(type="alpaca"), False)


def test_what_is_odd_is_counted() -> None:
    notes: Counter[str] = Counter()
    for row in (
        {"instruction": "x", "input": "No input", "output": ""},
        {"instruction": "x", "input": "<no input>", "output": 42},
    ):
        example = example_of(row, entry(type="alpaca"), False, notes)
        assert "### Input:\n" + row["input"] in example.segments[0].text
    assert example.segments[1] == Segment("42", True)
    assert sorted(notes.values()) == [1, 1, 2]


# --- a prompt of one's own


def own(row: dict[str, Any], **prompt: Any) -> list[tuple[str, bool]]:
    return text_of(row, type=UserPrompt(**prompt))


def test_own_prompt() -> None:
    row = {"instruction": "Add {x}.", "input": "1", "output": "2"}
    keys = {
        "format": "[INST] {instruction} {input} [/INST]",
        "no_input_format": "[INST] {instruction} [/INST]",
    }
    assert own(row, **keys) == [("[INST] Add {x}. 1 [/INST]", False), ("2", True)]
    assert own({**row, "input": ""}, **keys) == [("[INST] Add {x}. [/INST]", False), ("2", True)]
    keys |= {"system_prompt": "Be brief.", "system_format": "<<SYS>>{system}<</SYS>>"}
    assert own(row, **keys)[0][0] == "<<SYS>>Be brief.<</SYS>>[INST] Add {x}. 1 [/INST]"
    assert own({**row, "system": "Now."}, **keys)[0][0] == "<<SYS>>Now.<</SYS>>[INST] Add {x}. 1 [/INST]"
    inside = own(row, format="{system}|{instruction}|{input}:", system_prompt="S")
    assert inside[0][0] == "S|Add {x}.|1:"
    assert own({"q": "a", "output": "b"}, format="{{{instruction}}}", field_instruction="q") == [
        ("{a}", False),
        ("b", True),
    ]
    assert own(row, format="Q: {instruction}\nA: {output}\n{{end}}")[1] == ("2\n{end}", True)
    assert own({"body": "raw"}, field="body") == [("raw", True)]


def test_an_input_without_a_place_is_not_read() -> None:
    assert "input" in columns_of(entry(type=UserPrompt(format="{instruction} {input}")))
    assert "input" not in columns_of(entry(type=UserPrompt(format="{instruction}")))


# --- plain text and segments


def test_completion() -> None:
    example = example_of({"text": "Once."}, entry(type="completion"), False)
    assert example == TextExample((Segment("Once.", True),))
    assert text_of({"body": "x"}, type="completion", field="body") == [("x", True)]
    with pytest.raises(DataError, match="`text` is empty"):
        example_of({"text": ""}, entry(type="completion"), False)


def test_segments_are_taken_as_they_are() -> None:
    row = {"segments": [{"label": False, "text": "<s>Q"}, {"label": True, "text": "A</s>"}]}
    example = example_of(row, entry(type="input_output"), False)
    assert example == TextExample(
        (Segment("<s>Q", False), Segment("A</s>", True)), add_bos=False, add_eos=False
    )
    for bad, message in (
        ({"segments": []}, "must be a list of segments"),
        ({"segments": [{"text": "x"}]}, "segment 1 of `segments` must have `label`"),
        ({"segments": [{"label": "yes", "text": "x"}]}, "`label` must be true or false, not 'yes'"),
        ({"segments": [{"label": True, "text": None}]}, "must be text, and is null"),
    ):
        with pytest.raises(DataError, match=message):
            example_of(bad, entry(type="input_output"), False)


# --- conversations


def test_messages_of_both_kinds_are_the_same_conversation() -> None:
    expected = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
    ]
    assert chat_of({"messages": expected}).messages == expected
    share = [
        {"from": role, "value": message["content"]}
        for role, message in zip(["system", "human", "gpt"], expected, strict=True)
    ]
    assert chat_of({"conversations": share}).messages == expected
    assert chat_of({"conversations": json.dumps(share)}).messages == expected
    assert chat_of({"conversations": share[1:], "system": "Be brief."}).messages == expected
    assert chat_of({"conversations": share, "system": "Be brief."}).messages == expected
    own = [
        {"who": role, "what": message["content"]}
        for role, message in zip(["sys", "me", "you"], expected, strict=True)
    ]
    keys = {
        "field_messages": "turns",
        "message_property_mappings": {"role": "who", "content": "what"},
        "roles": {"system": ["sys"], "user": ["me"], "assistant": ["you"]},
    }
    assert chat_of({"turns": own, "messages": []}, **keys).messages == expected
    del keys["message_property_mappings"]
    keys |= {"message_field_role": "who", "message_field_content": "what"}
    assert chat_of({"turns": own}, **keys).messages == expected


def test_a_mapping_that_does_not_fit_is_an_error() -> None:
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    with pytest.raises(DataError, match="message 1 of `messages` has `role` and no `from`"):
        example_of(
            row,
            entry(type="chat_template", message_property_mappings={"role": "from", "content": "value"}),
            False,
        )


def test_train_flags_and_other_keys() -> None:
    flags = [
        {"train": True},
        {"training": False},
        {"weight": 0},
        {"weight": 1, "train": None},
        {"name": "Ann"},
        {},
    ]
    messages = [{"role": "assistant", "content": "x", **flag} for flag in flags]
    assert [m.get("train") for m in chat_of({"messages": messages}).messages] == [
        True,
        False,
        False,
        True,
        None,
        None,
    ]
    assert chat_of({"messages": messages}).messages[4]["name"] == "Ann"


def test_tool_calls_in_all_their_forms() -> None:
    inner = {"name": "weather", "arguments": {"city": "Rome"}}
    expected = [{"type": "function", "function": inner}]
    forms: list[Any] = [
        expected,
        [inner],
        inner,
        json.dumps([inner]),
        [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}],
    ]
    for form in forms:
        message = {"role": "assistant", "content": None, "tool_calls": form}
        assert chat_of({"messages": [message]}).messages == [
            {"role": "assistant", "content": "", "tool_calls": expected}
        ]
    sharegpt = [
        {"from": "function_call", "value": json.dumps(inner)},
        {"from": "observation", "value": "sunny"},
    ]
    assert chat_of({"conversations": sharegpt}).messages == [
        {"role": "assistant", "content": "", "tool_calls": expected},
        {"role": "tool", "content": "sunny"},
    ]
    schema = {"name": "weather", "parameters": {"type": "object"}}
    wrapped = [{"type": "function", "function": schema}]
    tool_forms: list[Any] = [
        wrapped,
        [schema],
        json.dumps([schema]),
        [{**schema, "parameters": '{"type": "object"}'}],
    ]
    for tools in tool_forms:
        assert chat_of({"messages": [{"role": "user", "content": "x"}], "tools": tools}).tools == wrapped
    for nothing in (None, "", "[]", []):
        assert chat_of({"messages": [{"role": "user", "content": "x"}], "tools": nothing}).tools is None


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat_of({"messages": [{"role": "user", "content": parts}]}).messages[0]["content"] == "ab"
    image = [{"type": "image", "url": "x"}]
    with pytest.raises(DataError, match=r"has a part that is not text \(image\)"):
        chat_of({"messages": [{"role": "user", "content": image}]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "`messages` is missing; the row has the fields: text"),
        ({"messages": []}, "has no message"),
        ({"messages": "hello"}, "is text that is not valid JSON"),
        ({"messages": {"role": "user"}}, "must be a list of messages, and is an object"),
        ({"messages": ["x"]}, "message 1 of `messages` must be an object"),
        ({"messages": [{"content": "x"}]}, "message 1 of `messages` has no role"),
        (
            {"messages": [{"role": "bing", "content": "x"}]},
            "the role 'bing', which is none of .*`roles: {assistant: ",
        ),
        ({"messages": [{"role": "user", "content": None}]}, r"\(user\) has no content"),
        ({"messages": [{"role": "user", "content": 1.5}]}, "content of message 1 of `messages` must be text"),
        ({"messages": [{"role": "user", "content": "x", "weight": 0.5}]}, "`weight` must be true or false"),
        ({"messages": [{"role": "user", "content": "x", "train": 1, "weight": 0}]}, "contradict each other"),
        ({"messages": [{"role": "user", "content": "x", "training_detail": []}]}, "use `type: input_output`"),
        ({"messages": [{"role": "system", "content": "a"}], "system": "b"}, "two different system texts"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"x": 1}]}]}, "has no `name`"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "not valid JSON",
        ),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{"x": 1}]}, "tool 1 of `tools` must be"),
    ],
)
def test_bad_conversations(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        chat_of(row)


# --- tokens


def test_aligned_tokens() -> None:
    notes: Counter[str] = Counter()
    assert tokens_of({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}) == TokenExample(
        [5, 6, 7], [-100, 6, 7], (3,)
    )
    assert tokens_of({"input_ids": [5, 6]}, notes).labels == [5, 6]
    assert tokens_of({"input_ids": [5, 6, 7], "assistant_masks": [0, 1, 0]}).labels == [-100, 6, -100]
    padded = {"input_ids": [0, 5, 6, 0], "labels": [-100, 5, 6, -100], "attention_mask": [0, 1, 1, 0]}
    assert tokens_of(padded, notes) == TokenExample([5, 6], [5, 6], (2,))
    assert notes == {
        "rows without `labels`, of which every token is trained": 1,
        "padding tokens, left out": 2,
    }


@pytest.mark.parametrize(
    "column",
    [
        {"position_ids": [0, 1, 0, 1, 2]},
        {"segment_lengths": [2, 3]},
        {"seq_lengths": [2, 3]},
        {"attention_mask": [1, 1, 2, 2, 2]},
        {"position_ids": [0, 1, 0, 1, 2], "segment_lengths": [2, 3], "attention_mask": [1] * 5},
    ],
)
def test_packed_rows(column: dict[str, list[int]]) -> None:
    row = {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, -100, 4, 5]}
    assert tokens_of({**row, **column}) == TokenExample(row["input_ids"], row["labels"], (2, 3))


def test_packed_row_with_padding() -> None:
    row = {
        "input_ids": [1, 2, 3, 4, 0, 0],
        "attention_mask": [1, 1, 1, 1, 0, 0],
        "position_ids": [0, 1, 0, 1, 0, 1],
    }
    assert tokens_of({**row, "labels": [1, 2, 3, 4, -100, -100]}) == TokenExample(
        [1, 2, 3, 4], [1, 2, 3, 4], (2, 2)
    )


def test_shifted_labels_are_never_trained_as_they_are() -> None:
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, 7, 8, 9]}
    with pytest.raises(DataError, match="already shifted by one .* Write `labels_shifted: true`"):
        tokens_of(row)
    back = tokens_of(row, labels_shifted=True)
    assert back == TokenExample([5, 6, 7, 8, 9], [-100, -100, 7, 8, 9], (5,))
    unlabelled_end = tokens_of({**row, "labels": [-100, 7, 8, -100]}, labels_shifted=True)
    assert unlabelled_end == TokenExample([5, 6, 7, 8], [-100, -100, 7, 8], (4,))
    with pytest.raises(DataError, match="`labels_shifted: true`, but"):
        tokens_of({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, labels_shifted=True)


def test_shifted_labels_of_packed_rows() -> None:
    notes: Counter[str] = Counter()
    row = {"input_ids": [1, 2, 3, 4, 5], "labels": [2, 3, 4, 5, 6], "segment_lengths": [2, 3]}
    # Shifted after packing: the first document's last label (3) is the second one's first token.
    assert tokens_of(row, notes, labels_shifted=True) == TokenExample(
        [1, 2, 3, 4, 5, 6], [-100, 2, -100, 4, 5, 6], (2, 4)
    )
    assert notes["labels that lead from one packed document into the next, left out"] == 1
    # Shifted before: it is the end (9) that the tokens no longer have.
    before = tokens_of({**row, "labels": [2, 9, 4, 5, 9]}, labels_shifted=True)
    assert before == TokenExample([1, 2, 9, 3, 4, 5, 9], [-100, 2, 9, -100, 4, 5, 9], (3, 4))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": [1]}, "there is no `input_ids`.* the row has the fields: tokens"),
        ({"input_ids": []}, "`input_ids` is empty"),
        ({"input_ids": "1 2"}, "must be a list of whole numbers, and is text"),
        ({"input_ids": [1.5]}, "must hold whole numbers only"),
        ({"input_ids": [1, None]}, "must hold whole numbers only, and holds null"),
        ({"input_ids": [[1], [2, 3]]}, "must hold whole numbers only"),
        ({"input_ids": [-1]}, "token ids are 0 or more"),
        ({"input_ids": [1, 2], "labels": [1]}, "`labels` has 1 entries, and `input_ids` 2"),
        (
            {"input_ids": [1, 2, 3], "labels": [-100, 9, 3]},
            "`labels` has 9 at position 1, where `input_ids` has 2",
        ),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "all padding"),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]}, "trains position 1, which"),
        ({"input_ids": [1, 2], "segment_lengths": [1, 2]}, "sum to the row's 2 tokens; the sum is 3"),
    ],
)
def test_bad_tokens(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokens_of(row)


# --- for generation


def test_prompts_are_the_rows_without_their_answers() -> None:
    row = {"instruction": "Add.", "input": "1", "output": "2"}
    for kind in ("alpaca", UserPrompt(format="Q {instruction} {input}\nA {output}.")):
        whole = example_of(row, entry(type=kind), False)
        prompt = prompt_example(entry(type=kind), "Add.", "1")
        assert prompt == TextExample(whole.segments[:1], add_eos=False)
    chat = prompt_example(entry(type="chat_template"), "Add.", "1", system="S")
    assert chat == ChatExample([{"role": "system", "content": "S"}, {"role": "user", "content": "Add.\n1"}])
    raw = prompt_example(entry(type="completion"), "Once")
    assert raw == TextExample((Segment("Once", False),), add_eos=False)


# --- real rows


def test_every_real_alpaca_row(alpaca_path: Path) -> None:
    notes: Counter[str] = Counter()
    kind = entry(type="alpaca")
    count = 0
    for _, row in open_rows(DatasetEntry(path=str(alpaca_path))):
        example = example_of(row, kind, False, notes)
        assert example.segments[1].text == row["output"]
        template = STANFORD_INPUT if row["input"] else STANFORD_NO_INPUT
        assert example.segments[0].text == template.format(**row)
        count += 1
    assert count == 52002
    assert notes["empty answers, of which only the end is trained"] == 28


def test_real_tool_calls(shared_data: Path) -> None:
    rows = open_rows(DatasetEntry(path=str(shared_data / "llamafactory" / "glaive_toolcall_en_demo.json")))
    examples = [chat_of(row) for _, row in rows]
    assert len(examples) == 300
    calls = [call for example in examples for m in example.messages for call in m.get("tool_calls", [])]
    assert calls
    assert all(isinstance(call["function"]["arguments"], dict) for call in calls)
    assert any(example.tools for example in examples)
