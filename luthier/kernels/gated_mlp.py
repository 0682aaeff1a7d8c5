"""A gated MLP in one piece: y = (act(x G') * (x U')) D', each of the three with an optional low-rank addition.

As separate layers it keeps five tensors of the wide dimension for backward (gate, activation, up, product, and
the down projection's input); in one piece it keeps gate and up, computes the product again where it is needed,
and writes the gradients over them.

Shapes: T tokens, D hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from luthier.kernels import lora_linear
from luthier.kernels.gated import gated_backward_, gated_forward, reference_gated
from luthier.kernels.lora_linear import (
    Kept,
    Linear,
    in_order,
    input_gradient,
    reference_lora_linears,
    trained_parts,
    weight_gradients,
    with_masks,
    without_masks,
)

# Largest difference from `reference_gated_mlp` in fp32, relative to the largest value.
TOLERANCE = 1e-5


def gated_mlp(
    x: torch.Tensor,
    inputs: Sequence[Linear],
    down: Linear,
    kind: str,
    stacked_a: torch.Tensor | None = None,
) -> torch.Tensor:
    """(..., D) -> (..., D).

    Args:
        inputs: gate and up, or one layer whose outputs are both, gate first (Phi-3).
        kind: the activation, as in `kernels.gated`.
        stacked_a: see `lora_linears`; of the inputs.
    """
    flat = x.reshape(-1, x.shape[-1])
    tensors = [t for layer in (*inputs, down) for t in (layer.weight, layer.bias, layer.a, layer.b)]
    return _GatedMLP.apply(flat, tuple(inputs), down, kind, stacked_a, *tensors).view(x.shape)


def reference_gated_mlp(x: torch.Tensor, inputs: Sequence[Linear], down: Linear, kind: str) -> torch.Tensor:
    """The same in plain torch, for autograd to differentiate."""
    gate, up = halves(reference_lora_linears(x, inputs))
    return reference_lora_linears(reference_gated(gate, up, kind), [down])[0]


def halves(outs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up (..., I) among the outputs of the input layers: two, or the halves of one (..., 2 I)."""
    if len(outs) == 2:
        return outs[0], outs[1]
    gate, up = outs[0].chunk(2, -1)
    return gate, up


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        inputs: tuple[Linear, ...],
        down: Linear,
        kind: str,
        stacked_a: torch.Tensor | None,
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        wide, kept = lora_linear.forward(x_TD, inputs, stacked_a)
        (out_TD,), kept_down = lora_linear.forward(gated_forward(*halves(wide), kind), (down,))
        (ctx.layers, masks), ctx.kind = without_masks((*inputs, down)), kind
        ctx.trained = trained_parts(ctx.needs_input_grad[5:])
        needs_x = any(weight or adapter for weight, _, adapter in ctx.trained[:-1])
        ctx.save_for_backward(
            x_TD if needs_x else None, kept.a, kept.inner, kept_down.a, kept_down.inner, *masks, *wide, *tensors
        )
        return out_TD

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, a, inner, a_down, inner_down, *rest = ctx.saved_tensors
        *inputs, down = with_masks(ctx.layers, rest)
        wide = rest[len(ctx.layers) :][: len(inputs)]
        kept, kept_down = Kept(tuple(inputs), a, inner), Kept((down,), a_down, inner_down)
        # Gate and up are dead after this; their gradients take their place.
        d_product, d_inner_down = input_gradient([d_out], kept_down)
        assert d_product is not None
        product, *_ = gated_backward_(d_product, *halves(wide), ctx.kind, inplace=True)
        of_down = weight_gradients([d_out], d_inner_down, product, kept_down, ctx.trained[-1:])
        del product, d_product
        dx, d_inner = input_gradient(wide, kept, wanted=ctx.needs_input_grad[0])
        of_inputs = weight_gradients(wide, d_inner, x_TD, kept, ctx.trained[:-1])
        return dx, None, None, None, None, *in_order(ctx.layers, [*of_inputs, *of_down])
