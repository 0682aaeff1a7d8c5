"""How MMLU-Pro's questions are asked: prompts that fit, one by one or in batches, and answers that are kept at once.

Every answer is a line on disk as soon as it is there, under a hash of its question and its prompt's ids. What is asked
again, after a kill or with other subjects, is looked up first.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.data.encode import TextEncoder
from luthier.data.formats import prompt_example
from luthier.data.render import Renderer
from luthier.evaluate.mmlu_pro.data import LETTERS, STOP, Question, cot_prompt, extract_answer, letter_prompt
from luthier.evaluate.results import digest
from luthier.evaluate.store import Store
from luthier.generate.batches import in_batches
from luthier.generate.engine import Engine
from luthier.generate.sampling import Sampling

log = logging.getLogger("luthier")

Encode = Callable[[Sequence[str]], list[list[int]]]
Ids = tuple[int, ...]
Keep = Callable[["Asked", dict[str, Any]], None]

_LETTER_IDS = 4  # room for a letter, which is one id for nearly every tokenizer
_SAY_EVERY = 30.0  # seconds between two lines about progress


@dataclass(frozen=True)
class Settings:
    """What an accuracy depends on, besides the model and the data."""

    mode: str
    shots: int
    max_new_tokens: int
    context: int
    chat: bool


@dataclass(frozen=True)
class Asked:
    """A question as the model gets it: prompt, ids, how many worked examples are left in it, and the row's key."""

    question: Question
    prompt: str
    ids: list[int]
    shots: int
    key: str


def encoder_of(tokenizer: Any, renderer: Renderer, entry: Any, rl: str | None, chat: bool) -> Encode:
    """Prompts to ids: as text behind what the tokenizer opens a text with, or in the format of `entry`."""
    if chat:
        return lambda texts: [renderer.prompt_ids(prompt_example(entry, text, rl=rl), entry) for text in texts]
    encoder = TextEncoder(tokenizer)
    return lambda texts: [[*encoder.opening, *ids] for ids in encoder.beginnings(texts)]


