"""The GPU's own matrix-multiply speed at a model's shapes and dtype, which the share of the peak is taken of.

Each linear map is multiplied both ways, as forward and the input's gradient do, on random numbers: zeros would
be multiplied faster than data is. The best of them is the peak.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from bench.gpu.cases import GPU_SHAPES

LARGEST_OUTPUT = 49_152  # of the head: more rows are no faster
REPEATS, CALLS = 5, 8


def measure(shape_name: str, tokens: int, device: str) -> dict[str, Any]:
    """The best TFLOP/s, and those of each map, forward and backward."""
    import torch

    shape = GPU_SHAPES[shape_name]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    maps = {(inputs, outputs): name for name, inputs, outputs in reversed(shape.linears())}
    maps[shape.hidden_size, min(shape.vocab_size, LARGEST_OUTPUT)] = "lm_head"
    found: dict[str, dict[str, float]] = {}
    for (inputs, outputs), name in maps.items():
        x, weight, dy = (
            torch.randn(*size, device=device, dtype=dtype)
            for size in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
        )
        work = 2 * tokens * inputs * outputs / 1e12
        found[name] = {
            "forward": work / _seconds(lambda x=x, weight=weight: x @ weight.T, device),
            "backward": work / _seconds(lambda dy=dy, weight=weight: dy @ weight, device),
        }
    best = max(speed for pair in found.values() for speed in pair.values())
    return {"tflops": best, "tokens": tokens, "dtype": str(dtype)[6:], "maps": found}


def _seconds(call: Callable[[], Any], device: str) -> float:
    """Of one call: the median over repeats of several calls each."""
    import torch

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    call()
    times = []
    for _ in range(REPEATS):
        began = now()
        for _ in range(CALLS):
            call()
        times.append((now() - began) / CALLS)
    return median(times)
