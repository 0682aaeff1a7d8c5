"""The norms against plain torch and transformers' own modules, values and gradients."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from luthier.kernels.rms_norm import TOLERANCE, add_rms_norm, reference_rms_norm, rms_norm

EPS = 1e-5


def agree(found: object, expected: object, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7, 33), (1, 3, 2, 64), (200, 64), (3, 2100)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_equals_the_reference(shape: tuple[int, ...], offset: float, device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, device=device, requires_grad=True)
    weight = torch.randn(shape[-1], device=device, requires_grad=True)
    upstream = torch.randn(shape, device=device)

    found = rms_norm(x, weight, EPS, offset=offset)
    expected = reference_rms_norm(x, weight, EPS, offset=offset)

    agree(found, expected)
    # The weight's gradient sums as many rounding errors as there are rows.
    agree(
        torch.autograd.grad(found, [x, weight], upstream),
        torch.autograd.grad(expected, [x, weight], upstream),
        5 * TOLERANCE,
    )


@pytest.mark.parametrize("used", ["both", "norm", "sum"])
@pytest.mark.parametrize("trained", [True, False])
def test_residual_sum_and_norm_in_one(used: str, trained: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    x, residual = (torch.randn(2, 9, 40, device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(40, device=device, requires_grad=trained)
    wanted = [x, residual, weight] if trained else [x, residual]
    upstream = torch.randn(2, 2, 9, 40, device=device)

    def gradients(y: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = {"both": [y, total], "norm": [y], "sum": [total]}[used]
        return torch.autograd.grad(outputs, wanted, list(upstream[: len(outputs)]), allow_unused=True)

    found = add_rms_norm(x, residual, weight, EPS)
    expected = reference_rms_norm(x + residual, weight, EPS), x + residual

    agree(found, expected)
    agree(gradients(*found), gradients(*expected), 5 * TOLERANCE)


def test_views_are_read_where_they_are(device: torch.device) -> None:
    torch.manual_seed(0)
    buffer = torch.randn(6, 3, 48, device=device, requires_grad=True)
    weight = torch.randn(32, device=device)
    for view in (
        lambda b: b[..., 8:40],
        lambda b: b[..., :32].transpose(0, 1),
        lambda b: b[:, 0].t()[:32].t(),
    ):
        found, expected = rms_norm(view(buffer), weight, EPS), reference_rms_norm(view(buffer), weight, EPS)
        upstream = torch.randn_like(expected).transpose(0, 1).contiguous().transpose(0, 1)
        agree(found, expected)
        agree(torch.autograd.grad(found, buffer, upstream), torch.autograd.grad(expected, buffer, upstream))


def test_no_rows(device: torch.device) -> None:
    x = torch.zeros(0, 16, device=device, requires_grad=True)
    weight = torch.ones(16, device=device, requires_grad=True)
    y, total = add_rms_norm(rms_norm(x, weight, EPS), x, weight, EPS)
    (y.sum() + total.sum()).backward()
    assert y.shape == total.shape == x.grad.shape == (0, 16)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [LlamaRMSNorm, GemmaRMSNorm])
def test_equals_transformers_modules(family: type, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    gemma = family is GemmaRMSNorm
    module = family(24, eps=EPS).to(device, dtype)
    torch.nn.init.normal_(module.weight)
    x = torch.randn(7, 24, device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn(7, 24, device=device, dtype=dtype)

    found = rms_norm(x, module.weight, EPS, offset=float(gemma), cast_before_weight=not gemma)
    expected = module(x)

    # bf16 keeps 8 bits; the orders of rounding differ in backward.
    tolerance = TOLERANCE if dtype == torch.float32 else 2e-2
    assert found.dtype == expected.dtype == dtype
    agree(found, expected, tolerance)
    agree(torch.autograd.grad(found, x, upstream), torch.autograd.grad(expected, x, upstream), tolerance)


def test_gradients_in_double_precision() -> None:
    x, residual = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3, offset=1.0), (x, weight))
    torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, 1e-3), (x, residual, weight))


def test_saves_its_input_and_one_number_per_row() -> None:
    x, weight = torch.randn(8, 16, requires_grad=True), torch.ones(16)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, weight, EPS)
    new = [t for t in saved if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert [t.numel() for t in new] == [8]
