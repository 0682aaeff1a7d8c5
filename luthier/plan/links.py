"""How fast devices reach each other: interconnects by name, or as measured.

A speed is that of one device, in one direction, as collectives count it ("bus bandwidth": NCCL's tests, and
`python -m bench.scaling`): of S bytes an all-gather or a reduce-scatter among n devices moves (n - 1)/n through each of
them, an all-reduce twice that. A link that is only named is taken to reach 80% of what its maker states; a number
is taken as it stands.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from luthier.errors import ConfigError
from luthier.plan.cards import Card

# Share of a link's nominal speed that large collectives reach.
REACHED = 0.8
# Bytes a second of 16 lanes, each way: 8, 16 and 32 GT/s a lane, 128 of 130 bits.
PCIE = {generation: 16 * giga * 1e9 * 128 / 130 / 8 for generation, giga in ((3, 8), (4, 16), (5, 32))}
# Between machines: a port of 400 Gbit/s for each GPU, or one of 100 Gbit/s for all of them together.
INFINIBAND, ETHERNET = 50e9, 12.5e9
WITHIN, BETWEEN = ("nvlink", "pcie3", "pcie4", "pcie5"), ("infiniband", "ethernet")
_EXAMPLE = "450GB/s, or 400Gbit/s"
_SCALE = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30, "ti": 2.0**40}


@dataclass(frozen=True)
class Links:
    """Bytes a second that collectives move, each way.

    Attributes:
        inner: of a device, to those of its machine. node: of a machine, to the others. per_node: devices in one.
        host: of a device, to the host's memory. said: all of it, for people.
    """

    inner: float
    node: float
    per_node: int
    host: float
    said: str

    def speed(self, ranks: int, stride: int = 1) -> float:
        """Of each device in groups of so many, whose members stand `stride` apart, all groups at work at once.

        A ring enters and leaves each machine once, so that one large group has the whole machine's ports for itself;
        groups across machines share them.
        """
        if ranks * stride <= self.per_node:
            return self.inner
        return min(self.inner, self.node / min(stride, self.per_node))


def links_of(interconnect: str | None, card: Card | None, gpus: int, per_node: int | None, *, cpu: bool) -> Links:
    """What the command line says of devices and their links, completed by what is usual.

    Args:
        interconnect: of a machine's devices, and behind a comma between machines. per_node: devices in a machine; all
            if it is None.

    Raises:
        ConfigError: no such link, one that the card does not have, or machines that are not full.
    """
    each = gpus if per_node is None else per_node
    if gpus % each:
        raise ConfigError(f"--gpus-per-node {each}: {gpus} GPUs do not fill machines of {each}")
    names = [] if interconnect is None else [part.strip() for part in interconnect.split(",")]
    several = gpus > each
    if len(names) > 2 or (len(names) == 2 and not several) or "" in names:
        raise ConfigError(
            f"--interconnect: {interconnect!r}: name one link, such as nvlink, and where --gpus-per-node makes several "
            "machines of the GPUs a second one between them, such as nvlink,infiniband"
        )
    if several and each == 1 and len(names) == 1:
        names = [names[0], names[0]]  # nothing is inside of a machine
    if cpu and not names:
        raise ConfigError(
            "--interconnect: the config computes on CPUs, and no link between them is usual: state its speed, such as "
            "1.5GB/s; `python -m bench.scaling` measures it"
        )
    usual = "nvlink" if card is not None and card.nvlink and not card.bridged else f"pcie{card.pcie if card else 4}"
    first = names[0] if names else usual
    inner, said = _within(first, card, each, cpu=cpu) if each > 1 else (float("inf"), "")
    said += ", an assumption: --interconnect" if said and not names else ""
    node = inner
    if several:
        second = names[1] if len(names) == 2 else "infiniband"
        node, between = _between(second, each)
        between += "" if len(names) == 2 else f", an assumption: --interconnect {first},infiniband"
        said += f"{'; ' if said else ''}between machines of {each} {between}"
    host = PCIE[card.pcie if card else 4] * REACHED
    return Links(inner, node, each, host, said)


def _within(name: str, card: Card | None, gpus: int, *, cpu: bool) -> tuple[float, str]:
    plain = name.lower()
    if plain in BETWEEN:
        raise ConfigError(
            f"--interconnect: {name} joins machines: name what joins the GPUs of one first, as in nvlink,{plain}, and "
            "with --gpus-per-node how many there are in each (1: nothing is inside)"
        )
    if plain not in WITHIN:
        return _number(name)
    if cpu:
        raise ConfigError(f"--interconnect: {name} joins GPUs, and the config computes on CPUs: state a speed")
    if plain != "nvlink":
        return _named(plain, PCIE[int(plain[-1])])
    if card is None or card.tflops is None:
        raise ConfigError(
            "--interconnect: how fast nvlink is depends on the card: name it with --gpu, or state the speed, such as "
            f"{_EXAMPLE}"
        )
    if card.nvlink is None:
        raise ConfigError(f"--interconnect: {card.name} has no nvlink; it has pcie{card.pcie}")
    if card.bridged and gpus > 2:
        raise ConfigError(
            f"--interconnect: a bridge joins two of {card.name} and no more; with {gpus} in a machine it is "
            f"pcie{card.pcie} that counts"
        )
    return _named(plain, card.nvlink)


def _between(name: str, per_node: int) -> tuple[float, str]:
    """Of a whole machine. A number is one GPU's, as everywhere."""
    plain = name.lower()
    if plain in WITHIN:
        raise ConfigError(f"--interconnect: {name} does not join machines; {' and '.join(BETWEEN)} do, or a number")
    if plain == "infiniband":
        speed, said = _named(plain, INFINIBAND)
        return speed * per_node, f"{said}, a port for each GPU"
    if plain == "ethernet":
        speed, said = _named(plain, ETHERNET)
        return speed, f"{said}, one port for all"
    speed, said = _number(name)
    return speed * per_node, f"{said} for each GPU"


def _named(name: str, nominal: float) -> tuple[float, str]:
    return nominal * REACHED, f"{name} ({nominal / 1e9:.4g} GB/s each way, of which {REACHED:.0%} are taken)"


def _number(text: str) -> tuple[float, str]:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgtKMGT]i?)(B|b|bit)(?:/s|ps)", text.strip())
    if match is None or float(match[1]) <= 0:
        raise ConfigError(
            f"--interconnect: {text!r} is no link that is known; there are {', '.join(WITHIN)}, between machines "
            f"{' and '.join(BETWEEN)}, or state its speed, one way, such as {_EXAMPLE}"
        )
    speed = float(match[1]) * _SCALE[match[2].lower()] / (1 if match[3] == "B" else 8)
    return speed, f"{speed / 1e9:.4g} GB/s each way, as stated"
