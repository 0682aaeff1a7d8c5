"""The machine's own matrix-multiply speed at a model's shapes: what no fp32 training can be faster than.

    python -m bench.peak SHAPE TOKENS RESULT

A frozen linear map is multiplied with twice for every token: forward, X (T, in) @ W^T, and backward for its
input's gradient, dY (T, out) @ W (out, in). Each of them is timed for every map of the shape and for the head,
and the best is the peak: a whole model cannot be expected to reach it, since its narrow maps are slower.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from bench.shapes import SHAPES

WINDOW = 0.06  # seconds of one measurement: a single call may meet a jump of a virtual machine's clock
WINDOWS = 5
LARGEST_OUTPUT = 49_152  # of the head: more rows of it are no faster, and need memory


def measure(shape_name: str, tokens: int) -> dict[str, object]:
    """The best GFLOP/s, and those of each map, forward and backward."""
    import torch

    shape = SHAPES[shape_name]
    maps = {(inputs, outputs): name for name, inputs, outputs in reversed(shape.linears())}
    maps[shape.hidden_size, min(shape.vocab_size, LARGEST_OUTPUT)] = "lm_head"
    found: dict[str, dict[str, float]] = {}
    for (inputs, outputs), name in maps.items():
        x, weight, dy = (
            torch.randn(tokens, inputs),
            torch.randn(outputs, inputs),
            torch.randn(tokens, outputs),
        )
        work = 2 * tokens * inputs * outputs / 1e9
        found[name] = {
            "forward": work / _best(lambda x=x, weight=weight: x @ weight.T),
            "backward": work / _best(lambda dy=dy, weight=weight: dy @ weight),
        }
    best = max(speed for pair in found.values() for speed in pair.values())
    return {"gflops": best, "tokens": tokens, "threads": torch.get_num_threads(), "maps": found}


def _best(call) -> float:  # type: ignore[no-untyped-def]
    """Seconds of a call: the mean within a window of time, of the best window, after one call to warm up."""
    call()
    best = float("inf")
    for _ in range(WINDOWS):
        calls, began = 0, time.perf_counter()
        while (spent := time.perf_counter() - began) < WINDOW:
            call()
            calls += 1
        best = min(best, spent / calls)
    return best


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(measure(sys.argv[1], int(sys.argv[2]))), encoding="utf-8")
