"""Forwards for inference: fewer and larger operations than a module's own, for weights that nobody trains.

Writing a text reads all weights for every token, and on a small model the operations in between cost as much as that.
Layers with one input become one multiply: their weights move into one tensor of which each layer keeps its part. What
fits is found and proven as in training (`models.fuse`); these classes are other guesses for the same modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from luthier.models import attention
from luthier.models.fuse import fuse
from luthier.models.fused import Fused, FusedAttention, FusedLayer, FusedMLP, FusedNorm
from luthier.models.isolation import prove
from luthier.models.memory import PROBE_TOKENS

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def make_lean(model: PreTrainedModel) -> None:
    """Give a model that is not trained lean forwards, where they are proven; a model that takes no flat passes stays as
    it is."""
    if model.config._attn_implementation == attention.NAME and prove(model, PROBE_TOKENS).flat:
        fuse(model, KINDS)


class LeanNorm(FusedNorm):
    """torch's own RMSNorm, in fp32; other dtypes round in each family's way."""

    @classmethod
    def candidates(cls, module: nn.Module) -> Iterator[dict[str, Any]]:
        if getattr(getattr(module, "weight", None), "dtype", None) is torch.float32:
            yield from super().candidates(module)

    def __init__(self, module: nn.Module, offset: float, cast_before_weight: bool) -> None:
        super().__init__(module, offset, cast_before_weight)
        weight = self.module.weight.detach()
        self.scale = weight + offset if offset else weight

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, self.scale.shape, self.scale, self.eps)

    def add(self, added: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual = residual + added
        return self(residual), residual


class LeanMLP(FusedMLP):
    """gate and up in one multiply."""

    @classmethod
    def candidates(cls, module: nn.Module) -> Iterator[dict[str, Any]]:
        for found in super().candidates(module):
            if joinable(module, (*found["inputs"], "down_proj")):
                yield found

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        m = self.module
        gate, up = F.linear(x, *joined(m, self.inputs)).chunk(2, -1)
        return F.linear(_ACTIVATIONS[self.kind](gate) * up, m.down_proj.weight, m.down_proj.bias)


class LeanAttention(FusedAttention):
    """q, k and v in one multiply, and q and k rotated together."""

    @classmethod
    def candidates(cls, module: nn.Module) -> Iterator[dict[str, Any]]:
        for found in super().candidates(module):
            if joinable(module, (*found["inputs"], "o_proj")):
                yield found

    def _heads(self, x: torch.Tensor, positions: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        m = self.module
        heads = F.linear(x, *joined(m, self.inputs)).unflatten(-1, (-1, m.head_dim))
        queries = m.o_proj.in_features // m.head_dim
        keys = (heads.shape[-2] - queries) // 2
        turned, value = heads.split([queries + keys, keys], -2)
        if getattr(m, "q_norm", None) is not None:
            turned = self._normed(turned, queries)
        if self.rope:
            turned = _rotated(turned, *positions)
        query, key = turned.split([queries, keys], -2)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _normed(self, turned: torch.Tensor, queries: int) -> torch.Tensor:
        """q and k through their norms, which take one head, or all of them at once (OLMo 2)."""
        m = self.module
        parts = []
        sides = turned.split([queries, turned.shape[-2] - queries], -2)
        for part, norm in zip(sides, (m.q_norm, m.k_norm), strict=True):
            whole = norm.weight.numel() != m.head_dim
            parts.append(norm(part.flatten(-2)).view(part.shape) if whole else norm(part))
        return torch.cat(parts, -2)


class LeanLayer(FusedLayer):
    """A decoder layer without what training needs of it."""

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs.get("document_lengths") is None or kwargs.get("past_key_values") is not None:
            return self.original(hidden_states, *args, **kwargs)
        if kwargs.get("label_rows") is not None:
            return self._run(hidden_states, **kwargs)
        m: Any = self.module
        before, after, before_mlp, after_mlp = (name and getattr(m, name).forward for name in self.norms)
        x = hidden_states
        added = m.self_attn.forward(hidden_states=before(x) if before else x, **kwargs)[0]
        added = self._scaled(after(added) if after else added)
        if isinstance(before_mlp, FusedNorm):
            normed, x = before_mlp.add(added, x)
        else:
            x = x + added
            normed = before_mlp(x) if before_mlp else x
        added = m.mlp.forward(normed)
        added = added[0] if isinstance(added, tuple) else added
        return x + self._scaled(after_mlp(added) if after_mlp else added)


# Children before parents: what a parent is proven with is what it will run.
KINDS: tuple[type[Fused], ...] = (LeanNorm, LeanMLP, LeanAttention, LeanLayer)


def joinable(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether layers are plain ones of one dtype, whose weights can lie in one tensor."""
    layers = [module.get_submodule(name) for name in names]
    return all(type(layer) is nn.Linear and not layer.weight.requires_grad for layer in layers) and (
        len({(layer.weight.dtype, layer.bias is None) for layer in layers[: len(names) - 1]}) == 1
    )


def joined(module: Any, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of layers with one input as one layer's. They move there, and keep their parts as views."""
    if len(names) == 1:
        layer = getattr(module, names[0])
        return layer.weight, layer.bias
    if (found := module.__dict__.get("_joined")) is None:
        layers = [getattr(module, name) for name in names]
        sizes = [layer.out_features for layer in layers]
        tensors: list[torch.Tensor | None] = []
        for kind in ("weight", "bias"):
            parts = [getattr(layer, kind) for layer in layers]
            whole = None if parts[0] is None else torch.cat([part.detach() for part in parts])
            if whole is not None:
                for part, view in zip(parts, whole.split(sizes), strict=True):
                    part.data = view
            tensors.append(whole)
        found = module.__dict__["_joined"] = tuple(tensors)
    return cast(tuple[torch.Tensor, torch.Tensor | None], found)


def _rotated(x_BTHd: torch.Tensor, cos_BTr: torch.Tensor, sin_BTr: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al. 2021) of all heads at once; features beyond r pass unchanged."""
    rotated = cos_BTr.shape[-1]
    x = x_BTHd if rotated == x_BTHd.shape[-1] else x_BTHd[..., :rotated]
    first, second = x.chunk(2, -1)
    out = torch.addcmul(x * cos_BTr.unsqueeze(2), torch.cat((-second, first), -1), sin_BTr.unsqueeze(2))
    return out if x is x_BTHd else torch.cat((out, x_BTHd[..., rotated:]), -1)
