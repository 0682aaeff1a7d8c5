"""The rows that the studies are trained on: little tasks over lists of words and numbers, in Alpaca's form.

The tasks are chosen so that a model of a million parameters learns them by degrees within a hundred steps: the demo's
base model has seen every word and number in them, and none of the instructions. A question is asked once, and what a
held-out row asks is in no training row.

    train.jsonl     right answers
    noisy.jsonl     the first rows of the demo's training data; of two rows in five the answer is another row's of the
                    same task, and wrong
    test.jsonl      held out, right answers
    long.jsonl      texts of about 500 tokens, in which the second half asks for what the first half told
    long-test.jsonl the same, of other people and things

Everything is seeded; the shipped files are what this script writes:

    python examples/studies/data/write.py examples/studies/data
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

from luthier.demo import tasks, words

SEED = 11
TRAIN_ROWS, TEST_ROWS = 640, 160
WRONG_SHARE = 0.4
LONG_TEXTS, LONG_TEST_TEXTS = 48, 12
FACTS_PER_TEXT = 22

Question = tuple[str, str]
"""(instruction, input)"""


def _list(items: Iterable[object]) -> str:
    return ", ".join(str(item) for item in items)


def backwards(rng: Random) -> tuple[Question, str]:
    some = rng.sample(words.NOUNS, rng.randint(2, 4))
    return ("Write the list backwards.", _list(some)), _list(reversed(some))


def swapped(rng: Random) -> tuple[Question, str]:
    first, *middle, last = rng.sample(words.NOUNS, rng.randint(3, 4))
    return ("Swap the first and the last word.", _list([first, *middle, last])), _list([last, *middle, first])


def repeated(rng: Random) -> tuple[Question, str]:
    word, times = rng.choice(words.NOUNS), rng.randint(2, 4)
    return (f"Say the word {times} times.", word), _list([word] * times)


def second(rng: Random) -> tuple[Question, str]:
    some = rng.sample(words.NOUNS, rng.randint(3, 5))
    return ("Which word stands second?", _list(some)), some[1]


def last(rng: Random) -> tuple[Question, str]:
    some = rng.sample(words.NOUNS, rng.randint(2, 5))
    return ("Which word stands last?", _list(some)), some[-1]


def plurals(rng: Random) -> tuple[Question, str]:
    some = rng.sample(words.NOUNS, rng.randint(1, 3))
    return ("Write the plurals.", _list(some)), _list(words.PLURALS[word] for word in some)


def ordered(rng: Random) -> tuple[Question, str]:
    some = rng.sample(range(30), rng.randint(2, 4))
    return ("Put the numbers in order.", _list(some)), _list(sorted(some))


def largest(rng: Random) -> tuple[Question, str]:
    some = rng.sample(range(60), rng.randint(2, 4))
    return ("Which number is the largest?", _list(some)), str(max(some))


TASKS: tuple[Callable[[Random], tuple[Question, str]], ...] = (
    backwards,
    swapped,
    repeated,
    second,
    last,
    plurals,
    ordered,
    largest,
)


def rows(rng: Random, count: int, seen: set[Question]) -> list[dict[str, str]]:
    """`count` rows, the tasks in turn and then shuffled; their questions are added to `seen`, and new to it."""
    made: list[dict[str, str]] = []
    turn = 0
    while len(made) < count:
        question, answer = TASKS[turn % len(TASKS)](rng)
        turn += 1
        if question not in seen:
            seen.add(question)
            made.append({"instruction": question[0], "input": question[1], "output": answer})
    rng.shuffle(made)
    return made


def spoiled(rng: Random, good: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows, `WRONG_SHARE` of them with another answer of the same task."""
    bad = [dict(row) for row in good]
    for number in rng.sample(range(len(good)), round(len(good) * WRONG_SHARE)):
        task, answer = good[number]["task"], good[number]["output"]
        of_task = [row["output"] for row in good if row["task"] == task]
        bad[number]["output"] = rng.choice([other for other in of_task if other != answer])
    return bad


def long_text(rng: Random) -> str:
    """Who has what, one sentence each; then the same things asked for in another order."""
    things = rng.sample(words.NOUNS, FACTS_PER_TEXT)
    owners = [rng.choice(words.NAMES) for _ in things]
    told = " ".join(f"{owner} has the {thing}." for owner, thing in zip(owners, things, strict=True))
    pairs = list(zip(owners, things, strict=True))
    rng.shuffle(pairs)
    asked = " ".join(f"Who has the {thing}? {owner}." for owner, thing in pairs)
    return f"{told}\n{asked}"


def make(seed: int = SEED) -> dict[str, list[dict[str, str]]]:
    """The rows of every file, by its name."""
    seen: set[Question] = set()
    test = rows(Random(f"{seed}/test"), TEST_ROWS, seen)
    train = rows(Random(f"{seed}/train"), TRAIN_ROWS, seen)
    long = Random(f"{seed}/long")
    texts = [{"text": long_text(long)} for _ in range(LONG_TEXTS + LONG_TEST_TEXTS)]
    return {
        "train": train,
        "noisy": spoiled(Random(f"{seed}/noisy"), tasks.make_rows()[0][:TRAIN_ROWS]),
        "test": test,
        "long": texts[:LONG_TEXTS],
        "long-test": texts[LONG_TEXTS:],
    }


def write(folder: Path, seed: int = SEED) -> None:
    """Writes every file into `folder`."""
    for name, made in make(seed).items():
        text = "".join(json.dumps(row) + "\n" for row in made)
        (folder / f"{name}.jsonl").write_bytes(text.encode())


if __name__ == "__main__":
    write(Path(sys.argv[1]))
