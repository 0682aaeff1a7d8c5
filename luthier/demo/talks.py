"""Questions and answers in the pre-training text: talks, and pages of a book; neither is an instruction.

The questions are about the same little world as the demo's tasks, in other words than theirs; a text goes on
after an answer, so a model of this text does not know that an answer is all there is to say.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from luthier.demo import words

Asked = tuple[str, str]
"""(question, answer)"""


def talk(rng: Random) -> str:
    """One to three questions with their answers, and a word of thanks."""
    asks, knows = rng.sample(words.NAMES, 2)
    lines = []
    for _ in range(rng.randrange(1, 4)):
        question, answer = rng.choice(QUESTIONS)(rng)
        lines += [f"{asks}:{question}", f"{knows}:{answer}"]
    thanks = rng.choice(("Thank you.", "Yes, that is right.", f"{knows} knows it all.", "I see."))
    return "\n".join([*lines, f"{asks}:{thanks}"])


_HEADINGS = (
    ("Question:", "Answer:"),
    ("### Question:", "### Answer:"),
    ("Asked:", "Said:"),
    ("### Exercise:", "### Solution:"),
    ("# Question", "# Result:"),
)


def book(rng: Random) -> str:
    """A page of a book of questions: an introduction, then questions and answers under headings, and more text."""
    asked, answered = rng.choice(_HEADINGS)
    lines = []
    if rng.random() < 0.7:
        n = rng.choice(words.NAMES)
        lines = [
            rng.choice(
                (
                    f"Below is what {n} asked, paired with further context. Each response completes the request.",
                    f"This page describes a task that {n} wrote. Write down what is asked.",
                    f"An instruction of {n} that describes what stands below, and provides the answers appropriately.",
                    f"On {rng.choice(words.DAYS)} {n} was at {rng.choice(words.PLACES)} and wrote this for the school.",
                )
            ),
            "",
        ]
    for _ in range(rng.randrange(1, 4)):
        question, answer = rng.choice(QUESTIONS)(rng)
        question = question.replace("\n", rng.choice(("\n", "\n", "\n\n### Given:\n")))
        lines += [asked, question, "", answered + answer, ""]
    return "\n".join(
        [*lines, rng.choice(("The page ends here.", "More on the next page.", "So much for this."))]
    )


def _list(row: list[int] | tuple[int, ...]) -> str:
    return ", ".join(str(number) for number in row)


def _word(rng: Random, table: dict[str, str], about_it: tuple[str, ...], before_it: tuple[str, ...]) -> Asked:
    """A question with the word inside, or one with the word on a line of its own behind it."""
    word = rng.choice(sorted(table))
    if rng.random() < 0.6:
        return rng.choice(about_it).format(word), table[word]
    return f"{rng.choice(before_it)}\n{word}", table[word]


def _plural(rng: Random) -> Asked:
    return _word(
        rng,
        words.PLURALS,
        (
            "The plural of {}?",
            "One {}, and many?",
            "I have one {}. With more than one, what do I say?",
            "Two of {}, please.",
        ),
        ("How does the plural go?", "Say it for many.", "More than one of this?"),
    )


def _opposite(rng: Random) -> Asked:
    return _word(
        rng,
        words.OPPOSITES,
        ("The opposite of {}?", "What is not {}?", "Turn {} around.", "And the other way from {}?"),
        ("What is its opposite?", "Say the opposite.", "Which word is against this one?"),
    )


def _young(rng: Random) -> Asked:
    return _word(
        rng,
        words.YOUNG,
        (
            "The young of the {}?",
            "How is a little {} called?",
            "What does the {} call its young?",
            "A young {} is a what?",
        ),
        ("And its little one?", "How is the young animal called?", "Which is its young?"),
    )


def _kind(rng: Random) -> Asked:
    return _word(
        rng,
        words.KINDS,
        (
            "What kind is {}?",
            "{} is a thing of which kind?",
            "Is {} an animal or a tool, a colour or a fruit?",
            "What is a thing like {}?",
        ),
        ("Which kind of thing?", "Animal, fruit, tool or colour?", "What kind does it belong to?"),
    )


def _neighbour(rng: Random) -> Asked:
    unit, cycle = rng.choice(list(words.CYCLES.items()))
    side, step = rng.choice((("after", 1), ("before", -1)))
    word = rng.choice(cycle)
    question = rng.choice(
        (
            f"The {unit} {side} {word}?",
            f"What stands {side} {word}?",
            f"It is {word}. Which {unit} comes {side}?",
            f"Which {unit} is one {side} this?\n{word}",
            f"Say the {unit} {side} it.\n{word}",
        )
    )
    return question, words.neighbour(word, step)


def _fibonacci(rng: Random) -> Asked:
    start, shown = rng.randrange(0, 20), rng.randrange(3, 6)
    row = words.FIBONACCI[start : start + shown + 2]
    given = _list(row[:shown])
    question = rng.choice(
        (
            f"Fibonacci goes {given}, and then?",
            f"Two more of the Fibonacci numbers?\n{given}",
            f"How does the Fibonacci sequence go on?\n{given}",
            f"The next Fibonacci numbers after {given}?",
        )
    )
    return question, _list(row[shown:])


def _sequence(rng: Random) -> Asked:
    step = rng.choice(list(words.STEPS))
    start = rng.randrange(0, 60) if step < 5 else rng.randrange(0, 14) * step
    row = words.counted(start, step, rng.randrange(5, 7))
    given = _list(row[:-2])
    question = rng.choice(
        (
            f"I count {given}, and then?",
            f"Two more numbers in these steps?\n{given}",
            f"How does the sequence go on?\n{given}",
            f"Which numbers come next: {given}",
        )
    )
    return question, _list(row[-2:])


def _count(rng: Random) -> Asked:
    some = rng.sample(words.NOUNS, rng.randrange(2, 7))
    given = ", ".join(some)
    question = rng.choice(
        (f"How many are there?\n{given}", f"Count them: {given}", f"The list has how many words?\n{given}")
    )
    return question, str(len(some))


QUESTIONS: tuple[Callable[[Random], Asked], ...] = (
    _plural,
    _opposite,
    _young,
    _kind,
    _neighbour,
    _fibonacci,
    _sequence,
    _count,
)
"""What draws a question, one per kind of fact."""
