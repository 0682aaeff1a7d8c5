"""Proof at load, on the very model that will be trained, that a flat batch computes what it should.

Three things could go wrong unseen: documents that share a pass could see each other (a family with masks or
states of its own), documents that share a beginning could fail to see it (an attention that does not know of
it), and the head could be run without the family's convention. All are tried here on a few random tokens
against the model's own forward; what differs is not used, and one line says so.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from luthier.models import attention
from luthier.models.kinds import one_of_each_layer
from luthier.models.load import embeddings_of, rows_of_embeddings
from luthier.models.lora import DropoutState
from luthier.models.policy import Policy

log = logging.getLogger("luthier")

# Largest difference allowed between two ways of computing the same vector of a token, relative to its norm. In 16
# bits rounding adds up over the layers: to 0.07 in bf16 with 32 of large random weights. A neighbour that is seen
# changes a vector by about its whole length.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1.5e-1}
_LENGTHS = (9, 21, 5)
# A forest of three documents, 8 + 7 + 9, 8 + 7 + 4 and 8 + 11 tokens: the 8 are shared by all, the 7 by two.
_SEGMENTS, _PARENTS = (8, 7, 9, 4, 11), (-1, 0, 1, 1, 0)
_PATHS = ((0, 1, 2), (0, 1, 3), (0, 4))


@dataclass(frozen=True)
class Proof:
    """What was seen: may documents share a pass, may the head be run here, and why not; may documents of a pass
    share what they begin with, and why not."""

    flat: bool
    own_head: bool
    why: str = ""
    why_not_shared: str = ""


def build_policy(model: PreTrainedModel, dropout: DropoutState | None, sequence_len: int) -> Policy:
    """The policy for a model, with the shortcuts that hold on it; the others are named in the log."""
    proof = prove(model, sequence_len)
    if not proof.flat:
        log.info("documents run one per pass on this model: %s", proof.why)
    if not proof.own_head:
        log.info("the model's own forward gives the logits: its head has a convention that is not known here")
    policy = Policy(model, dropout, flat=proof.flat, own_head=proof.own_head)
    policy.why_not_shared = proof.why_not_shared
    return policy


@torch.no_grad()
def prove(model: PreTrainedModel, sequence_len: int) -> Proof:
    """Compare flat against alone, and our head against the model's, on random tokens; leaves no trace."""
    was_training = model.training
    model.eval()
    try:
        with one_of_each_layer(model):
            return _prove(model, sequence_len)
    except IndexError:  # a forward that counts its layers by the config
        return _prove(model, sequence_len)
    finally:
        model.train(was_training)


def _prove(model: PreTrainedModel, sequence_len: int) -> Proof:
    device, vocabulary = embeddings_of(model).weight.device, rows_of_embeddings(model)
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(vocabulary, (n,), generator=generator).to(device) for n in _LENGTHS]
    expected = [own_logits(model, ids) for ids in documents]
    alone = Policy(model, flat=False)
    hidden = [
        alone.hidden(ids, torch.arange(len(ids), device=device), [len(ids)], _cu([len(ids)], device))
        for ids in documents
    ]
    own_head = all(same_vectors(alone.logits(h), e, h.dtype) for h, e in zip(hidden, expected, strict=True))
    why = _why_not_flat(model, sequence_len) or _try_flat(model, documents, hidden)
    flat = own_head and not why
    return Proof(
        flat=flat,
        own_head=own_head,
        why=why or "its head must be run by itself",
        why_not_shared=_try_shared(model, generator) if flat else "documents run one per pass",
    )


def own_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """What the family itself computes for one document, with its own eager attention where it can be chosen."""
    before = model.config._attn_implementation
    ours = before == attention.NAME
    if ours:
        model.set_attn_implementation("eager")
    try:
        return model(input_ids=ids[None], use_cache=False).logits[0].float()
    finally:
        if ours:
            model.set_attn_implementation(before)


