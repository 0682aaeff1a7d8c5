"""The questions in a dataset that have one short answer, and what a model answers.

A row asks something if its last trained stretch is an answer behind a prompt. Letter-for-letter comparison means
something for short answers only: a number, a name, a label or a phrase is right or wrong, and whoever writes more than
a line has many right ways to do it. So rows are asked whose answer has up to `SHORT_ANSWER` tokens, about 25 words.
It also bounds what asking costs: nothing longer can be right, and generation stops soon behind that length.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.data.dataset import TokenDataset
from luthier.generate.batches import SHARE_OF_MEMORY, cache_bytes, in_batches
from luthier.generate.engine import MAX_CACHED_TOKENS, Engine
from luthier.generate.sampling import Sampling
from luthier.generate.text import continuation
from luthier.models.memory import free_memory

SHORT_ANSWER = 32
# Tokens that an answer may have beyond the longest expected one: the same text can be cut into more of them.
SLACK = 8


@dataclass(frozen=True)
class Question:
    """A document as a question: what comes before its last answer, and that answer.

    Attributes:
        expected: the answer's text. tokens: how many it has, its end aside. ends: whether a terminator ends it.
    """

    prompt_ids: list[int]
    expected: str
    tokens: int
    ends: bool


@dataclass(frozen=True)
class Answer:
    """What a model said, and whether it ended by itself; `skipped` says why it was not asked."""

    text: str
    stopped: bool
    skipped: str = ""

    @property
    def shown(self) -> str:
        """The text, with a sign behind it where it was cut off: it is never the expected one then."""
        return self.text if self.stopped else f"{self.text} ..."


def question_of(dataset: TokenDataset, index: int, tokenizer: Any, terminators: Collection[int]) -> Question | None:
    """The question in a document; None where nothing comes before its labels (raw text, or trained prompts), and for
    rows of several documents."""
    document = dataset[index]
    if document.lengths is not None:
        return None
    trained = np.flatnonzero(np.asarray(document.labels) != -100)
    end = int(trained[-1]) + 1
    gaps = np.flatnonzero(np.diff(trained) > 1)
    start = int(trained[gaps[-1] + 1] if len(gaps) else trained[0])
    if start <= 1:  # at most a BOS
        return None
    prompt = [int(token) for token in document.input_ids[:start]]
    answer = [int(token) for token in document.input_ids[start:end]]
    spoken = answer
    while spoken and spoken[-1] in terminators:
        spoken = spoken[:-1]
    return Question(prompt, continuation(tokenizer, prompt, spoken), len(spoken), len(spoken) < len(answer))


def greedy_answers(
    model: Any,
    tokenizer: Any,
    terminators: Sequence[int],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    on_done: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """What the model says to each prompt, always by the likeliest token, many prompts at a time. Batches are as large
    as memory allows, and half as large after each time that it does not.

    Raises:
        RunError: memory does not hold a single prompt with its answer.
    """
    device = model.get_input_embeddings().weight.device
    cached = min(MAX_CACHED_TOKENS, int(SHARE_OF_MEMORY * free_memory(device) / cache_bytes(model)))
    engine = Engine(model, tokenizer, terminators, max_cached_tokens=cached)
    # A penalty of the model's own settings would make it say something else than it finds likeliest.
    sampling = Sampling(max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=1.0)
    answers: dict[int, Answer] = {}
    for index, prompt in enumerate(prompts):
        if reason := engine.why_not(prompt):
            answers[index] = Answer("", False, reason)
            on_done()

    def ask(waiting: list[int]) -> None:
        def keep(place: int, completion: Any) -> None:
            answers[waiting[place]] = Answer(completion.text, completion.finish_reason == "stop")
            on_done()

        engine.generate([prompts[index] for index in waiting], sampling, on_done=keep)

    advice = "--short-answer 0 asks nothing, and --dtype bf16 halves the weights"
    in_batches(engine, prompts, answers.__contains__, ask, advice)
    return [answers[index] for index in range(len(prompts))]
