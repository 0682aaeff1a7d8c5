"""The text that the demo's base model is pre-trained on: an endless, seeded stream of short documents.

Several kinds of document take turns: sentences (little stories, and facts told in prose), entries of a small
dictionary, and questions with answers (`talks`). The dictionary is what shows the model words that begin a
line or follow a colon, where they are other tokens than in the middle of a sentence. Nothing is put as an
instruction, and no question in the words of the demo's tasks. A document is a function of the seed and its
number alone, so that any part of the stream can be made again.

    python -m luthier.demo.corpus --documents 5      # look at some
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from random import Random

from luthier.demo import words
from luthier.demo.talks import book, talk

_DICTIONARY_SHARE, _TALK_SHARE, _BOOK_SHARE = 0.15, 0.15, 0.4


def document(seed: int, number: int) -> str:
    """Document `number` of the stream that belongs to `seed`."""
    rng = Random(f"{seed}/{number}")
    kind = rng.random()
    if kind < _DICTIONARY_SHARE:
        return rng.choice(DICTIONARIES)(rng)
    if kind < _DICTIONARY_SHARE + _TALK_SHARE:
        return talk(rng)
    if kind < _DICTIONARY_SHARE + _TALK_SHARE + _BOOK_SHARE:
        return book(rng)
    return rng.choices(list(SENTENCES), list(SENTENCES.values()))[0](rng)


def documents(seed: int, start: int, count: int) -> list[str]:
    """`count` documents of the stream from number `start` on."""
    return [document(seed, number) for number in range(start, start + count)]


def _list(items: Iterable[object]) -> str:
    return ", ".join(str(item) for item in items)


def article(word: str) -> str:
    """`a` or `an`, as the word asks for."""
    return "an" if word[0] in "aeiou" else "a"


# --- sentences ------------------------------------------------------------------------------------------------


def story(rng: Random) -> str:
    """Two people, a thing, a place."""
    n, m = rng.sample(words.NAMES, 2)
    p, q = rng.sample(words.PLACES, 2)
    x, y = rng.sample(words.NOUNS, 2)
    d = rng.choice(words.DAYS)
    a = article(x)
    return rng.choice(
        (
            f"On {d} {n} went to {p} with {m}. There they found {a} {x}. {n} took the {x} home, and {m} was happy.",
            f"{n} lives near {p}. Every {d} {m} comes to visit and brings {a} {x}. They put the {x} beside the {y}.",
            f"It was {d}. {n} lost {a} {x} at {p}. {m} looked for the {x} and found it at {q}.",
            f"{n} and {m} met at {p}. {n} had {a} {x}, and {m} had the {y}. On {d} they met again at {q}.",
            f"{n} describes a task to {m}, and the instruction is on {d}: bring the {x} to {p}.",
            f"The request of {n} was paired with further context from {m}, and a response that appropriately "
            f"completes it was written below the {x}.",
            f"Dear {n}, on {d} I saw your {x} at {p}. Come and get it, the {y} is there too. Yours, {m}.",
        )
    )


def fibonacci(rng: Random) -> str:
    """A stretch of the Fibonacci sequence."""
    start, length = rng.randrange(0, 20), rng.randrange(4, 9)
    row = _list(words.FIBONACCI[start : start + length])
    return rng.choice(
        (
            f"The Fibonacci numbers go on: {row}.",
            f"In the Fibonacci sequence stand {row}.",
            f"Each number is the sum of the two before it: {row}.",
            f"{row} are Fibonacci numbers.",
        )
    )


def counting_on(rng: Random) -> str:
    """Numbers in equal steps."""
    step = rng.choice(list(words.STEPS))
    start = rng.randrange(0, 60) if step < 5 else rng.randrange(0, 14) * step
    row = _list(words.counted(start, step, rng.randrange(5, 9)))
    return rng.choice(
        (
            f"{rng.choice(words.NAMES)} counted by {words.STEPS[step]}: {row}.",
            f"In steps of {words.STEPS[step]} it goes {row}.",
            f"The house numbers were {row}.",
            f"{row}, and so on.",
        )
    )


def plurals(rng: Random) -> str:
    """One and many."""
    some = rng.sample(words.NOUNS, rng.choice((1, 1, 2)))
    one, many = _list(some), _list(words.PLURALS[word] for word in some)
    return rng.choice(
        (
            f"One of each: {one}. Many of each: {many}.",
            f"{rng.choice(words.NAMES)} had {one}, and bought more: {many}.",
            f"First {one}, then many: {many}.",
            f"{one} become {many}.",
        )
    )


def opposites(rng: Random) -> str:
    """A word and what it is not."""
    some = rng.sample(words.QUALITIES, rng.choice((1, 1, 2)))
    one, other = _list(some), _list(words.OPPOSITES[word] for word in some)
    return rng.choice(
        (
            f"Not {one} but {other}.",
            f"The other way round: {one} turned into {other}.",
            f"{rng.choice(words.NAMES)} said {one}, and meant {other}.",
            f"{one}; against it: {other}.",
        )
    )


def calendar(rng: Random) -> str:
    """Days and months in their order."""
    first = rng.choice((*words.DAYS, *words.MONTHS))
    second = words.neighbour(first, 1)
    return rng.choice(
        (
            f"After {first} comes {second}.",
            f"The one after {first} is {second}.",
            f"Before {second} comes {first}.",
            f"The one before {second} is {first}.",
            f"{first} and {second} follow each other.",
            f"{rng.choice(words.NAMES)} waited through {first}, {second} and {words.neighbour(first, 2)}.",
        )
    )


def kinds(rng: Random) -> str:
    """A thing and what it is."""
    thing, kind = rng.choice(list(words.KINDS.items()))
    name = rng.choice(words.NAMES)
    return rng.choice(
        (
            f"{name} knows that {thing} is {article(kind)} {kind}.",
            f"{thing} is {article(kind)} {kind}, said {name}.",
            f"{name} asked for {article(kind)} {kind} and got {thing}.",
        )
    )


def young(rng: Random) -> str:
    """An animal and its young."""
    animal, little = rng.choice(list(words.YOUNG.items()))
    return rng.choice(
        (
            f"The {animal} has a {little}.",
            f"A {little} grows up to be a {animal}.",
            f"The young of the {animal} is a {little}.",
            f"{rng.choice(words.NAMES)} saw a {animal} with its {little}.",
        )
    )


def counted(rng: Random) -> str:
    """A list and how long it is."""
    some = rng.sample(words.NOUNS, rng.randrange(2, 7))
    return rng.choice(
        (
            f"{_list(some)}: that makes {len(some)}.",
            f"{rng.choice(words.NAMES)} wrote down {_list(some)}, {len(some)} words in all.",
            f"There are {len(some)} things here: {_list(some)}.",
        )
    )


Writer = Callable[[Random], str]

SENTENCES: dict[Writer, int] = {
    story: 14,
    fibonacci: 15,
    counting_on: 16,
    plurals: 10,
    opposites: 11,
    calendar: 9,
    kinds: 9,
    young: 6,
    counted: 10,
}
"""What writes sentences, and how often."""


# --- the dictionary -------------------------------------------------------------------------------------------


def _entries(rng: Random, headings: tuple[str, ...], table: dict[str, str]) -> str:
    some = rng.sample(sorted(table), rng.randrange(2, 5))
    between = rng.choice(("\n", "\n", "; "))
    return rng.choice(headings) + "\n" + between.join(f"{word}:{table[word]}" for word in some)


def _neighbours(rng: Random) -> str:
    cycle, step = rng.choice((words.DAYS, words.MONTHS)), rng.choice((1, -1))
    heading = "The one after it" if step == 1 else "The one before it"
    return _entries(rng, (heading,), {word: words.neighbour(word, step) for word in cycle})


DICTIONARIES: tuple[Writer, ...] = (
    lambda rng: _entries(rng, ("Plurals", "Many of them"), words.PLURALS),
    lambda rng: _entries(rng, ("Opposites", "The other way round"), words.OPPOSITES),
    lambda rng: _entries(rng, ("Young animals", "Little ones"), words.YOUNG),
    lambda rng: _entries(rng, ("Kinds of things", "What it is"), words.KINDS),
    _neighbours,
)


def _main() -> None:
    parser = argparse.ArgumentParser(description="Print documents of the demo's pre-training text.")
    parser.add_argument("--documents", type=int, default=10, help="how many (default: 10)")
    parser.add_argument("--start", type=int, default=0, help="number of the first one (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the stream (default: 0)")
    arguments = parser.parse_args()
    print("\n---\n".join(documents(arguments.seed, arguments.start, arguments.documents)))


if __name__ == "__main__":
    _main()
