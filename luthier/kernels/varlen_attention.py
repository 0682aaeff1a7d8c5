"""Attention of all branches of a pass in one call of the flash kernel that comes with torch (CUDA).

`torch.nn.attention.varlen` takes queries and keys of unequal lengths, and aligns its causal mask with the end
of both (Dao 2023, FlashAttention-2, from version 2.1): just what a branch needs whose keys begin with a
shared prefix. So shared prefixes need no second kernel, and no merging of partial softmaxes, whose gradient
torch does not pass on.

Shapes: (1, heads, T, D) queries, (1, kv_heads, S, D) keys and values (`kernels.document_layout`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from luthier.kernels.document_layout import Layout, gather_keys, layout_on


def _find() -> Callable[..., Any] | None:
    """torch's function, where it has the arguments that are needed; they differ between versions."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"scale", "window_size"} <= _arguments(varlen_attn) else None


@cache
def _arguments(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


_varlen = _find()


def takes(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernel is there and made for such tensors: CUDA, 16 bits, head size up to 256."""
    return (
        _varlen is not None
        and query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
    )


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    *,
    window: int | None,
    scaling: float | None,
) -> torch.Tensor:
    """Causal attention within each branch of a pass: (1, heads, T, D), keys and values (1, kv_heads, T, D).

    Args:
        window: a token sees itself and the window - 1 tokens before it; None sees all before it.
    """
    assert _varlen is not None
    grouped = key.shape[1] != query.shape[1]
    # torch 2.11 takes fewer key heads as they are; from 2.12 on it wants to be told.
    told = {"enable_gqa": True} if grouped and "enable_gqa" in _arguments(_varlen) else {}
    where = layout_on(layout, query.device)
    key_SHD = gather_keys(key.transpose(1, 2), layout)[0]
    value_SHD = gather_keys(value.transpose(1, 2), layout)[0]
    out_THD = _varlen(
        query.transpose(1, 2)[0].contiguous(),
        key_SHD.contiguous(),
        value_SHD.contiguous(),
        where.cu_queries,
        where.cu_keys,
        where.longest_queries,
        where.longest_keys,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **told,
    )
    return out_THD[None].transpose(1, 2)
