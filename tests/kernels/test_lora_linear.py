"""LoRA linears with a shared input against plain torch: outputs, and gradients of everything that may be trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from luthier.kernels.lora_linear import TOLERANCE, Linear, lora_linears, reference_lora_linears, stack

T, I = 13, 12  # noqa: E741


def layer(outputs: int, r: int, *, bias: bool = False, p: float = 0.0, trained: bool = False) -> Linear:
    """A random layer; its adapter is trained, and its weight as well if `trained`."""
    weight = torch.randn(outputs, I, requires_grad=trained)
    b = torch.randn(outputs, requires_grad=trained) if bias else None
    keep = torch.rand(T, I) >= p if p else None
    if not r:
        return Linear(weight, b)
    a, up = torch.randn(r, I, requires_grad=True), torch.randn(outputs, r, requires_grad=True)
    return Linear(weight, b, a, up, scale=0.7, keep=keep, p=p)


def trained(layers: list[Linear]) -> list[torch.Tensor]:
    found = [t for one in layers for t in (one.weight, one.bias, one.a, one.b) if t is not None]
    return [t for t in found if t.requires_grad]


GROUPS = {
    "one": lambda: [layer(8, 3)],
    "q, k, v": lambda: [layer(8, 3), layer(4, 3), layer(4, 3)],
    "unequal ranks": lambda: [layer(8, 3), layer(4, 5)],
    "one of them without an adapter": lambda: [layer(8, 3), layer(4, 0), layer(4, 2)],
    "biases": lambda: [layer(8, 3, bias=True), layer(4, 3, bias=True)],
    "dropout": lambda: [layer(8, 3, p=0.3), layer(4, 0), layer(4, 3, p=0.3)],
    "no adapter": lambda: [layer(8, 0), layer(4, 0)],
    "weights trained as well": lambda: [layer(8, 3, bias=True, trained=True), layer(4, 2, trained=True)],
}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("input_gradient", [True, False])
def test_equals_plain_torch(group: str, input_gradient: bool) -> None:
    torch.manual_seed(0)
    layers = GROUPS[group]()
    x = torch.randn(1, T, I, requires_grad=input_gradient)
    found, expected = lora_linears(x, layers), reference_lora_linears(x, layers)
    wanted = [x, *trained(layers)] if input_gradient else trained(layers)
    if not wanted:
        return
    upstream = [torch.randn(out.shape) for out in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE * 10, rtol=TOLERANCE)
    got, right = (
        torch.autograd.grad(sum((out * up).sum() for out, up in zip(outs, upstream, strict=True)), wanted)
        for outs in (found, expected)
    )
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE * 10, rtol=TOLERANCE)


def test_an_output_that_nobody_uses_gives_no_gradient() -> None:
    torch.manual_seed(0)
    layers = [layer(8, 3), layer(4, 3)]
    x = torch.randn(T, I, requires_grad=True)
    got = torch.autograd.grad(
        lora_linears(x, layers)[0].sum(), [x, layers[0].b, layers[1].b], allow_unused=True
    )
    wanted = torch.autograd.grad(reference_lora_linears(x, layers)[0].sum(), [x, layers[0].b])
    torch.testing.assert_close(got[0], wanted[0], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(got[1], wanted[1], atol=1e-4, rtol=1e-5)
    assert got[2] is None


def test_copies_in_the_compute_dtype_are_what_is_multiplied() -> None:
    """fp32 masters under a bf16 model: the copies a caller keeps give what casting at every use gives."""
    torch.manual_seed(0)
    layers = [layer(8, 3), layer(4, 3)]
    layers = [replace(one, weight=one.weight.bfloat16()) for one in layers]
    x = torch.randn(T, I, dtype=torch.bfloat16, requires_grad=True)
    kept = [
        replace(one, a_copy=one.a.detach().bfloat16(), b_copy=one.b.detach().bfloat16()) for one in layers
    ]
    wanted = [x, *trained(layers)]
    plain = torch.autograd.grad(sum(out.sum() for out in lora_linears(x, layers)), wanted)
    copied = lora_linears(x, kept, stack(kept, torch.bfloat16))
    for one, other in zip(plain, torch.autograd.grad(sum(o.sum() for o in copied), wanted), strict=True):
        assert torch.equal(one, other)
        assert other.dtype == (torch.bfloat16 if other.shape == x.shape else torch.float32)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    layers = [
        Linear(*(t if t is None else t.detach().double() for t in (one.weight, one.bias)),
               one.a.detach().double().requires_grad_(), one.b.detach().double().requires_grad_(), 0.7)
        for one in (layer(5, 2), layer(3, 2))
    ]  # fmt: skip
    x = torch.randn(4, I, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: lora_linears(x, layers), (x, *trained(layers)))
