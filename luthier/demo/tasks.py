"""The demo's instruction data: Alpaca-format rows over eight kinds of task, with answers a script can check.

A row is an item (a word, a stretch of numbers) asked for in one of several wordings. Rows are held out one by
one: a held-out row's question, item and wording together, was never trained on. The files that the package
ships are this script's output:

    python -m luthier.demo.tasks --out luthier/demo/data
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from luthier.demo import words

SEED = 7
TEST_ROWS_PER_TASK = 40
MOST_ROWS_PER_TASK = 560

Question = tuple[str, str]
Asked = tuple[Question, str]
"""((instruction, input), answer)"""


def _list(row: list[int] | tuple[int, ...]) -> str:
    return ", ".join(str(number) for number in row)


def _fibonacci() -> Iterator[Asked]:
    for start in range(20):
        for shown in (3, 4, 5):
            row = words.FIBONACCI[start : start + shown + 2]
            given, answer = _list(row[:shown]), _list(row[shown:])
            yield ("Continue the Fibonacci sequence with two numbers.", given), answer
            yield ("Write the next two numbers of the Fibonacci sequence.", given), answer
            yield ("Which two Fibonacci numbers come next?", given), answer
            yield (f"The Fibonacci sequence stands at {given}. Go on with two numbers.", ""), answer
            yield (f"Go on with two Fibonacci numbers: {given}", ""), answer


def _sequence() -> Iterator[Asked]:
    for step in words.STEPS:
        for place in range(60 if step < 5 else 12):
            for shown in (3, 4):
                row = words.counted(place if step < 5 else place * step, step, shown + 2)
                given, answer = _list(row[:shown]), _list(row[shown:])
                yield ("Write the next two numbers of the sequence.", given), answer
                yield ("Continue in equal steps with two numbers.", given), answer
                yield (f"Count on with two numbers: {given}", ""), answer


def _plurals() -> Iterator[Asked]:
    for word, many in words.PLURALS.items():
        yield ("What is the plural of this word?", word), many
        yield ("Give the word for more than one.", word), many
        yield (f"Write the plural of {word}.", ""), many
        yield (f"What do we say for many of the kind {word}?", ""), many
        yield (f"There is one {word}. What are two of them called?", ""), many
        yield (f"Put the word {word} into the plural.", ""), many


def _opposites() -> Iterator[Asked]:
    for word, other in words.OPPOSITES.items():
        yield ("What is the opposite of this word?", word), other
        yield ("Turn the word into its opposite.", word), other
        yield (f"Write the opposite of {word}.", ""), other
        yield (f"If it is not {word}, what is it?", ""), other
        yield (f"Which word is the other way round from {word}?", ""), other
        yield (f"Name the opposite of the word {word}.", ""), other


def _young() -> Iterator[Asked]:
    for animal, little in words.YOUNG.items():
        yield ("What is the young of this animal called?", animal), little
        yield ("Name its young.", animal), little
        yield (f"What is a young {animal} called?", ""), little
        yield (f"Name the young of the {animal}.", ""), little
        yield (f"What do we call the little one of a {animal}?", ""), little
        yield (f"Which young animal belongs to the {animal}?", ""), little
        yield (f"Write the name of the {animal} when it is little.", ""), little


def _calendar() -> Iterator[Asked]:
    for unit, cycle in words.CYCLES.items():
        for word in cycle:
            for side, step in (("after", 1), ("before", -1)):
                answer = words.neighbour(word, step)
                yield (f"Name the {unit} {side} this one.", word), answer
                yield (f"Write the {unit} that is one {side} it.", word), answer
                yield (f"Which {unit} comes {side} {word}?", ""), answer
                yield (f"What is the {unit} {side} {word}?", ""), answer
                yield (f"{word} is given. Which {unit} stands {side} it?", ""), answer


def _kinds() -> Iterator[Asked]:
    for thing, kind in words.KINDS.items():
        yield ("Is it an animal, a fruit, a tool or a colour?", thing), kind
        yield ("Name the kind of this thing.", thing), kind
        yield (f"What kind of thing is {thing}: animal, fruit, tool or colour?", ""), kind
        yield (f"To which kind does {thing} belong?", ""), kind
        yield (f"Sort {thing} into its kind.", ""), kind
        yield (f"What is {thing}?", ""), kind


def _counting() -> Iterator[Asked]:
    rng = Random(f"{SEED}/lists")
    for _ in range(MOST_ROWS_PER_TASK):
        some = rng.sample(words.NOUNS, rng.randrange(2, 7))
        asked = rng.choice(("How many words are in the list?", "Count the words.", "How long is the list?"))
        yield (asked, ", ".join(some)), str(len(some))


TASKS: dict[str, Callable[[], Iterator[Asked]]] = {
    "fibonacci": _fibonacci,
    "sequence": _sequence,
    "plurals": _plurals,
    "opposites": _opposites,
    "young": _young,
    "calendar": _calendar,
    "kinds": _kinds,
    "counting": _counting,
}
"""Kinds of task by name, each with what asks all of its questions."""


def make_rows(seed: int = SEED) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The training rows and the held-out rows, each shuffled over the kinds."""
    train: list[dict[str, str]] = []
    test: list[dict[str, str]] = []
    for task, ask in TASKS.items():
        answers = dict(ask())
        rows = [
            {"task": task, "instruction": instruction, "input": given, "output": answer}
            for (instruction, given), answer in answers.items()
        ]
        Random(f"{seed}/{task}").shuffle(rows)
        test += rows[:TEST_ROWS_PER_TASK]
        train += rows[TEST_ROWS_PER_TASK:MOST_ROWS_PER_TASK]
    for name, rows in (("train", train), ("test", test)):
        Random(f"{seed}/{name}").shuffle(rows)
    return train, test


def write(folder: Path, seed: int = SEED) -> None:
    """Writes `train.jsonl` and `test.jsonl` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "test"), make_rows(seed), strict=True):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_bytes(lines.encode())


def _main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's instruction data.")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and test.jsonl")
    parser.add_argument("--seed", type=int, default=SEED, help=f"default: {SEED}, the shipped data's")
    arguments = parser.parse_args()
    write(arguments.out, arguments.seed)


if __name__ == "__main__":
    _main()
