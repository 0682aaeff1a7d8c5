"""The call of torch's variable-length kernel, with a stand-in that does on a CPU what the kernel promises."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from luthier.kernels import varlen_attention
from luthier.kernels.document_layout import layout_of, layout_on
from luthier.models import attention

LENGTHS, PARENTS = (8, 7, 9, 4, 11, 5), (-1, 0, 1, 1, 0, -1)


def _promised(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """(T, heads, D); queries and keys end together, a query sees window_size[0] keys to its left."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size[1] == 0
    assert max_q == int(cu_seq_q.diff().max()) and max_k == int(cu_seq_k.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    outs = []
    for i in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]].transpose(0, 1)
        k = key[cu_seq_k[i] : cu_seq_k[i + 1]].transpose(0, 1)
        v = value[cu_seq_k[i] : cu_seq_k[i + 1]].transpose(0, 1)
        row = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        column = torch.arange(k.shape[1])[None]
        seen = (column <= row) & ((window_size[0] < 0) | (column >= row - window_size[0]))
        groups = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        outs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outs)


def _inputs(total: int, kv_heads: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    # As transformers lays them out: tokens outside, heads inside.
    return [torch.randn(1, total, n, 8).requires_grad_().transpose(1, 2) for n in (4, kv_heads, kv_heads)]


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("parents", [PARENTS, None])
def test_one_call_equals_the_branches_one_by_one(
    monkeypatch: pytest.MonkeyPatch, window: int | None, kv_heads: int, parents: tuple[int, ...] | None
) -> None:
    monkeypatch.setattr(varlen_attention, "_varlen", _promised)
    layout = layout_of(LENGTHS, parents)
    inputs = _inputs(sum(LENGTHS), kv_heads)
    fused = varlen_attention.varlen_attention(*inputs, layout, window=window, scaling=0.3)
    plain = attention.attend_branches(*inputs, layout, window=window, scaling=0.3, softcap=None, sinks=None)
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)
    for one, other in zip(
        torch.autograd.grad((fused**2).sum(), inputs),
        torch.autograd.grad((plain**2).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_version_that_asks_for_no_flag_for_grouped_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 takes fewer key heads without being told."""

    def older(
        *args: Any, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)
    ) -> torch.Tensor:
        return _promised(*args, scale=scale, window_size=window_size, enable_gqa=True)

    monkeypatch.setattr(varlen_attention, "_varlen", older)
    layout = layout_of(LENGTHS, PARENTS)
    inputs = _inputs(sum(LENGTHS), 2)
    fused = varlen_attention.varlen_attention(*inputs, layout, window=6, scaling=0.3)
    plain = attention.attend_branches(*inputs, layout, window=6, scaling=0.3, softcap=None, sinks=None)
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)


def test_the_index_of_the_keys_is_that_of_the_spans() -> None:
    layout = layout_of(LENGTHS, PARENTS)
    assert layout.queries == (24, 4, 11, 5) and layout.keys == (24, 19, 19, 5)
    index = layout_on(layout, torch.device("cpu")).index_S
    assert index is not None
    expected = [*range(24), *range(15), *range(24, 28), *range(8), *range(28, 39), *range(39, 44)]
    assert index.tolist() == expected


@pytest.mark.parametrize("right", [True, False])
def test_the_kernel_is_tried_before_it_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, right: bool
) -> None:
    """A kernel that aligns its mask with the beginning instead of the end is found out."""

    @functools.wraps(_promised)
    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        return _promised(*args, **{**kwargs, "window_size": (3, 0)})

    caplog.set_level("INFO", logger="luthier")
    monkeypatch.setattr(varlen_attention, "_varlen", _promised if right else wrong)
    monkeypatch.setattr(varlen_attention, "takes", lambda *_: True)
    monkeypatch.setattr(attention, "_tried", {})
    query, key, value = _inputs(sum(LENGTHS), 2)
    out, _ = attention.attention(
        torch.nn.Module(), query, key, value, None, document_lengths=LENGTHS, document_parents=PARENTS
    )
    layout = layout_of(LENGTHS, PARENTS)
    plain = attention.attend_branches(
        query, key, value, layout, window=None, scaling=None, softcap=None, sinks=None
    )
    torch.testing.assert_close(out, plain.transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert list(attention._tried.values()) == [right]
    assert ("varlen_attn differs" in caplog.text) is not right


def test_what_the_kernel_is_not_made_for() -> None:
    half = torch.zeros(1, 2, 4, 8, dtype=torch.bfloat16)
    assert not varlen_attention.takes(half, half)  # it is not on CUDA


def test_long_branches_are_cut_into_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(LENGTHS, PARENTS)
    inputs = _inputs(sum(LENGTHS), 2)
    options: dict[str, Any] = dict(window=6, scaling=None, softcap=None, sinks=None)
    whole = attention.attend_branches(*inputs, layout, **options)
    monkeypatch.setattr(attention, "_MASKED_ROWS", 3)
    torch.testing.assert_close(attention.attend_branches(*inputs, layout, **options), whole)
