"""The vocabulary of the demo's little world, shared by its pre-training text and its instruction rows.

Everything the tiny base model ever reads is put together from these tables, so each word occurs often enough
to be learned in minutes: its spelling, its plural, its place in the alphabet, its opposite. The towns are
made up; the rest is everyday English.
"""

from __future__ import annotations

from typing import NamedTuple


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GIRLS = _words("""
Ada Clara Emma Grace Ida Kate Mia Nora Rosa Tess Una Wendy Anna Celia Ella Gina Iris Lena Nina Ruth
""")
BOYS = _words("""
Ben Dan Felix Hugo Jack Leo Oscar Paul Sam Victor Boris David Frank Henry Jonas Max Otto Peter Simon Tom
""")
NAMES = tuple(sorted(GIRLS + BOYS))

# A noun that takes a plain -s stands alone; any other plural follows after a slash.
_NOUNS = """
apple axe/axes ant arrow bag ball banana basket bear bed bee bell bike bird boat book boot bottle bowl
box/boxes branch/branches bridge brush/brushes bucket bus/buses bush/bushes button cake camel candle cap car
card carrot castle cat chain chair child/children church/churches city/cities clock cloud coat coin cow crab
crow crown cup desk dish/dishes dog doll donkey door dress/dresses drum duck eagle ear egg elephant engine
eye face farm fence field finger fire flag flower fly/flies foot/feet forest fork fox/foxes
frog garden gate ghost giraffe glass/glasses glove goat goose/geese grape guitar hammer hand hat hen hill
horn horse house inn insect island jacket jar jewel judge/judges jug kettle key king kite kitchen kitten
knife/knives knot ladder lady/ladies lake lamp leaf/leaves leg lemon letter lion loaf/loaves lock log
man/men map mask melon mirror monkey moon mountain mouse/mice mouth mug nail neck needle nest net
nose nurse nut oak ocean office olive onion orange oven owl ox/oxen page palace pan
parrot party/parties path peach/peaches pear pen pencil piano picture pig pillow pipe plane plate pocket
pond pony/ponies potato/potatoes pot prince puppy/puppies queen quilt rabbit radio river road
robot rock roof room rope rose ruler sack saddle sailor salad sheep/sheep shelf/shelves ship shirt shoe
shop sister snake sock sofa spider spoon stamp star stone story/stories street table tail tent
thief/thieves ticket tiger tomato/tomatoes tooth/teeth tower town toy train tree truck tulip turtle
umbrella uncle vase village violin wagon wall watch/watches whale wheel whistle window wing wolf/wolves
woman/women worm yacht yard zebra
"""
PLURALS: dict[str, str] = {
    noun: plural or noun + "s" for noun, _, plural in (entry.partition("/") for entry in _NOUNS.split())
}
NOUNS = tuple(PLURALS)

# No word stands in two pairs, so that every opposite is the only right answer.
_OPPOSITES = """
hot/cold tall/short open/closed early/late fast/slow happy/sad light/dark young/old rich/poor full/empty
hard/soft wet/dry clean/dirty loud/quiet strong/weak thick/thin wide/narrow near/far high/low deep/shallow
sharp/blunt brave/afraid kind/cruel correct/wrong true/false up/down left/right in/out on/off
first/last push/pull buy/sell give/take start/stop win/lose laugh/cry day/night summer/winter north/south
east/west above/below before/after inside/outside always/never more/less big/small good/bad
smooth/rough sweet/sour safe/dangerous asleep/awake alive/dead cheap/expensive ugly/beautiful
polite/rude lazy/busy wild/tame front/back top/bottom love/hate arrive/leave remember/forget
begin/end question/answer friend/enemy morning/evening guest/host teacher/pupil
"""
OPPOSITES: dict[str, str] = {
    word: other
    for left, _, right in (pair.partition("/") for pair in _OPPOSITES.split())
    for word, other in ((left, right), (right, left))
}

SPELT = tuple(sorted({word for word in (*NOUNS, *OPPOSITES) if 3 <= len(word) <= 5}))
"""The words that the demo spells: short ones, so that an answer stays short."""

