"""Named chat templates against the families' own, and the check of a template before training."""

from __future__ import annotations

import logging

import pytest

from luthier.config import Config
from luthier.data import templates
from luthier.data.chat import ChatTemplate
from luthier.data.examples import ChatExample
from luthier.data.render import UNTRAINED, Renderer
from luthier.errors import ConfigError, DataError
from tests.data.test_chat_masks import CALL, RESULT, TOOL, chat, trained_text, without_marks

S, Q, A, R, B = "Be brief.", "Why?", "So.", "And?", "Yes."

# Single turn and then, with a system text, two turns; trained stretches in « ». From the models' cards.
FORMATS = {
    "chatml": (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n«So.<|im_end|>»\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        "«So.<|im_end|>»\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n«Yes.<|im_end|>»\n",
    ),
    "qwen_25": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n«So.<|im_end|>»\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        "«So.<|im_end|>»\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n«Yes.<|im_end|>»\n",
    ),
    "qwen3": (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nSo.<|im_end|>»\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        "«So.<|im_end|>»\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\n\n</think>\n\nYes.<|im_end|>»\n",
    ),
    "llama3": (
        "<bos><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«So.<|eot_id|>»",
        "<bos><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«So.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Yes.<|eot_id|>»",
    ),
    "llama2": (
        "<bos>[INST] Why? [/INST]« So. </s>»",
        "<bos>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhy? [/INST]« So. </s>»<bos>[INST] And? [/INST]« Yes. </s>»",
    ),
    "gemma": (
        "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n«So.<end_of_turn>»\n",
        "<bos><start_of_turn>user\nBe brief.\n\nWhy?<end_of_turn>\n<start_of_turn>model\n«So.<end_of_turn>»\n"
        "<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\n«Yes.<end_of_turn>»\n",
    ),
    "phi_3": (
        "<|user|>\nWhy?<|end|>\n<|assistant|>\n«So.<|end|>»\n",
        "<|system|>\nBe brief.<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n«So.<|end|>»\n"
        "<|user|>\nAnd?<|end|>\n<|assistant|>\n«Yes.<|end|>»\n",
    ),
    "phi_4": (
        "<|im_start|>user<|im_sep|>Why?<|im_end|><|im_start|>assistant<|im_sep|>«So.<|im_end|>»",
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Why?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>«So.<|im_end|>»<|im_start|>user<|im_sep|>And?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>«Yes.<|im_end|>»",
    ),
    "mistral_v1": (
        "<bos>[INST] Why? [/INST]« So.</s>»",
        "<bos>[INST] Be brief.\n\nWhy? [/INST]« So.</s>»[INST] And? [/INST]« Yes.</s>»",
    ),
    "mistral_v2v3": (
        "<bos>[INST] Why?[/INST]« So.</s>»",
        "<bos>[INST] Be brief.\n\nWhy?[/INST]« So.</s>»[INST] And?[/INST]« Yes.</s>»",
    ),
    "mistral_v3_tekken": (
        "<bos>[INST]Why?[/INST]«So.</s>»",
        "<bos>[INST]Be brief.\n\nWhy?[/INST]«So.</s>»[INST]And?[/INST]«Yes.</s>»",
    ),
    "zephyr": (
        "<|user|>\nWhy?</s>\n<|assistant|>\n«So.</s>»\n",
        "<|system|>\nBe brief.</s>\n<|user|>\nWhy?</s>\n<|assistant|>\n«So.</s>»\n"
        "<|user|>\nAnd?</s>\n<|assistant|>\n«Yes.</s>»\n",
    ),
    "vicuna": (
        "<bos>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Why? ASSISTANT:« So.</s>»",
        "<bos>Be brief. USER: Why? ASSISTANT:« So.</s>»USER: And? ASSISTANT:« Yes.</s>»",
    ),
    "alpaca": (
        "<bos>Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nWhy?\n\n### Response:\n«So.</s>»",
        "<bos>Be brief.\n\n### Instruction:\nWhy?\n\n### Response:\n«So.</s>»\n\n"
        "### Instruction:\nAnd?\n\n### Response:\n«Yes.</s>»",
    ),
    "deepseek_v3": (
        "<bos><｜User｜>Why?<｜Assistant｜>«So.<｜end▁of▁sentence｜>»",
        "<bos>Be brief.<｜User｜>Why?<｜Assistant｜>«So.<｜end▁of▁sentence｜>»"
        "<｜User｜>And?<｜Assistant｜>«Yes.<｜end▁of▁sentence｜>»",
    ),
}  # fmt: skip


