"""Each op beside the same in plain torch and beside the neighbours' op, in turn.

    python -m bench.kernels                       # all ops, a minute or two
    python -m bench.kernels --only rms_norm,gated

On a CPU the shapes are SmolLM2-135M's in fp32, on an NVIDIA GPU those of an 8B Llama in bf16. A round calls
everybody for a few milliseconds, one after the other, and ratios are taken within rounds, so that whatever
slows the machine down for a while slows all of them. Every op is measured with its backward, and its result
compared with plain torch's. The result goes to bench/results/ and its table is printed last.

Shapes: T tokens, D hidden size, I intermediate size, N labelled positions, V vocabulary, H heads.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch starts threads

import torch
import torch.nn.functional as F

from bench import machine
from luthier.kernels.cross_entropy import cross_entropy_, reference_cross_entropy
from luthier.kernels.gated import gated, reference_gated
from luthier.kernels.gated_mlp import gated_mlp, reference_gated_mlp
from luthier.kernels.linear_ce import linear_logps
from luthier.kernels.lora_linear import Linear, lora_linears, reference_lora_linears
from luthier.kernels.rms_norm import add_rms_norm, reference_rms_norm, rms_norm
from luthier.kernels.rotary import reference_rotary, rotary

RESULTS = Path(__file__).resolve().parent / "results"
OURS, REFERENCE = "luthier", "plain torch"
PACKAGES = ["torch", "triton", "liger-kernel"]
EPS = 1e-6

Tensors = tuple[torch.Tensor, ...]
Op = Callable[[], Tensors]


@dataclass(frozen=True)
class Shape:
    """One model's sizes, and how many tokens and labelled positions a call has."""

    name: str
    T: int
    N: int
    D: int
    I: int  # noqa: E741 - the legend's letter
    V: int
    heads: int
    key_heads: int
    head: int
    rank: int = 16


SMOL = Shape("SmolLM2-135M", T=1024, N=256, D=576, I=1536, V=49152, heads=9, key_heads=3, head=64)
LLAMA = Shape("Llama-3.1-8B", T=8192, N=2048, D=4096, I=14336, V=128256, heads=32, key_heads=8, head=128)


@dataclass
class Maker:
    """Random tensors of one device and dtype."""

    device: torch.device
    dtype: torch.dtype

    def __call__(self, *shape: int, grad: bool = False, scale: float = 1.0) -> torch.Tensor:
        made = torch.randn(shape, device=self.device, dtype=torch.float32).mul_(scale).to(self.dtype)
        return made.requires_grad_(grad)

    def ids(self, count: int, below: int) -> torch.Tensor:
        return torch.randint(below, (count,), device=self.device)

    def liger(self) -> Any:
        """The module of Liger's autograd functions where they can run, else None."""
        if self.device.type != "cuda" or not find_spec("liger_kernel"):
            return None
        import liger_kernel.ops as ops

        return ops


def differentiated(forward: Op, wanted: Tensors, upstream: Tensors) -> Op:
    """An op that runs forward and backward, and returns the outputs and the gradients."""

    def run() -> Tensors:
        outputs = forward()
        return *outputs, *torch.autograd.grad(outputs, wanted, upstream)

    return run


def of_rms_norm(s: Shape, make: Maker) -> dict[str, Op]:
    x, weight, dy = make(s.T, s.D, grad=True), make(s.D), make(s.T, s.D)
    ops: dict[str, Op] = {
        OURS: lambda: (rms_norm(x, weight, EPS, cast_before_weight=True),),
        REFERENCE: lambda: (reference_rms_norm(x, weight, EPS, cast_before_weight=True),),
        "F.rms_norm": lambda: (F.rms_norm(x, (s.D,), weight, EPS),),
    }
    if liger := make.liger():
        ops["liger"] = lambda: (liger.LigerRMSNormFunction.apply(x, weight, EPS),)
    return {name: differentiated(op, (x,), (dy,)) for name, op in ops.items()}


def of_add_rms_norm(s: Shape, make: Maker) -> dict[str, Op]:
    x, residual = make(s.T, s.D, grad=True), make(s.T, s.D, grad=True)
    weight, dy, dtotal = make(s.D), make(s.T, s.D), make(s.T, s.D)

    def reference() -> Tensors:
        total = x + residual
        return reference_rms_norm(total, weight, EPS, cast_before_weight=True), total

    ops = {
        OURS: lambda: add_rms_norm(x, residual, weight, EPS, cast_before_weight=True),
        REFERENCE: reference,
    }
    return {name: differentiated(op, (x, residual), (dy, dtotal)) for name, op in ops.items()}


def of_gated(s: Shape, make: Maker) -> dict[str, Op]:
    gate, up, dh = make(s.T, s.I, grad=True), make(s.T, s.I, grad=True), make(s.T, s.I)
    ops: dict[str, Op] = {
        OURS: lambda: (gated(gate, up, "silu"),),
        REFERENCE: lambda: (reference_gated(gate, up, "silu"),),
    }
    if liger := make.liger():
        ops["liger"] = lambda: (liger.LigerSiLUMulFunction.apply(gate, up),)
    return {name: differentiated(op, (gate, up), (dh,)) for name, op in ops.items()}


def of_rotary(s: Shape, make: Maker) -> dict[str, Op]:
    q = make(1, s.T, s.heads, s.head).transpose(1, 2).requires_grad_()
    k = make(1, s.T, s.key_heads, s.head).transpose(1, 2).requires_grad_()
    angle = torch.rand(1, s.T, s.head // 2, device=make.device).mul_(6).repeat(1, 1, 2)
    cos, sin = angle.cos().to(make.dtype), angle.sin().to(make.dtype)
    upstream = torch.randn_like(q), torch.randn_like(k)
    ops: dict[str, Op] = {
        OURS: lambda: rotary(q, k, cos, sin),
        REFERENCE: lambda: reference_rotary(q, k, cos, sin),
    }
    if liger := make.liger():
        ops["liger"] = lambda: liger.LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin)
    return {name: differentiated(op, (q, k), upstream) for name, op in ops.items()}


