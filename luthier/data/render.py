"""From examples to token ids and labels.

The rule behind every label: trained is what the model has to write itself, and nothing else. In plain text that is
the answer and the EOS behind it. In a conversation it is each trained turn, from just behind the header that
generation starts with up to and including the token that ends the turn; what a template puts behind that token (a
newline) is never generated, since generation has stopped by then.

Text in the data that reads like a special token (`</s>` in somebody's question) becomes that token, as it does in
transformers; such rows are counted, and the first one is told of.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.config import Config
from luthier.config.datasets import DatasetEntry
from luthier.data import templates
from luthier.data.chat import ASK, REPLY, ChatTemplate, Message, Span, clean
from luthier.data.encode import Encoded, TextEncoder
from luthier.data.examples import ChatExample, Example, TextExample, TokenExample
from luthier.data.spans import Turn, TurnFinder
from luthier.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("luthier")

UNTRAINED = -100
"""Label of a token that is not trained, as everywhere in torch and transformers."""


@dataclass(slots=True)
class Rendered:
    """One document: `labels` are aligned with `input_ids`, -100 where nothing is trained; the trainer shifts.

    `lengths` are the documents' tokens where a row brought several of them, else None.
    """

    input_ids: list[int]
    labels: list[int]
    lengths: tuple[int, ...] | None = None


class Renderer:
    """Examples to tokens, with one tokenizer and the options of one config.

    `special_text_rows` counts the rows whose text held a special token's text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer)
        self.special_text_rows = 0
        self._data = config.data
        self._finders: dict[str | None, tuple[ChatTemplate, TurnFinder]] = {}

    def render(self, examples: Sequence[Example], entry: DatasetEntry) -> list[Rendered]:
        """Tokens of a batch of examples, in their order. Raises DataError for the first that cannot be rendered."""
        rendered = []
        for result in self.render_each(examples, entry):
            if isinstance(result, DataError):
                raise result
            rendered.append(result)
        return rendered

    def render_each(self, examples: Sequence[Example], entry: DatasetEntry) -> list[Rendered | DataError]:
        """As `render`, with the error in the place of an example that cannot be rendered."""
        results: list[Rendered | DataError | None] = [None] * len(examples)
        texts = [(at, example) for at, example in enumerate(examples) if isinstance(example, TextExample)]
        chats = [(at, example) for at, example in enumerate(examples) if isinstance(example, ChatExample)]
        for at, rendered in self._texts(texts):
            results[at] = rendered
        for at, result in self._chats(chats, entry):
            results[at] = result
        for at, example in enumerate(examples):
            if isinstance(example, TokenExample):
                results[at] = Rendered(list(example.input_ids), list(example.labels), example.lengths)
        return [result for result in results if result is not None]

    def prompt_ids(self, example: Example, entry: DatasetEntry) -> list[int]:
        """What generation starts from: everything before the last answer, with the header that opens an answer."""
        if isinstance(example, TokenExample):
            first = next(
                (at for at, label in enumerate(example.labels) if label != UNTRAINED), len(example.labels)
            )
            return list(example.input_ids[:first])
        if isinstance(example, TextExample):
            segments = example.segments
            while segments and segments[-1].trained:
                segments = segments[:-1]
            prompt = TextExample(segments, add_bos=example.add_bos, add_eos=False)
            return next(iter(self._texts([(0, prompt)])))[1].input_ids
        messages = clean(example.messages)
        while messages and messages[-1].get("role") == "assistant":
            messages.pop()
        if not messages:
            raise DataError(
                "the conversation has no turn before its answer, so there is nothing to generate from"
            )
        template, _ = self._finder(entry)
        return self.encoder.beginnings([template.text(messages, example.tools, header=True)])[0]

    # --- plain text ------------------------------------------------------------------------------------------------

    def _texts(self, examples: Sequence[tuple[int, TextExample]]) -> Iterable[tuple[int, Rendered]]:
        """All segments of all examples in two calls of the tokenizer: those that begin a document, and the others."""
        if not examples:
            return
        pieces = [[segment for segment in example.segments if segment.text] for _, example in examples]
        first = iter(self.encoder.beginnings([row[0].text for row in pieces if row]))
        later = iter(self.encoder.continuations([segment.text for row in pieces for segment in row[1:]]))
        eos, opening = self.tokenizer.eos_token_id, self.encoder.opening
        for (at, example), row in zip(examples, pieces, strict=True):
            ids: list[int] = []
            labels: list[int] = []
            for number, segment in enumerate(row):
                new = next(later) if number else next(first)
                ids += new
                labels += new if segment.trained else [UNTRAINED] * len(new)
            self._note_special(at, ids, (segment.text for segment in row))
            if (
                example.add_bos and ids[: len(opening)] != opening
            ):  # text that brings its BOS gets no second one
                ids, labels = opening + ids, [UNTRAINED] * len(opening) + labels
            if example.add_eos and ids[-1:] != [eos]:
                ids.append(eos)
                labels.append(eos if example.segments and example.segments[-1].trained else UNTRAINED)
            yield at, Rendered(ids, labels)

    def _note_special(self, row: int, ids: Sequence[int], texts: Iterable[str]) -> None:
        if self.encoder.special_ids.isdisjoint(ids):
            return
        self.special_text_rows += 1
        if self.special_text_rows == 1:
            number = next(number for number in ids if number in self.encoder.special_ids)
            self._warn_special(str(self.tokenizer.convert_ids_to_tokens(number)), "".join(texts))

    def _warn_special(self, token: str, text: str) -> None:
        at = text.find(token)
        log.warning(
            "text in the data reads like a special token and becomes that token: %s, first in %r",
            token,
            text[max(0, at - 30) : at + len(token) + 30],
        )

    # --- conversations ---------------------------------------------------------------------------------------------

    def _chats(
        self, examples: Sequence[tuple[int, ChatExample]], entry: DatasetEntry
    ) -> Iterable[tuple[int, Rendered | DataError]]:
        """Texts and trained characters one by one, then one call of the tokenizer for all texts."""
        if not examples:
            return
        ready: list[tuple[int, str, list[Span] | None]] = []
        for at, example in examples:
            try:
                ready.append((at, *self._characters(example, entry)))
            except DataError as error:
                yield at, error
        encoded = self.encoder.with_offsets([text for _, text, _ in ready])
        for (at, _, spans), tokens in zip(ready, encoded, strict=True):
            yield at, Rendered(tokens.ids, _labels(tokens, spans))

    def _characters(self, example: ChatExample, entry: DatasetEntry) -> tuple[str, list[Span] | None]:
        """A conversation's text and the stretches of it that are trained; None stands for all of it."""
        template, finder = self._finder(entry)
        messages = clean(example.messages)
        if not messages:
            raise DataError("the conversation has no messages")
        self._note_special_content(template, messages)
        if entry.train_on_inputs if entry.train_on_inputs is not None else self._data.train_on_inputs:
            return template.text(messages, example.tools), None
        roles = entry.roles_to_train if entry.roles_to_train is not None else ["assistant"]
        asked = [_is_trained(message, roles) for message in example.messages]
        wanted = [at for at, trained in enumerate(asked) if trained]
        full, marks = template.text_and_marks(messages, example.tools)
        answers = [message.get("role") == "assistant" for message in messages]
        train_on_eos = entry.train_on_eos or "turn"
        if marks and asked == answers:
            spans = _from_marks(template, full, marks, only_last_end=train_on_eos == "last")
        else:
            turns = finder.find(messages, example.tools, full, wanted)
            spans = _from_turns([turns[at] for at in wanted], only_last_end=train_on_eos == "last")
        if train_on_eos == "all":
            spans += [match.span() for match in template.ends.finditer(full)]
        return full, spans

    def _finder(self, entry: DatasetEntry) -> tuple[ChatTemplate, TurnFinder]:
        """The template of an entry, compiled and tried out once."""
        if entry.chat_template not in self._finders:
            override = templates.chosen(entry.chat_template, None, None)
            template = ChatTemplate(
                self.tokenizer,
                override if isinstance(override, str) else None,
                self._data.chat_template_kwargs,
                self._data.eot_tokens or (),
            )
            self._finders[entry.chat_template] = template, TurnFinder(template)
        return self._finders[entry.chat_template]

    def _note_special_content(self, template: ChatTemplate, messages: Sequence[Message]) -> None:
        for message in messages:
            content: Any = message.get("content")
            match = template.special_tokens.search(content) if isinstance(content, str) else None
            if match is not None:
                self.special_text_rows += 1
                if self.special_text_rows == 1:
                    self._warn_special(match.group(), content)
                return

    # --- before training -------------------------------------------------------------------------------------------

    def check(self, entry: DatasetEntry) -> None:
        """Try an entry's chat template out: an answer has to end with a token that is trained and stops generation.

        Raises:
            DataError: the answer's end is missing, is several tokens, or is not trained.
        """
        if not (isinstance(entry.type, str) and entry.type.startswith("chat_template")):
            return
        template, _ = self._finder(entry)
        habits = template.habits
        if not habits.header and (written := habits.before_answer.strip()):
            log.warning(
                "the chat template has no generation prompt (add_generation_prompt changes nothing): the model is trained "
                "to write %r itself before each answer",
                written,
            )
        probe = ChatExample([{"role": "user", "content": ASK}, {"role": "assistant", "content": REPLY}])
        roles = entry.roles_to_train if entry.roles_to_train is not None else ["assistant"]
        if "assistant" not in roles:
            return
        rendered = self.render([probe], entry)[0]
        trained = [number for number in rendered.labels if number != UNTRAINED]
        ends = {self.tokenizer.convert_tokens_to_ids(token) for token in habits.last_terminators}
        if ends.isdisjoint(trained):
            raise DataError(self._missing_end(template))

    def _missing_end(self, template: ChatTemplate) -> str:
        tail = template.habits.tail
        opening = "chat_template: an answer has no token at its end at which generation could stop. "
        if not tail.strip():
            seen = "The template puts nothing behind an answer."
        else:
            pieces = self.encoder.beginnings([tail.strip()])[0]
            seen = (
                f"Behind an answer the template puts {tail!r}, which this tokenizer reads as {len(pieces)} ordinary "
                f"token{'s' if len(pieces) > 1 else ''}."
            )
        return (
            f"{opening}{seen} Use the template that belongs to this model or another chat_template "
            f"({', '.join(templates.names())}), or make the text one token: `tokens: [...]`, and `eot_tokens: [...]` "
            "if it is not found by itself."
        )


