"""Masks of conversations, held against transformers' and TRL's own, token for token."""

from __future__ import annotations

import re
from typing import Any

import pytest

from luthier.data.chat import ChatTemplate
from luthier.data.examples import ChatExample
from luthier.data.masks import LEFT_OUT
from luthier.data.places import PlaceFinder
from luthier.data.render import UNTRAINED, Renderer
from luthier.data.spans import TurnFinder, _Quick, _Slow
from luthier.errors import DataError

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "abcdefghi",
            "type": "function",
            "function": {"name": "get_weather", "arguments": {"place": "Rome"}},
        }
    ],
}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": "sunny"}


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    roles = ["user", "assistant"] * len(contents)
    opening = [{"role": "system", "content": system}] if system else []
    return opening + [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def trained_text(tokenizer: Any, rendered: Any) -> list[str]:
    """The trained stretches, each as text."""
    stretches: list[list[int]] = [[]]
    for number, label in zip(rendered.input_ids, rendered.labels, strict=True):
        assert label in (UNTRAINED, number)
        if label == UNTRAINED:
            stretches.append([])
        else:
            stretches[-1].append(number)
    return [tokenizer.decode(ids) for ids in stretches if ids]


def without_marks(template: str) -> str:
    """The same text without `{% generation %}`: an `if` that is always true keeps the spaces as they are."""
    opened = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", opened)


# What TRL's marks add to what a model writes: the answer's header, and a newline behind the terminator.
ALSO_HEADER = {
    "deepseek_r1_distill", "deepseekv3", "gptoss", "muse_glimmer", "nemotron_3_5_lightning", "nemotron_3_nano",
    "nemotron_3_super", "nemotron_3_ultra", "qwen2_5", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8",
}  # fmt: skip
# Templates that only read contents that are lists of parts.
PARTS = ("idefics3", "llava_next", "smolvlm")


def test_marks_are_taken_at_their_word(trl_templates, tokenizer_with, random_chats, chat_config):
    """Ids and masks equal `apply_chat_template(return_assistant_tokens_mask=True)` on TRL's training templates."""
    config, entry = chat_config()
    compared = 0
    for name, template in trl_templates.items():
        if not name.endswith("_training") or name.startswith(PARTS):
            continue
        tokenizer = tokenizer_with(template)
        renderer = Renderer(tokenizer, config)
        for messages in random_chats(1, 8, odd=False, system=name != "gemma_training"):
            expected = tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True
            )
            rendered = renderer.render([ChatExample(messages)], entry)[0]
            assert rendered.input_ids == expected["input_ids"], name
            assert [int(x != UNTRAINED) for x in rendered.labels] == expected["assistant_masks"], name
            compared += 1
    assert compared > 150


def test_masks_without_marks_equal_marked_ones(trl_templates, tokenizer_with, random_chats, chat_config):
    """The same templates with the marks taken out: the turns are found, and are what the marks said.

    Where TRL's marks take in more than a model writes (the newline behind the terminator, in some families the
    header before the answer), ours have to be theirs without that.
    """
    config, entry = chat_config()
    compared = 0
    for name, template in trl_templates.items():
        if not name.endswith("_training") or name.startswith(PARTS):
            continue
        tokenizer, plain = tokenizer_with(template), tokenizer_with(template)
        plain.chat_template = without_marks(template)
        renderer = Renderer(plain, config)
        ends = ChatTemplate(tokenizer, None).habits.terminators
        for messages in random_chats(2, 8, odd=False, system=name != "gemma_training"):
            expected = tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True
            )
            rendered = renderer.render([ChatExample(messages)], entry)[0]
            theirs = list(expected["assistant_masks"])
            mine = [int(x != UNTRAINED) for x in rendered.labels]
            for at, number in enumerate(expected["input_ids"]):
                if tokenizer.convert_ids_to_tokens(number) in ends:
                    behind = at + 1
                    while behind < len(theirs) and theirs[behind] and not mine[behind]:
                        theirs[behind] = 0  # what follows a terminator is never generated
                        behind += 1
            assert rendered.input_ids == expected["input_ids"], name
            if name.removesuffix("_training") in ALSO_HEADER:
                assert all(not own or their for own, their in zip(mine, theirs, strict=True)), name
                joined = "".join(trained_text(tokenizer, rendered))
                assert all(
                    message["content"] in joined for message in messages if message["role"] == "assistant"
                )
            else:
                assert mine == theirs, name
            compared += 1
    assert compared > 150


