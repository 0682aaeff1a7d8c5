"""The rows that everybody trains on: real ones where they are at hand, else rows of the same lengths.

The text of every row is put together here, once, so that all contenders see the same characters: nobody's own
template is measured. The prompt ends with a line break, at which byte-level tokenizers always split; a prompt
and an answer that are tokenised apart are then the same tokens as the whole.

What a row holds depends on the task (`TASKS`): `prompt`, `output` and both as `text` for supervised fine-tuning;
`prompt`, `chosen` and `rejected` for methods that compare two answers; `prompt`, `completion` and `label` for KTO.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
ALPACA, PREFERENCES = DATA / "alpaca_52k.jsonl", DATA / "prefs_dpo_en_300_conversational.jsonl"

TASKS = ("sft", "dpo", "orpo", "kto")

Row = dict[str, Any]

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


def source_name(task: str = "sft") -> str:
    """What the rows are, for the results."""
    source = ALPACA if task == "sft" else PREFERENCES
    return source.stem if source.exists() else "generated"


def all_rows(task: str = "sft") -> Iterator[Row]:
    """Every row that can be used, in order.

    Rows without an answer are left out, and so are answers that begin or end with white space, and pairs of the same
    answer: what becomes of those differs between the contenders.
    """
    if task != "sft":
        yield from _compared(task)
        return
    for row in _alpaca() if ALPACA.exists() else generated():
        if _usable(row["output"]):
            yield rendered(row)


def _compared(task: str) -> Iterator[Row]:
    """Pairs; for KTO the chosen answer of one pair and the rejected one of the next, in turn."""
    pairs = _preferences() if PREFERENCES.exists() else generated_pairs()
    usable = (p for p in pairs if _usable(p["chosen"], p["rejected"]) and p["chosen"] != p["rejected"])
    for index, pair in enumerate(usable):
        if task == "kto":
            desirable = index % 2 == 0
            answer = pair["chosen" if desirable else "rejected"]
            yield {"prompt": pair["prompt"], "completion": answer, "label": desirable}
        else:
            yield pair


def texts(row: Row) -> list[str]:
    """What of a row is trained on: the whole text, or the prompt with each answer, counted each time in full."""
    if "text" in row:
        return [row["text"]]
    return [row["prompt"] + row[name] for name in ("chosen", "rejected", "completion") if name in row]


def rendered(row: Row) -> Row:
    """The row with `prompt`, and `text`, which is the prompt and the answer."""
    template = _WITH_INPUT if row["input"] else _WITHOUT_INPUT
    prompt = template.format(instruction=row["instruction"], input=row["input"])
    return {**row, "prompt": prompt, "text": prompt + row["output"]}


def fitting(rows: Iterator[Row], count: int, length: Callable[[str], int], limit: int) -> list[Row]:
    """The first rows whose texts, and their ends, are not longer than `limit` tokens: nobody cuts any of them."""
    kept: list[Row] = []
    for row in rows:
        if all(length(text) < limit for text in texts(row)):
            kept.append(row)
        if len(kept) == count:
            return kept
    raise ValueError(f"there are only {len(kept)} rows of less than {limit} tokens, and {count} are needed")


def generated(count: int = 20_000, seed: int = 0) -> Iterator[Row]:
    """Rows of words of no meaning; their lengths in characters are drawn like Alpaca's (medians about 60 for
    an instruction, 190 for an answer with a long tail; an input in two rows of five)."""
    draw = random.Random(seed)
    text = _writer(draw)
    for _ in range(count):
        yield {
            "instruction": text(min(draw.lognormvariate(4.05, 0.35), 400)),
            "input": text(min(draw.lognormvariate(3.9, 0.9), 2000)) if draw.random() < 0.4 else "",
            "output": text(min(draw.lognormvariate(5.2, 1.1), 3000)),
        }


def generated_pairs(count: int = 20_000, seed: int = 0) -> Iterator[Row]:
    """Pairs whose lengths in characters are drawn like those of the real ones: medians about 750 for a prompt and 1,400
    for an answer, with long tails; two answers to one prompt are more alike in length than others."""
    draw = random.Random(seed)
    text = _writer(draw)
    for _ in range(count):
        prompt, shared = text(min(draw.lognormvariate(6.6, 1.5), 10_000)), draw.gauss(0, 0.9)
        chosen, rejected = (min(draw.lognormvariate(6.8 + shared, 0.9), 6000) for _ in range(2))
        yield {
            "prompt": turns([{"role": "user", "content": prompt}]),
            "chosen": text(chosen),
            "rejected": text(rejected),
        }


def turns(messages: list[dict[str, str]]) -> str:
    """A conversation as the text of a prompt, up to where the answer begins."""
    said = "".join(f"### {turn['role'].capitalize()}:\n{turn['content']}\n\n" for turn in messages)
    return said + "### Assistant:\n"


def _writer(draw: random.Random) -> Callable[[float], str]:
    """A function that makes texts of about so many characters, of words of no meaning."""
    words = ["".join(draw.choices("etaoinshrdlucmfwyp", k=draw.randint(1, 9))) for _ in range(8000)]

    def text(characters: float) -> str:
        chosen = [draw.choice(words)]
        written = len(chosen[0]) + 1
        while written < characters:
            # Low numbers far more often, as words are in a language.
            chosen.append(words[int(len(words) * draw.random() ** 4)])
            written += len(chosen[-1]) + 1
        return " ".join(chosen).capitalize() + "."

    return text


def _usable(*answers: str) -> bool:
    return all(answer and answer == answer.strip() for answer in answers)


def _alpaca() -> Iterator[Row]:
    for row in _lines(ALPACA):
        yield {name: row[name] for name in ("instruction", "input", "output")}


def _preferences() -> Iterator[Row]:
    for row in _lines(PREFERENCES):
        answers = {name: row[name][0]["content"] for name in ("chosen", "rejected")}
        yield {"prompt": turns(row["prompt"]), **answers}


def _lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)
