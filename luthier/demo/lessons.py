"""The skills half of the pre-training text: small exercises told in prose, every answer right.

Counting, sums, sequences, spelling, the alphabet, plurals, opposites, units and the like. The base model
picks the skills up here, from many wordings; what it does not see is the instruction format, nor that an
answer should stand alone and stop. That is what the demo's fine-tuning teaches.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from luthier.demo import words
from luthier.demo.stories import article, join, person

Exercise = Callable[[Random], str]
"""Writes one exercise with its answer, as a line or two of prose."""


def running_sums(first: int, second: int, length: int) -> list[int]:
    """A Fibonacci-like row: each number is the sum of the two before it."""
    row = [first, second]
    while len(row) < length:
        row.append(row[-1] + row[-2])
    return row[:length]


def distinct_initials(rng: Random, count: int) -> list[str]:
    """`count` nouns in random order, no two of which begin with the same letter."""
    picked: dict[str, str] = {}
    while len(picked) < count:
        noun = rng.choice(words.NOUNS)
        picked.setdefault(noun[0], noun)
    items = list(picked.values())
    rng.shuffle(items)
    return items


def numbers(row: list[int]) -> str:
    """`[3, 5]` -> `3, 5`."""
    return ", ".join(map(str, row))


def told(rng: Random, question: str, given: str, answer: str) -> str:
    """One exercise as somebody might tell it: what was asked, what was given, and the answer."""
    pupil = person(rng)
    return rng.choice(
        (
            f"{question}: {given}. The answer is {answer}.",
            f"{question}: {given}\nAnswer: {answer}.",
            f"{question}.\n{given}\n{answer}.",
            f"{given}\n{question}:\n{answer}.",
            f"{pupil.name} was asked: {question} of {given}. {pupil.name} said {answer}.",
            f"{question}, said the teacher: {given}.\n{pupil.name} wrote:\n{answer}.",
            f"### {question}\n{given}\n\n### Answer:\n{answer}.",
            f"{question}.\n\n{given}\n\n{answer}.",
        )
    )


def fibonacci(rng: Random) -> str:
    """Rows of running sums, the classical Fibonacci sequence among them."""
    if rng.random() < 0.2:
        start = rng.randint(0, 8)
        row = running_sums(1, 1, 14)[start : start + rng.randint(5, 6)]
        name = "the Fibonacci sequence"
    else:
        row = running_sums(rng.randint(1, 15), rng.randint(1, 20), rng.randint(5, 6))
        name = rng.choice(("the Fibonacci sequence", "the row of sums", "the Fibonacci row"))
    shown = len(row) - 2
    given, answer = numbers(row[:shown]), numbers(row[shown:])
    a, b, c, d = row[:4]
    y, z, following = row[shown - 2 : shown + 1]
    return rng.choice(
        (
            f"In {name} each number is the sum of the two before it: {numbers(row)}.",
            f"Now {name} {given} goes on with {answer}.",
            f"After {given} in {name} come {answer}, because {y} plus {z} is {following}.",
            f"{a} and {b} is {c}, {b} and {c} is {d}, so the row is {numbers(row)}.",
            told(rng, f"The next two numbers of {name}", given, answer),
        )
    )


def steps(rng: Random) -> str:
    """Rows with a constant step, upwards or downwards."""
    step, length, first = rng.randint(1, 10), rng.randint(5, 6), rng.randint(1, 40)
    row = [first + step * i for i in range(length)]
    word = "up"
    if rng.random() < 0.3:
        row, word = row[::-1], "down"
    given, answer = numbers(row[:-2]), numbers(row[-2:])
    return rng.choice(
        (
            f"Counting {word} in steps of {step}: {numbers(row)}.",
            f"The sequence {given} goes {word} by {step} each time and goes on with {answer}.",
            f"{given} and then {answer} have a step of {step}.",
            told(rng, "The next two numbers of the sequence", given, answer),
        )
    )


def sums(rng: Random) -> str:
    """Addition and taking away, in figures and in prose."""
    a, b = rng.randint(1, 99), rng.randint(1, 99)
    high, low = max(a, b), min(a, b)
    noun = words.PLURALS[rng.choice(words.NOUNS)]
    who = person(rng)
    return rng.choice(
        (
            f"{a} plus {b} is {a + b}.",
            f"{a} + {b} = {a + b}.",
            f"The sum of {a} and {b} is {a + b}.",
            f"{high} minus {low} is {high - low}.",
            f"{who.name} has {a} {noun} and gets {b} more, so now {who.they} has {a + b} {noun}.",
            f"{who.name} has {high} {noun} and gives {low} away, so {who.they} has {high - low} left.",
        )
    )


def comparing(rng: Random) -> str:
    """The largest and smallest of a few numbers, and numbers in order."""
    row = rng.sample(range(1, 100), rng.randint(3, 5))
    ordered = sorted(row)
    return rng.choice(
        (
            f"Of {numbers(row)} the largest is {ordered[-1]} and the smallest is {ordered[0]}.",
            f"The numbers {numbers(row)} in order are {numbers(ordered)}.",
            told(rng, "The largest number", numbers(row), str(ordered[-1])),
        )
    )


def spelling(rng: Random) -> str:
    """A word letter by letter, forwards and backwards."""
    word = rng.choice(words.SPELT)
    forward, backward = words.spell(word), words.spell_backwards(word)
    who = person(rng)
    return rng.choice(
        (
            f"The word {word} is spelt {forward} and backwards it is {backward}.",
            f"{word} is spelt {forward}.",
            f"Backwards the word {word} is spelt {backward}.",
            f"{who.name} can spell {word} backwards: {backward}.",
            f"### The word {word} spelt backwards\n{backward}.",
            f"The letters of the word {word} are {forward}, and from the end they are {backward}.",
            f"{who.name} spelt the word {word} backwards and wrote:\n{backward}.",
            f"The word is {word}. Its letters backwards:\n{backward}.",
        )
    )


def alphabet(rng: Random) -> str:
    """Words in the order of the alphabet."""
    items = distinct_initials(rng, rng.randint(2, 4))
    ordered = sorted(items)
    given, answer = ", ".join(items), ", ".join(ordered)
    first, last = ordered[0], ordered[-1]
    return rng.choice(
        (
            f"In the order of the alphabet the words {given} are {answer}.",
            f"The words {given} sorted by the alphabet: {answer}.",
            f"The word {first} comes before {last}, because {first[0]} comes before {last[0]} "
            "in the alphabet.",
            told(rng, "The words sorted alphabetically", given, answer),
            told(rng, "The words in alphabetical order", given, answer),
        )
    )


def plurals(rng: Random) -> str:
    """One and many."""
    nouns = rng.sample(words.NOUNS, 2)
    many = [words.PLURALS[noun] for noun in nouns]
    given, answer = ", ".join(nouns), ", ".join(many)
    return rng.choice(
        (
            f"One {nouns[0]}, two {many[0]}. One {nouns[1]}, two {many[1]}.",
            f"The plural of {nouns[0]} is {many[0]}, and the plural of {nouns[1]} is {many[1]}.",
            f"If there is more than one {nouns[0]}, we say {many[0]}.",
            told(rng, "The plural of each word", given, answer),
        )
    )


def opposites(rng: Random) -> str:
    """Words with their opposites."""
    here = rng.sample(list(words.OPPOSITES), 2)
    there = [words.OPPOSITES[word] for word in here]
    given, answer = ", ".join(here), ", ".join(there)
    return rng.choice(
        (
            f"The opposite of {here[0]} is {there[0]}, and the opposite of {here[1]} is {there[1]}.",
            f"What is not {here[0]} is {there[0]}.",
            f"{here[0]} and {there[0]} are opposites, and so are {here[1]} and {there[1]}.",
            told(rng, "The opposite of each word", given, answer),
        )
    )


def counting(rng: Random) -> str:
    """How many things a list holds."""
    items = rng.sample(words.NOUNS, rng.randint(2, 9))
    given = ", ".join(items)
    count = len(items)
    noun = rng.choice(words.NOUNS)
    return rng.choice(
        (
            f"In the list {given} there are {count} words.",
            f"{given} are {count} things.",
            f"There are {words.NUMBER_WORDS[count]} things in the bag: {join(items)}. That is {count}.",
            f"{', '.join(str(i) for i in range(1, count + 1))}: {count} {words.PLURALS[noun]}.",
            told(rng, "The number of words in the list", given, str(count)),
        )
    )


def profile(rng: Random) -> tuple[str, dict[str, str]]:
    """A sentence or two about an invented person, and what it says by field."""
    who = person(rng)
    fields = {
        "age": str(rng.randint(6, 90)),
        "town": rng.choice(words.TOWNS).name,
        "job": rng.choice(words.JOBS).name,
        "pet": rng.choice(words.PETS),
        "food": rng.choice(words.FOODS),
        "hobby": rng.choice(words.HOBBIES),
        "colour": rng.choice(words.COLOURS),
    }
    phrases = {
        "age": f"is {fields['age']} years old",
        "town": f"lives in {fields['town']}",
        "job": f"works as {article(fields['job'])}",
        "pet": f"has {article(fields['pet'])}",
        "food": f"eats {fields['food']}",
        "hobby": f"likes {fields['hobby']}",
        "colour": f"wears {fields['colour']} shoes",
    }
    told_fields = rng.sample(list(fields), rng.randint(3, 4))
    text = f"{who.name} {join([phrases[field] for field in told_fields])}."
    return text, {"name": who.name, **{field: fields[field] for field in told_fields}}


def profiles(rng: Random) -> str:
    """Somebody described, and one thing of it said again."""
    text, fields = profile(rng)
    field = rng.choice(list(fields))
    return rng.choice(
        (
            f"{text} So the {field} of {fields['name']} is {fields[field]}.",
            f"{text} The {field}: {fields[field]}.",
            f"{text}\nThe {field} is\n{fields[field]}.",
            f"Asked for the {field}: {text}\n{fields[field]}.",
        )
    )


def units(rng: Random) -> str:
    """Everyday conversions of units."""
    count = rng.randint(2, 9)
    big, small, factor = rng.choice(
        (
            ("metres", "centimetres", 100),
            ("kilometres", "metres", 1000),
            ("weeks", "days", 7),
            ("hours", "minutes", 60),
            ("years", "months", 12),
            ("dozens", "pieces", 12),
        )
    )
    return f"{count} {big} are {count * factor} {small}, for there are {factor} {small} in one."


def clock(rng: Random) -> str:
    """What time it will be."""
    hour, later = rng.randint(1, 12), rng.randint(1, 9)
    then = (hour + later - 1) % 12 + 1
    return f"It is {hour} o'clock now, and in {later} hours it will be {then} o'clock."


LESSONS: tuple[tuple[Exercise, int], ...] = (
    (fibonacci, 8),
    (steps, 6),
    (sums, 5),
    (comparing, 2),
    (spelling, 6),
    (alphabet, 8),
    (plurals, 3),
    (opposites, 3),
    (counting, 4),
    (profiles, 4),
    (units, 1),
    (clock, 1),
)
"""Each kind of exercise with its share."""
