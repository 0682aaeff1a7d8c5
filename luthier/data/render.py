"""From examples to token ids and labels.

The rule behind every label: trained is what the model has to write itself, and nothing else. In plain text
that is the answer and the EOS behind it. In a conversation it is each trained turn, from just behind the
header that generation starts with up to and including the token that ends the turn; what a template puts
behind that token (a newline) is never generated, since generation has stopped by then.

Text in the data that reads like a special token (`</s>` in somebody's question) becomes that token, as it
does in transformers, and some templates leave out what a message says; the documents of such rows carry a
note.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.config import Config
from luthier.config.datasets import DatasetEntry
from luthier.data import templates
from luthier.data.chat import ASK, REPLY, ChatTemplate, clean
from luthier.data.encode import TextEncoder
from luthier.data.examples import ChatExample, Example, TextExample, TokenExample
from luthier.data.masks import SPECIAL_TEXT, UNTRAINED, Options, chat_notes, labels_of, trained_characters
from luthier.data.spans import TurnFinder
from luthier.data.tokenizer import chat_template_of, is_chat
from luthier.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("luthier")

_PROBE = ({"role": "user", "content": ASK}, {"role": "assistant", "content": REPLY})


@dataclass(slots=True)
class Rendered:
    """One document: `labels` are aligned with `input_ids`, -100 where nothing is trained; the trainer shifts.

    `lengths` are the documents' tokens where a row brought several of them, else None. `notes` say what a
    user should know of this row: pairs of what it is and, where there is more to say, what exactly.
    """

    input_ids: list[int]
    labels: list[int]
    lengths: tuple[int, ...] | None = None
    notes: tuple[tuple[str, str], ...] = ()


class Renderer:
    """Examples to tokens, with one tokenizer and one config's options; can be sent to other processes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer)
        self._config = config
        self._finders: dict[str | None, TurnFinder] = {}

    def render(self, examples: Sequence[Example], entry: DatasetEntry) -> list[Rendered]:
        """Tokens of a batch of examples, in their order. Raises the DataError of the first that has one."""
        rendered = []
        for result in self.render_each(examples, entry):
            if isinstance(result, DataError):
                raise result
            rendered.append(result)
        return rendered

    def render_each(self, examples: Sequence[Example], entry: DatasetEntry) -> list[Rendered | DataError]:
        """As `render`, with the error in the place of an example that cannot be rendered."""
        results: dict[int, Rendered | DataError] = {}
        texts = [(at, one) for at, one in enumerate(examples) if isinstance(one, TextExample)]
        results.update(self._texts(texts))
        chats = [(at, one) for at, one in enumerate(examples) if isinstance(one, ChatExample)]
        results.update(self._chats(chats, entry))
        for at, example in enumerate(examples):
            if isinstance(example, TokenExample):
                results[at] = Rendered(list(example.input_ids), list(example.labels), example.lengths)
        return [results[at] for at in range(len(examples))]

    def prompt_ids(self, example: Example, entry: DatasetEntry) -> list[int]:
        """What generation starts from: everything before the last answer, with the header that opens an
        answer.

        Raises:
            DataError: a conversation without a turn before its answer, or one that the template refuses.
        """
        if isinstance(example, TokenExample):
            labels = example.labels
            first = next((at for at, label in enumerate(labels) if label != UNTRAINED), len(labels))
            return list(example.input_ids[:first])
        if isinstance(example, TextExample):
            segments = example.segments
            while segments and segments[-1].trained:
                segments = segments[:-1]
            prompt = TextExample(segments, add_bos=example.add_bos, add_eos=False)
            return dict(self._texts([(0, prompt)]))[0].input_ids
        messages = clean(example.messages)
        while messages and messages[-1].get("role") == "assistant":
            messages.pop()
        if not messages:
            raise DataError("the conversation has no turn before its answer: there is nothing to go on from")
        text = self._finder(entry).template.text(messages, example.tools, header=True)
        return self.encoder.beginnings([text])[0]

    def check(self, entry: DatasetEntry) -> None:
        """Try an entry's chat template out: what ends an answer has to be trained, and to stop generation.

        Raises:
            DataError: no token ends an answer, or it is not trained.
        """
        if not is_chat(entry.type):
            return
        options = self._options(entry)
        template = self._finder(entry).template
        habits = template.habits
        if not habits.header and (written := habits.before_answer.strip()):
            log.warning(
                "the chat template has no generation prompt (add_generation_prompt changes nothing): the "
                "model is trained to write %r itself before each answer",
                written,
            )
        if "assistant" not in options.roles:
            return
        if self._trains_end(entry, [*_PROBE], habits.last_terminators):
            return
        if template.eot_tokens and self._trains_end(entry, [*_PROBE, *_PROBE], template.eot_tokens):
            log.warning(
                "the chat template puts no %s behind the last answer of a conversation: only answers that "
                "have a message behind them teach the model to stop",
                " or ".join(template.eot_tokens),
            )
            return
        raise DataError(self._missing_end(template))

    def _texts(self, examples: Sequence[tuple[int, TextExample]]) -> Iterator[tuple[int, Rendered]]:
        """All segments of all examples in two calls of the tokenizer: first segments, and the others."""
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
            notes = self._notes(ids)
            # Text that brings its own BOS or EOS gets no second one.
            if example.add_bos and ids[: len(opening)] != opening:
                ids, labels = opening + ids, [UNTRAINED] * len(opening) + labels
            if example.add_eos and ids[-1:] != [eos]:
                ids.append(eos)
                labels.append(eos if example.segments and example.segments[-1].trained else UNTRAINED)
            yield at, Rendered(ids, labels, notes=notes)

    def _notes(self, ids: Sequence[int]) -> tuple[tuple[str, str], ...]:
        special = self.encoder.special_ids
        if special.isdisjoint(ids):
            return ()
        found = next(number for number in ids if number in special)
        return ((SPECIAL_TEXT, str(self.tokenizer.convert_ids_to_tokens(found))),)

    def _chats(
        self, examples: Sequence[tuple[int, ChatExample]], entry: DatasetEntry
    ) -> Iterator[tuple[int, Rendered | DataError]]:
        """Texts and trained characters one by one, then one call of the tokenizer for all texts."""
        if not examples:
            return
        finder, options = self._finder(entry), self._options(entry)
        ready = []
        for at, example in examples:
            try:
                text, spans = trained_characters(finder.template, finder, example, options)
            except DataError as error:
                yield at, error
            else:
                ready.append((at, example, text, spans))
        encoded = self.encoder.with_offsets([text for _, _, text, _ in ready])
        for (at, example, text, spans), tokens in zip(ready, encoded, strict=True):
            notes = tuple(chat_notes(example.messages, text, finder.template))
            yield at, Rendered(tokens.ids, labels_of(tokens, spans), notes=notes)

    def _finder(self, entry: DatasetEntry) -> TurnFinder:
        """The template of an entry; what is learnt of it is kept."""
        if entry.chat_template not in self._finders:
            template = chat_template_of(self.tokenizer, self._config, entry.chat_template)
            self._finders[entry.chat_template] = TurnFinder(template)
        return self._finders[entry.chat_template]

    def _options(self, entry: DatasetEntry) -> Options:
        on_inputs = entry.train_on_inputs
        return Options(
            roles=tuple(entry.roles_to_train) if entry.roles_to_train is not None else ("assistant",),
            train_on_eos=entry.train_on_eos or "turn",
            train_on_inputs=self._config.data.train_on_inputs if on_inputs is None else on_inputs,
        )

    def _trains_end(self, entry: DatasetEntry, messages: list[dict[str, str]], ends: Sequence[str]) -> bool:
        """Whether one of these tokens is among the trained ones."""
        rendered = self.render([ChatExample(list(messages))], entry)[0]
        return not {self.tokenizer.convert_tokens_to_ids(token) for token in ends}.isdisjoint(rendered.labels)

    def _missing_end(self, template: ChatTemplate) -> str:
        tail = template.habits.tail
        if tail.strip():
            count = len(self.encoder.beginnings([tail.strip()])[0])
            seen = f"Behind an answer it puts {tail!r}, to this tokenizer {count} ordinary token(s)."
        else:
            seen = "It puts nothing behind an answer."
        return (
            "chat_template: the template ends an answer with no token at which generation could stop. "
            f"{seen} Use the template that belongs to this model, or another chat_template "
            f"({', '.join(templates.names())}); or name what ends a turn with `eot_tokens: [...]`, after "
            "adding it with `tokens: [...]` if it is not one token yet."
        )
