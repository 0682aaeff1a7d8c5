"""The demo's instruction data: Alpaca-format rows over eight kinds of task, with answers a script can check.

An item (a word, a stretch of numbers, a list) is asked for in several wordings, a row each. Items are held out
whole: what a held-out row asks for was not trained on in any wording. The files that the package ships are this
script's output:

    python -m luthier.demo.tasks --out luthier/demo/data
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

from luthier.demo import words

SEED = 7
TEST_ROWS_PER_TASK = 40
MOST_ROWS_PER_TASK = 560

Question = tuple[str, str]
"""(instruction, input)"""


class Item(NamedTuple):
    """One thing to know or to work out, and all the ways in which the rows ask for it."""

    answer: str
    questions: tuple[Question, ...]


def _list(row: list[int] | tuple[int, ...]) -> str:
    return ", ".join(str(number) for number in row)


def _fibonacci() -> Iterator[Item]:
    for start in range(20):
        for shown in (3, 4, 5):
            row = words.FIBONACCI[start : start + shown + 2]
            given = _list(row[:shown])
            yield Item(
                _list(row[shown:]),
                (
                    ("Continue the Fibonacci sequence with two numbers.", given),
                    ("Write the next two numbers of the Fibonacci sequence.", given),
                    ("Which two Fibonacci numbers come next?", given),
                    (f"The Fibonacci sequence stands at {given}. Go on with two numbers.", ""),
                    (f"Go on with two Fibonacci numbers: {given}", ""),
                ),
            )


def _sequence() -> Iterator[Item]:
    for step in words.STEPS:
        for place in range(60 if step < 5 else 12):
            for shown in (3, 4):
                row = words.counted(place if step < 5 else place * step, step, shown + 2)
                given = _list(row[:shown])
                yield Item(
                    _list(row[shown:]),
                    (
                        ("Write the next two numbers of the sequence.", given),
                        ("Continue in equal steps with two numbers.", given),
                        (f"Count on with two numbers: {given}", ""),
                    ),
                )


def _plurals() -> Iterator[Item]:
    for word, many in words.PLURALS.items():
        yield Item(
            many,
            (
                ("What is the plural of this word?", word),
                ("Give the word for more than one.", word),
                (f"Write the plural of {word}.", ""),
                (f"What do we say for many of the kind {word}?", ""),
                (f"There is one {word}. What are two of them called?", ""),
                (f"Put the word {word} into the plural.", ""),
            ),
        )


def _opposites() -> Iterator[Item]:
    for word, other in words.OPPOSITES.items():
        yield Item(
            other,
            (
                ("What is the opposite of this word?", word),
                ("Turn the word into its opposite.", word),
                (f"Write the opposite of {word}.", ""),
                (f"If it is not {word}, what is it?", ""),
                (f"Which word is the other way round from {word}?", ""),
                (f"Name the opposite of the word {word}.", ""),
            ),
        )


def _young() -> Iterator[Item]:
    for animal, little in words.YOUNG.items():
        yield Item(
            little,
            (
                ("What is the young of this animal called?", animal),
                ("Name its young.", animal),
                (f"What is a young {animal} called?", ""),
                (f"Name the young of the {animal}.", ""),
                (f"What do we call the little one of a {animal}?", ""),
                (f"Which young animal belongs to the {animal}?", ""),
                (f"Write the name of the {animal} when it is little.", ""),
            ),
        )


def _calendar() -> Iterator[Item]:
    for unit, cycle in words.CYCLES.items():
        for word in cycle:
            for side, step in (("after", 1), ("before", -1)):
                yield Item(
                    words.neighbour(word, step),
                    (
                        (f"Name the {unit} {side} this one.", word),
                        (f"Write the {unit} that is one {side} it.", word),
                        (f"Which {unit} comes {side} {word}?", ""),
                        (f"What is the {unit} {side} {word}?", ""),
                        (f"{word} is given. Which {unit} stands {side} it?", ""),
                    ),
                )


def _kinds() -> Iterator[Item]:
    for thing, kind in words.KINDS.items():
        yield Item(
            kind,
            (
                ("Is it an animal, a fruit, a tool or a colour?", thing),
                ("Name the kind of this thing.", thing),
                (f"What kind of thing is {thing}: animal, fruit, tool or colour?", ""),
                (f"To which kind does {thing} belong?", ""),
                (f"Sort {thing} into its kind.", ""),
                (f"What is {thing}?", ""),
            ),
        )


def _counting() -> Iterator[Item]:
    rng = Random(f"{SEED}/lists")
    lists = {frozenset(rng.sample(words.NOUNS, rng.randrange(2, 7))): None for _ in range(MOST_ROWS_PER_TASK)}
    for nouns in lists:
        some = rng.sample(sorted(nouns), len(nouns))
        asked = rng.choice(("How many words are in the list?", "Count the words.", "How long is the list?"))
        yield Item(str(len(some)), ((asked, ", ".join(some)),))


TASKS: dict[str, Callable[[], Iterator[Item]]] = {
    "fibonacci": _fibonacci,
    "sequence": _sequence,
    "plurals": _plurals,
    "opposites": _opposites,
    "young": _young,
    "calendar": _calendar,
    "kinds": _kinds,
    "counting": _counting,
}
"""Kinds of task by name, each with what makes all of its items."""


def make_rows(seed: int = SEED) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The training rows and the held-out rows, each shuffled over the kinds."""
    train: list[dict[str, str]] = []
    test: list[dict[str, str]] = []
    for task, make in TASKS.items():
        rng = Random(f"{seed}/{task}")
        items = list(make())
        rng.shuffle(items)
        held_out: list[dict[str, str]] = []
        while len(held_out) < TEST_ROWS_PER_TASK:
            held_out += _rows(task, items.pop())
        rest = [row for item in items for row in _rows(task, item)]
        test += rng.sample(held_out, TEST_ROWS_PER_TASK)
        train += rng.sample(rest, min(len(rest), MOST_ROWS_PER_TASK - TEST_ROWS_PER_TASK))
    for name, rows in (("train", train), ("test", test)):
        Random(f"{seed}/{name}").shuffle(rows)
    return train, test


def _rows(task: str, item: Item) -> list[dict[str, str]]:
    return [
        {"task": task, "instruction": instruction, "input": given, "output": item.answer}
        for instruction, given in item.questions
    ]


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
