"""The gated MLP in one piece against plain torch: outputs, gradients, and what it keeps."""

from __future__ import annotations

import pytest
import torch

from luthier.kernels.gated_mlp import TOLERANCE, gated_mlp, reference_gated_mlp
from luthier.kernels.lora_linear import Linear

T, D, I = 11, 8, 12  # noqa: E741


def layer(inputs: int, outputs: int, r: int, *, bias: bool, p: float, trained: bool) -> Linear:
    weight = (torch.randn(outputs, inputs) * 0.3).requires_grad_(trained)
    b = torch.randn(outputs, requires_grad=trained) if bias else None
    if not r:
        return Linear(weight, b)
    a = torch.randn(r, inputs, requires_grad=True)
    up = torch.randn(outputs, r, requires_grad=True)
    return Linear(weight, b, a, up, 0.5, torch.rand(T, inputs) >= p if p else None, p)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("r", [0, 3])
@pytest.mark.parametrize(
    ("bias", "p", "trained"), [(False, 0.0, False), (True, 0.4, False), (True, 0.0, True)]
)
def test_equals_plain_torch(kind: str, joined: bool, r: int, bias: bool, p: float, trained: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, T, D, requires_grad=True)
    options = dict(bias=bias, p=p, trained=trained)
    inputs = [layer(D, 2 * I, r, **options)] if joined else [layer(D, I, r, **options) for _ in "ab"]
    down = layer(I, D, r, **options)
    wanted = [x]
    for one in (*inputs, down):
        wanted += [t for t in (one.weight, one.bias, one.a, one.b) if t is not None and t.requires_grad]
    expected = reference_gated_mlp(x, inputs, down, kind)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, wanted, upstream)
    found = gated_mlp(x, inputs, down, kind)
    torch.testing.assert_close(found, expected, atol=TOLERANCE * 10, rtol=TOLERANCE)
    for one, other in zip(torch.autograd.grad(found, wanted, upstream), gradients, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE * 10, rtol=TOLERANCE)


def test_keeps_gate_and_up_and_nothing_else_that_is_wide() -> None:
    inputs = [layer(D, I, 3, bias=False, p=0.0, trained=False) for _ in "ab"]
    down = layer(I, D, 3, bias=False, p=0.0, trained=False)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_mlp(torch.randn(T, D, requires_grad=True), inputs, down, "silu")
    assert [tuple(t.shape) for t in kept if t.shape[0] == T and t.shape[1] >= I] == [(T, I), (T, I)]


def test_a_second_backward_is_refused_instead_of_wrong() -> None:
    """Backward writes over what it kept."""
    x = torch.randn(T, D, requires_grad=True)
    inputs = [layer(D, I, 3, bias=False, p=0.0, trained=False) for _ in "ab"]
    out = gated_mlp(x, inputs, layer(I, D, 3, bias=False, p=0.0, trained=False), "silu").sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