def test_every_template_is_tested():
    folder_names = {name for name in templates.names() if name not in templates._ALIASES}
    assert folder_names == set(FORMATS)
    assert set(templates._ALIASES.values()) <= folder_names
    assert {"chatml", "llama3", "gemma", "phi", "mistral", "qwen", "alpaca"} <= set(templates.names())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("marked", [True, False])
def test_named_templates(tokenizer_with, chat_config, name, marked):
    """Text and masks of one and of several turns, with the template's marks and without them."""
    template = templates.named(name)
    config, entry = chat_config()
    tokenizer = tokenizer_with(template if marked else without_marks(template))
    renderer = Renderer(tokenizer, config)
    renderer.check(entry)
    for messages, expected in zip((chat(Q, A), chat(Q, A, R, B, system=S)), FORMATS[name], strict=True):
        rendered = renderer.render([ChatExample(messages)], entry)[0]
        pieces = expected.replace("«", "»").split("»")
        assert tokenizer.decode(rendered.input_ids) == "".join(pieces)
        assert trained_text(tokenizer, rendered) == pieces[1::2]
        prompt = renderer.prompt_ids(ChatExample(messages), entry)
        assert rendered.input_ids[: len(prompt)] == prompt
        assert rendered.labels[len(prompt)] != UNTRAINED


@pytest.mark.parametrize(
    ("name", "family", "system"),
    [("qwen3", "qwen3", True), ("qwen_25", "qwen2_5", True), ("llama3", "llama3", True), ("gemma", "gemma3", True),
     ("gemma", "gemma", False), ("chatml", "qwen3_instruct_2507", True)],
)  # fmt: skip
def test_named_templates_equal_the_families_own(
    trl_templates, tokenizer_with, random_chats, name, family, system
):
    tokenizer = tokenizer_with(trl_templates[family])
    ours, theirs = ChatTemplate(tokenizer, templates.named(name)), ChatTemplate(tokenizer)
    tooled = family.startswith("qwen")
    for number, messages in enumerate(random_chats(5, 12, system=system)):
        tools = [TOOL] if tooled and number % 2 else None
        if tools:
            messages[-1:-1] = [CALL, RESULT, RESULT]
        assert ours.text(messages, tools) == theirs.text(messages, tools)
        assert ours.text(messages[:-1], tools, header=True) == theirs.text(messages[:-1], tools, header=True)


def test_llama3_tools(tokenizer_with, trl_templates):
    """Calls and results are as in Llama 3.1's own template; that one adds dates to the system turn."""
    template = templates.named("llama3")
    ours = ChatTemplate(tokenizer_with(template))
    text = ours.text(
        [{"role": "user", "content": "Weather?"}, CALL, RESULT, *chat("x", "Sunny.")[1:]], [TOOL]
    )
    theirs = ChatTemplate(tokenizer_with(trl_templates["llama3_1"]))
    expected = theirs.text(
        [{"role": "user", "content": "Weather?"}, CALL, RESULT, *chat("x", "Sunny.")[1:]], [TOOL]
    )
    question = expected.index("<|start_header_id|>user")
    assert text.removeprefix("<bos>") == expected[question:].replace('"sunny"', "sunny")


@pytest.mark.parametrize(
    ("choice", "jinja", "problem"),
    [
        ("chatmll", None, r"no template named 'chatmll'. Did you mean 'chatml'\?"),
        ("jinja", None, "chat_template_jinja"),
        ("chatml", "{{ x }}", "keep one of them"),
        ("missing/file.jinja", None, "cannot read missing/file.jinja"),
    ],
)
def test_choices_that_are_errors(choice, jinja, problem):
    with pytest.raises(ConfigError, match=problem):
        templates.chosen(choice, jinja, None)


def test_choices(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages }}", encoding="utf-8")
    assert templates.chosen(None, None, "own") == "own"
    assert templates.chosen("tokenizer_default", None, None) is None
    assert templates.chosen("tokenizer_default_fallback_chatml", None, None) == templates.named("chatml")
    assert templates.chosen("tokenizer_default_fallback_chatml", None, "own") == "own"
    assert templates.chosen(str(path), None, None) == "{{ messages }}"
    assert templates.chosen("jinja", str(path), None) == "{{ messages }}"
    assert templates.chosen("jinja", "{{ x }}", None) == "{{ x }}"
    assert templates.chosen(None, "{{ x }}", None) == "{{ x }}"
    assert templates.chosen("rag", None, {"default": "a", "rag": "b"}) == "b"


