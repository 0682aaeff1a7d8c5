"""Linear layers that share an input, each with a trained low-rank addition: y = x W' + b + scale (x A') B'.

Autograd's own version of this keeps x once per layer, makes a tensor for every intermediate sum, and reads x
once per A. Here the A's of layers with one input (q, k and v; gate and up) are stacked into a single multiply,
x A' is kept for backward, dY B is computed once for the gradients of A and of x, the sums happen inside the
multiplies, a frozen weight gets no gradient, and an input that needs none gets none. A frozen weight may be stored
in a format of its own (quantised, or in 16 bits beside fp32); it is then read into the compute dtype at each use
and not kept.

Shapes: T tokens, I inputs, O outputs, r rank; a weight may be a transposed view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from luthier.kernels.fp8_linear import fp8_input_gradient, fp8_linear

# Largest difference from `reference_lora_linears` in fp32, relative to the largest value.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Linear:
    """One layer as the kernels see it.

    Attributes:
        weight: (O, I), or frozen in a format of its own. bias: (O,).
        read: gives such a weight as (O, I) in a compute dtype; None where `weight` itself is what is multiplied with.
            Its second argument says that the caller is done with it before any other weight is read. shape: (O, I) of
            such a weight.
        a, b: (r, I) and (O, r), in any float dtype; None without an adapter.
        row_scale: (O, 1) fp32, of a weight in e4m3 that is multiplied with as it is (`kernels.fp8_linear`).
        scale: factor on the low-rank addition.
        keep: (T, I), true where dropout keeps the adapter's input; None without dropout. p: its probability.
        a_copy, b_copy: a and b in the input's dtype, where the caller keeps such copies; made here otherwise.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0
    keep: torch.Tensor | None = None
    p: float = 0.0
    a_copy: torch.Tensor | None = None
    b_copy: torch.Tensor | None = None
    read: Callable[[torch.dtype, bool], torch.Tensor] | None = None
    row_scale: torch.Tensor | None = None
    shape: tuple[int, int] = (0, 0)

    def weight_in(self, dtype: torch.dtype, *, brief: bool = False) -> torch.Tensor:
        return self.weight if self.read is None else self.read(dtype, brief)

    def multiply(self, x_TI: torch.Tensor) -> torch.Tensor:
        """x W' + b."""
        if self.row_scale is not None:
            return fp8_linear(x_TI, self.weight, self.row_scale, self.bias)
        if self.read is None:
            return F.linear(x_TI, self.weight, self.bias)
        # What is kept is there before the weight is read, and the weight is gone before anything else is: otherwise a
        # CPU's heap is left in pieces.
        out = x_TI.new_empty(x_TI.shape[0], self.shape[0])
        weight = self.weight_in(x_TI.dtype, brief=True)
        if self.bias is None:
            return torch.mm(x_TI, weight.t(), out=out)
        return torch.addmm(self.bias, x_TI, weight.t(), out=out)

    def multiply_back(self, grad_TO: torch.Tensor, onto: torch.Tensor | None) -> torch.Tensor:
        """dY W, added to what is there already."""
        if self.row_scale is not None:
            dx = fp8_input_gradient(grad_TO, self.weight, self.row_scale)
            return dx if onto is None else onto.add_(dx)
        if onto is not None:
            return onto.addmm_(grad_TO, self.weight_in(grad_TO.dtype, brief=True))
        if self.read is None:
            return grad_TO @ self.weight
        dx = grad_TO.new_empty(grad_TO.shape[0], self.shape[1])
        return torch.mm(grad_TO, self.weight_in(grad_TO.dtype, brief=True), out=dx)

    def b_in(self, dtype: torch.dtype) -> torch.Tensor:
        assert self.b is not None
        return self.b.to(dtype) if self.b_copy is None else self.b_copy


