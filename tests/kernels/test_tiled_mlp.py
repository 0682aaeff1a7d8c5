"""The tiled MLP against the plain one under autograd, and against `gated_mlp` where there is one tile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from luthier.kernels.gated_mlp import gated_mlp, reference_gated_mlp
from luthier.kernels.lora_linear import Linear
from luthier.kernels.tiled_mlp import TOLERANCE, MLPLayers, output_unused, tiled_mlp

T, D, I = 23, 12, 20  # noqa: E741


def make(*, fused_inputs: bool, trained: bool, dropout: bool) -> tuple[torch.Tensor, MLPLayers, list[torch.Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(T, D, requires_grad=True)
    leaves = [x]

    def layer(inputs: int, outputs: int) -> Linear:
        weight, bias = torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)
        if trained:
            leaves.extend([weight.requires_grad_(), bias.requires_grad_()])
            return Linear(weight, bias)
        a, b = (torch.randn(3, inputs) / 3).requires_grad_(), (torch.randn(outputs, 3) / 3).requires_grad_()
        leaves.extend([a, b])
        keep = torch.rand(T, inputs) > 0.3 if dropout else None
        return Linear(weight, bias, a, b, 0.5, keep, 0.3 if dropout else 0.0)

    inputs = (layer(D, 2 * I),) if fused_inputs else (layer(D, I), layer(D, I))
    return x, MLPLayers(inputs, layer(I, D), None), leaves


@pytest.mark.parametrize("tile", [1, 7, 100])
@pytest.mark.parametrize("trained", [True, False], ids=["weights", "adapters"])
@pytest.mark.parametrize("fused_inputs", [True, False])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
def test_it_is_the_plain_mlp(kind: str, fused_inputs: bool, trained: bool, dropout: bool, tile: int) -> None:
    if trained and dropout:
        pytest.skip("dropout is the adapters'")
    x, layers, leaves = make(fused_inputs=fused_inputs, trained=trained, dropout=dropout)
    cotangent = torch.randn(T, D)
    outs = [
        reference_gated_mlp(x, layers.inputs, layers.down, kind),
        tiled_mlp(x, lambda _: layers, kind, tile),
        gated_mlp(x, layers.inputs, layers.down, kind),
    ]
    expected, found, whole = (
        [out.detach(), *torch.autograd.grad(out, leaves, cotangent)] for out in outs
    )
    for one, other, untiled in zip(found, expected, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE * max(1.0, float(other.abs().max())))
        if tile >= T:
            assert torch.equal(one, untiled)


def test_an_unused_output_has_the_same_gradients() -> None:
    x, layers, leaves = make(fused_inputs=False, trained=False, dropout=False)
    expected = torch.autograd.grad(tiled_mlp(x, lambda _: layers, "silu", 8), leaves, torch.ones(T, D))
    with output_unused():
        out = tiled_mlp(x, lambda _: layers, "silu", 8)
    found = torch.autograd.grad(out, leaves, torch.ones(T, D))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_weight_that_changed_since_is_seen() -> None:
    x, layers, _ = make(fused_inputs=False, trained=True, dropout=False)
    out = tiled_mlp(x, lambda _: layers, "silu", 8)
    with torch.no_grad():
        layers.down.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_layers_are_asked_for_again() -> None:
    """So that nothing as wide as the MLP lives from forward to backward inside them."""
    x, layers, leaves = make(fused_inputs=False, trained=False, dropout=True)
    asked = []

    def give(_: torch.Tensor) -> MLPLayers:
        asked.append(1)
        return replace(layers)

    out = tiled_mlp(x, give, "silu", 8)
    before = len(asked)
    torch.autograd.grad(out, leaves, torch.ones(T, D))
    assert len(asked) == before + 1
