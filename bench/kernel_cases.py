"""What `bench.kernels` measures: each op of ours, the same in plain torch, and the neighbours' op where it runs.

Every contender of an op computes the same from the same random tensors, and returns it to be compared.

Shapes: T tokens, D hidden size, I intermediate size, N labelled positions, V vocabulary, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from luthier.kernels.cross_entropy import cross_entropy_, reference_cross_entropy
from luthier.kernels.gated import gated, reference_gated
from luthier.kernels.gated_mlp import gated_mlp, reference_gated_mlp
from luthier.kernels.linear_ce import linear_logps
from luthier.kernels.lora_linear import Linear, lora_linears, reference_lora_linears
from luthier.kernels.rms_norm import add_rms_norm, reference_rms_norm, rms_norm
from luthier.kernels.rotary import reference_rotary, rotary

OURS, REFERENCE = "luthier", "plain torch"
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
        """Liger's functions where they can run, else None. Some write over their inputs: these get their own."""
        if self.device.type != "cuda" or not find_spec("liger_kernel"):
            return None
        from liger_kernel.transformers import functional

        return functional


def own(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that may be written over."""
    return tensor.detach().clone().requires_grad_()


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
        ops["liger"] = lambda: (liger.liger_rms_norm(x, weight, EPS, in_place=False),)
    return {name: differentiated(op, (x,), (dy,)) for name, op in ops.items()}


def of_add_rms_norm(s: Shape, make: Maker) -> dict[str, Op]:
    x, residual = make(s.T, s.D, grad=True), make(s.T, s.D, grad=True)
    weight, dy, dtotal = make(s.D), make(s.T, s.D), make(s.T, s.D)

    def reference() -> Tensors:
        total = x + residual
        return reference_rms_norm(total, weight, EPS, cast_before_weight=True), total

    ops: dict[str, Op] = {
        OURS: lambda: add_rms_norm(x, residual, weight, EPS, cast_before_weight=True),
        REFERENCE: reference,
    }
    if liger := make.liger():
        ops["liger"] = lambda: liger.liger_fused_add_rms_norm(x, residual, weight, EPS, in_place=False)
    return {name: differentiated(op, (x, residual), (dy, dtotal)) for name, op in ops.items()}


def of_gated(s: Shape, make: Maker) -> dict[str, Op]:
    gate, up, dh = make(s.T, s.I, grad=True), make(s.T, s.I, grad=True), make(s.T, s.I)
    ops: dict[str, Op] = {
        OURS: lambda: (gated(gate, up, "silu"),),
        REFERENCE: lambda: (reference_gated(gate, up, "silu"),),
    }
    ops = {name: differentiated(op, (gate, up), (dh,)) for name, op in ops.items()}
    if liger := make.liger():
        a, b = own(gate), own(up)
        ops["liger"] = differentiated(lambda: (liger.liger_swiglu(a, b),), (a, b), (dh,))
    return ops


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
    ops = {name: differentiated(op, (q, k), upstream) for name, op in ops.items()}
    if liger := make.liger():
        q2, k2, upstream2 = own(q), own(k), (upstream[0].clone(), upstream[1].clone())
        ops["liger"] = differentiated(lambda: liger.liger_rope(q2, k2, cos, sin)[:2], (q2, k2), upstream2)
    return ops


def of_cross_entropy(s: Shape, make: Maker) -> dict[str, Op]:
    """What writes over its logits works on its own output from the second call on, so that no copy is timed; the
    work is the same."""
    logits, target = make(s.N, s.V, grad=True), make.ids(s.N, s.V)
    overwritten = own(logits).detach()

    def by_autograd(loss: Callable[[], torch.Tensor], leaf: torch.Tensor) -> Op:
        def run() -> Tensors:
            total = loss()
            torch.autograd.grad(total, leaf)
            return (total,)

        return run

    def by_torch() -> torch.Tensor:
        return F.cross_entropy(logits.float(), target, reduction="sum")

    ops: dict[str, Op] = {
        OURS: lambda: (-cross_entropy_(overwritten, target, None)[0].sum(),),
        REFERENCE: by_autograd(lambda: -reference_cross_entropy(logits, target)[0].sum(), logits),
        "F.cross_entropy": by_autograd(by_torch, logits),
    }
    if liger := make.liger():
        leaf = own(logits)
        ops["liger"] = by_autograd(lambda: liger.liger_cross_entropy(leaf, target, reduction="sum"), leaf)
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
        ops["liger"] = lambda: (
            liger.liger_fused_linear_cross_entropy(hidden, head, target, reduction="sum"),
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