def lora_linears(
    x: torch.Tensor, layers: Sequence[Linear], stacked_a: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Outputs (..., O) of each layer on one input (..., I).

    Args:
        stacked_a: the layers' A's one under another in x's dtype, where the caller keeps such a copy; made here
            otherwise.
    """
    flat = x.reshape(-1, x.shape[-1])
    tensors = [t for layer in layers for t in (layer.weight, layer.bias, layer.a, layer.b)]
    outs = _Linears.apply(flat, tuple(layers), stacked_a, *tensors)
    return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outs)


def reference_lora_linears(x: torch.Tensor, layers: Sequence[Linear]) -> tuple[torch.Tensor, ...]:
    """The same in plain torch, for autograd to differentiate."""
    outs = []
    for layer in layers:
        out = F.linear(x, layer.weight_in(x.dtype), layer.bias)
        if layer.a is not None and layer.b is not None:
            dropped = x
            if layer.keep is not None:
                dropped = x * layer.keep.view(x.shape) * (1.0 / (1.0 - layer.p))
            inner = F.linear(dropped, layer.a.to(x.dtype))
            out = out + F.linear(inner, layer.b.to(x.dtype)) * layer.scale
        outs.append(out)
    return tuple(outs)


@dataclass
class Kept:
    """What a group of layers keeps for its backward: their own tensors, and the inner products (T, sum of r)."""

    layers: tuple[Linear, ...]
    a: torch.Tensor | None
    inner: torch.Tensor | None

    def columns(self) -> list[slice]:
        """Where each layer's rank lies among the columns of `inner`, and the rows of `a`."""
        found, start = [], 0
        for layer in self.layers:
            r = 0 if layer.a is None else layer.a.shape[0]
            found.append(slice(start, start + r))
            start += r
        return found


def forward(
    x_TI: torch.Tensor, layers: tuple[Linear, ...], stacked_a: torch.Tensor | None = None
) -> tuple[list[torch.Tensor], Kept]:
    """Outputs of each layer, without autograd; what `backward` needs."""
    if stacked_a is None:
        stacked_a = stack(layers, x_TI.dtype)
    kept = Kept(layers, stacked_a, inner_products(x_TI, layers, stacked_a))
    outs = []
    for layer, columns in zip(layers, kept.columns(), strict=True):
        out = layer.multiply(x_TI)
        if layer.b is not None:
            assert kept.inner is not None
            out.addmm_(kept.inner[:, columns], layer.b_in(out.dtype).t(), alpha=layer.scale)
        outs.append(out)
    return outs, kept


def input_gradient(
    grads: Sequence[torch.Tensor | None], kept: Kept, *, wanted: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """First half of the backward: the gradients of the input (T, I), if wanted, and of the inner products.

    Args:
        grads: of each output, (T, O); None where an output was not used.
    """
    dx: torch.Tensor | None = None
    d_inner = None if kept.inner is None else torch.zeros_like(kept.inner)
    for grad, layer, columns in zip(grads, kept.layers, kept.columns(), strict=True):
        if grad is None:
            continue
        if wanted:
            dx = layer.multiply_back(grad, dx)
        if layer.b is not None:
            assert d_inner is not None
            torch.mm(grad, layer.b_in(grad.dtype), out=d_inner[:, columns])
            d_inner[:, columns] *= layer.scale
    if d_inner is None or kept.a is None or not wanted:
        return dx, d_inner
    if all(layer.keep is None for layer in kept.layers):
        return d_inner @ kept.a if dx is None else dx.addmm_(d_inner, kept.a), d_inner
    for layer, columns in zip(kept.layers, kept.columns(), strict=True):
        if layer.a is not None:
            through = _dropped(d_inner[:, columns] @ kept.a[columns], layer)
            dx = through if dx is None else dx.add_(through)
    return dx, d_inner


def weight_gradients(
    grads: Sequence[torch.Tensor | None],
    d_inner: torch.Tensor | None,
    x_TI: torch.Tensor | None,
    kept: Kept,
    trained: Sequence[tuple[bool, bool, bool]],
) -> list[tuple[torch.Tensor | None, ...]]:
    """Second half of the backward: for each layer the gradients of (weight, bias, a, b), None where not trained.

    Args:
        d_inner: from `input_gradient`. x_TI: the input; may be None if no weight and no adapter is trained.
        trained: per layer, whether weight, bias and adapter want a gradient.
    """
    stacked = None
    if d_inner is not None and x_TI is not None and all(layer.keep is None for layer in kept.layers):
        stacked = d_inner.t() @ x_TI
    found: list[tuple[torch.Tensor | None, ...]] = []
    for grad, layer, columns, wants in zip(grads, kept.layers, kept.columns(), trained, strict=True):
        weight = bias = a = b = None
        if grad is not None and wants[0]:
            assert x_TI is not None
            weight = grad.t() @ x_TI
        if grad is not None and wants[1]:
            bias = grad.sum(0)
        if grad is not None and wants[2] and layer.a is not None:
            assert x_TI is not None and d_inner is not None and kept.inner is not None
            a = d_inner[:, columns].t() @ _dropped(x_TI, layer) if stacked is None else stacked[columns]
            b = (grad.t() @ kept.inner[:, columns]).mul_(layer.scale)
        found.append((weight, bias, a, b))
    return found


def inner_products(
    x_TI: torch.Tensor, layers: tuple[Linear, ...], stacked_a: torch.Tensor | None
) -> torch.Tensor | None:
    """x A' of all layers side by side, (T, sum of r); dropped inputs differ, so they multiply one by one."""
    if stacked_a is None:
        return None
    if all(layer.keep is None for layer in layers):
        return x_TI @ stacked_a.t()
    adapted = [layer for layer in layers if layer.a is not None]
    parts = stacked_a.split([layer.a.shape[0] for layer in adapted if layer.a is not None])
    return torch.cat([_dropped(x_TI, layer) @ a.t() for layer, a in zip(adapted, parts, strict=True)], -1)


def _dropped(x_TI: torch.Tensor, layer: Linear) -> torch.Tensor:
    if layer.keep is None:
        return x_TI
    return (x_TI * layer.keep).mul_(1.0 / (1.0 - layer.p))


def stack(layers: Sequence[Linear], dtype: torch.dtype) -> torch.Tensor | None:
    """The layers' A's one under another in a dtype; one alone is not copied if it has that dtype already."""
    present = [layer.a if layer.a_copy is None else layer.a_copy for layer in layers if layer.a is not None]
    if not present:
        return None
    return (present[0] if len(present) == 1 else torch.cat(present)).detach().to(dtype)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: torch.Tensor,
        layers: tuple[Linear, ...],
        stacked_a: torch.Tensor | None,
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        outs, kept = forward(x_TI, layers, stacked_a)
        ctx.trained = trained_parts(ctx.needs_input_grad[3:])
        needs_x = any(weight or adapter for weight, _, adapter in ctx.trained)
        ctx.layers, masks = without_masks(layers)
        ctx.save_for_backward(x_TI if needs_x else None, kept.a, kept.inner, *masks, *tensors)
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x_TI, a, inner, *rest = ctx.saved_tensors  # reading them checks that nobody has changed a weight since
        kept = Kept(with_masks(ctx.layers, rest), a, inner)
        dx, d_inner = input_gradient(grads, kept, wanted=ctx.needs_input_grad[0])
        return (
            dx,
            None,
            None,
            *in_order(ctx.layers, weight_gradients(grads, d_inner, x_TI, kept, ctx.trained)),
        )


def without_masks(layers: Sequence[Linear]) -> tuple[tuple[Linear, ...], list[torch.Tensor | None]]:
    """Layers without dropout's masks, and these: as saved tensors they are not kept where a layer is recomputed."""
    masks = [one.keep for one in layers]
    return tuple(one if one.keep is None else replace(one, keep=None) for one in layers), masks


def with_masks(layers: Sequence[Linear], masks: Sequence[torch.Tensor | None]) -> tuple[Linear, ...]:
    """The layers as they were before `without_masks`; of `masks` only the first ones, one for each layer, are read."""
    pairs = zip(layers, masks, strict=False)
    return tuple(one if keep is None else replace(one, keep=keep) for one, keep in pairs)


def trained_parts(needs: Sequence[bool]) -> list[tuple[bool, bool, bool]]:
    """`needs_input_grad` of (weight, bias, a, b) for each layer -> (weight, bias, adapter)."""
    return [(needs[i], needs[i + 1], needs[i + 2] or needs[i + 3]) for i in range(0, len(needs), 4)]


def in_order(
    layers: Sequence[Linear], of_layers: Sequence[tuple[torch.Tensor | None, ...]]
) -> list[torch.Tensor | None]:
    """Gradients in the order of the tensors, each in its tensor's dtype (adapters are fp32 masters)."""
    flat: list[torch.Tensor | None] = []
    for layer, found in zip(layers, of_layers, strict=True):
        for tensor, gradient in zip((layer.weight, layer.bias, layer.a, layer.b), found, strict=True):
            flat.append(None if tensor is None or gradient is None else gradient.to(tensor.dtype))
    return flat
