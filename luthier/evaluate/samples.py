"""What the model says in the middle of a run: a few prompts, answered at every evaluation.

The prompts are fixed when the run starts, so that the answers of step 100 and step 900 stand side by side.
Prompts of the user have no expected answer; those taken from validation rows do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from luthier.data.dataset import TokenDataset
from luthier.generate.engine import Engine
from luthier.generate.sampling import Sampling
from luthier.generate.text import decode

RAW_PROMPT = 32  # ids of a text that is trained from its first token on which serve as the prompt, at most


class SamplePrompt(NamedTuple):
    """A prompt as it is shown and as the model gets it."""

    label: str
    prompt_ids: Sequence[int]
    expected: str | None = None


class Sampler:
    """Answers the same prompts again and again."""

    def __init__(self, prompts: Sequence[tuple[Any, ...]], sampling: Sampling) -> None:
        self.prompts = [SamplePrompt(*prompt) for prompt in prompts]
        self.sampling = sampling

    def rows(self, engine: Engine, step: int) -> list[dict[str, Any]]:
        """One row per prompt, for `samples.jsonl`; `stopped`: the model ended its answer by itself.

        A prompt that leaves no room in the context window has no answer, and its row says so as `skipped`.
        """
        skipped = [engine.why_not(prompt.prompt_ids) for prompt in self.prompts]
        answered = [
            prompt.prompt_ids for prompt, reason in zip(self.prompts, skipped, strict=True) if not reason
        ]
        completions = iter(engine.generate(answered, self.sampling))
        settings = engine.described(self.sampling)
        rows = []
        for prompt, reason in zip(self.prompts, skipped, strict=True):
            row: dict[str, Any] = {
                "step": step,
                "prompt": prompt.label,
                "text": "",
                "expected": prompt.expected,
            }
            if reason:
                row |= {"stopped": False, "skipped": reason}
            else:
                completion = next(completions)
                row |= {"text": completion.text, "stopped": completion.finish_reason == "stop"}
            rows.append(row | settings)
        return rows


def stopped_share(rows: Sequence[dict[str, Any]]) -> float:
    """Share of samples that ended with their terminator; 0 of none."""
    return sum(bool(row["stopped"]) for row in rows) / max(1, len(rows))


def validation_prompts(
    validation: TokenDataset, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[SamplePrompt]:
    """The prompts and first answers of `count` documents, evenly spaced over the validation set.

    The prompt is what comes before the first trained token. A raw text has nothing there: its beginning is
    the prompt, and the rest is what is expected. Of a pair, the chosen answer is expected, and where an answer is
    undesirable, none.
    """
    places = np.unique(
        np.linspace(0, len(validation) - 1, num=min(count, len(validation))).round().astype(int)
    )
    prompts = []
    for place in places.tolist():
        document = validation[place]
        ids, trained = document.input_ids, np.asarray(document.labels) != -100
        start = int(trained.argmax())
        answered = int((~trained[start:]).argmax()) or len(ids) - start
        end = start + answered
        if document.prompt:
            start, end = document.prompt, (document.lengths or (len(ids),))[0]
        elif start <= 1:  # at most a BOS
            start, end = max(1, min(RAW_PROMPT, len(ids) // 2)), len(ids)
        prompt = [int(token) for token in ids[:start]]
        answer = [int(token) for token in ids[start:end]]
        expected = decode(tokenizer, answer) if document.desirable else None
        prompts.append(SamplePrompt(decode(tokenizer, prompt), prompt, expected))
    return prompts
