"""The plain-prose half of the pre-training text: stories, facts, letters, reports and talks.

Each public function writes one document from a random generator. The people and their doings are drawn
anew each time; the facts (towns, jobs, animals, the calendar) always agree with the tables of `words`, so a
model that reads enough of it knows them by heart.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from luthier.demo import words


class Person(NamedTuple):
    """A name with its pronouns."""

    name: str
    they: str
    them: str
    their: str


def person(rng: Random, *others: Person) -> Person:
    """A person who is none of `others`."""
    taken = {other.name for other in others}
    name = rng.choice([name for name in words.NAMES if name not in taken])
    if name in words.GIRLS:
        return Person(name, "she", "her", "her")
    return Person(name, "he", "him", "his")


def article(word: str) -> str:
    """`owl` -> `an owl`."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def join(items: list[str]) -> str:
    """`[a, b, c]` -> `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


_PLACES = ("bed", "table", "chair", "bush", "cupboard", "stairs", "bench", "basket", "old tree")


def lost_and_found(rng: Random) -> str:
    """Somebody misses a thing, looks in three places, and finds it."""
    owner = person(rng)
    helper = person(rng, owner)
    colour, thing = rng.choice(words.COLOURS), rng.choice(words.NOUNS)
    places = rng.sample(_PLACES, 3)
    day = rng.choice(words.DAYS)
    lines = [
        rng.choice(
            (
                f"On {day} {owner.name} could not find {owner.their} {colour} {thing}.",
                f"{owner.name} had a {colour} {thing}, and on {day} it was gone.",
                f'"Where is my {colour} {thing}?" asked {owner.name} on {day}.',
            )
        ),
        rng.choice(
            (
                f"{owner.they.capitalize()} looked under the {places[0]} and behind the {places[1]}.",
                f"First {owner.they} looked behind the {places[0]}, then near the {places[1]}.",
            )
        ),
        rng.choice(
            (
                f"It was not there, so {owner.they} asked {helper.name} for help.",
                f"Then {helper.name} came and helped {owner.them}.",
            )
        ),
        rng.choice(
            (
                f"{helper.name} found the {thing} under the {places[2]}.",
                f'"Here it is, under the {places[2]}," said {helper.name}.',
            )
        ),
        rng.choice(
            (
                f"{owner.name} was happy and thanked {helper.them}.",
                f'"Thank you, {helper.name}," said {owner.name}, and took the {thing} home.',
                f"Now {owner.name} keeps {owner.their} {thing} "
                f"in {article(rng.choice(('box', 'drawer', 'bag')))}.",
            )
        ),
    ]
    return " ".join(lines)


def journey(rng: Random) -> str:
    """Somebody travels between two towns and meets an animal."""
    traveller = person(rng)
    start, goal = rng.sample(words.TOWNS, 2)
    animal = rng.choice(words.ANIMALS)
    means = rng.choice(("by train", "by boat", "on foot", "by bus", "on a bike"))
    gift = rng.choice(words.NOUNS)
    friend = person(rng, traveller)
    lines = [
        rng.choice(
            (
                f"Early in the morning {traveller.name} left {start.name} and went to {goal.name} {means}.",
                f"{traveller.name} lived in {start.name} and wanted to see {goal.name}, "
                f"so {traveller.they} went {means}.",
            )
        ),
        rng.choice(
            (
                f"On the way {traveller.they} saw {article(animal.name)}, which {animal.deed}.",
                f"Near the river {start.river} {traveller.they} met {article(animal.name)}.",
            )
        ),
        rng.choice(
            (
                f"{goal.name} is famous for its {goal.famous_for}, and {traveller.name} bought some.",
                f"In {goal.name} the {goal.flag} flag was up, because the mayor, {goal.mayor}, was there.",
            )
        ),
        rng.choice(
            (
                f"There {traveller.they} gave {friend.name} {article(gift)}, "
                f"and they ate {rng.choice(words.FOODS)}.",
                f"In the evening {traveller.they} came home with {article(gift)} for {friend.name}.",
            )
        ),
    ]
    return " ".join(lines)


def working_day(rng: Random) -> str:
    """What somebody does for a living."""
    worker = person(rng)
    job = rng.choice(words.JOBS)
    town = rng.choice(words.TOWNS)
    day = rng.choice(words.DAYS)
    opening = rng.choice(
        (
            f"{worker.name} is a {job.name} in {town.name}.",
            f"In {town.name} there is a {job.name} whose name is {worker.name}.",
        )
    )
    middle = rng.choice(
        (
            f"{worker.they.capitalize()} works at the {job.place} and {job.work}.",
            f"Every day {worker.they} goes to the {job.place}, takes the {job.tool} and {job.work}.",
        )
    )
    end = rng.choice(
        (
            f"On {day} {worker.they} stays at home and likes {rng.choice(words.HOBBIES)}.",
            f"After work {worker.they} eats {rng.choice(words.FOODS)} with {person(rng, worker).name}.",
            f"The people of {town.name} like {worker.them} very much.",
        )
    )
    return f"{opening} {middle} {end}"


def town_facts(rng: Random) -> str:
    """Some of what is true of one town, in any order."""
    town = rng.choice(words.TOWNS)
    facts = [
        f"{town.name} lies on the river {town.river}.",
        f"The mayor of {town.name} is {town.mayor}.",
        f"The flag of {town.name} is {town.flag}.",
        f"{town.name} is famous for its {town.famous_for}.",
        f"About {town.people} people live in {town.name}.",
        f"{town.name} is a town in the {town.side} of the island.",
    ]
    return " ".join(rng.sample(facts, rng.randint(2, 5)))


def animal_facts(rng: Random) -> str:
    """Some of what is true of one animal or two."""
    lines = []
    for animal in rng.sample(words.ANIMALS, rng.randint(1, 2)):
        a = article(animal.name).capitalize()
        legs = f"has {words.NUMBER_WORDS[animal.legs]} legs" if animal.legs else "has no legs"
        facts = [
            f"{a} {legs}.",
            f"{a} lives in the {animal.home}.",
            f"{a} eats {animal.food}.",
            f"{a} {animal.deed}.",
        ]
        lines += rng.sample(facts, rng.randint(2, 4))
    return " ".join(lines)


def calendar(rng: Random) -> str:
    """Days, months and seasons."""
    lines = []
    for _ in range(rng.randint(2, 4)):
        day, month = rng.randrange(7), rng.randrange(12)
        name = words.MONTHS[month]
        lines.append(
            rng.choice(
                (
                    f"The day after {words.DAYS[day]} is {words.DAYS[(day + 1) % 7]}.",
                    f"The day before {words.DAYS[day]} is {words.DAYS[day - 1]}.",
                    f"{name} is followed by {words.MONTHS[(month + 1) % 12]}.",
                    f"{name} has {words.MONTH_LENGTHS[month]} days.",
                    f"{name} is month number {month + 1} of the year.",
                    f"{name} is in {words.SEASONS[(month + 1) % 12 // 3]}.",
                )
            )
        )
    return " ".join(lines)


def weather(rng: Random) -> str:
    """A short weather report."""
    town, other = rng.sample(words.TOWNS, 2)
    day = rng.randrange(7)
    degrees = rng.randint(2, 30)
    change = rng.randint(1, 9)
    warmer = rng.random() < 0.5 or degrees <= change
    next_degrees = degrees + change if warmer else degrees - change
    sky = rng.choice(("sunny", "cloudy", "rainy", "windy", "foggy"))
    return (
        f"The weather on {words.DAYS[day]} in {town.name} is {sky}, with {degrees} degrees. "
        f"On {words.DAYS[(day + 1) % 7]} it will be {change} degrees {'warmer' if warmer else 'colder'}, "
        f"which makes {next_degrees} degrees. "
        + rng.choice(
            (
                f"In {other.name} there may be {rng.choice(('rain', 'snow', 'storms', 'fog'))} "
                "in the evening.",
                f"People in {other.name} should take {article(rng.choice(('coat', 'hat', 'umbrella')))}.",
            )
        )
    )


def shopping(rng: Random) -> str:
    """A talk in a shop, in which the sum is right."""
    buyer = person(rng)
    seller = person(rng, buyer)
    first, second = rng.sample(words.NOUNS, 2)
    price, other = rng.randint(2, 30), rng.randint(2, 30)
    total = price + other
    paid = (total // 10 + 1) * 10
    return "\n".join(
        (
            f'{buyer.name}: {rng.choice(("Good morning", "Hello", "Good day"))}, {seller.name}. '
            f"How much is the {first}?",
            f"{seller.name}: The {first} is {price} coins, and the {second} is {other} coins.",
            f"{buyer.name}: I take both. That makes {total} coins. Here are {paid}.",
            f"{seller.name}: Thank you. You get {paid - total} coins back.",
        )
    )


def letter(rng: Random) -> str:
    """A letter to a friend."""
    writer = person(rng)
    reader = person(rng, writer)
    town = rng.choice(words.TOWNS)
    thing, colour = rng.choice(words.NOUNS), rng.choice(words.COLOURS)
    return "\n".join(
        (
            f"Dear {reader.name},",
            rng.choice(
                (
                    f"I am in {town.name} now and the {rng.choice(words.FOODS)} here is very good.",
                    f"thank you for the {colour} {thing}. I like it very much.",
                    f"the {town.famous_for} of {town.name} are beautiful, and I bought some for you.",
                )
            ),
            rng.choice(
                (
                    f"Please come on {rng.choice(words.DAYS)} and bring your {rng.choice(words.PETS)}.",
                    f"In {rng.choice(words.MONTHS)} I want to try {rng.choice(words.HOBBIES)} with you.",
                    f"My {rng.choice(words.PETS)} is well and eats a lot of {rng.choice(words.FOODS)}.",
                )
            ),
            f"Yours, {writer.name}",
        )
    )


def classroom(rng: Random) -> str:
    """School talk in the words in which people describe a task and ask for a response."""
    teacher = person(rng)
    pupil = person(rng, teacher)
    return " ".join(
        rng.sample(
            (
                f"{teacher.name} gave {pupil.name} a task with an instruction.",
                "An instruction describes a task, and a good response completes it.",
                "Below the instruction was an input that provides further context.",
                f"{pupil.name} read the instruction, which was paired with an input, and wrote a response.",
                "Each response below the line appropriately completes the request.",
                f"{pupil.name} made a request for further help, and {teacher.name} wrote an answer.",
                "The word below is paired with a picture that describes it.",
                f"The context provides what {pupil.name} has to know.",
            ),
            rng.randint(2, 4),
        )
    )


WRITERS = (
    (lost_and_found, 5),
    (journey, 5),
    (working_day, 3),
    (town_facts, 3),
    (animal_facts, 3),
    (calendar, 3),
    (weather, 3),
    (shopping, 4),
    (letter, 4),
    (classroom, 2),
)
"""Each kind of document with its share."""
