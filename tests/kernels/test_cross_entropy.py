"""The cross-entropy that overwrites its logits, against plain torch: log-probs, first choices, gradients."""

from __future__ import annotations

import pytest
import torch

from luthier.kernels import cross_entropy
from luthier.kernels.cross_entropy import TOLERANCE, cross_entropy_, reference_cross_entropy


def agree(found: object, expected: object, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def expected_of(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logp, correct and the gradient by autograd."""
    leaf = logits.detach().clone().requires_grad_()
    logp, correct = reference_cross_entropy(leaf, target, scale, softcap)
    weighted = logp if weight is None else weight * logp
    (gradient,) = torch.autograd.grad(-weighted.sum(), leaf)
    return logp.detach(), correct, gradient


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 5.0), (2.0, 3.0)])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (23, 50), (3, 9001)])
def test_equals_autograd(
    scale: float,
    softcap: float | None,
    weighted: bool,
    rows: int,
    vocabulary: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(cross_entropy, "BLOCK_FLOATS", 300)  # several blocks, the last one shorter
    logits = torch.randn(rows, vocabulary, device=device) * 3
    target = torch.randint(vocabulary, (rows,), device=device)
    target[::2] = logits[::2].argmax(-1)
    weight = torch.rand(rows, device=device) if weighted else None
    logp, correct, gradient = expected_of(logits, target, weight, scale, softcap)

    found_logp, found_correct = cross_entropy_(logits, target, weight, scale, softcap)

    agree(found_logp, logp)
    agree(logits, gradient)
    assert found_logp.dtype == torch.float32
    assert torch.equal(found_correct, correct)


def test_rows_of_a_wider_buffer(device: torch.device) -> None:
    torch.manual_seed(0)
    buffer = torch.randn(6, 40, device=device)
    before = buffer.clone()
    logits, target = buffer[:, 3:33], torch.randint(30, (6,), device=device)
    weight = torch.rand(6, 2, device=device)[:, 0]
    logp, _, gradient = expected_of(logits, target, weight, 1.0, None)
    agree(cross_entropy_(logits, target, weight)[0], logp)
    agree(logits, gradient)
    assert torch.equal(buffer[:, :3], before[:, :3]) and torch.equal(buffer[:, 33:], before[:, 33:])


def test_extreme_logits(device: torch.device) -> None:
    """Entries of -inf (a masked vocabulary), probabilities below the smallest float, logits near fp32's end."""
    inf = float("inf")
    logits = torch.tensor([[-inf, 0.0, 1.0], [1e4, 0.0, -1e4], [3e38, 3e38, 0.0]], device=device)
    target = torch.tensor([2, 1, 1], device=device)
    logp, _, gradient = expected_of(logits, target, None, 1.0, None)
    agree(cross_entropy_(logits, target, None)[0], logp)
    agree(logits, gradient)


def test_the_first_of_equal_bf16_entries_is_the_choice(device: torch.device) -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]] * 3, device=device).bfloat16()
    target = torch.tensor([1, 2, 3], device=device)
    assert cross_entropy_(logits, target, None)[1].tolist() == [True, False, False]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_bf16(softcap: float | None, device: torch.device) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(5, 60, device=device) * 3).bfloat16()
    target, weight = torch.randint(60, (5,), device=device), torch.rand(5, device=device)
    logp, correct, gradient = expected_of(logits, target, weight, 1.0, softcap)
    found_logp, found_correct = cross_entropy_(logits, target, weight, 1.0, softcap)
    agree(found_logp, logp)  # in fp32 from the same bf16 logits
    agree(logits, gradient, 1e-2)
    assert torch.equal(found_correct, correct)


def test_no_rows(device: torch.device) -> None:
    logp, correct = cross_entropy_(
        torch.zeros(0, 9, device=device), torch.zeros(0, dtype=torch.long, device=device), None
    )
    assert logp.shape == correct.shape == (0,)
