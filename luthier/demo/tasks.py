"""The demo's instruction data: Alpaca-format rows over eight kinds of task, with answers a script can check.

Each kind draws *items* (a word to spell, a row of numbers to continue) at random; an item stands in exactly
one row, and a row is either for training or held out. So no held-out question was trained on in any wording.
The files that the package ships are this script's output:

    python -m luthier.demo.tasks --out luthier/demo/data
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Hashable
from pathlib import Path
from random import Random
from typing import NamedTuple

from luthier.demo import lessons, words

SEED = 7
TRAIN_ROWS_PER_TASK = 400
TEST_ROWS_PER_TASK = 45


class Item(NamedTuple):
    """One question with its only right answer; items with equal keys ask the same thing."""

    key: Hashable
    instructions: tuple[str, ...]
    input: str
    output: str


def _fibonacci(rng: Random) -> Item:
    instructions = (
        "Continue the Fibonacci sequence with the next two numbers.",
        "In this Fibonacci sequence each number is the sum of the two before it. Write the next two numbers.",
    )
    shown = rng.randint(3, 4)
    if rng.random() < 0.15:
        start = rng.randint(0, 8)
        row = lessons.running_sums(1, 1, 14)[start : start + shown + 2]
    else:
        row = lessons.running_sums(rng.randint(1, 15), rng.randint(1, 20), shown + 2)
    given, answer = lessons.numbers(row[:shown]), lessons.numbers(row[shown:])
    return Item(answer, instructions, given, answer)


def _sequence(rng: Random) -> Item:
    instructions = (
        "Write the next two numbers of the sequence.",
        "Go on with two more numbers in equal steps.",
    )
    shown, step, first = rng.randint(3, 4), rng.randint(1, 10), rng.randint(1, 40)
    row = [first + step * i for i in range(shown + 2)]
    if rng.random() < 0.3:
        row.reverse()
    given, answer = lessons.numbers(row[:shown]), lessons.numbers(row[shown:])
    return Item(answer, instructions, given, answer)


def _backwards(rng: Random) -> Item:
    word = rng.choice(words.SPELT)
    instructions = (
        f"Spell the word {word} backwards.",
        f"Write the letters of the word {word} from the end.",
    )
    return Item(word, instructions, "", words.spell_backwards(word))


def _sorting(rng: Random) -> Item:
    instructions = ("Sort the words alphabetically.", "Write these words in alphabetical order.")
    items = lessons.distinct_initials(rng, rng.randint(3, 4))
    return Item(frozenset(items), instructions, ", ".join(items), ", ".join(sorted(items)))


def _opposites(rng: Random) -> Item:
    instructions = ("Write the opposite of each word.", "Give the opposites of these words.")
    pair = rng.sample(list(words.OPPOSITES), 2)
    others = [words.OPPOSITES[word] for word in pair]
    return Item(frozenset(pair), instructions, ", ".join(pair), ", ".join(others))


def _plurals(rng: Random) -> Item:
    instructions = ("Write the plural of each word.", "Give the plurals of these words.")
    pair = rng.sample(words.NOUNS, 2)
    many = [words.PLURALS[word] for word in pair]
    return Item(frozenset(pair), instructions, ", ".join(pair), ", ".join(many))


def _counting(rng: Random) -> Item:
    instructions = ("How many words are in the list?", "Count the words in the list.")
    items = rng.sample(words.NOUNS, rng.randint(2, 9))
    return Item(frozenset(items), instructions, ", ".join(items), str(len(items)))


def _lookup(rng: Random) -> Item:
    text, fields = lessons.profile(rng)
    field = rng.choice([field for field in fields if field != "name"])
    instructions = (f"What is the {field} of {fields['name']}?", f"Find the {field} in the text.")
    return Item((text, field), instructions, text, fields[field])


TASKS: dict[str, Callable[[Random], Item]] = {
    "fibonacci": _fibonacci,
    "sequence": _sequence,
    "backwards": _backwards,
    "sorting": _sorting,
    "opposites": _opposites,
    "plurals": _plurals,
    "counting": _counting,
    "lookup": _lookup,
}
"""Kinds of task by name, each with what draws one item of it."""

_DRAWS_WITHOUT_NEWS = 2000


def _rows_of(task: str, seed: int, count: int) -> list[dict[str, str]]:
    """Up to `count` rows with different items; fewer where a kind has no more (293 words can be spelt)."""
    rng = Random(f"{seed}/{task}")
    seen: set[Hashable] = set()
    rows: list[dict[str, str]] = []
    draws = 0
    while len(rows) < count and draws < _DRAWS_WITHOUT_NEWS:
        item = TASKS[task](rng)
        draws += 1
        if item.key in seen:
            continue
        seen.add(item.key)
        draws = 0
        instruction = rng.choice(item.instructions)
        rows.append({"task": task, "instruction": instruction, "input": item.input, "output": item.output})
    return rows


def make_rows(
    seed: int = SEED, train_per_task: int = TRAIN_ROWS_PER_TASK, test_per_task: int = TEST_ROWS_PER_TASK
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The training rows and the held-out rows, each shuffled over the kinds."""
    train: list[dict[str, str]] = []
    test: list[dict[str, str]] = []
    for task in TASKS:
        rows = _rows_of(task, seed, train_per_task + test_per_task)
        test += rows[:test_per_task]
        train += rows[test_per_task:]
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
