"""LoRA on embeddings: a looked-up row of the base plus a looked-up column of A, times B.

The one-hot input of an embedding makes A x a column of A, so that only the columns of tokens that occur are read
and get a gradient. A begins as 0 here and B at random, the other way round than in linear layers, as in PEFT.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from luthier.models.adapter import ForwardAdapter, adds_nothing, scale_of
from luthier.models.deltas import adapted_weight
from luthier.models.dora import Magnitude


class LoRAEmbedding(ForwardAdapter):
    """The forward of an embedding (V, D) with an adapter: A (r, V), B (D, r) and, with DoRA, a magnitude (D,).

    A model that multiplies its embeddings (Gemma) multiplies what is added as well.
    """

    def __init__(
        self, module: nn.Embedding, r: int, alpha: float, *, rslora: bool, dora: bool, generator: torch.Generator
    ) -> None:
        super().__init__(module)
        self.r, self.alpha, self.scale = r, alpha, scale_of(alpha, r, rslora)
        device = module.weight.device
        b = torch.empty(module.embedding_dim, r).normal_(generator=generator)
        module.lora_embedding_A = nn.Parameter(torch.zeros(r, module.num_embeddings, device=device))
        module.lora_embedding_B = nn.Parameter(b.to(device))
        self.magnitude = None
        if dora:
            self.magnitude = Magnitude(self._rows, self._stored, self._low_rank, self.scale)
            module.lora_magnitude_vector = self.magnitude.start()

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        module = self.module
        out = cast(torch.Tensor, self.original(input_ids))
        if not self.enabled:
            return out
        columns = F.embedding(input_ids, module.lora_embedding_A.t(), padding_idx=module.padding_idx)
        added = F.linear(columns.to(out.dtype), module.lora_embedding_B.to(out.dtype)) * self.scale
        multiplier = getattr(module, "embed_scale", None)
        if multiplier is not None:
            added = added * torch.as_tensor(multiplier).to(added)
        if self.magnitude is not None:
            return (out + added) * self.magnitude.factor(module.lora_magnitude_vector).to(out.dtype)
        return out + added

    def _rows(self) -> torch.Tensor:
        return cast(torch.Tensor, self.module.weight.detach().t().float())

    def _stored(self) -> torch.Tensor:
        return cast(torch.Tensor, self.module.weight)

    def _low_rank(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.module.lora_embedding_A, self.module.lora_embedding_B

    def idle(self) -> bool:
        if not adds_nothing(*self._low_rank()):
            return False
        return self.magnitude is None or torch.equal(self.module.lora_magnitude_vector, self.magnitude.norms())

    def tensors(self) -> dict[str, torch.Tensor]:
        names = ["lora_embedding_A", "lora_embedding_B"]
        names += [] if self.magnitude is None else ["lora_magnitude_vector"]
        return {name: getattr(self.module, name) for name in names}

    def strengths(self) -> dict[str, tuple[int, float]]:
        return {"": (self.r, self.alpha)}

    def merged(self) -> dict[str, torch.Tensor]:
        found: Any = self.tensors()
        whole = adapted_weight(
            self.module.weight.t(),
            found["lora_embedding_A"],
            found["lora_embedding_B"],
            self.scale,
            found.get("lora_magnitude_vector"),
        )
        return {"weight": whole.t()}