def _try_flat(model: PreTrainedModel, documents: list[torch.Tensor], expected: list[torch.Tensor]) -> str:
    """Empty if the documents of one pass come out as they do alone, else what was seen."""
    lengths = [len(ids) for ids in documents]
    device = documents[0].device
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])
    try:
        found = Policy(model, flat=True).hidden(
            torch.cat(documents), positions, lengths, _cu(lengths, device)
        )
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        return f"{type(model).__name__} does not take a flat batch ({' '.join(str(error).split())[:120]})"
    for one, other in zip(found.split(lengths), expected, strict=True):
        if not same_vectors(one, other, other.dtype):
            worst = (one.float() - other.float()).abs().max().item()
            return (
                f"{type(model).__name__} lets documents of one pass see each other "
                f"(hidden states differ by {worst:.1e})"
            )
    return ""


def _try_shared(model: PreTrainedModel, generator: torch.Generator) -> str:
    """Empty if documents that share beginnings come out as they do alone, else what was seen."""
    if model.config._attn_implementation != attention.NAME:
        return f"attn_implementation {model.config._attn_implementation!r} knows whole documents only"
    device, vocabulary = embeddings_of(model).weight.device, rows_of_embeddings(model)
    segments = [torch.randint(vocabulary, (n,), generator=generator).to(device) for n in _SEGMENTS]
    starts = {place: sum(_SEGMENTS[i] for i in path[:n]) for path in _PATHS for n, place in enumerate(path)}
    positions = torch.cat(
        [torch.arange(starts[i], starts[i] + n, device=device) for i, n in enumerate(_SEGMENTS)]
    )
    policy = Policy(model, flat=True)
    cu_seqlens = _cu(list(_SEGMENTS), device)
    found = policy.hidden(torch.cat(segments), positions, _SEGMENTS, cu_seqlens, _PARENTS).split(_SEGMENTS)
    for path in _PATHS:
        ids = torch.cat([segments[i] for i in path])
        alone = policy.hidden(ids, torch.arange(len(ids), device=device), [len(ids)], _cu([len(ids)], device))
        if not same_vectors(torch.cat([found[i] for i in path]), alone, alone.dtype):
            return (
                f"in {type(model).__name__} documents with a common beginning come out otherwise than alone"
            )
    return ""


def _why_not_flat(model: PreTrainedModel, sequence_len: int) -> str:
    """What short documents cannot show: rules that begin at some length."""
    config = model.config.get_text_config(decoder=True)
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and sequence_len > chunk:
        return f"its attention works in chunks of {chunk} tokens, shorter than sequence_len"
    device = embeddings_of(model).weight.device
    for module in model.modules():
        if isinstance(getattr(module, "inv_freq", None), torch.Tensor) and not _rotary_is_isolated(
            module, sequence_len, device
        ):
            return "its rotary embedding changes with the longest document of a pass"
    return ""


def _rotary_is_isolated(rotary: nn.Module, sequence_len: int, device: torch.device) -> bool:
    """Angles of a short document alone against beside one of `sequence_len` tokens (Phi-3's longrope switches)."""
    hidden = torch.zeros(1, 1, 1, device=device)
    short = torch.arange(8, device=device)
    both = torch.cat([short, torch.arange(sequence_len, device=device)])
    try:
        alone, _ = rotary(hidden, short[None])
        beside, _ = rotary(hidden, both[None])
        rotary(hidden, short[None])  # a dynamic rotary keeps what it saw last
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return True  # called in a way of its own; the model's own pass decides
    return bool(torch.equal(alone[:, :8], beside[:, :8]))


def _cu(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def same_vectors(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether each token's vector is the same, to within rounding. A norm over all logits of a token tells more than
    the largest difference, which grows with the vocabulary."""
    one, other = one.float(), other.float()
    return bool(((one - other).norm(dim=-1) <= TOLERANCE[dtype] * other.norm(dim=-1)).all())