def of_cross_entropy(s: Shape, make: Maker) -> dict[str, Op]:
    """Ours works on its own output from the second call on, so that no copy is timed; the work is the same."""
    logits, target = make(s.N, s.V, grad=True), make.ids(s.N, s.V)
    own = logits.detach().clone()

    def ours() -> Tensors:
        return (cross_entropy_(own, target, None)[0].sum(),)

    def by_autograd(loss: Callable[[], torch.Tensor]) -> Op:
        def run() -> Tensors:
            total = loss()
            torch.autograd.grad(total, logits)
            return (-total,)

        return run

    ops = {
        OURS: ours,
        REFERENCE: by_autograd(lambda: -reference_cross_entropy(logits, target)[0].sum()),
        "F.cross_entropy": by_autograd(lambda: F.cross_entropy(logits.float(), target, reduction="sum")),
    }
    if liger := make.liger():

        def by_liger() -> Tensors:
            held = logits.detach().clone().requires_grad_()  # it overwrites its input as well
            arguments = (held, target, None, -100, 0.0, 0.0, "sum")
            return (-liger.LigerCrossEntropyFunction.apply(*arguments)[0],)

        ops["liger"] = by_liger
    return ops


def of_linear_ce(s: Shape, make: Maker) -> dict[str, Op]:
    hidden, target = make(s.N, s.D, grad=True), make.ids(s.N, s.V)
    head = make(s.V, s.D, scale=s.D**-0.5)
    one = torch.ones((), device=make.device)

    ops: dict[str, Op] = {
        OURS: lambda: (-linear_logps(hidden, target, head)[0].sum(),),
        REFERENCE: lambda: (F.cross_entropy(F.linear(hidden, head).float(), target, reduction="sum"),),
    }
    if liger := make.liger():
        arguments = (None, None, -100, 0.0, 0.0, "sum")
        ops["liger"] = lambda: (
            liger.LigerFusedLinearCrossEntropyFunction.apply(hidden, head, target, *arguments)[0].float(),
        )
    return {name: differentiated(op, (hidden,), (one,)) for name, op in ops.items()}


def _linears(s: Shape, make: Maker, *sizes: tuple[int, int]) -> tuple[list[Linear], Tensors]:
    """Layers (inputs, outputs) with fp32 adapters, and those."""
    layers = []
    for inputs, outputs in sizes:
        a, b = (
            torch.randn(size, device=make.device) * 0.02 for size in ((s.rank, inputs), (outputs, s.rank))
        )
        weight = make(outputs, inputs, scale=inputs**-0.5)
        layers.append(Linear(weight, a=a.requires_grad_(), b=b.requires_grad_(), scale=2.0))
    trained = tuple(t for layer in layers for t in (layer.a, layer.b) if t is not None)
    return layers, trained


def of_lora_linear(s: Shape, make: Maker) -> dict[str, Op]:
    wide, narrow = s.heads * s.head, s.key_heads * s.head
    x = make(s.T, s.D, grad=True)
    layers, trained = _linears(s, make, (s.D, wide), (s.D, narrow), (s.D, narrow))
    upstream = make(s.T, wide), make(s.T, narrow), make(s.T, narrow)
    ops: dict[str, Op] = {
        OURS: lambda: lora_linears(x, layers),
        REFERENCE: lambda: reference_lora_linears(x, layers),
    }
    return {name: differentiated(op, (x, *trained), upstream) for name, op in ops.items()}


def of_gated_mlp(s: Shape, make: Maker) -> dict[str, Op]:
    x, dy = make(s.T, s.D, grad=True), make(s.T, s.D)
    (*inputs, down), trained = _linears(s, make, (s.D, s.I), (s.D, s.I), (s.I, s.D))
    ops: dict[str, Op] = {
        OURS: lambda: (gated_mlp(x, inputs, down, "silu"),),
        REFERENCE: lambda: (reference_gated_mlp(x, inputs, down, "silu"),),
    }
    return {name: differentiated(op, (x, *trained), (dy,)) for name, op in ops.items()}


CASES: dict[str, Callable[[Shape, Maker], dict[str, Op]]] = {
    "rms_norm": of_rms_norm,
    "add_rms_norm": of_add_rms_norm,
    "gated": of_gated,
    "rotary": of_rotary,
    "cross_entropy": of_cross_entropy,
    "linear_ce": of_linear_ce,
    "lora_linear": of_lora_linear,
    "gated_mlp": of_gated_mlp,
}


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
    title = f"{shape['name']} ({sizes}), {result['dtype']}, {where}; forward and backward"
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
    chosen = parser.parse_args(given)
    if unknown := set(chosen.only.split(",")) - set(CASES):
        parser.error(f"no such op: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")

    device = torch.device(chosen.device)
    on_gpu = device.type == "cuda"
    shape, make = (LLAMA if on_gpu else SMOL), Maker(device, torch.bfloat16 if on_gpu else torch.float32)
    torch.manual_seed(0)
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
        "hardware": machine.hardware() | {"threads": torch.get_num_threads()} | _gpu(device),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "dtype": str(make.dtype).removeprefix("torch."),
        "shape": asdict(shape),
        "lines": [asdict(line) for line in lines],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"kernels-{device.type}-{now:%Y%m%d}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(as_text(result))
    print(f"\nwritten to bench/results/{path.name}")
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
