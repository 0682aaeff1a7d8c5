"""Attention over a flat run of documents: no padding, and no document sees another.

transformers calls attention through a registry of functions, so one function registered under one name
serves every family that uses it. In a flat pass (`document_lengths` is given) it runs each document on its
own slice: exact, without a T x T mask, and on a CPU faster than one. In every other call (generation with a
cache, padded batches) it does what the ordinary implementation does.

Shapes: (1, heads, T, head_dim) as transformers passes them; T counts the tokens of all documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "luthier"

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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature -> ((batch, T, heads, head_dim), None).

    Args:
        softcap: caps the scores (Gemma 2). s_aux: one sink logit per head (GPT-OSS). Both take a slower path
            with explicit scores.
        document_lengths: tokens of each document, adding up to T; None outside flat passes.
        dropout: ignored; a model's own dropout is turned off at load, see `models.load`.
    """
    options: dict[str, Any] = dict(scaling=scaling, softcap=softcap, sinks=s_aux)
    if document_lengths is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        causal = bool(causal) and attention_mask is None and query.shape[2] > 1
        out = attend(query, key, value, mask=attention_mask, causal=causal, window=None, **options)
        return out.transpose(1, 2).contiguous(), None
    outs = [
        attend(q, k, v, mask=None, causal=True, window=sliding_window, **options)
        for q, k, v in zip(
            query.split(document_lengths, 2),
            key.split(document_lengths, 2),
            value.split(document_lengths, 2),
            strict=True,
        )
    ]
    return (outs[0] if len(outs) == 1 else torch.cat(outs, 2)).transpose(1, 2).contiguous(), None


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
) -> torch.Tensor:
    """Attention of one document (or of a batch under a mask), by SDPA wherever it can express the family.

    Args:
        mask: boolean (True = may attend) or additive, broadcastable to the scores; excludes `causal`.
        window: a token sees itself and the window - 1 tokens before it; None sees all before it.
    """
    length, seen = query.shape[2], key.shape[2]
    if window is not None and causal and window < length:
        ones = torch.ones(length, seen, dtype=torch.bool, device=query.device)
        mask, causal = ones.tril().triu(1 - window), False
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