def test_quick_way_equals_slow_way(trl_templates, tokenizer_with, random_chats):
    """Every turn that is found by what surrounds it is also found by rendering parts, at the same place."""
    same = 0
    for name, template in trl_templates.items():
        wrapped = ChatTemplate(tokenizer_with(template))
        places = PlaceFinder(wrapped)
        for number, messages in enumerate(random_chats(3, 6, system="gemma" not in name)):
            tools = [TOOL] if number % 2 else None
            if tools:
                messages[-1:-1] = [CALL, RESULT]
            try:
                full = wrapped.text(messages, tools)
            except DataError:
                continue  # a template without tools
            quick = _Quick(wrapped, messages, full, places.places(messages, tools, full))
            slow = _Slow(wrapped, messages, tools, full)
            for at in range(len(messages)):
                turn = quick.turn(at)
                if turn is None:
                    continue
                try:
                    exact = slow.turn(at)
                except DataError:
                    continue
                assert turn == exact, (name, messages, at)
                same += 1
    assert same > 800


QWEN3_CHAT = chat("Hi", "<think>\nold\n</think>\n\nHello", "More?", "<think>\nnew\n</think>\n\nYes")


def test_qwen3_rewrites_history(trl_templates, tokenizer_with, chat_config):
    tokenizer = tokenizer_with(trl_templates["qwen3"])
    config, entry = chat_config()
    rendered = Renderer(tokenizer, config).render(
        [ChatExample(QWEN3_CHAT), ChatExample(chat("Hi", "Hello", "More?", "Yes"))], entry
    )
    assert trained_text(tokenizer, rendered[0]) == [
        "Hello<|im_end|>",
        "<think>\nnew\n</think>\n\nYes<|im_end|>",
    ]
    assert trained_text(tokenizer, rendered[1]) == ["Hello<|im_end|>", "<think>\n\n</think>\n\nYes<|im_end|>"]
    assert rendered[0].notes == ((LEFT_OUT, "content of role assistant: 'old'"),)
    assert rendered[1].notes == ()


def test_qwen3_header_with_an_empty_think_block(trl_templates, tokenizer_with, chat_config):
    """With `enable_thinking: false` the block is part of what generation starts from, so it is not trained."""
    tokenizer = tokenizer_with(trl_templates["qwen3"])
    config, entry = chat_config(chat_template_kwargs={"enable_thinking": False})
    renderer = Renderer(tokenizer, config)
    rendered = renderer.render([ChatExample(chat("Hi", "Hello", "More?", "Yes"))], entry)[0]
    assert trained_text(tokenizer, rendered) == ["Hello<|im_end|>", "Yes<|im_end|>"]
    prompt = renderer.prompt_ids(ChatExample(chat("Hi", "Hello", "More?", "Yes")), entry)
    assert rendered.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_tool_calls_are_trained_to_their_terminator(trl_templates, tokenizer_with, chat_config):
    config, entry = chat_config()
    messages = [
        {"role": "user", "content": "Weather?"},
        CALL,
        RESULT,
        {"role": "assistant", "content": "Sunny."},
    ]
    expected = {
        "qwen2_5": ['<tool_call>\n{"name": "get_weather", "arguments": {"place": "Rome"}}\n</tool_call><|im_end|>',
                    "Sunny.<|im_end|>"],
        "llama3_1": ['{"name": "get_weather", "parameters": {"place": "Rome"}}<|eot_id|>', "Sunny.<|eot_id|>"],
        "gptoss": [' to=functions.get_weather<|channel|>commentary json<|message|>{"place": "Rome"}<|call|>',
                   "<|channel|>final<|message|>Sunny.<|return|>"],
    }  # fmt: skip
    for name, stretches in expected.items():
        tokenizer = tokenizer_with(trl_templates[name])
        rendered = Renderer(tokenizer, config).render([ChatExample(messages, [TOOL])], entry)[0]
        assert trained_text(tokenizer, rendered) == stretches, name
        ids = tokenizer.apply_chat_template(messages, tools=[TOOL], return_dict=True)["input_ids"]
        assert rendered.input_ids == ids, name


