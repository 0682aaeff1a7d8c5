"""A chat template in use: conversations to text, and what can be learnt about the template by trying it out.

Templates are programs that anyone may have written. What has to be known of one, such as the token that ends
an answer, is found by rendering small conversations and looking at what comes out, never by reading its
source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from luthier.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None
Span = tuple[int, int]

ASK, REPLY, ASK_AGAIN, REPLY_AGAIN = "Ask7", "Reply7", "AskAgain7", "ReplyAgain7"
CALLED, VALUE, RESULT, BRIEF = "called7", "Value7", "Result7", "Brief7"
_USER: Message = {"role": "user", "content": ASK}
_ANSWER: Message = {"role": "assistant", "content": REPLY}
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "call00007", "type": "function", "function": {"name": CALLED, "arguments": {"key": VALUE}}}
    ],
}
_RESULT: Message = {"role": "tool", "name": CALLED, "tool_call_id": "call00007", "content": RESULT}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": CALLED,
        "description": "",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}},
    },
}

_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(slots=True)
class Habits:
    """What a template does around the contents of messages."""

    endings: set[str] = field(default_factory=set)
    """Texts between an answer and the end of its terminator."""
    last_terminators: list[str] = field(default_factory=list)
    """Tokens that end an answer at which the conversation ends: where generation stops."""
    terminators: list[str] = field(default_factory=list)
    """Those, and tokens that end answers in the middle."""
    openings: dict[str, str] = field(default_factory=dict)
    """Per role, the text between such a message's content and the place from which an answer is generated."""
    gaps: dict[str, str] = field(default_factory=dict)
    """The first part of that: what ends the message, before the header of the answer."""
    header: str = ""
    """The header that opens an answer."""
    before_answer: str = ""
    """What stands between that header and the content of a last answer."""
    tail: str = ""
    """All that stands behind the content of a last answer."""
    writes_calls: bool = False
    """Whether tool calls are in the text at all."""


