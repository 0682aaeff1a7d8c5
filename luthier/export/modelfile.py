"""Ollama's Modelfile: the weights, the template in Ollama's own language, where answers end, the system text.

Ollama fills templates of Go's kind, and takes one from the chat template in a GGUF file only where that is one of those
it knows. So it is translated: what stands around each role's text is read off conversations that the chat template
renders, and the result is kept only if it gives the same text for further conversations. Runs on instruction data
have their prompt as template.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from luthier.config import Config
from luthier.data.chat import ChatTemplate
from luthier.data.examples import TextExample
from luthier.data.formats import kind_of_entry, prompt_example, prompt_format
from luthier.data.tokenizer import chat_template_of
from luthier.errors import DataError, LuthierError

log = logging.getLogger("luthier")

_S, _U, _A, _V = "SYSTEMTEXT", "FIRSTQUESTION", "FIRSTANSWER", "SECONDQUESTION"


def modelfile(
    weights: str, tokenizer: PreTrainedTokenizerBase, run: Config | None, ends: Sequence[str], *, adds_bos: bool
) -> str:
    """The text of a Modelfile.

    Args:
        weights: name of the GGUF file beside it. run: whose format prompts are in; None takes the chat template.
        ends: tokens that end an answer. adds_bos: llama.cpp puts BOS before each prompt, so the template must not.
    """
    bos = tokenizer.bos_token if adds_bos else None
    template, why = _template(tokenizer, run, bos or "")
    lines = [f"FROM ./{weights}", ""]
    if template is None:
        log.warning("Modelfile: no TEMPLATE: %s; Ollama takes the file's own chat template if it knows it", why)
        lines += [
            f"# No TEMPLATE: {why}.",
            "# Ollama recognises some chat templates in the GGUF file; else each prompt is taken as raw text.",
        ]
    else:
        lines.append(f'TEMPLATE """{template}"""')
    lines.append("")
    for end in ends:
        if '"' in end or "\n" in end:
            log.warning("Modelfile: no stop for %r, which cannot be quoted there", end)
        else:
            lines.append(f'PARAMETER stop "{end}"')
    if system := _system(run):
        quote = '"""' if "\n" in system or '"' in system else '"'
        lines.append(f"SYSTEM {quote}{system}{quote}")
    return "\n".join(lines).rstrip() + "\n"


def _template(tokenizer: PreTrainedTokenizerBase, run: Config | None, bos: str) -> tuple[str | None, str]:
    """The template, or why there is none."""
    try:
        if run is not None:
            entry = run.data.datasets[0]
            plain = prompt_example(entry, "{{ .Prompt }}", rl=run.preference.rl)
            if isinstance(plain, TextExample):
                asked = prompt_example(entry, "{{ .Prompt }}", system="{{ .System }}", rl=run.preference.rl)
                assert isinstance(asked, TextExample)
                return _of_text(plain, asked, tokenizer.eos_token or "")
            chat = chat_template_of(tokenizer, run, getattr(entry, "chat_template", None))
        elif tokenizer.chat_template:
            chat = ChatTemplate(tokenizer)
        else:
            return "{{ .Prompt }}", ""
        found = read_turns(chat, bos)
    except LuthierError as error:
        return None, f"the chat template cannot be rendered ({error})"
    if found is None:
        return None, "the chat template does more than to set text around each turn"
    system = found.system or found.in_question or ()
    return _quotable(found.go(), [found.opening, *system, *found.user, *found.assistant, found.header])


def _of_text(plain: TextExample, asked: TextExample, eos: str) -> tuple[str | None, str]:
    without, with_system = plain.segments[0].text, asked.segments[0].text
    before = without
    if "{{ .System }}" in with_system:
        before = f"{{{{ if .System }}}}{with_system}{{{{ else }}}}{without}{{{{ end }}}}"
    literal = (without + with_system).replace("{{ .Prompt }}", "").replace("{{ .System }}", "")
    return _quotable(f"{before}{{{{ .Response }}}}{eos}", [literal, eos])


def _quotable(template: str, literals: Sequence[str]) -> tuple[str | None, str]:
    if any("{{" in text or '"""' in text for text in literals) or template.endswith('"'):
        return None, "its text has what Ollama's templates cannot hold"
    return template, ""


