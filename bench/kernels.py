"""Each op beside the same in plain torch and beside the neighbours' op, in turn.

    python -m bench.kernels                       # all ops, a minute or two
    python -m bench.kernels --only rms_norm,gated

On a CPU the shapes are SmolLM2-135M's in fp32, on an NVIDIA GPU those of an 8B Llama in bf16. A round calls
everybody for a few milliseconds, one after the other, and ratios are taken within rounds, so that whatever
slows the machine down for a while slows all of them. Every op is measured with its backward, and its result
compared with plain torch's. The result goes to bench/results/ and its table is printed last.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch starts threads

import torch

from bench import machine
from bench.kernel_cases import CASES, LLAMA, OURS, REFERENCE, SMOL, Maker, Op, Tensors

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ["torch", "triton", "liger-kernel"]


@dataclass(frozen=True)
class Line:
    """One contender's figures.

    Attributes:
        microseconds: of a call, the median of the rounds. ratio: to ours in the same round, the median.
        difference: the largest from plain torch's result, relative to its largest entry.
    """

    op: str
    contender: str
    microseconds: float
    ratio: float
    difference: float


def measure(op: str, ops: dict[str, Op], device: torch.device, seconds: float) -> list[Line]:
    """Rounds of everybody in turn, for about the given time."""
    expected = ops[REFERENCE]()
    differences = {name: _difference(run(), expected) for name, run in ops.items()}
    del expected
    # As many calls in a turn as fill a fifteenth of a contender's share: about 15 rounds.
    turn = seconds / 15 / len(ops)
    calls = {name: max(1, int(turn / _time(run, 2, device))) for name, run in ops.items()}
    times: dict[str, list[float]] = {name: [] for name in ops}
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends or len(times[OURS]) < 3:
        for name, run in ops.items():
            times[name].append(_time(run, calls[name], device))
    return [
        Line(
            op,
            name,
            median(of) * 1e6,
            median(t / ours for t, ours in zip(of, times[OURS], strict=True)),
            differences[name],
        )
        for name, of in times.items()
    ]


def as_text(result: dict[str, Any]) -> str:
    """The table for a terminal."""
    hardware, shape = result["hardware"], result["shape"]
    rows = [["op", "contender", "time of a call", "times ours", "differs by"]]
    for line in (Line(**entry) for entry in result["lines"]):
        rows.append(
            [
                line.op,
                line.contender,
                f"{line.microseconds / 1000:,.3f} ms",
                f"{line.ratio:.2f}x",
                f"{line.difference:.0e}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    where = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['threads']} threads"
    sizes = ", ".join(f"{key} {value}" for key, value in shape.items() if key != "name")
    title = (
        f"{shape['name']} ({sizes}), {result['dtype']}, {where}; forward and backward; "
        f"{result['load_before']} processes were busy before"
    )
    return "\n".join([title, "", *(line.rstrip() for line in lines)])


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", default=",".join(CASES), metavar="A,B", help="these ops: " + ", ".join(CASES)
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="for each op")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the file goes")
    chosen = parser.parse_args(given)
    if unknown := set(chosen.only.split(",")) - set(CASES):
        parser.error(f"no such op: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")

    device = torch.device(chosen.device)
    on_gpu = device.type == "cuda"
    shape, make = (LLAMA if on_gpu else SMOL), Maker(device, torch.bfloat16 if on_gpu else torch.float32)
    torch.manual_seed(0)
    others = round(os.getloadavg()[0], 1)
    lines: list[Line] = []
    for op in chosen.only.split(","):
        print(f"{op} ...", file=sys.stderr, flush=True)
        lines += measure(op, CASES[op](shape, make), device, chosen.seconds)
        if on_gpu:
            torch.cuda.empty_cache()

    now = datetime.now(UTC)
    result = {
        "date": now.isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "load_before": others,
        "hardware": machine.hardware() | {"threads": torch.get_num_threads()} | _gpu(device),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "dtype": str(make.dtype).removeprefix("torch."),
        "shape": asdict(shape),
        "lines": [asdict(line) for line in lines],
    }
    chosen.results.mkdir(parents=True, exist_ok=True)
    path = chosen.results / f"kernels-{device.type}-{now:%Y%m%d}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(as_text(result))
    print(f"\nwritten to {path}")
    return 0


def _time(run: Op, calls: int, device: torch.device) -> float:
    """Seconds of a call, the mean of several."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    before = time.perf_counter()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - before) / calls


def _difference(found: Tensors, expected: Tensors) -> float:
    gaps = []
    for one, other in zip(found, expected, strict=True):
        gap = (one.detach().float() - other.detach().float()).abs().max()
        gaps.append((gap / other.detach().float().abs().max()).item())
    return max(gaps)


def _gpu(device: torch.device) -> dict[str, str]:
    return {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