class Runner:
    """One model in one setting."""

    def __init__(self, engine: Engine, settings: Settings, encode: Encode) -> None:
        self.engine = engine
        self.settings = settings
        self.encode = encode
        window = engine.window or settings.context
        self.context = min(settings.context, window)
        # Where the window is small, at least half of it is for the prompt, as in the published setting.
        answer = settings.max_new_tokens if settings.mode == "cot" else _LETTER_IDS
        self.longest_prompt = self.context - min(answer, self.context // 2)
        if self.context < settings.context:
            log.info(
                "context: %d tokens, all that the model has, where the published figures have %d",
                self.context,
                settings.context,
            )

    def prompts(self, questions: Sequence[Question], examples: Sequence[Question]) -> list[Asked]:
        """Every question with as many of the examples as leave room for an answer, the last ones dropped first."""
        write = cot_prompt if self.settings.mode == "cot" else letter_prompt
        found: dict[int, Asked] = {}
        for shots in range(len(examples), -1, -1):
            left = [at for at in range(len(questions)) if at not in found]
            texts = [write(questions[at], examples[:shots]) for at in left]
            for at, text, ids in zip(left, texts, self.encode(texts) if texts else [], strict=True):
                if len(ids) < self.longest_prompt or shots == 0:
                    question = questions[at]
                    key = digest([question.id, question.answer, question.options, ids])
                    found[at] = Asked(question, text, ids, shots, key)
        return [found[at] for at in range(len(questions))]

    def answer(self, subject: str, asked: Sequence[Asked], store: Store) -> None:
        """Ask what is not in the store yet; it has a row for each question then."""
        waiting = [one for one in asked if one.key not in store.rows]
        if len(waiting) < len(asked):
            log.info("%s: %d of %d questions were answered before", subject, len(asked) - len(waiting), len(asked))
        progress = _Progress(subject, len(waiting))

        def keep(one: Asked, row: dict[str, Any]) -> None:
            store.add(_row(one, row))
            progress.count(row["prediction"] == one.question.answer)

        for one in waiting:
            letter = [] if self.settings.mode == "cot" else [0] * _LETTER_IDS
            if reason := self.engine.why_not([*one.ids, *letter]):
                keep(one, {"prediction": None, "stage": 0, "finish": "skipped", "skipped": reason, "output": ""})
        ask = self._generate if self.settings.mode == "cot" else self._letters
        in_batches(
            self.engine,
            [one.ids for one in asked],
            lambda at: asked[at].key in store.rows,
            lambda waiting: ask([asked[at] for at in waiting], keep),
            "--dtype bf16 halves the weights, and --max-new-tokens bounds the answer",
        )

    def _generate(self, asked: Sequence[Asked], keep: Keep) -> None:
        def done(index: int, completion: Any) -> None:
            letter, stage = extract_answer(completion.text)
            finish = completion.finish_reason
            keep(
                asked[index],
                {"prediction": letter, "stage": stage, "finish": finish, "output": completion.text},
            )

        sampling = Sampling(max_new_tokens=self.settings.max_new_tokens, do_sample=False, stop=(STOP,))
        self.engine.generate([one.ids for one in asked], sampling, on_done=done)

    def _letters(self, asked: Sequence[Asked], keep: Keep) -> None:
        """One pass for each question; one more where a tokenizer writes a letter as several ids, for each of them."""
        spelled = [self._spelled(one) for one in asked]
        passes: list[tuple[int, Ids, list[int]]] = []  # question, ids behind its prompt, ids that may be next
        for at, (_, tails) in enumerate(spelled):
            behind: dict[Ids, list[int]] = {}
            for tail in tails:
                for end, token_id in enumerate(tail):
                    behind.setdefault(tail[:end], []).append(token_id)
            passes += [(at, beginning, list(dict.fromkeys(ids))) for beginning, ids in behind.items()]
        logps: list[dict[Ids, float]] = [{} for _ in asked]
        left = Counter(at for at, _, _ in passes)

        def done(index: int, values: list[float]) -> None:
            at, beginning, ids = passes[index]
            logps[at] |= {(*beginning, token_id): value for token_id, value in zip(ids, values, strict=True)}
            left[at] -= 1
            if not left[at]:
                keep(asked[at], _likeliest(spelled[at][1], logps[at]))

        prompts = [[*spelled[at][0], *beginning] for at, beginning, _ in passes]
        self.engine.next_logps(prompts, [ids for _, _, ids in passes], done)

    def _spelled(self, asked: Asked) -> tuple[list[int], list[Ids]]:
        """What all of prompt + " A", prompt + " B", ... begin with, and the ids with which each goes on. A space that
        is a token of its own is part of the beginning."""
        options = len(asked.question.options)
        found = self.encode([f"{asked.prompt} {letter}" for letter in LETTERS[: max(2, options)]])
        shared = next(at for at, ids in enumerate(zip(*found, strict=False)) if len(set(ids)) > 1)
        return found[0][:shared], [tuple(ids[shared:]) for ids in found[:options]]


def _likeliest(tails: Sequence[Ids], logps: Mapping[Ids, float]) -> dict[str, Any]:
    """The letter whose ids have the largest sum of log-probs, and all of the sums."""
    sums = [sum(logps[tail[: end + 1]] for end in range(len(tail))) for tail in tails]
    named = {letter: round(value, 4) for letter, value in zip(LETTERS, sums, strict=False)}
    best = LETTERS[max(range(len(sums)), key=sums.__getitem__)]
    return {"prediction": best, "stage": 1, "finish": "stop", "output": "", "logprobs": named}


def _row(asked: Asked, answer: Mapping[str, Any]) -> dict[str, Any]:
    question = asked.question
    return {
        "key": asked.key,
        "question_id": question.id,
        "category": question.category,
        "prompt": asked.prompt,
        "shots": asked.shots,
        **answer,
        "answer": question.answer,
        "answer_index": question.answer_index,
        "options": len(question.options),
        "right": answer["prediction"] == question.answer,
    }


class _Progress:
    """A line about how far it is, now and then."""

    def __init__(self, subject: str, total: int) -> None:
        self.subject, self.total = subject, total
        self.done = self.right = 0
        self.said = time.monotonic()

    def count(self, right: bool) -> None:
        self.done += 1
        self.right += right
        if time.monotonic() - self.said >= _SAY_EVERY:
            self.said = time.monotonic()
            share = 100 * self.right / self.done
            log.info("%s: %d of %d questions, %.1f%% right so far", self.subject, self.done, self.total, share)