def _is_trained(message: Message, roles: Sequence[str]) -> bool:
    """A message's own `train` decides, where there is one; else its role."""
    said = message.get("train")
    return bool(said) if said is not None else message.get("role") in roles


def _from_turns(turns: Sequence[Turn], only_last_end: bool) -> list[Span]:
    spans = []
    for number, turn in enumerate(turns):
        with_end = turn.terminator is not None and (not only_last_end or number == len(turns) - 1)
        spans.append((turn.start, turn.terminator[1] if with_end and turn.terminator else turn.end))
    return spans


def _from_marks(template: ChatTemplate, full: str, marks: Sequence[Span], only_last_end: bool) -> list[Span]:
    """A template's own `{% generation %}` blocks, taken at their word, except that a turn's end is always trained."""
    spans = []
    for number, (start, end) in enumerate(marks):
        following = marks[number + 1][0] if number + 1 < len(marks) else len(full)
        inside = list(template.ends.finditer(full, start, end))
        if not (inside and not full[inside[-1].end() : end].strip()):
            # The block ends before the turn does; only spaces may stand between its end and the terminator.
            behind = template.ends.search(full, end, following)
            if behind is not None and not full[end : behind.start()].strip():
                inside, end = [behind], behind.end()
            else:
                inside = []
        if only_last_end and inside and number < len(marks) - 1:
            end = inside[-1].start()
        spans.append((start, end))
    return spans


def _labels(tokens: Encoded, spans: Sequence[Span] | None) -> list[int]:
    if spans is None:
        return list(tokens.ids)
    labels = [UNTRAINED] * len(tokens.ids)
    for start, end in spans:
        if start < end:
            first, last = tokens.tokens(start, end)
            labels[first:last] = tokens.ids[first:last]
    return labels
