"""Forwards for inference: fewer and larger operations than a module's own, for weights that nobody trains.

Writing a text reads all weights for every token, and on a small model the operations in between cost as much as that.
Layers with one input become one multiply: their weights move into one tensor of which each layer keeps its part. What
fits is found and proven as in training (`models.fuse`); these classes are other guesses for the same modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from luthier.models import attention
from luthier.models.fuse import fuse
from luthier.models.fused import AttentionCall, Fused, FusedAttention, FusedLayer, FusedMLP, FusedNorm
from luthier.models.isolation import prove
from luthier.models.memory import PROBE_TOKENS
from luthier.models.speakers import SeveralLinear

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


class _Joining(Fused):
    """For modules that begin with layers of one input. `last`: the layer that they end with."""

    last: ClassVar[str]

    @classmethod
    def takes(cls, layer: nn.Module) -> bool:
        return is_plain(layer)

    @classmethod
    def candidates(cls, module: nn.Module) -> Iterator[dict[str, Any]]:
        for found in super().candidates(module):
            if joinable(module, (*found["inputs"], cls.last)):
                yield found


class LeanMLP(_Joining, FusedMLP):
    """gate and up in one multiply."""

    last = "down_proj"

    def __init__(self, module: nn.Module, kind: str, inputs: tuple[str, ...]) -> None:
        super().__init__(module, kind, inputs)
        self.layers = Joined([getattr(module, name) for name in inputs])
        self.down, self.activation = self.module.down_proj, _ACTIVATIONS[kind]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.layers(x).chunk(2, -1)
        return cast(torch.Tensor, self.down(self.activation(gate) * up))


class LeanAttention(_Joining, FusedAttention):
    """q, k and v in one multiply, and q and k rotated together."""

    last = "o_proj"

    def __init__(self, module: nn.Module, call: AttentionCall, inputs: tuple[str, ...], rope: bool) -> None:
        super().__init__(module, call, inputs, rope)
        m = self.module
        self.layers = Joined([getattr(module, name) for name in inputs])
        self.head_dim, self.queries = m.head_dim, m.o_proj.in_features // m.head_dim
        self.keys = (sum(self.layers.sizes) // m.head_dim - self.queries) // 2
        self.norms = (m.q_norm, m.k_norm) if getattr(m, "q_norm", None) is not None else None

    def _heads(self, x: torch.Tensor, positions: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, tokens, _ = x.shape
        heads = self.layers(x).view(batch, tokens, -1, self.head_dim)
        both = self.queries + self.keys
        turned, value = heads[:, :, :both], heads[:, :, both:]
        if self.norms is not None:
            turned = self._normed(turned)
        if self.rope:
            turned = _rotated(turned, *positions)
        turned = turned.transpose(1, 2)
        return turned[:, : self.queries], turned[:, self.queries :], value.transpose(1, 2)

    def _normed(self, turned: torch.Tensor) -> torch.Tensor:
        """q and k through their norms, which take one head, or all of them at once (OLMo 2)."""
        assert self.norms is not None
        parts = []
        for part, norm in zip(turned.split([self.queries, self.keys], -2), self.norms, strict=True):
            whole = norm.weight.numel() != self.head_dim
            parts.append(norm(part.flatten(-2)).view(part.shape) if whole else norm(part))
        return torch.cat(parts, -2)


class LeanLayer(FusedLayer):
    """A decoder layer without what training needs of it."""

    def __init__(self, module: nn.Module, form: str) -> None:
        super().__init__(module, form)
        m = self.module
        self.parts = [name and getattr(m, name).forward for name in self.norms]
        self.attention, self.mlp = m.self_attn.forward, m.mlp.forward

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs.get("document_lengths") is None or kwargs.get("past_key_values") is not None:
            return self.original(hidden_states, *args, **kwargs)
        if kwargs.get("label_rows") is not None:
            return self._run(hidden_states, **kwargs)
        before, after, before_mlp, after_mlp = self.parts
        x = hidden_states
        added = self.attention(hidden_states=before(x) if before else x, **kwargs)[0]
        added = self._scaled(after(added) if after else added)
        x = x + added
        added = self.mlp(before_mlp(x) if before_mlp else x)
        added = added[0] if isinstance(added, tuple) else added
        return x + self._scaled(after_mlp(added) if after_mlp else added)


# Children before parents: what a parent is proven with is what it will run.
KINDS: tuple[type[Fused], ...] = (LeanNorm, LeanMLP, LeanAttention, LeanLayer)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer's weight is there as it is multiplied with, be it with adapters beside it."""
    several = type(layer) is SeveralLinear and layer.storage == "dense" and not layer.transposed
    return type(layer) is nn.Linear or several


def joinable(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether layers are of one dtype, and their weights, which nobody trains, can lie in one tensor."""
    layers: list[Any] = [module.get_submodule(name) for name in names]
    return not any(layer.weight.requires_grad for layer in layers) and (
        len({(layer.weight.dtype, layer.bias is None) for layer in layers[: len(names) - 1]}) == 1
    )


class Joined:
    """Layers with one input as one layer. Their weights move into one tensor, of which each keeps its part, a view."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self.sizes = [layer.out_features for layer in layers]
        self.adapted = any(isinstance(layer, SeveralLinear) for layer in layers)
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if weight is None or weight.device != x.device or weight.dtype != x.dtype:  # new, or the model has moved
            self.weight, self.bias = weight, _ = self._join("weight"), self._join("bias")
        assert weight is not None
        out = F.linear(x, weight, self.bias)
        if self.adapted:
            for layer, part in zip(self.layers, out.split(self.sizes, -1), strict=True):
                if isinstance(layer, SeveralLinear):
                    layer.add(x, part)
        return out

    def _join(self, kind: str) -> torch.Tensor | None:
        parts = [getattr(layer, kind) for layer in self.layers]
        if parts[0] is None or len(parts) == 1:
            return None if parts[0] is None else parts[0].detach()
        whole = torch.cat([part.detach() for part in parts])
        for part, view in zip(parts, whole.split(self.sizes), strict=True):
            part.data = view
        return whole


_signed: tuple[torch.Tensor, torch.Tensor] | None = None


def _rotated(x_BTHd: torch.Tensor, cos_BTr: torch.Tensor, sin_BTr: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al. 2021) of all heads at once; features beyond r pass unchanged."""
    rotated = cos_BTr.shape[-1]
    x = x_BTHd if rotated == x_BTHd.shape[-1] else x_BTHd[..., :rotated]
    out = torch.addcmul(x * cos_BTr.unsqueeze(2), x.roll(rotated // 2, -1), _with_signs(sin_BTr))
    return out if x is x_BTHd else torch.cat((out, x_BTHd[..., rotated:]), -1)


def _with_signs(sin_BTr: torch.Tensor) -> torch.Tensor:
    """sin with its first half negative, (B, T, 1, r). All layers of a pass ask for the same."""
    global _signed
    if _signed is None or _signed[0] is not sin_BTr:
        first, second = sin_BTr.chunk(2, -1)
        _signed = sin_BTr, torch.cat((-first, second), -1).unsqueeze(2)
    return _signed[1]
