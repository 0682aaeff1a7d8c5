"""The rows that everybody trains on: Alpaca's own where they are at hand, else rows of the same lengths.

The text of every row is put together here, once, so that all contenders see the same characters: nobody's own
template is measured. The prompt ends with a line break, at which byte-level tokenizers always split; a prompt
and an answer that are tokenised apart are then the same tokens as the whole.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

ALPACA = Path(__file__).resolve().parents[2] / "shared" / "data" / "alpaca_52k.jsonl"

Row = dict[str, str]

# The prompts of github.com/tatsu-lab/stanford_alpaca.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}"
    "\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


def source_name() -> str:
    """What the rows are, for the results."""
    return "alpaca_52k" if ALPACA.exists() else "generated"


def all_rows() -> Iterator[Row]:
    """Every row that can be used, in order: instruction, input, output, and prompt and answer as text.

    Rows without an answer are left out, and so are answers that begin or end with white space: what becomes of
    those differs between the contenders.
    """
    for row in _alpaca() if ALPACA.exists() else generated():
        if row["output"] and row["output"] == row["output"].strip():
            yield rendered(row)


def rendered(row: Row) -> Row:
    """The row with `prompt`, and `text`, which is the prompt and the answer."""
    template = _WITH_INPUT if row["input"] else _WITHOUT_INPUT
    prompt = template.format(instruction=row["instruction"], input=row["input"])
    return {**row, "prompt": prompt, "text": prompt + row["output"]}


def fitting(rows: Iterator[Row], count: int, length: Callable[[str], int], limit: int) -> list[Row]:
    """The first rows whose text, and its end, is not longer than `limit` tokens: nobody cuts any of them."""
    kept: list[Row] = []
    for row in rows:
        if length(row["text"]) < limit:
            kept.append(row)
        if len(kept) == count:
            return kept
    raise ValueError(f"there are only {len(kept)} rows of less than {limit} tokens, and {count} are needed")


def generated(count: int = 20_000, seed: int = 0) -> Iterator[Row]:
    """Rows of words of no meaning; their lengths in characters are drawn like Alpaca's (medians about 60 for
    an instruction, 190 for an answer with a long tail; an input in two rows of five)."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlucmfwyp", k=draw.randint(1, 9))) for _ in range(8000)]

    def text(characters: float) -> str:
        chosen = [draw.choice(words)]
        while sum(map(len, chosen)) + len(chosen) < characters:
            # Low numbers far more often, as words are in a language.
            chosen.append(words[int(len(words) * draw.random() ** 4)])
        return " ".join(chosen).capitalize() + "."

    for _ in range(count):
        yield {
            "instruction": text(min(draw.lognormvariate(4.05, 0.35), 400)),
            "input": text(min(draw.lognormvariate(3.9, 0.9), 2000)) if draw.random() < 0.4 else "",
            "output": text(min(draw.lognormvariate(5.2, 1.1), 3000)),
        }


def _alpaca() -> Iterator[Row]:
    with ALPACA.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            row = json.loads(line)
            yield {name: row[name] for name in ("instruction", "input", "output")}
