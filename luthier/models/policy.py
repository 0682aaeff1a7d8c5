"""The module that is trained: a flat batch of documents in, the log-prob of every labelled token out.

It alone runs backbone and head, so that whatever wraps a module (sharding, compilation) wraps this one.
The backbone gives hidden states; the head sees the labelled positions only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from luthier.kernels.linear_ce import head_logps, linear_logps, transform_logits
from luthier.models.attention import NAME, flat_pass
from luthier.models.frozen import FrozenLinear
from luthier.models.load import decoder_of, text_config_of
from luthier.models.lora import DropoutState, lora_layers, mix

log = logging.getLogger("luthier")


class FlatBatch(Protocol):
    """One forward pass. T tokens of D documents laid end to end, N labelled positions among them.

    Attributes:
        input_ids, position_ids: (T,) int64; positions begin at 0 in every document.
        lengths: tokens of each document, adding up to T. cu_seqlens: (D + 1,) int32, their running sum from 0.
        parents: -1 for each document. Where documents share beginnings, D counts segments, and a segment goes
            on from that of the index `parents` gives: in its positions, and it attends to all its ancestors.
        drawn: tokens of each stretch whose dropout is drawn together, adding up to T; not necessarily documents.
        seeds: one integer per stretch.
        position_N: (N,) int64, the token whose hidden state predicts the label. target_N: (N,) int64; several
            of one position where documents part.
        weight_N: (N,) fp32, loss weights.
    """

    @property
    def input_ids(self) -> torch.Tensor: ...
    @property
    def position_ids(self) -> torch.Tensor: ...
    @property
    def cu_seqlens(self) -> torch.Tensor: ...
    @property
    def lengths(self) -> Sequence[int]: ...
    @property
    def parents(self) -> Sequence[int]: ...
    @property
    def drawn(self) -> Sequence[int]: ...
    @property
    def seeds(self) -> Sequence[int]: ...
    @property
    def position_N(self) -> torch.Tensor: ...
    @property
    def target_N(self) -> torch.Tensor: ...
    @property
    def weight_N(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class HeadConvention:
    """What a family does between its head and its softmax; read off its config."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> HeadConvention:
        config = text_config_of(model)
        scale = 1.0
        for name in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon-H1
            scale *= getattr(config, name, None) or 1.0
        scaling = getattr(config, "logits_scaling", None) or 1.0
        scale = scale * scaling if config.model_type == "hyperclovax" else scale / scaling
        return cls(scale, getattr(config, "final_logit_softcapping", None))


