"""The formats that weights have in a GGUF file: those that the package gguf writes, and those that llama.cpp makes."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from luthier.errors import ConfigError, ModelError
from luthier.export.gguf import llama

Array = npt.NDArray[np.float32]
ROWS = 4096  # of a matrix that are quantised at a time


@dataclass(frozen=True)
class Quant:
    """Attributes:
    matrices, head: gguf's names of the formats of matrices, and of the head. kind: llama.cpp's number of the file.
    by_llama_cpp: it is made from a file in 16 bits.
    """

    name: str
    matrices: str
    kind: int
    head: str = ""
    by_llama_cpp: bool = False


# The head is where rounding shows most, and takes 8 bits beside 4 and 5 (llama.cpp's own quantiser gives it 6).
QUANTS = {
    quant.name: quant
    for quant in (
        Quant("f32", "F32", 0),
        Quant("f16", "F16", 1),
        Quant("bf16", "BF16", 32),
        Quant("q8_0", "Q8_0", 7),
        Quant("q5_1", "Q5_1", 9, "Q8_0"),
        Quant("q5_0", "Q5_0", 8, "Q8_0"),
        Quant("q4_1", "Q4_1", 3, "Q8_0"),
        Quant("q4_0", "Q4_0", 2, "Q8_0"),
        Quant("q6_k", "Q6_K", 18, by_llama_cpp=True),
        Quant("q5_k_m", "Q5_K", 17, by_llama_cpp=True),
        Quant("q5_k_s", "Q5_K", 16, by_llama_cpp=True),
        Quant("q4_k_m", "Q4_K", 15, by_llama_cpp=True),
        Quant("q4_k_s", "Q4_K", 14, by_llama_cpp=True),
        Quant("q3_k_l", "Q3_K", 13, by_llama_cpp=True),
        Quant("q3_k_m", "Q3_K", 12, by_llama_cpp=True),
        Quant("q3_k_s", "Q3_K", 11, by_llama_cpp=True),
        Quant("q2_k", "Q2_K", 10, by_llama_cpp=True),
    )
}
_SAME = {"float16": "f16", "fp16": "f16", "bfloat16": "bf16", "float32": "f32", "fp32": "f32", "q4_k": "q4_k_m",
         "q5_k": "q5_k_m", "q3_k": "q3_k_m"}  # fmt: skip


def find_quant(name: str) -> Quant:
    """Raises ConfigError for a name that there is not, with the nearest."""
    lowered = name.lower().replace("-", "_")
    found = QUANTS.get(_SAME.get(lowered, lowered))
    if found is None:
        near = difflib.get_close_matches(lowered, QUANTS, n=1, cutoff=0.4)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"--quant: there is no {name!r}.{meant} There are {', '.join(QUANTS)}")
    return found


def check_installed(quant: Quant) -> None:
    """Raises ModelError where the packages that a format needs are missing."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelError('GGUF files are written with the package gguf: pip install "luthier[gguf]"') from error
    if not llama.is_installed() and quant.by_llama_cpp:
        python = ", ".join(name for name, each in QUANTS.items() if not each.by_llama_cpp)
        raise ModelError(
            f"--quant {quant.name} is made by llama.cpp: pip install llama-cpp-python. Without it there are {python}"
        )


def format_of(name: str, shape: tuple[int, ...], quant: Quant, *, head: bool) -> str:
    """gguf's name of the format of one tensor: vectors stay in fp32, and rows that are no whole number of blocks in 16
    bits."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) < 2:
        return "F32"
    chosen = quant.head if head and quant.head else quant.matrices
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[chosen]]
    return chosen if shape[-1] % block == 0 else "F16"


def bytes_of(shape: tuple[int, ...], kind: str) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(np.prod(shape, dtype=np.int64)) // block * size


def quantised(value: Array, kind: str, name: str) -> npt.NDArray[Any]:
    """A tensor's values as they stand in the file."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if kind == "F32":
        return np.ascontiguousarray(value, dtype=np.float32)
    if kind == "F16":
        with np.errstate(over="ignore"):
            narrow = value.astype(np.float16)
        if not np.isfinite(narrow).all():
            raise ModelError(f"{name}: f16 cannot hold its largest entries; take --quant bf16")
        return narrow
    which = GGMLQuantizationType[kind]
    parts = [quantize(value[at : at + ROWS], which) for at in range(0, len(value), ROWS)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
