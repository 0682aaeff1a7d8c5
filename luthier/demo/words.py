"""The vocabulary of the demo's little world, shared by its pre-training text and its instruction rows.

Everything the tiny base model ever reads is put together from these tables, so each word occurs often enough
to be learned in minutes: its plural, its opposite, its kind, its place in the week.
"""

from __future__ import annotations


def _pairs(text: str) -> dict[str, str]:
    """`a/b` entries as a table; an entry without a slash is a noun whose plural takes an s."""
    return {word: other or word + "s" for word, _, other in (entry.partition("/") for entry in text.split())}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("Anna Ben Clara David Emma Finn Grace Henry Iris Jonas Kate Leo Mia Noah Olive Paul")
PLACES = tuple(
    f"the {place}"
    for place in (
        "garden",
        "market",
        "river",
        "old bridge",
        "school",
        "kitchen",
        "harbour",
        "forest",
        "station",
        "hill",
    )
)

PLURALS = _pairs("""
cat dog bird horse cow boat car road tree book chair table lamp door apple cup hat shoe star river stone bridge
house garden window spoon box/boxes bus/buses dish/dishes brush/brushes fox/foxes glass/glasses man/men
child/children mouse/mice foot/feet leaf/leaves knife/knives city/cities baby/babies tooth/teeth goose/geese
wolf/wolves lady/ladies
""")
NOUNS = tuple(sorted(PLURALS))

# No word stands in two pairs, so that every opposite is the only right answer.
_OPPOSITES = _pairs("""
hot/cold big/small tall/short fast/slow old/new happy/sad light/dark hard/soft rich/poor wet/dry full/empty
near/far early/late open/closed loud/quiet strong/weak clean/dirty thick/thin high/low sweet/sour up/down
left/right day/night north/south east/west black/white good/bad first/last inside/outside begin/end buy/sell
win/lose
""")
OPPOSITES = {**_OPPOSITES, **{other: word for word, other in _OPPOSITES.items()}}
QUALITIES = tuple(sorted(OPPOSITES))

YOUNG = _pairs("""
dog/puppy cat/kitten cow/calf horse/foal sheep/lamb goat/kid duck/duckling bear/cub frog/tadpole pig/piglet
hen/chick goose/gosling deer/fawn swan/cygnet eagle/eaglet owl/owlet hare/leveret spider/spiderling
""")

KINDS = {
    thing: kind
    for kind, things in {
        "animal": "cat dog horse cow fox bear wolf duck goat sheep mouse frog",
        "fruit": "apple pear plum cherry peach lemon grape melon banana mango",
        "tool": "hammer saw drill spoon knife needle brush ladder rake shovel",
        "colour": "red blue green yellow brown grey pink purple orange white",
    }.items()
    for thing in things.split()
}

DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
CYCLES = {"day": DAYS, "month": MONTHS}


def neighbour(word: str, step: int) -> str:
    """The day or month that many places on, around the year or the week."""
    cycle = DAYS if word in DAYS else MONTHS
    return cycle[(cycle.index(word) + step) % len(cycle)]


def fibonacci(count: int) -> list[int]:
    """The first numbers of the Fibonacci sequence, from 0 on."""
    row = [0, 1]
    while len(row) < count:
        row.append(row[-1] + row[-2])
    return row[:count]


FIBONACCI = tuple(fibonacci(26))
STEPS = {1: "one", 2: "two", 5: "five", 10: "ten"}
"""Step widths of the sequences that are counted on, with their names."""


def counted(start: int, step: int, length: int) -> list[int]:
    """`length` numbers from a start on in equal steps."""
    return [start + step * place for place in range(length)]