class Policy(nn.Module):
    """Backbone and head of a causal LM as a function of flat batches.

    Args:
        model: a causal LM, changed already (adapter, frozen layers).
        dropout: the state that its LoRA layers share, if it has any.
        flat: whether several documents may share a pass (`models.isolation` proves it). Otherwise each
            document of a batch runs on its own, with the model's own attention.
        own_head: whether the head may be run here, on chunks of the labelled positions; otherwise the model's
            own forward gives their logits (families with a convention that is not known here).
        weighted_sum: the loss is a multiple of the labels' weighted log-probs (supervised fine-tuning), so that a
            trained head's gradient may be formed in the forward pass.

    Attributes:
        rows_in_last_layer: the model's last layer takes `label_rows` and computes those only (`models.fuse`).
        why_not_shared: why batches may not have parents here; empty if they may.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dropout: DropoutState | None = None,
        *,
        flat: bool = True,
        own_head: bool = True,
        weighted_sum: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.dropout = dropout or DropoutState()
        self.flat = flat
        self.own_head = own_head
        self.weighted_sum = weighted_sum
        self.rows_in_last_layer = False
        self.convention = HeadConvention.of(model)
        self.why_not_shared = "" if flat and own_head else "documents run one per pass"

    def may_share(self) -> Literal["", "rows", "all"]:
        """Which documents of a batch may share what they begin with in training: all, the answers of one row (their
        prompt), or none; says why not all."""
        if self.why_not_shared:
            log.info("documents share no prefixes: %s", self.why_not_shared)
            return ""
        if any(layer.dropout for layer in lora_layers(self.model).values()):
            log.info(
                "documents share no prefixes: lora_dropout is drawn for each document (for a pair once over its prompt)"
            )
            return "rows"
        return "all"

    def forward(self, batch: FlatBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs (N,) in fp32 and whether each label was the first choice (N,), in the batch's order."""
        self.dropout.lengths, self.dropout.seeds = batch.drawn, batch.seeds
        if not self.own_head:
            return self._logps_by_model(batch)
        hidden_ND = self.hidden(
            batch.input_ids,
            batch.position_ids,
            batch.lengths,
            batch.cu_seqlens,
            batch.parents,
            rows=batch.position_N,
        )
        head = self.model.get_output_embeddings()
        scale, softcap = self.convention.scale, self.convention.softcap
        plain = type(head) is nn.Linear or (type(head) is FrozenLinear and head.storage == "dense")
        if not plain:  # a head with an adapter, or in a format of its own
            vocabulary = head.weight.shape[0]
            return head_logps(
                hidden_ND, batch.target_N, head, vocabulary=vocabulary, scale=scale, softcap=softcap
            )
        return linear_logps(
            hidden_ND,
            batch.target_N,
            head.weight,
            head.bias,
            scale=scale,
            softcap=softcap,
            loss_weight_N=batch.weight_N if self.weighted_sum else None,
        )

    def hidden(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        lengths: Sequence[int],
        cu_seqlens: torch.Tensor,
        parents: Sequence[int] = (),
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Last hidden states (T, D) of a flat run of documents, or of segments that have parents; with `rows`
        (N,) of those tokens only, (N, D).
        """
        decoder = decoder_of(self.model)
        if not self.flat:
            documents = input_ids.split(list(lengths))
            with self._seeded(documents):
                hidden_TD = torch.cat(
                    [decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in documents]
                )
            return hidden_TD if rows is None else hidden_TD.index_select(0, rows)
        longest = max(lengths)
        # Dropout's masks are drawn for all tokens of a document, so that they do not depend on its labels.
        dropped = self.model.training and self.dropout.active
        last = {"label_rows": rows} if self.rows_in_last_layer and rows is not None and not dropped else {}
        # transformers takes a mask of four dimensions as it is. Given none, it looks at the positions for documents,
        # and that waits for the device; this one is never read.
        ready = text_config_of(self.model)._attn_implementation == NAME
        mask = {"attention_mask": input_ids.new_empty(1, 1, 1, 1)} if ready else {}
        with flat_pass():
            # The names are those that transformers gives flat batches for flash attention; `document_lengths` is
            # the same on the host, where per-document slices are cut.
            hidden_TD = decoder(
                input_ids=input_ids[None],
                position_ids=position_ids[None],
                use_cache=False,
                document_lengths=tuple(lengths),
                document_parents=tuple(parents),
                cu_seq_lens_q=cu_seqlens,
                cu_seq_lens_k=cu_seqlens,
                max_length_q=longest,
                max_length_k=longest,
                **mask,
                **last,
            ).last_hidden_state[0]
        return hidden_TD if rows is None or last else hidden_TD.index_select(0, rows)

    def _logps_by_model(self, batch: FlatBatch) -> tuple[torch.Tensor, torch.Tensor]:
        pieces = []
        start = 0
        documents = batch.input_ids.split(list(batch.lengths))
        with self._seeded(documents):
            for ids in documents:
                inside = (batch.position_N >= start) & (batch.position_N < start + len(ids))
                logits = self.model(input_ids=ids[None], use_cache=False).logits[0].float()
                pieces.append(logits[batch.position_N[inside] - start])
                start += len(ids)
        logits_NV = torch.cat(pieces)
        logp = logits_NV.log_softmax(-1).gather(-1, batch.target_N[:, None])[:, 0]
        return logp, logits_NV.argmax(-1) == batch.target_N

    @contextmanager
    def _seeded(self, documents: Sequence[torch.Tensor]) -> Iterator[None]:
        """Where several documents of a batch run one after another. Dropout is drawn from torch's own generator then,
        which recomputation in backward restores; a step that is repeated has to draw the same."""
        if len(documents) < 2 or not (self.model.training and self.dropout.active):
            yield
            return
        device = documents[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(mix(*self.dropout.seeds))
            yield

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Full logits of some hidden states, for proofs."""
        logits = self.model.get_output_embeddings()(hidden).float()
        return transform_logits(logits, self.convention.scale, self.convention.softcap)
