"""The rotary embedding against transformers' function, values and gradients, in place too."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial_rotary_pos_emb

from luthier.kernels.rotary import TOLERANCE, reference_rotary, rotary, rotate_


def agree(found: object, expected: object, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def angles(batch: int, tokens: int, rotated: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin as a rotary module gives them, with a scaling factor."""
    angle = torch.rand(batch, tokens, rotated // 2, device=device) * 6
    angle = torch.cat((angle, angle), -1)
    return angle.cos() * 1.2, angle.sin() * 1.2


@pytest.mark.parametrize(("batch", "angle_batch"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("rotated", [10, 6])
@pytest.mark.parametrize("transposed", [True, False])
def test_equals_transformers(
    batch: int, angle_batch: int, rotated: int, transposed: bool, device: torch.device
) -> None:
    torch.manual_seed(0)
    cos, sin = angles(angle_batch, 5, rotated, device)

    def heads(count: int) -> torch.Tensor:
        if transposed:  # as a projection's output is cut into heads
            return torch.randn(batch, 5, count, 10, device=device).transpose(1, 2).requires_grad_()
        return torch.randn(batch, count, 5, 10, device=device, requires_grad=True)

    q, k = heads(3), heads(1)
    found, reference = rotary(q, k, cos, sin), reference_rotary(q, k, cos, sin)
    expected = (apply_rotary_pos_emb if rotated == 10 else apply_partial_rotary_pos_emb)(q, k, cos, sin)
    upstream = [torch.randn_like(t) for t in expected]

    agree(found, expected)
    agree(reference, expected)
    agree(torch.autograd.grad(found, [q, k], upstream), torch.autograd.grad(expected, [q, k], upstream))
    assert found[0].stride() == q.stride()


def test_halves_of_cos_and_sin_need_not_be_equal(device: torch.device) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 4, 8, device=device, requires_grad=True) for _ in range(2))
    cos, sin = torch.randn(2, 1, 4, 8, device=device)
    found, expected = rotary(q, k, cos, sin), reference_rotary(q, k, cos, sin)
    upstream = [torch.randn_like(t) for t in expected]
    agree(found, expected)
    agree(torch.autograd.grad(found, [q, k], upstream), torch.autograd.grad(expected, [q, k], upstream))


@pytest.mark.parametrize("rotated", [8, 4])
@pytest.mark.parametrize("leading", [(), (1,), (2,)])
def test_in_place_on_heads_inside_a_wider_buffer(
    rotated: int, leading: tuple[int, ...], device: torch.device
) -> None:
    torch.manual_seed(0)
    buffer = torch.randn(*leading, 5, 40, device=device)
    before = buffer.clone()
    heads = buffer[..., 8:32].unflatten(-1, (3, 8))
    cos, sin = angles(1, 5, rotated, device)

    def by_reference(x: torch.Tensor) -> torch.Tensor:
        batched = x.reshape(-1, 5, 3, 8).transpose(1, 2)
        return reference_rotary(batched, batched, cos, sin)[0].transpose(1, 2).reshape(x.shape)

    original = heads.clone().requires_grad_()
    expected = by_reference(original)
    assert rotate_(heads, cos, sin).data_ptr() == heads.data_ptr()
    agree(heads, expected)
    assert torch.equal(buffer[..., :8], before[..., :8]) and torch.equal(buffer[..., 32:], before[..., 32:])

    upstream = torch.randn_like(heads)
    (wanted,) = torch.autograd.grad(expected, original, upstream)
    agree(rotate_(upstream, cos[0], sin[0], inverse=True), wanted)


def test_no_tokens(device: torch.device) -> None:
    q, k = (torch.zeros(1, heads, 0, 8, device=device, requires_grad=True) for heads in (2, 1))
    cos, sin = angles(1, 0, 8, device)
    sum(t.sum() for t in rotary(q, k, cos, sin)).backward()
    assert q.grad.shape == (1, 2, 0, 8)


def test_gradients_in_double_precision() -> None:
    q, k = (torch.randn(2, heads, 3, 6, dtype=torch.float64, requires_grad=True) for heads in (2, 1))
    cos, sin = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    torch.autograd.gradcheck(lambda q, k: rotary(q, k, cos, sin), (q, k))


def test_bf16(device: torch.device) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, heads, 4, 8, device=device).bfloat16() for heads in (2, 1))
    cos, sin = angles(1, 4, 8, device)
    found = rotary(q, k, cos.bfloat16(), sin.bfloat16())
    expected = reference_rotary(q.float(), k.float(), cos, sin)
    assert found[0].dtype == torch.bfloat16
    agree([t.float() for t in found], list(expected), 5e-2)
