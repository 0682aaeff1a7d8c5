"""The gated unit against plain torch and transformers' activations, values and gradients, in place too."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from luthier.kernels.gated import KINDS, TOLERANCE, gated, gated_backward_, gated_forward, reference_gated

TRANSFORMERS_NAME = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}


def agree(found: object, expected: object, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 37), (2, 2100)])
def test_equals_the_reference(kind: str, shape: tuple[int, ...], device: torch.device) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(shape, device=device).mul_(3).requires_grad_() for _ in range(2))
    upstream = torch.randn(shape, device=device)
    found, expected = gated(gate, up, kind), reference_gated(gate, up, kind)
    agree(found, expected)
    agree(expected, ACT2FN[TRANSFORMERS_NAME[kind]](gate) * up)
    agree(
        torch.autograd.grad(found, [gate, up], upstream), torch.autograd.grad(expected, [gate, up], upstream)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leading", [(5,), (1, 5), (2, 3)])
def test_halves_of_one_buffer_become_its_gradient(
    kind: str, leading: tuple[int, ...], device: torch.device
) -> None:
    torch.manual_seed(0)
    buffer = torch.randn(*leading, 22, device=device, requires_grad=True)
    d_out = torch.randn(*leading, 13, device=device)[..., :11]  # its rows are apart as well
    before = d_out.clone()
    expected = reference_gated(buffer[..., :11], buffer[..., 11:], kind)
    (wanted,) = torch.autograd.grad(expected, buffer, d_out)

    own = buffer.detach().clone()
    gate, up = own[..., :11], own[..., 11:]
    agree(gated_forward(gate, up, kind), expected)
    for inplace in (False, True):
        h, d_gate, d_up = gated_backward_(d_out, gate, up, kind, inplace=inplace)
        agree(h, expected)
        agree(torch.cat((d_gate, d_up), -1), wanted)
        assert torch.equal(own, buffer) is not inplace
    agree(own, wanted)
    assert torch.equal(d_out, before)


@pytest.mark.parametrize("kind", KINDS)
def test_large_values_neither_overflow_nor_turn_into_nan(kind: str, device: torch.device) -> None:
    gate = torch.tensor([-1e4, -90.0, -0.0, 90.0, 1e4], device=device)
    up = torch.ones_like(gate)
    h, d_gate, d_up = gated_backward_(up.clone(), gate, up, kind)
    agree(h, torch.tensor([0.0, 0.0, 0.0, 90.0, 1e4], device=device))
    agree(d_gate, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0], device=device))
    agree(d_up, h)


def test_no_rows(device: torch.device) -> None:
    gate, up = (torch.zeros(0, 8, device=device, requires_grad=True) for _ in range(2))
    gated(gate, up, "silu").sum().backward()
    assert gate.grad.shape == up.grad.shape == (0, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_double_precision(kind: str) -> None:
    buffer = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda b: gated(b[:, :5], b[:, 5:], kind), buffer)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16(kind: str, device: torch.device) -> None:
    torch.manual_seed(0)
    gate, up, d_out = (torch.randn(4, 16, device=device).bfloat16() for _ in range(3))
    wide = [t.double().cpu().requires_grad_() for t in (gate, up)]
    expected = reference_gated(*wide, kind)
    wanted = torch.autograd.grad(expected, wide, d_out.double().cpu())
    found = gated_backward_(d_out, gate, up, kind)
    assert {t.dtype for t in found} == {torch.bfloat16}
    # 8 bits, rounded once or twice on the way.
    agree([t.double().cpu() for t in found], [expected, *wanted], 3e-2)
