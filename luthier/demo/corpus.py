"""The text that the demo's base model is pre-trained on: an endless, seeded stream of short documents.

Plain prose (`stories`) is mixed with exercises told in prose (`lessons`). A document is a function of the
seed and its number alone, so that any part of the stream can be made again, and training that was interrupted
goes on with the text that it had not seen.

    python -m luthier.demo.corpus --documents 5      # look at some
"""

from __future__ import annotations

import argparse
from random import Random

from luthier.demo import lessons, stories

_STORY_SHARE = 0.25
_WRITERS, _WRITER_WEIGHTS = zip(*stories.WRITERS, strict=True)
_EXERCISES, _EXERCISE_WEIGHTS = zip(*lessons.LESSONS, strict=True)


def document(seed: int, number: int) -> str:
    """Document `number` of the stream that belongs to `seed`."""
    rng = Random(f"{seed}/{number}")
    if rng.random() < _STORY_SHARE:
        return rng.choices(_WRITERS, _WRITER_WEIGHTS)[0](rng)
    exercise = rng.choices(_EXERCISES, _EXERCISE_WEIGHTS)[0]
    return "\n".join(exercise(rng) for _ in range(rng.choice((1, 1, 2, 3))))


def documents(seed: int, start: int, count: int) -> list[str]:
    """`count` documents of the stream from number `start` on."""
    return [document(seed, number) for number in range(start, start + count)]


def _main() -> None:
    parser = argparse.ArgumentParser(description="Print documents of the demo's pre-training text.")
    parser.add_argument("--documents", type=int, default=10, help="how many (default: 10)")
    parser.add_argument("--start", type=int, default=0, help="number of the first one (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the stream (default: 0)")
    arguments = parser.parse_args()
    print("\n---\n".join(documents(arguments.seed, arguments.start, arguments.documents)))


if __name__ == "__main__":
    _main()
