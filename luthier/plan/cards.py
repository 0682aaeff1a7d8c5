"""Cards by name: their memory, their matrix-multiply peak, and how a size like 24GiB is read."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from luthier.errors import ConfigError

# The CUDA context and libraries, which the allocator does not see, and the share of the rest that tensors can fill:
# what is freed and taken in other sizes leaves gaps.
CONTEXT_BYTES, FILLED = 0.6 * 2**30, 0.95


@dataclass(frozen=True)
class Card:
    """One accelerator.

    Attributes:
        memory: bytes. tflops: dense 16-bit matrix multiplies with fp32 sums, in 10^12 FLOP/s, as the maker states
            them; None where it is not known. bf16: whether it multiplies bfloat16. fp8: whether it is of the Hopper
            generation or later, whose 8-bit multiplies `load_in_fp8` is for.
        nvlink: bytes a second between cards, each way, as the maker states them; None where there is none. bridged:
            it joins two cards and no more. pcie: generation of its 16 lanes to the host.
    """

    name: str
    memory: float
    tflops: float | None = None
    bf16: bool = True
    fp8: bool = True
    nvlink: float | None = None
    bridged: bool = False
    pcie: int = 4

    @property
    def room(self) -> float:
        """Bytes that a step's tensors may take."""
        return max(0.0, self.memory - CONTEXT_BYTES) * FILLED


def _card(
    name: str,
    mib: int,
    tflops: float,
    *,
    bf16: bool = True,
    fp8: bool = False,
    nvlink: float | None = None,
    bridged: bool = False,
    pcie: int = 4,
) -> Card:
    return Card(name, mib * 2.0**20, tflops, bf16, fp8, nvlink and nvlink * 1e9, bridged, pcie)


# Memory as the driver reports it, which is less than the nominal where error correction takes a part; peak as in the
# makers' data sheets, without sparsity. NVLink in GB/s each way, half of what the sheets say for both.
CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        _card("b200", 183_359, 2250, fp8=True, nvlink=900, pcie=5),
        _card("h200", 143_771, 989, fp8=True, nvlink=450, pcie=5),
        _card("h100", 81_559, 989, fp8=True, nvlink=450, pcie=5),
        _card("h100-pcie", 81_559, 756, fp8=True, nvlink=300, bridged=True, pcie=5),
        _card("a100-80", 81_920, 312, nvlink=300),
        _card("a100-40", 40_960, 312, nvlink=300),
        _card("l40s", 46_068, 362),
        _card("a6000", 49_140, 155, nvlink=56.25, bridged=True),
        _card("rtx6000-ada", 49_140, 364),
        _card("rtx5090", 32_607, 209, fp8=True, pcie=5),
        _card("rtx4090", 24_564, 165),
        _card("rtx3090", 24_576, 71, nvlink=56.25, bridged=True),
        _card("a10g", 23_028, 70),
        _card("l4", 23_034, 121),
        _card("rtx4080", 16_376, 97),
        _card("v100-32", 32_768, 125, bf16=False, nvlink=150, pcie=3),
        _card("v100-16", 16_384, 125, bf16=False, nvlink=150, pcie=3),
        _card("t4", 15_360, 65, bf16=False, pcie=3),
    )
}
_ALIASES = {"h100-80": "h100", "a100": "a100-80", "4090": "rtx4090", "3090": "rtx3090", "v100": "v100-16"}
_UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def card_named(name: str) -> Card:
    """A card of the table.

    Raises:
        ConfigError: there is none of that name; it names the nearest.
    """
    plain = re.sub(r"[\s_]+", "-", name.strip().lower())
    plain = re.sub(r"^(nvidia|geforce|tesla)-", "", plain).removesuffix("gb")
    plain = re.sub(r"^rtx-", "rtx", plain)
    plain = _ALIASES.get(plain, plain)
    if plain in CARDS:
        return CARDS[plain]
    near = difflib.get_close_matches(plain, CARDS, n=1, cutoff=0.5)
    meant = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"--gpu: no card {name!r} is known.{meant} There are {', '.join(CARDS)}; any other by its memory: "
        "--memory 24GiB"
    )


def parse_memory(text: str) -> float:
    """Bytes of a size such as "24GiB", "80 GB" or "24G" (read as GiB, as cards are named).

    Raises:
        ConfigError: no such size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].lower() if match else ""
    unit = {"g": "gib", "m": "mib", "t": "tib"}.get(unit, unit)
    if match is None or unit not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(f"--memory: {text!r} is no size; write a number and a unit, such as 24GiB or 80GB")
    return float(match[1]) * _UNITS[unit]
