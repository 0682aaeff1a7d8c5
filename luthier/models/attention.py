"""Attention over a flat run of documents: no padding, and no document sees another.

transformers calls attention through a registry of functions, so one function registered under one name
serves every family that uses it. In a flat pass (`document_lengths` is given) it runs each document on its
own slice: exact, without a T x T mask, and on a CPU faster than one. Documents that share a beginning
(`document_parents`) attend to it as to their own. On CUDA one call of a variable-length kernel does all of it,
once it has been tried against the slices for the kind of heads that a model has. In every other call
(generation with a cache, padded batches) it does what the ordinary implementation does.

Shapes: (1, heads, T, head_dim) as transformers passes them; T counts the tokens of all documents.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from luthier.kernels import varlen_attention
from luthier.kernels.document_layout import Layout, gather_keys, layout_of

log = logging.getLogger("luthier")

NAME = "luthier"

# Masks up to this size are kept (1 MiB in fp32).
REMEMBERED_FLOATS = 2**18
# Queries of one masked SDPA call, which bounds its mask: queries x keys numbers.
_MASKED_ROWS = 1024

# Masks are made once at the top of a model's forward, where no argument of ours arrives; this tells the mask
# function that the pass is flat and that attention needs none.
_flat: ContextVar[bool] = ContextVar("flat", default=False)


@contextmanager
def flat_pass() -> Iterator[None]:
    """Inside, models that attend through Luthier build no mask."""
    token = _flat.set(True)
    try:
        yield
    finally:
        _flat.reset(token)


class Cached(Protocol):
    """Attention of a layer in a pass over parts of texts, whose beginnings it keeps (`generate.slots`)."""

    def __call__(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        window: int | None,
        **options: Any,
    ) -> torch.Tensor: ...


def register() -> None:
    """Make `attn_implementation="luthier"` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    return None if _flat.get() else sdpa_mask(*args, **kwargs)


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    document_lengths: Sequence[int] | None = None,
    document_parents: Sequence[int] | None = None,
    cached: Cached | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature -> ((batch, T, heads, head_dim), None).

    Args:
        softcap: caps the scores (Gemma 2). s_aux: one sink logit per head (GPT-OSS). Both take a slower path
            with explicit scores.
        document_lengths: tokens of each document, adding up to T; None outside flat passes. With
            document_parents, of each segment, and the index of the one that it goes on from, or -1.
        cached: has the keys and values of what came before, and attends in place of all that is here.
        dropout: ignored; a model's own dropout is turned off at load, see `models.load`.
    """
    options: dict[str, Any] = dict(scaling=scaling, softcap=softcap, sinks=s_aux)
    if document_lengths is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        causal = bool(causal) and attention_mask is None and query.shape[2] > 1
        out = attend(query, key, value, mask=attention_mask, causal=causal, window=None, **options)
        return out.transpose(1, 2).contiguous(), None
    if cached is not None:
        out = cached(module.layer_idx, query, key, value, window=sliding_window, **options)
        return out.transpose(1, 2).contiguous(), None
    layout = layout_of(tuple(document_lengths), tuple(document_parents) if document_parents else None)
    if softcap is None and s_aux is None and varlen_attention.takes(query, value):
        kind = _Kind.of(query, key, sliding_window, scaling)
        if kind not in _tried:
            _tried[kind] = _try_varlen(kind)
        if _tried[kind]:
            out = varlen_attention.varlen_attention(
                query, key, value, layout, window=sliding_window, scaling=scaling
            )
            return out.transpose(1, 2).contiguous(), None
    out = attend_branches(query, key, value, layout, window=sliding_window, **options)
    return out.transpose(1, 2).contiguous(), None


def attend_branches(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, **options: Any
) -> torch.Tensor:
    """Attention within each branch of a pass, one call per branch; options as `attend` takes them."""
    key = gather_keys(key.transpose(1, 2), layout).transpose(1, 2)
    value = gather_keys(value.transpose(1, 2), layout).transpose(1, 2)
    outs = [
        attend(q, k, v, mask=None, causal=True, before=k.shape[2] - q.shape[2], **options)
        for q, k, v in zip(
            query.split(layout.queries, 2),
            key.split(layout.keys, 2),
            value.split(layout.keys, 2),
            strict=True,
        )
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    causal: bool,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    before: int = 0,
) -> torch.Tensor:
    """Attention of one document (or of a batch under a mask), by SDPA wherever it can express the family.

    Args:
        mask: boolean (True = may attend) or additive, broadcastable to the scores; excludes `causal`.
        window: a token sees itself and the window - 1 tokens before it; None sees all before it.
        before: with `causal`, keys that precede the first query: what the document shares with others.
    """
    length, seen = query.shape[2], key.shape[2]
    if causal and before and length > _MASKED_ROWS:
        stops = range(before + _MASKED_ROWS, seen + _MASKED_ROWS, _MASKED_ROWS)
        options: dict[str, Any] = dict(window=window, scaling=scaling, softcap=softcap, sinks=sinks)
        outs = [
            attend(
                rows,
                key[:, :, :stop],
                value[:, :, :stop],
                mask=None,
                causal=True,
                before=stop - _MASKED_ROWS,
                **options,
            )
            for rows, stop in zip(query.split(_MASKED_ROWS, 2), stops, strict=True)
        ]
        return torch.cat(outs, 2)
    if causal and (before or (window is not None and window < length)):
        make = _branch_mask if length * seen <= REMEMBERED_FLOATS else _branch_mask.__wrapped__
        mask, causal = make(length, seen, before, window, query.dtype, query.device), False
    if mask is not None and mask.dim() == 4:
        mask = mask[..., :seen]
    if softcap is not None or sinks is not None:
        return _explicit(query, key, value, mask, causal, scaling, softcap, sinks)
    if causal and seen > length:  # a static cache: the slots behind the queries are still empty
        key, value = key[:, :, :length], value[:, :, :length]
    grouped = key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=grouped
    )


# All layers of a pass ask for the same few masks, as numbers to add, which is what SDPA makes of a boolean one.
@lru_cache(maxsize=64)
def _branch_mask(
    length: int, seen: int, before: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """(length, seen): 0 where a query that `before` keys precede may attend, -inf elsewhere."""
    allowed = torch.ones(length, seen, dtype=torch.bool, device=device).tril(before)
    if window is not None and window < seen:
        allowed = allowed.triu(before + 1 - window)
    return torch.zeros(length, seen, dtype=dtype, device=device).masked_fill_(~allowed, -math.inf)


def _explicit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
    if sinks is not None:  # a column that takes probability and gives no value
        column = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1).to(scores.dtype)
        scores = torch.cat([scores, column], -1)
    probs = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return probs[..., : key.shape[2]] @ value


class _Kind(NamedTuple):
    """What a variable-length kernel's code depends on."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    windowed: bool
    scaling: float | None

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, window: int | None, scaling: float | None) -> _Kind:
        heads, kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
        return cls(query.device, query.dtype, heads, kv_heads, head_dim, window is not None, scaling)


