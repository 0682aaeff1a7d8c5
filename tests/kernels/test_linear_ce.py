"""The chunked head against full logits in plain torch, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from luthier.kernels import linear_ce


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 5.0), (2.0, 3.0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_equals_full_logits(
    scale: float, softcap: float | None, bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(linear_ce, "CHUNK_FLOATS", 50 * rows)  # chunks of `rows` rows, the last one shorter
    head = nn.Linear(16, 50, bias=bias)
    hidden = torch.randn(23, 16, requires_grad=True)
    target = torch.randint(50, (23,))
    upstream = torch.randn(23)

    logp, correct = linear_ce.head_logps(hidden, target, head, vocabulary=50, scale=scale, softcap=softcap)
    found = torch.autograd.grad(logp @ upstream, [hidden, *head.parameters()])
    expected = linear_ce.reference_logps(hidden, target, head.weight, head.bias, scale=scale, softcap=softcap)
    wanted = torch.autograd.grad(expected @ upstream, [hidden, *head.parameters()])

    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert torch.equal(correct, head(hidden).argmax(-1) == target)


def test_no_labels_give_no_log_probs_and_a_zero_gradient() -> None:
    hidden = torch.randn(0, 16, requires_grad=True)
    head = nn.Linear(16, 5).requires_grad_(False)
    nothing = torch.zeros(0, dtype=torch.long)
    for logp, correct in (
        linear_ce.head_logps(hidden, nothing, head, vocabulary=5),
        linear_ce.linear_logps(hidden, nothing, head.weight, head.bias),
    ):
        assert logp.shape == correct.shape == (0,)
        logp.sum().backward()


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (2.0, 3.0)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_frozen_head_gives_the_hidden_states_the_same_gradient(
    scale: float, softcap: float | None, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formed in the forward pass, for whatever arrives in backward."""
    torch.manual_seed(0)
    monkeypatch.setattr(linear_ce, "CHUNK_FLOATS", 50 * 7)
    head = nn.Linear(16, 50, bias=bias).requires_grad_(False)
    hidden = torch.randn(23, 16, requires_grad=True)
    target, upstream = torch.randint(50, (23,)), torch.randn(23)
    convention = dict(scale=scale, softcap=softcap)
    logp, correct = linear_ce.linear_logps(hidden, target, head.weight, head.bias, **convention)
    expected = linear_ce.reference_logps(hidden, target, head.weight, head.bias, **convention)
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=1e-5)
    (found,) = torch.autograd.grad(logp @ upstream, hidden)
    (wanted,) = torch.autograd.grad(expected @ upstream, hidden)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(correct, head(hidden).argmax(-1) == target)


def test_known_weights_give_a_trained_head_its_gradient_in_the_forward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(linear_ce, "CHUNK_FLOATS", 50 * 7)
    monkeypatch.setattr(linear_ce, "checkpoint", None)  # nothing is computed twice
    head = nn.Linear(16, 50)
    hidden = torch.randn(23, 16, requires_grad=True)
    target, weight = torch.randint(50, (23,)), torch.randint(0, 4, (23,)).float()
    logp, _ = linear_ce.linear_logps(hidden, target, head.weight, head.bias, loss_weight_N=weight)
    expected = linear_ce.reference_logps(hidden, target, head.weight, head.bias)
    wanted = [hidden, head.weight, head.bias]
    found = torch.autograd.grad(-(logp @ weight) / 17, wanted)
    for one, other in zip(found, torch.autograd.grad(-(expected @ weight) / 17, wanted), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