COLOURS = _words("""
red blue green yellow black white brown pink purple grey golden silver
""")
DAYS = _words("""
Monday Tuesday Wednesday Thursday Friday Saturday Sunday
""")
MONTHS = _words("""
January February March April May June July August September October November December
""")
MONTH_LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
SEASONS = ("winter", "spring", "summer", "autumn")
NUMBER_WORDS = _words("""
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty
""")
FOODS = _words("""
soup bread cheese rice fish cake salad honey milk tea jam pie
""")
HOBBIES = _words("""
painting singing swimming reading cooking dancing fishing skating knitting rowing
""")
PETS = _words("""
cat dog rabbit parrot pony turtle goat frog duck mouse
""")


class Town(NamedTuple):
    """One made-up town and the facts that every text about it agrees on."""

    name: str
    river: str
    mayor: str
    flag: str
    famous_for: str
    people: int
    side: str


_TOWNS = """
Abern/Lune/Wendy/red/bells/400/north Bromley/Ister/Victor/blue/apples/900/south
Corvin/Lune/Oscar/green/clocks/700/east Dunmore/Teal/Una/white/boats/300/west
Elmstead/Ister/Hugo/yellow/honey/800/north Farrow/Teal/Grace/black/kites/200/south
Galford/Arrow/Felix/purple/violins/600/east Hexley/Arrow/Rosa/golden/lamps/500/west
Inverden/Lune/Simon/silver/carrots/300/north Kestrel/Ister/Tess/pink/shoes/900/south
Lindow/Teal/Otto/brown/candles/700/east Marlow/Arrow/Iris/red/glass/400/west
Norwick/Lune/Paul/blue/tulips/600/north Oxley/Ister/Lena/green/hats/200/south
Penrose/Teal/Jonas/white/cheese/800/east Quarley/Arrow/Ruth/grey/stones/500/west
"""
TOWNS = tuple(
    Town(name, river, mayor, flag, famous_for, int(people), side)
    for name, river, mayor, flag, famous_for, people, side in (entry.split("/") for entry in _TOWNS.split())
)


class Job(NamedTuple):
    """A job, where it is done, its tool and what comes of it."""

    name: str
    place: str
    tool: str
    work: str


_JOBS = """
baker/bakery/oven/bakes bread|farmer/farm/plough/grows wheat|teacher/school/chalk/teaches children
doctor/hospital/needle/heals the sick|sailor/harbour/rope/sails ships|painter/studio/brush/paints pictures
gardener/garden/spade/grows roses|cook/kitchen/spoon/makes soup|tailor/workshop/needle/sews coats
smith/forge/hammer/makes horseshoes|miller/mill/wheel/grinds corn|clerk/office/pen/writes letters
fisher/lake/net/catches fish|driver/station/map/drives the bus|builder/yard/saw/builds houses
singer/theatre/voice/sings songs
"""
JOBS = tuple(Job(*entry.split("/")) for line in _JOBS.strip().splitlines() for entry in line.split("|"))


class Animal(NamedTuple):
    """An animal: legs, where it lives, what it eats, what it does."""

    name: str
    legs: int
    home: str
    food: str
    deed: str


_ANIMALS = """
horse/4/stable/hay/runs|cow/4/field/grass/gives milk|hen/2/yard/corn/lays eggs|bee/6/hive/nectar/makes honey
spider/8/web/flies/spins threads|snake/0/grass/mice/creeps|fish/0/lake/worms/swims
owl/2/forest/mice/hunts at night|frog/4/pond/insects/jumps|duck/2/pond/seeds/swims|goat/4/hill/leaves/climbs
rabbit/4/garden/carrots/digs holes|whale/0/ocean/shrimps/dives|ant/6/ground/crumbs/carries leaves
lion/4/grassland/meat/roars
camel/4/desert/thorns/carries sacks|monkey/4/jungle/bananas/climbs|eagle/2/mountain/fish/flies high
"""
ANIMALS = tuple(
    Animal(name, int(legs), home, food, deed)
    for name, legs, home, food, deed in (
        entry.split("/") for line in _ANIMALS.strip().splitlines() for entry in line.split("|")
    )
)


def spell(word: str) -> str:
    """`cat` -> `c a t`: one token per letter in the demo's tokenizer."""
    return " ".join(word)


def spell_backwards(word: str) -> str:
    """`cat` -> `t a c`."""
    return " ".join(reversed(word))