def _system(run: Config | None) -> str:
    if run is None:
        return ""
    entry = run.data.datasets[0]
    try:
        is_prompt = kind_of_entry(entry, run.preference.rl) == "prompt"
        return prompt_format(entry).system_prompt if is_prompt else ""
    except LuthierError:  # a type of preference data, which has no text of its own
        return ""


# --- chat templates -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turns:
    """Text around the turns of a conversation, each as (before, behind).

    Attributes:
        opening: before the first turn where there is no system text. system: with the opening that it has; None
            where the template refuses one, or sets it inside of the first question.
        header: what opens an answer.
    """

    opening: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    header: str
    in_question: tuple[str, str] | None = None
    """Around a system text that stands inside of the first question, before its text."""

    def text(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation with the header of an answer, as `go` renders it."""
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        parts = [self.system[0], system, self.system[1]] if system and self.system else [self.opening]
        left = system if self.in_question else ""
        for message in messages:
            if message["role"] != "system":
                before, behind = self.user if message["role"] == "user" else self.assistant
                if message["role"] == "user" and left and self.in_question:
                    before, left = left.join(self.in_question), ""
                parts += [before, message["content"], behind]
        return "".join([*parts, self.header])

    def go(self) -> str:
        opening = self.opening
        if self.system is not None:
            told = "{{ .System }}".join(self.system)
            opening = f"{{{{ if .System }}}}{told}{{{{ else }}}}{opening}{{{{ end }}}}"
        before = self.user[0]
        if self.in_question is not None:
            told = "{{ $system }}".join(self.in_question)
            before = f'{{{{ if $system }}}}{told}{{{{ else }}}}{before}{{{{ end }}}}{{{{ $system = "" }}}}'
            opening = f"{{{{ $system := .System }}}}{opening}"
        return (
            f"{opening}{{{{ range .Messages }}}}"
            f'{{{{ if eq .Role "user" }}}}{before}{{{{ .Content }}}}{self.user[1]}'
            f'{{{{ else if eq .Role "assistant" }}}}{self.assistant[0]}{{{{ .Content }}}}{self.assistant[1]}'
            f"{{{{ end }}}}{{{{ end }}}}{self.header}"
        )


def read_turns(chat: ChatTemplate, bos: str) -> Turns | None:
    """What a chat template sets around each turn; None where there is more to it.

    Args:
        bos: left out at the very beginning.
    """
    question = [_said("user", _U)]
    more = [*question, _said("assistant", _A), _said("user", _V)]
    told = [_said("system", _S), *question]
    alone, headed = chat.text(question), chat.text(question, header=True)
    if not headed.startswith(alone):
        return None
    header = headed[len(alone) :]
    whole, answered = chat.text(more), chat.text(more[:2])
    cut = _cut(whole, (_U, _A, _V))
    if cut is None or _A not in answered:
        return None
    first, between, second, behind_user = cut
    behind_answer = answered.split(_A)[1]
    if not between.startswith(behind_user) or not second.startswith(behind_answer):
        return None
    before_user = second[len(behind_answer) :]
    if not first.endswith(before_user):
        return None
    opening = first[: len(first) - len(before_user)]
    system = in_question = None
    conversations = [question, more]
    if _takes_system(chat, told):
        in_system = _cut(chat.text(told), (_S, _U))
        if in_system is None:
            return None
        if in_system[1].endswith(before_user):
            system = in_system[0].removeprefix(bos), in_system[1][: len(in_system[1]) - len(before_user)]
        elif in_system[0].startswith(opening):
            in_question = in_system[0][len(opening) :], in_system[1]
        else:
            return None
        conversations += [told, [told[0], *more], [told[0], *more, *more[1:]]]
    found = Turns(
        opening.removeprefix(bos),
        system,
        (before_user, behind_user),
        (between[len(behind_user) :], behind_answer),
        header,
        in_question,
    )
    same = all(found.text(one) == chat.text(one, header=True).removeprefix(bos) for one in conversations)
    return found if same else None


def _takes_system(chat: ChatTemplate, told: Sequence[dict[str, Any]]) -> bool:
    try:
        return _S in chat.text(told)
    except DataError:
        return False


def _said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _cut(text: str, at: Sequence[str]) -> list[str] | None:
    parts = []
    for mark in at:
        before, found, text = text.partition(mark)
        if not found:
            return None
        parts.append(before)
    return [*parts, text]