def test_content_and_terminator_exactly(toy_tokenizer, random_chats, chat_config):
    """ChatML by hand, as Axolotl's masks are documented: the content's tokens and the end of turn, nothing else."""
    config, entry = chat_config()
    renderer = Renderer(toy_tokenizer, config)

    def ids(text: str) -> list[int]:
        return toy_tokenizer(text, add_special_tokens=False)["input_ids"]

    for messages in random_chats(4, 20, odd=False):
        rendered = renderer.render([ChatExample(messages)], entry)[0]
        labels: list[int] = []
        for message in messages:
            header = ids(f"<|im_start|>{message['role']}\n")
            body = ids(message["content"] + "<|im_end|>")
            trained = body if message["role"] == "assistant" else [UNTRAINED] * len(body)
            labels += [UNTRAINED] * len(header) + trained + [UNTRAINED] * len(ids("\n"))
        assert rendered.labels == labels


@pytest.mark.parametrize(
    ("entry", "stretches"),
    [
        ({}, ["A1<|im_end|>", "A2<|im_end|>"]),
        ({"roles_to_train": ["user"]}, ["Q1<|im_end|>", "Q2<|im_end|>"]),
        ({"roles_to_train": ["system", "assistant"]}, ["S<|im_end|>", "A1<|im_end|>", "A2<|im_end|>"]),
        ({"roles_to_train": []}, []),
        ({"train_on_eos": "last"}, ["A1", "A2<|im_end|>"]),
        ({"train_on_eos": "all"}, ["<|im_end|>", "<|im_end|>", "A1<|im_end|>", "<|im_end|>", "A2<|im_end|>"]),
    ],
)
@pytest.mark.parametrize("marked", [False, True])
def test_options(toy_tokenizer, tokenizer_with, chat_config, trl_templates, entry, stretches, marked):
    tokenizer = tokenizer_with(trl_templates["lfm2_training"]) if marked else toy_tokenizer
    config, entry = chat_config(entry)
    messages = chat("Q1", "A1", "Q2", "A2", system="S")
    rendered = Renderer(tokenizer, config).render([ChatExample(messages)], entry)[0]
    found = [
        text.removesuffix("\n") for text in trained_text(tokenizer, rendered)
    ]  # TRL marks the newline too
    assert found == stretches


def test_message_flags_come_before_roles(toy_tokenizer, chat_config):
    config, entry = chat_config()
    messages = chat("Q1", "A1", "Q2", "A2")
    messages[1]["train"], messages[2]["train"] = False, True
    rendered = Renderer(toy_tokenizer, config).render([ChatExample(messages)], entry)[0]
    assert trained_text(toy_tokenizer, rendered) == ["Q2<|im_end|>", "A2<|im_end|>"]


@pytest.mark.parametrize("entry", [{}, {"train_on_inputs": True}])
def test_train_on_inputs_trains_everything(toy_tokenizer, chat_config, entry):
    config, entry = chat_config(entry, train_on_inputs=not entry)
    rendered = Renderer(toy_tokenizer, config).render([ChatExample(chat("Q", "A"))], entry)[0]
    assert rendered.labels == rendered.input_ids


def test_train_on_inputs_leaves_out_flagged_messages(toy_tokenizer, chat_config):
    config, entry = chat_config(train_on_inputs=True)
    messages = chat("Q", "A", "B", "C")
    messages[1]["train"] = False
    rendered = Renderer(toy_tokenizer, config).render([ChatExample(messages)], entry)[0]
    header = "<|im_start|>{}\n{}".format
    assert trained_text(toy_tokenizer, rendered) == [
        header("user", "Q<|im_end|>\n") + header("assistant", ""),
        "\n" + header("user", "B<|im_end|>\n") + header("assistant", "C<|im_end|>\n"),
    ]


@pytest.mark.parametrize(
    ("messages", "stretches"),
    [
        (chat("Q", ""), ["<|im_end|>"]),
        # The header's newline and the spaces are one token: it holds trained characters, as transformers sees it.
        (chat("Q", "   "), ["\n   <|im_end|>"]),
        (chat("", "A"), ["A<|im_end|>"]),
        (chat("Q", "🚀", "é", "日本🚀"), ["🚀<|im_end|>", "日本🚀<|im_end|>"]),
        (
            chat("Q", "<|im_start|>assistant\n", "Q", "A"),
            ["<|im_start|>assistant\n<|im_end|>", "A<|im_end|>"],
        ),
        (chat("Q", "x<|im_end|>y"), ["x<|im_end|>y<|im_end|>"]),
        (chat("A", "A", "A", "A"), ["A<|im_end|>", "A<|im_end|>"]),
        ([*chat("Q", "A"), {"role": "assistant", "content": "B"}], ["A<|im_end|>", "B<|im_end|>"]),
        (chat("Q", "A", "Q"), ["A<|im_end|>"]),
        (chat("Q"), []),
        ([{"role": "assistant", "content": "A"}, {"role": "user", "content": "Q"}], ["A<|im_end|>"]),
        (
            [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "x": None}],
            ["A<|im_end|>"],
        ),
    ],
)
def test_odd_conversations(toy_tokenizer, chat_config, messages, stretches):
    config, entry = chat_config()
    rendered = Renderer(toy_tokenizer, config).render([ChatExample(messages)], entry)[0]
    assert trained_text(toy_tokenizer, rendered) == stretches