class ChatTemplate:
    """The template of one tokenizer, with the variables of a config.

    Args:
        override: template text in place of the tokenizer's own.
        eot_tokens: tokens that end turns besides those that are found.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        override: str | None = None,
        variables: Mapping[str, Any] | None = None,
        eot_tokens: Sequence[str] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.override = override
        self.eot_tokens = tuple(eot_tokens)
        self._variables = {**tokenizer.special_tokens_map, **(variables or {})}

    def source(self, tools: Tools = None) -> str:
        """The template's text; some models have one of their own for tools."""
        try:
            return self.tokenizer.get_chat_template(self.override, tools)
        except ValueError as error:
            raise ConfigError(f"chat_template: {' '.join(str(error).split())}") from error

    def has_marks(self, tools: Tools = None) -> bool:
        return _MARKS.search(self.source(tools)) is not None

    def text(self, messages: Sequence[Message], tools: Tools = None, header: bool = False) -> str:
        """The conversation as text; with `header` also what opens an answer (`add_generation_prompt`)."""
        return self._render(messages, tools, header, marks=False)[0]

    def text_and_marks(self, messages: Sequence[Message], tools: Tools = None) -> tuple[str, list[Span]]:
        """The conversation, and the characters that lie in `{% generation %}` blocks."""
        return self._render(messages, tools, False, marks=self.has_marks(tools))

    def _render(
        self, messages: Sequence[Message], tools: Tools, header: bool, marks: bool
    ) -> tuple[str, list[Span]]:
        if self._wants_parts:
            messages = [_in_parts(message) for message in messages]
        return self._render_as_is(messages, tools, header, marks)

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether contents have to be lists of parts, as some templates of models that see images want."""
        plain, answers = [_USER, _ANSWER], []
        for messages in (plain, [_in_parts(message) for message in plain]):
            try:
                answers.append(REPLY in self._render_as_is(messages, None, False, False)[0])
            except DataError:
                answers.append(False)
        return answers == [False, True]

    def _render_as_is(
        self, messages: Sequence[Message], tools: Tools, header: bool, marks: bool
    ) -> tuple[str, list[Span]]:
        import jinja2
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # its annotations are not what it returns
        try:
            texts, spans = render(
                conversations=[list(messages)],
                tools=tools,
                chat_template=self.source(tools),
                return_assistant_tokens_mask=marks,
                add_generation_prompt=header,
                **self._variables,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"chat_template: line {error.lineno}: {error.message}") from error
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
        ) as error:
            raise DataError(f"the chat template refuses this conversation: {error}") from error
        return texts[0], [(start, end) for start, end in spans[0]] if marks else []

    def _try(self, messages: Sequence[Message], tools: Tools = None, header: bool = False) -> str | None:
        try:
            return self.text(messages, tools, header)
        except DataError:
            return None

    @cached_property
    def added_tokens(self) -> re.Pattern[str]:
        """Matches every token of the vocabulary that was added as a whole."""
        return _any_of({*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens})

    @cached_property
    def special_tokens(self) -> re.Pattern[str]:
        """Matches what the tokenizer reads as a special token wherever it stands in a text."""
        added = self.tokenizer.added_tokens_decoder.values()
        return _any_of(
            {*(token.content for token in added if token.special), *self.tokenizer.all_special_tokens}
        )

    @cached_property
    def ends(self) -> re.Pattern[str]:
        """Matches the tokens that end a turn."""
        return _any_of({*self.habits.terminators, *self.eot_tokens})

    @cached_property
    def habits(self) -> Habits:
        """Empty where not even one question and one answer can be rendered."""
        found = Habits(tail=_behind(self._try([_USER, _ANSWER]), REPLY) or "")
        self._find_endings(found)
        self._find_openings(found)
        return found

    def _find_endings(self, found: Habits) -> None:
        """The terminators, told by the added tokens that stand side by side behind an answer.

        Of several the last one ends the turn (Cohere closes the response, then the turn), but only as far as
        they also stand behind an answer in the middle: some templates put an EOS behind the whole
        conversation.
        """
        question, answer = (
            {"role": "user", "content": ASK_AGAIN},
            {"role": "assistant", "content": REPLY_AGAIN},
        )
        middle = _between(self._try([_USER, _ANSWER, question, answer]), REPLY, ASK_AGAIN)
        at_end, inside = self._run(found.tail), self._run(middle)
        common = 0
        while common < min(len(at_end), len(inside)) and at_end[common][0] == inside[common][0]:
            common += 1
        named = [match for match in at_end if match[0] in self.eot_tokens]
        if end := (named or at_end[:common] or at_end)[-1:]:
            token, place = end[0]
            found.last_terminators.append(token)
            found.endings.add(found.tail[:place])
        ends = {*found.last_terminators, *self.eot_tokens}
        known = [match for match in inside if match[0] in ends]
        # A lone token before a question may be that question's header, unless it is known to end answers.
        if known or len(inside) > 1:
            token, place = (known or inside)[0]
            found.endings.add(middle[:place])
            if token not in ends:
                found.terminators.append(token)
        called = _behind(self._try([_USER, _CALL], [_TOOL]), VALUE)
        found.writes_calls = called is not None
        if called:
            known_end = _any_of({*found.last_terminators, *found.terminators, *self.eot_tokens}).search(
                called
            )
            closing = [match.group() for match in self.special_tokens.finditer(called)]
            if known_end is None and closing:
                found.last_terminators.append(closing[-1])
        found.terminators = [*found.last_terminators, *found.terminators]

    def _run(self, text: str) -> list[tuple[str, int]]:
        """The first added token of a text and those directly behind it, each with the place of its end."""
        tokens: list[tuple[str, int]] = []
        match = self.added_tokens.search(text)
        while match is not None:
            if match.group() == self.tokenizer.bos_token:
                break  # a conversation in the style of Llama 2, which begins anew with each question
            tokens.append((match.group(), match.end()))
            match = self.added_tokens.match(text, match.end())
        return tokens

    def _find_openings(self, found: Habits) -> None:
        before = {
            "user": ([_USER], ASK),
            "system": ([{"role": "system", "content": BRIEF}], BRIEF),
            "assistant": ([_USER, _ANSWER], REPLY),
            "tool": ([_USER, _CALL, _RESULT], RESULT),
        }
        for role, (messages, content) in before.items():
            tools = [_TOOL] if role == "tool" else None
            closed, opened = self._try(messages, tools), self._try(messages, tools, header=True)
            if closed is None or opened is None:
                continue
            opening, gap = _behind(opened, content), _behind(closed, content)
            if opening is not None:
                found.openings[role] = opening
            if gap is not None and opening is not None and opening.startswith(gap):
                found.gaps[role] = gap
        found.header = found.openings.get("user", "").removeprefix(found.gaps.get("user", ""))
        answered, opened = self._try([_USER, _ANSWER]), self._try([_USER], header=True)
        if opened is not None and answered is not None and answered.startswith(opened):
            found.before_answer = answered[len(opened) :].partition(REPLY)[0]


def clean(messages: Sequence[Message]) -> list[Message]:
    """Messages as templates take them: without our `train`, and without keys that are None."""
    return [
        {key: value for key, value in message.items() if value is not None and key != "train"}
        for message in messages
    ]


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    return (
        {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message
    )


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    longest_first = sorted((token for token in tokens if token), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _behind(text: str | None, content: str) -> str | None:
    """What stands behind `content`, if it stands in the text just once."""
    return text.partition(content)[2] if text is not None and text.count(content) == 1 else None


def _between(text: str | None, first: str, second: str) -> str:
    if text is None or text.count(second) != 1:
        return ""
    return text.partition(second)[0].partition(first)[2]
