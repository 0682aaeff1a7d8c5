"""Ollama's Modelfile: its template gives the text that the run's own format gives."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from luthier.config import Config
from luthier.data import templates
from luthier.data.chat import ChatTemplate
from luthier.data.formats import prompt_example
from luthier.export.modelfile import modelfile, read_turns
from tests.export.gguf_models import tokenizer

CONVERSATIONS = [
    [("user", "Hello?")],
    [("system", "Be kind."), ("user", "One\ntwo")],
    [("user", "Hello?"), ("assistant", "Yes."), ("user", "Good.")],
    [("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]


def go(template: str, values: dict[str, Any]) -> str:
    """As much of Go's templates as is written: if, else, else if, range over messages, fields, eq, a variable."""
    variables: dict[str, Any] = {}
    tokens = re.split(r"(\{\{.*?\}\})", template)

    def value(expression: str, scope: dict[str, Any]) -> Any:
        if match := re.fullmatch(r'eq (\.\w+) "(\w+)"', expression):
            return scope[match[1][1:]] == match[2]
        return variables[expression] if expression.startswith("$") else scope[expression[1:]]

    def run(at: int, scope: dict[str, Any], live: bool) -> tuple[str, int, str]:
        """Text up to what ends the block, its place, and that word."""
        out = ""
        while at < len(tokens):
            token = tokens[at]
            if not token.startswith("{{"):
                out += token if live else ""
                at += 1
                continue
            word = token[2:-2].strip()
            if word == "end" or word.startswith("else"):
                return out, at, word
            if match := re.fullmatch(r"(\$\w+) :?= (.+)", word):
                if live:
                    variables[match[1]] = "" if match[2] == '""' else value(match[2], scope)
                at += 1
            elif word.startswith("range "):
                items = value(word[6:], scope) if live else []
                end = run(at + 1, scope, False)[1]
                for item in items:
                    out += run(at + 1, item, True)[0]
                at = end + 1
            elif word.startswith("if "):
                done, test = False, word[3:]
                while True:
                    chosen = live and not done and bool(value(test, scope) if test else True)
                    text, at, word = run(at + 1, scope, chosen)
                    out += text
                    done = done or chosen
                    if word == "end":
                        break
                    test = word.removeprefix("else").strip().removeprefix("if").strip()
                at += 1
            else:
                out += str(value(word, scope)) if live else ""
                at += 1
        return out, at, ""

    return run(0, values, True)[0]


def template_in(text: str) -> str:
    found = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    assert found is not None
    return found[1]


def filled(template: str, conversation: list[tuple[str, str]]) -> str:
    """As Ollama does: the system texts by themselves, and all messages."""
    messages = [{"Role": role, "Content": content} for role, content in conversation]
    system = "\n\n".join(content for role, content in conversation if role == "system")
    return go(template, {"System": system, "Messages": messages})


@pytest.mark.parametrize("name", templates.names())
def test_shipped_chat_templates(name: str) -> None:
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer("llama3").backend_tokenizer,
        bos_token="<|begin|>",
        eos_token="<|endoftext|>",
        chat_template=templates.named(name),
    )
    chat = ChatTemplate(words)
    if read_turns(chat, "<|begin|>") is None:
        text = modelfile("x.gguf", words, None, [], adds_bos=True)
        assert "TEMPLATE" not in re.sub("^#.*$", "", text, flags=re.MULTILINE) and "# No TEMPLATE: the chat" in text
        return
    template = template_in(modelfile("x.gguf", words, None, [], adds_bos=True))
    takes_system = ".System }}" in template
    for conversation in CONVERSATIONS:
        if conversation[0][0] == "system" and not takes_system:
            continue
        expected = chat.text([{"role": r, "content": c} for r, c in conversation], header=True)
        assert filled(template, conversation) == expected.removeprefix("<|begin|>")


def test_the_common_ones_are_translated() -> None:
    done = set()
    for name in templates.names():
        words = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer("gpt2").backend_tokenizer,
            bos_token="<|begin|>",
            eos_token="<|endoftext|>",
            chat_template=templates.named(name),
        )
        if read_turns(ChatTemplate(words), "<|begin|>") is not None:
            done.add(name)
    assert {"chatml", "llama3", "phi_3", "gemma", "gemma3", "qwen3"} <= done


def config(kind: Any) -> Config:
    return Config.from_flat({"base_model": "x", "datasets": [{"path": "none.jsonl", "type": kind}]})


OWN = {"format": "Q: {instruction}\nA:", "no_input_format": "Q: {instruction}\nA:", "system_prompt": 'Say "yes".'}


@pytest.mark.parametrize("kind", ["alpaca", "alpaca_chat.load_qa", OWN])
def test_instruction_formats(kind: Any) -> None:
    run = config(kind)
    text = modelfile("x.gguf", tokenizer("gpt2"), run, ["<|endoftext|>"], adds_bos=False)
    template = template_in(text)
    assert template.endswith("{{ .Response }}<|endoftext|>")
    entry = run.data.datasets[0]
    for system in ("", "Be kind."):
        expected = prompt_example(entry, "Why?", system=system or None).segments[0].text  # type: ignore[union-attr]
        assert go(template, {"System": system, "Prompt": "Why?", "Response": ""}) == f"{expected}<|endoftext|>"
    assert ('SYSTEM """Say "yes"."""' in text) == (kind is OWN)
    assert text.startswith("FROM ./x.gguf\n") and 'PARAMETER stop "<|endoftext|>"' in text


def test_raw_text() -> None:
    template = template_in(modelfile("x.gguf", tokenizer("gpt2"), config("completion"), [], adds_bos=False))
    assert go(template, {"System": "", "Prompt": "Once", "Response": ""}) == "Once<|endoftext|>"


def test_what_go_would_take_for_its_own_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer("gpt2").backend_tokenizer,
        eos_token="<|endoftext|>",
        chat_template="{% for m in messages %}{{ '{{' + m.role + '}}' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '{{assistant}}' }}{% endif %}",
    )
    text = modelfile("x.gguf", words, None, ['a"b'], adds_bos=False)
    assert "TEMPLATE \"\"\"" not in text and "cannot hold" in caplog.text
    assert "stop" not in text.replace("No TEMPLATE", "") and "cannot be quoted" in caplog.text