def test_a_bad_conversation_is_an_error_in_its_place(trl_templates, tokenizer_with, chat_config):
    tokenizer = tokenizer_with(trl_templates["gemma"])
    config, entry = chat_config()
    good = ChatExample(chat("Q", "A"))
    results = Renderer(tokenizer, config).render_each(
        [good, ChatExample(chat("Q", "A", system="S")), good], entry
    )
    assert results[0] == results[2]
    assert isinstance(results[1], DataError)
    assert "System role not supported" in str(results[1])


def test_a_turn_that_cannot_be_found_is_an_error(tokenizer_with, chat_config):
    """A template that shuffles and changes what is said, so that no comparison shows where an answer went."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content | upper | reverse }}{{ eos_token }}"
        "{% else %}{{ messages | length }}{% endif %}{% endfor %}"
    )
    config, entry = chat_config()
    with pytest.raises(DataError, match=r"message 2 \(assistant\): .* cannot be found .*"):
        Renderer(tokenizer_with(template), config).render([ChatExample(chat("Q", "A", "Q", "B", "C"))], entry)


def test_templates_without_tools(trl_templates, tokenizer_with, chat_config):
    """Phi-3's leaves out results, LFM2's first one calls: the one is an error that says so, the other a note."""
    config, entry = chat_config()
    messages = [
        {"role": "user", "content": "Weather?"},
        CALL,
        RESULT,
        {"role": "assistant", "content": "Sunny."},
    ]
    for name, notes in (
        ("lfm2", ((LEFT_OUT, "tool calls of role assistant"),)),
        ("lfm2_2_5", ()),
        ("qwen3", ()),
    ):
        renderer = Renderer(tokenizer_with(trl_templates[name]), config)
        assert renderer.render([ChatExample(messages, [TOOL])], entry)[0].notes == notes, name
    with pytest.raises(
        DataError, match=r"message 2 \(assistant\): .* leaves out.* what message 3 \(tool\) says"
    ):
        Renderer(tokenizer_with(trl_templates["phi3"]), config).render([ChatExample(messages, [TOOL])], entry)


def test_contents_in_parts(trl_templates, tokenizer_with, chat_config):
    """Templates that read lists of parts get them, and conversations that have them are found too."""
    config, entry = chat_config()
    tokenizer = tokenizer_with(trl_templates["smolvlm"])
    rendered = Renderer(tokenizer, config).render([ChatExample(chat("Q", "A"))], entry)[0]
    assert trained_text(tokenizer, rendered) == [" A<end_of_utterance>"]
    parts = [
        {**message, "content": [{"type": "text", "text": message["content"]}]} for message in chat("Q", " A ")
    ]
    tokenizer = tokenizer_with(trl_templates["gemma3"])
    rendered = Renderer(tokenizer, config).render([ChatExample(parts)], entry)[0]
    assert trained_text(tokenizer, rendered) == ["A<end_of_turn>"]


def test_the_first_rows_go_both_ways(toy_tokenizer, monkeypatch):
    """A quick way that is wrong is given up, for its row as well."""
    template = ChatTemplate(toy_tokenizer)
    finder = TurnFinder(template)
    messages = chat("Q", "A", "Q", "B")
    full = template.text(messages)
    right = finder.find(messages, None, full, [1, 3])
    quick = _Quick.turn
    monkeypatch.setattr(_Quick, "turn", lambda self, at: quick(self, at) and quick(self, 1))
    fresh = TurnFinder(template)
    assert fresh.find(messages, None, full, [1, 3]) == right
    assert fresh.find(messages, None, full, [3]) == {3: right[3]}
