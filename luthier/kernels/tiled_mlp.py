"""A gated MLP that keeps nothing of its wide dimension: gate and up are made again in backward, tile by tile.

`gated_mlp` keeps gate and up of all tokens, which is more than half of what a layer keeps. Here only the input is
kept. Forward and backward take some rows at a time, so that the wide tensors of one tile are all that ever
exists of them: the tokens of a pass no longer multiply with the widest dimension of the model. What is made again
is gate and up; the down projection is not, since its output is not needed.

Rows do not meet in an MLP, so the outputs are those of the whole; gradients of weights and adapters add up over the
tiles, in the dtype that they are stored in. With one tile they have the bits of `gated_mlp`.

Shapes: T tokens, D hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch

from luthier.kernels import lora_linear
from luthier.kernels.gated import gated_backward_, gated_forward
from luthier.kernels.gated_mlp import halves
from luthier.kernels.lora_linear import (
    Kept,
    Linear,
    in_order,
    input_gradient,
    trained_parts,
    weight_gradients,
)

TOLERANCE = 1e-5  # fp32, against `reference_gated_mlp`, relative to the largest value

_output_is_unused: ContextVar[bool] = ContextVar("output_is_unused", default=False)


@dataclass(frozen=True)
class MLPLayers:
    """The layers of an MLP: gate and up (or one whose outputs are both, gate first), down, and the A's of the
    inputs one under another (see `lora_linears`)."""

    inputs: tuple[Linear, ...]
    down: Linear
    stacked_a: torch.Tensor | None


@contextmanager
def output_unused() -> Iterator[None]:
    """Inside, `tiled_mlp` notes what its backward needs and returns memory that was never written to: for a second
    run of a layer of which nothing that follows the MLP is kept."""
    token = _output_is_unused.set(True)
    try:
        yield
    finally:
        _output_is_unused.reset(token)


def tiled_mlp(
    x: torch.Tensor, layers: Callable[[torch.Tensor], MLPLayers], kind: str, tile: int
) -> torch.Tensor:
    """(..., D) -> (..., D).

    Args:
        layers: called with the input (T, D) in forward and again in backward, so that dropout's masks, which are as
            wide as the MLP, are not kept either; the two answers have to be the same.
        kind: the activation, as in `kernels.gated`.
        tile: most rows at a time.
    """
    flat = x.reshape(-1, x.shape[-1])
    found = layers(flat)
    tensors = [t for one in (*found.inputs, found.down) for t in (one.weight, one.bias, one.a, one.b)]
    return _TiledMLP.apply(flat, layers, found, kind, tile, *tensors).view(x.shape)


class _TiledMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        layers: Callable[[torch.Tensor], MLPLayers],
        found: MLPLayers,
        kind: str,
        tile: int,
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.layers, ctx.kind, ctx.tile = layers, kind, tile
        ctx.save_for_backward(x_TD, *tensors)
        out_TD = torch.empty_like(x_TD)
        if _output_is_unused.get():
            return out_TD
        for rows in _tiles(len(x_TD), tile):
            wide, _ = lora_linear.forward(x_TD[rows], _rows(found.inputs, rows), found.stacked_a)
            product = gated_forward(*halves(wide), kind)
            del wide
            (out,), _ = lora_linear.forward(product, _rows((found.down,), rows))
            if len(out) == len(out_TD):
                return out
            out_TD[rows] = out
        return out_TD

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, *_ = ctx.saved_tensors  # reading them checks that nobody has changed a weight since
        found = ctx.layers(x_TD)
        layers = (*found.inputs, found.down)
        trained = trained_parts(ctx.needs_input_grad[5:])
        needs_dx = ctx.needs_input_grad[0]
        dx_TD: torch.Tensor | None = None
        total: list[torch.Tensor | None] = [None] * len(ctx.needs_input_grad[5:])
        for rows in _tiles(len(x_TD), ctx.tile):
            x, inputs, down = x_TD[rows], _rows(found.inputs, rows), _rows((found.down,), rows)
            wide, kept = lora_linear.forward(x, inputs, found.stacked_a)
            a_down = lora_linear.stack(down, x.dtype)
            product = gated_forward(*halves(wide), ctx.kind)
            kept_down = Kept(down, a_down, lora_linear.inner_products(product, down, a_down))
            del product
            d_product, d_inner_down = input_gradient([d_out[rows]], kept_down)
            assert d_product is not None
            product, *_ = gated_backward_(d_product, *halves(wide), ctx.kind, inplace=True)
            of_down = weight_gradients([d_out[rows]], d_inner_down, product, kept_down, trained[-1:])
            del product, d_product
            dx, d_inner = input_gradient(wide, kept, wanted=needs_dx)
            of_inputs = weight_gradients(wide, d_inner, x, kept, trained[:-1])
            del wide
            total = _sum(total, in_order(layers, [*of_inputs, *of_down]))
            if dx is not None and len(x) < len(x_TD):
                dx_TD = torch.empty_like(x_TD) if dx_TD is None else dx_TD
                dx_TD[rows] = dx
            else:
                dx_TD = dx
        return dx_TD, None, None, None, None, *total


def _tiles(tokens: int, tile: int) -> list[slice]:
    """Rows as evenly as whole tiles allow; one empty tile for no tokens."""
    count = max(1, -(-tokens // tile))
    size = max(1, -(-tokens // count))
    return [slice(start, min(start + size, tokens)) for start in range(0, max(1, tokens), size)]


def _rows(layers: Sequence[Linear], rows: slice) -> tuple[Linear, ...]:
    return tuple(one if one.keep is None else replace(one, keep=one.keep[rows]) for one in layers)


def _sum(
    total: list[torch.Tensor | None], more: list[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    return [b if a is None else a if b is None else a.add_(b) for a, b in zip(total, more, strict=True)]
