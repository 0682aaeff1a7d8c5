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
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from luthier.config import Config
from luthier.config.datasets import DatasetEntry
from luthier.config.preference_types import preference_type
from luthier.data import templates
from luthier.data.chat import ASK, REPLY, ChatTemplate, Message, clean
from luthier.data.encode import TextEncoder
from luthier.data.examples import (
    ChatExample,
    Example,
    PreferenceExample,
    Segment,
    TextExample,
    TokenExample,
)
from luthier.data.masks import (
    SPECIAL_TEXT,
    UNTRAINED,
    Options,
    answer_characters,
    chat_notes,
    labels_of,
    trained_characters,
)
from luthier.data.spans import TurnFinder
from luthier.data.tokenizer import chat_template_of, is_chat
from luthier.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("luthier")

REWRITTEN = "rows whose prompt comes out otherwise before the one answer than before the other"

_PROBE = ({"role": "user", "content": ASK}, {"role": "assistant", "content": REPLY})


@dataclass(slots=True)
class Rendered:
    """One document: `labels` are aligned with `input_ids`, -100 where nothing is trained; the trainer shifts.

    `lengths` are the documents' tokens where a row brought several of them, else None. `notes` say what a
    user should know of this row: pairs of what it is and, where there is more to say, what exactly. Of answers to
    compare, `prompt` is the number of tokens with which each of them begins.
    """

    input_ids: list[int]
    labels: list[int]
    lengths: tuple[int, ...] | None = None
    notes: tuple[tuple[str, str], ...] = ()
    prompt: int = 0


class Renderer:
    """Examples to tokens, with one tokenizer and one config's options; can be sent to other processes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer)
        self._config = config
        self._finders: dict[str | None, TurnFinder] = {}
        self._tried: set[str | None] = set()  # templates that are known to end an answer
        self._special: re.Pattern[str] | None = None

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
        compared = [(at, one) for at, one in enumerate(examples) if isinstance(one, PreferenceExample)]
        results.update(self._compared(compared, entry))
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
        if isinstance(example, PreferenceExample):
            if isinstance(example.prompt, str):
                example = TextExample((Segment(example.prompt, False),), add_eos=False)
            else:
                example = ChatExample(example.prompt, example.tools)
        if isinstance(example, TokenExample):
            return list(example.input_ids[: _first_label(example.labels)])
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
        if is_chat(entry.type):
            self._check_template(entry)
        kind = preference_type(entry)
        end = kind.turns.end if kind is not None and kind.turns is not None else ""
        if end and (count := len(self.encoder.beginnings([end])[0])) > 1:
            log.warning(
                "`type: %s` ends each turn with %s, which is %d ordinary tokens to this tokenizer: add it with "
                "`tokens`, or write `chat_template.default` for the model's own turns",
                entry.type,
                end,
                count,
            )

    def _check_template(self, entry: DatasetEntry) -> None:
        self._tried.add(entry.chat_template)
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

    def _compared(
        self, examples: Sequence[tuple[int, PreferenceExample]], entry: DatasetEntry
    ) -> Iterator[tuple[int, Rendered | DataError]]:
        """Answers to compare: each behind the tokens of its prompt, those of a pair end to end."""
        texts = [(at, one) for at, one in examples if isinstance(one.prompt, str)]
        flat = [
            TextExample((Segment(str(example.prompt), False), Segment(str(answer), True)))
            for _, example in texts
            for answer in example.answers
        ]
        rendered = iter([one for _, one in self._texts(list(enumerate(flat)))])
        for at, example in texts:
            sides = [next(rendered) for _ in example.answers]
            firsts = [_first_label(side.labels) for side in sides]
            yield at, self._together(sides, firsts, entry, self._text_notes(example))
        chats = [(at, one) for at, one in examples if not isinstance(one.prompt, str)]
        if chats:
            yield from self._compared_chats(chats, entry)

    def _compared_chats(
        self, examples: Sequence[tuple[int, PreferenceExample]], entry: DatasetEntry
    ) -> Iterator[tuple[int, Rendered | DataError]]:
        if entry.chat_template not in self._tried:  # rows without a type, of which only they know what they are
            self._check_template(entry)
        finder = self._finder(entry)
        ready = []
        for at, example in examples:
            before = cast("list[Message]", example.prompt)
            sides = []
            try:
                for answer in example.answers:
                    chat = ChatExample([*before, *cast("list[Message]", answer)], example.tools)
                    sides.append((chat, *answer_characters(finder.template, finder, chat, len(before))))
            except DataError as error:
                yield at, error
            else:
                ready.append((at, sides))
        encoded = iter(self.encoder.with_offsets([text for _, sides in ready for _, text, _ in sides]))
        for at, sides in ready:
            notes: dict[str, str] = {}
            rendered, firsts = [], []
            for chat, text, spans in sides:
                tokens = next(encoded)
                rendered.append(Rendered(tokens.ids, labels_of(tokens, spans)))
                start = min((start for start, _ in spans), default=len(text))
                firsts.append(tokens.tokens(start, start + 1)[0])
                notes = {**dict(chat_notes(chat.messages, text, finder.template)), **notes}
            yield at, self._together(rendered, firsts, entry, tuple(notes.items()))

    def _together(
        self,
        sides: Sequence[Rendered],
        firsts: Sequence[int],
        entry: DatasetEntry,
        notes: tuple[tuple[str, str], ...],
    ) -> Rendered:
        """Answers end to end, and how many tokens of the prompt they have in common; `firsts` are the first tokens
        behind it."""
        prompt = min(firsts)
        first, last = sides[0].input_ids, sides[-1].input_ids
        if first[:prompt] != last[:prompt]:
            prompt = next(at for at in range(prompt) if first[at] != last[at])
            notes = (*notes, (REWRITTEN, f"{prompt} of {min(firsts)} tokens are the same"))
        ids: list[int] = []
        labels: list[int] = []
        lengths = []
        trains_prompt = len(sides) == 2 and self._trains_inputs(entry)
        for number, side in enumerate(sides):
            stop = _behind_last_label(side.labels)
            new = side.labels[:stop]
            if trains_prompt and number == 0:
                new = side.input_ids[:prompt] + new[prompt:]
            ids += side.input_ids[:stop]
            labels += new
            lengths.append(stop)
        return Rendered(ids, labels, tuple(lengths), notes, prompt)

    def _text_notes(self, example: PreferenceExample) -> tuple[tuple[str, str], ...]:
        pattern = ChatTemplate(self.tokenizer).special_tokens if self._special is None else self._special
        self._special = pattern
        meant = set(pattern.findall(example.frame))
        found = pattern.findall("".join(map(str, (example.prompt, *example.answers))))
        other = next((token for token in found if token not in meant), None)
        return ((SPECIAL_TEXT, other),) if other else ()

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
        return Options(
            roles=tuple(entry.roles_to_train) if entry.roles_to_train is not None else ("assistant",),
            train_on_eos=entry.train_on_eos or "turn",
            train_on_inputs=self._trains_inputs(entry),
        )

    def _trains_inputs(self, entry: DatasetEntry) -> bool:
        own = entry.train_on_inputs
        return self._config.data.train_on_inputs if own is None else own

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


def _first_label(labels: Sequence[int]) -> int:
    return next((at for at, label in enumerate(labels) if label != UNTRAINED), len(labels))


def _behind_last_label(labels: Sequence[int]) -> int:
    """Where what is compared ends; the whole length where nothing is."""
    return next((at + 1 for at in reversed(range(len(labels))) if labels[at] != UNTRAINED), len(labels))