def test_check_refuses_a_template_without_an_end(tokenizer_with, chat_config):
    config, entry = chat_config()
    nothing = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    with pytest.raises(DataError, match="It puts nothing behind an answer"):
        Renderer(tokenizer_with(nothing), config).check(entry)


def test_check_refuses_an_end_that_is_several_tokens(toy_tokenizer, tokenizer_with, chat_config):
    """ChatML on a tokenizer that does not know its tokens: nothing could stop a generation."""
    config, entry = chat_config()
    tokenizer = tokenizer_with()
    tokenizer.chat_template = (
        templates.named("chatml").replace("im_end", "im_done").replace("im_start", "im_begin")
    )
    with pytest.raises(DataError, match=r"'<\|im_done\|>\\n', to this tokenizer \d+ ordinary token"):
        Renderer(tokenizer, config).check(entry)
    tokenizer.add_tokens(["<|im_done|>"])
    Renderer(tokenizer, config).check(entry)


def test_check_of_an_end_that_belongs_to_the_next_message(trl_templates, tokenizer_with, chat_config, caplog):
    """GLM 4: `<|user|>` ends an answer, and no answer that stands last has it."""
    tokenizer = tokenizer_with(trl_templates["glm4moe"])
    config, entry = chat_config()
    with pytest.raises(DataError, match="eot_tokens"):
        Renderer(tokenizer, config).check(entry)
    config, entry = chat_config(eot_tokens=["<|user|>"])
    renderer = Renderer(tokenizer, config)
    with caplog.at_level(logging.WARNING):
        renderer.check(entry)
    assert "behind the last answer" in caplog.text
    rendered = renderer.render([ChatExample(chat(Q, A, R, B))], entry)[0]
    assert trained_text(tokenizer, rendered)[0].endswith("So.<|user|>")


def test_check_says_that_there_is_no_generation_prompt(tokenizer_with, chat_config, caplog):
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}"
    config, entry = chat_config()
    with caplog.at_level(logging.WARNING):
        Renderer(tokenizer_with(template, tokens=("<|assistant|>", "<|user|>")), config).check(entry)
    assert "'<|assistant|>' itself before each answer" in caplog.text


@pytest.mark.parametrize(
    ("template", "last", "all_of_them"),
    [
        ("qwen3", ["<|im_end|>"], ["<|im_end|>"]),
        ("cohere2", ["<|END_OF_TURN_TOKEN|>"], ["<|END_OF_TURN_TOKEN|>"]),
        ("gptoss", ["<|return|>", "<|call|>"], ["<|return|>", "<|call|>", "<|end|>"]),
        ("phi3", ["<|end|>"], ["<|end|>"]),
        ("deepseekv3", ["<｜end▁of▁sentence｜>"], ["<｜end▁of▁sentence｜>"]),
    ],
)
def test_terminators_are_found(trl_templates, tokenizer_with, template, last, all_of_them):
    habits = ChatTemplate(tokenizer_with(trl_templates[template])).habits
    assert habits.last_terminators == last
    assert habits.terminators == all_of_them


def test_a_broken_template_is_an_error_of_the_config(tokenizer_with):
    with pytest.raises(ConfigError, match="chat_template: line 1"):
        ChatTemplate(tokenizer_with("{% for m in messages %}{{ m.role }")).text(chat(Q, A))


def test_an_entrys_own_template(toy_tokenizer):
    config = Config.from_flat({"base_model": "toy", "datasets": [
        {"path": "a.jsonl", "type": "chat_template"},
        {"path": "b.jsonl", "type": "chat_template", "chat_template": "phi_4"},
    ]})  # fmt: skip
    renderer = Renderer(toy_tokenizer, config)
    first, second = (renderer.render([ChatExample(chat(Q, A))], entry)[0] for entry in config.data.datasets)
    assert "<|im_sep|>" not in toy_tokenizer.decode(first.input_ids)
    assert "<|im_sep|>" in toy_tokenizer.decode(second.input_ids)