_tried: dict[_Kind, bool] = {}

# Largest difference from the slices allowed, relative to the norm of what is compared. 16-bit rounding comes to
# less than 0.01, one wrong query of the 129 that are tried to 0.09.
_VARLEN_TOLERANCE = 0.03


def _try_varlen(kind: _Kind) -> bool:
    """Output and gradients of the variable-length kernel against the slices, on a small tree; says if it fails."""
    layout = layout_of((70, 21, 33, 5), (-1, 0, 0, -1))
    window = 16 if kind.windowed else None
    generator = torch.Generator(kind.device).manual_seed(0)

    def run(fused: bool) -> list[torch.Tensor]:
        generator.manual_seed(0)
        query, key, value = (
            torch.randn(
                1, n, 129, kind.head_dim, generator=generator, device=kind.device, dtype=kind.dtype
            ).requires_grad_()
            for n in (kind.heads, kind.kv_heads, kind.kv_heads)
        )
        options: dict[str, Any] = dict(window=window, scaling=kind.scaling)
        if fused:
            out = varlen_attention.varlen_attention(query, key, value, layout, **options)
        else:
            out = attend_branches(query, key, value, layout, softcap=None, sinks=None, **options)
        return [out.detach(), *torch.autograd.grad((out * out).sum(), [query, key, value])]

    try:
        with torch.enable_grad():
            pairs = list(zip(run(True), run(False), strict=True))
        worst = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        log.info("attention runs document by document: torch's varlen_attn failed (%s)", str(error)[:120])
        return False
    if not worst <= _VARLEN_TOLERANCE:
        log.info("attention runs document by document: torch's varlen_attn differs from it by %.1e", worst)
    return worst <= _VARLEN_TOLERANCE
