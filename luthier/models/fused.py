"""What takes the place of a module's forward in training: norm, gated MLP, attention, decoder layer.

Each class fits modules by what they have, not by what they are called, and is a guess until `models.fuse` has
seen it give the module's own output and gradients. It is put on the instance as its `forward`; the module keeps
its class, its parameters and their names. Attention and layers do this only for flat passes; with a cache or a
mask the module's own forward runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from luthier.kernels.gated import gated, gated_forward
from luthier.kernels.gated_mlp import gated_mlp, halves
from luthier.kernels.lora_linear import Linear, lora_linears, stack
from luthier.kernels.rms_norm import add_rms_norm, rms_norm
from luthier.kernels.rotary import rotary
from luthier.kernels.tiled_mlp import MLPLayers, output_unused, tiled_mlp
from luthier.models import attention
from luthier.models.frozen import FrozenLinear
from luthier.models.lora import DoRALinear, LoRALinear
from luthier.models.recompute import Getter, Mode, kept_here, recomputed, remade, runs_again

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


class Fused:
    """A forward for one module, with the module's own to fall back on.

    Attributes:
        what: the kind of module, for messages. module: whose forward it is.
    """

    what: ClassVar[str]

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module  # a module's attributes are whatever its family has

    @classmethod
    def candidates(cls, module: nn.Module) -> Iterator[dict[str, Any]]:
        """Settings under which this class may compute what the module does, the likeliest first."""
        raise NotImplementedError

    @classmethod
    def takes(cls, layer: nn.Module) -> bool:
        """Whether this class knows how to read a linear layer inside of the module."""
        return is_linear(layer)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class FusedNorm(Fused):
    """RMSNorm, with the weight as it is or added to 1 (Gemma), multiplied before or after rounding."""

    what = "norm"

    def __init__(self, module: nn.Module, offset: float, cast_before_weight: bool) -> None:
        super().__init__(module)
        self.eps = _eps(module)
        self.form: dict[str, Any] = dict(offset=offset, cast_before_weight=cast_before_weight)

    @classmethod
    def candidates(cls, module: nn.Module) -> Iterator[dict[str, Any]]:
        weight = getattr(module, "weight", None)
        own = [name for name, _ in module.named_parameters()]
        if own == ["weight"] and weight is not None and weight.dim() == 1 and _eps(module) is not None:
            for offset in (0.0, 1.0):
                for cast in (True, False):
                    yield dict(offset=offset, cast_before_weight=cast)

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.module.weight, self.eps, **self.form)

    def add(self, added: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of a residual sum, and the sum."""
        return add_rms_norm(added, residual, self.module.weight, self.eps, **self.form)


class Stack:
    """Copies of some layers' A's one under another, made once for each state of the masters."""

    def __init__(self) -> None:
        self.state: Any = None
        self.a: torch.Tensor | None = None

    def of(self, linears: list[Linear], dtype: torch.dtype) -> torch.Tensor | None:
        state = (dtype, [(id(one.a), one.a._version) for one in linears if one.a is not None])
        if self.state != state:
            self.state, self.a = state, stack(linears, dtype)
        return self.a


class FusedMLP(Fused):
    """act(gate) * up, then down; gate and up as two layers or as the halves of one (Phi-3).

    Attributes:
        tile: gate and up are made again in backward, for as many tokens at a time; None keeps them.
    """

    what = "gated MLP"

    def __init__(self, module: nn.Module, kind: str, inputs: tuple[str, ...]) -> None:
        super().__init__(module)
        self.kind = kind
        self.inputs = inputs
        self.stack = Stack()
        self.tile: int | None = None
        self.rescaled = any(isinstance(layer, DoRALinear) for layer in _of(module, [*inputs, "down_proj"]))

    @classmethod
    def candidates(cls, module: nn.Module) -> Iterator[dict[str, Any]]:
        names = set(dict(module.named_children()))
        inputs = ("gate_up_proj",) if "gate_up_proj" in names else ("gate_proj", "up_proj")
        linears = [*inputs, "down_proj"]
        activation = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
        if not set(linears) <= names or activation is None or not all(map(cls.takes, _of(module, linears))):
            return
        for kind in ACTIVATIONS:
            if _is_activation(activation, kind):
                yield dict(kind=kind, inputs=inputs)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.rescaled:  # between the multiplies, where the kernel in one piece lets nothing in
            if self.tile is None or not torch.is_grad_enabled():
                return self._by_layers(x)
            # Nothing drops out here, so there is no random state to restore for the second computation.
            again = partial(checkpoint, self._by_layers, use_reentrant=False, preserve_rng_state=False)
            return torch.cat([again(part) for part in x.split(self.tile, -2)], -2)
        if self.tile is not None:
            return tiled_mlp(x, self._layers, self.kind, self.tile)
        layers = self._layers(x)
        return gated_mlp(x, layers.inputs, layers.down, self.kind, layers.stacked_a)

    def _by_layers(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = halves(outputs(_of(self.module, self.inputs), x, self.stack))
        return cast(torch.Tensor, self.module.down_proj(gated(gate, up, self.kind)))

    def _layers(self, x: torch.Tensor) -> MLPLayers:
        inputs = [linear(layer, x) for layer in _of(self.module, self.inputs)]
        last = self.module.down_proj
        # Its input is the wide product, of which only shape and dtype matter here.
        wide = x.new_empty(1).expand(x.numel() // x.shape[-1], last.in_features)
        return MLPLayers(tuple(inputs), linear(last, wide), self.stack.of(inputs, x.dtype))


@dataclass(frozen=True)
class AttentionCall:
    """What a module's own forward hands to the attention function, beside query, key and value."""

    scaling: float | None = None
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: str | None = None


class FusedAttention(Fused):
    """q, k and v in one multiply with their adapters, norms of q and k, rotary embedding, attention, output."""

    what = "attention"

    def __init__(self, module: nn.Module, call: AttentionCall, inputs: tuple[str, ...], rope: bool) -> None:
        super().__init__(module)
        self.call, self.inputs, self.rope = call, inputs, rope
        self.stack = Stack()

    @classmethod
    def candidates(cls, module: nn.Module) -> Iterator[dict[str, Any]]:
        names = set(dict(module.named_children()))
        inputs = ("qkv_proj",) if "qkv_proj" in names else ("q_proj", "k_proj", "v_proj")
        linears = [*inputs, "o_proj"]
        if not set(linears) <= names or not isinstance(getattr(module, "head_dim", None), int):
            return
        if names - {*linears, "q_norm", "k_norm"} or not all(map(cls.takes, _of(module, linears))):
            return
        for rope in (True, False):
            yield dict(inputs=inputs, rope=rope)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        *,
        label_rows: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if past_key_values is not None or kwargs.get("document_lengths") is None:
            return self.original(
                hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **kwargs
            )
        m, call = self.module, self.call
        query, key, value = self._heads(hidden_states, position_embeddings)
        sinks = None if call.sinks is None else getattr(m, call.sinks)
        out, _ = attention.attention(
            m,
            query,
            key,
            value,
            None,
            scaling=call.scaling,
            sliding_window=call.sliding_window,
            softcap=call.softcap,
            s_aux=sinks,
            **kwargs,
        )
        out = out.flatten(2)
        if label_rows is not None:
            out = out.index_select(1, label_rows)
        return m.o_proj(out), None

    def _heads(self, x: torch.Tensor, positions: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value, each (1, heads, T, head_dim), rotated."""
        m: Any = self.module
        outs = outputs(_of(m, self.inputs), x, self.stack)
        if len(outs) == 1:
            queries = m.o_proj.in_features
            outs = outs[0].split([queries, *[(outs[0].shape[-1] - queries) // 2] * 2], -1)
        heads = []
        for out, norm in zip(
            outs, (getattr(m, "q_norm", None), getattr(m, "k_norm", None), None), strict=True
        ):
            if norm is not None and norm.weight.numel() == out.shape[-1]:  # over all heads at once (OLMo 2)
                out, norm = norm(out), None
            out = out.view(*out.shape[:-1], -1, m.head_dim)
            heads.append((out if norm is None else norm(out)).transpose(1, 2))
        query, key, value = heads
        if self.rope:
            query, key = rotary(query, key, *positions)
        return query, key, value


class FusedLayer(Fused):
    """A decoder layer, so that the last one can leave out the rows that no label needs.

    The forms are where the norms stand: before each block (Llama), before and after (Gemma 2 and 3), or after
    (OLMo 2). Granite multiplies what a block adds.
    """

    what = "decoder layer"
    forms: ClassVar[dict[str, tuple[str | None, ...]]] = {
        "before": ("input_layernorm", None, "post_attention_layernorm", None),
        "around": (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
        "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    }

    def __init__(self, module: nn.Module, form: str) -> None:
        super().__init__(module)
        self.form = form
        self.norms = self.forms[form]
        self.multiplier = float(getattr(module, "residual_multiplier", 1.0))
        self.last = False
        # transformers recomputes inside the forward that this one replaces, so it is done here
        self.mode: Mode = "layer" if getattr(module, "gradient_checkpointing", False) else "keep"
        self.keep: Callable[[torch.Tensor], Getter] = kept_here

    @classmethod
    def candidates(cls, module: nn.Module) -> Iterator[dict[str, Any]]:
        names = set(dict(module.named_children()))
        if not {"self_attn", "mlp"} <= names:
            return
        for form, norms in cls.forms.items():
            needed = {name for name in norms if name is not None}
            if needed == {name for name in names if name.endswith("norm")}:
                yield dict(form=form)

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs.get("document_lengths") is None or kwargs.get("past_key_values") is not None:
            return self.original(hidden_states, *args, **kwargs)
        if self.mode in ("layer", "offload") and torch.is_grad_enabled() and self.module.training:
            return recomputed(partial(self._run, **kwargs), hidden_states, self.keep)
        return self._run(hidden_states, **kwargs)

    def _run(self, x: torch.Tensor, *, label_rows: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        m: Any = self.module
        before, after, before_mlp, after_mlp = (n and getattr(m, n) for n in self.norms)
        rows = label_rows if self.last else None
        block: Any = m.self_attn
        own = isinstance(block.__dict__.get("forward"), FusedAttention)
        if own:
            kwargs["label_rows"] = rows
        normed = before(x) if before else x
        with self._remade(before, normed, x):
            added = block(hidden_states=normed, **kwargs)[0]
        if rows is not None:
            x = x.index_select(1, rows)
            added = added if own else added.index_select(1, rows)
        added = self._scaled(after(added) if after else added)
        norm = before_mlp.__dict__.get("forward") if before_mlp else None
        if isinstance(norm, FusedNorm):
            normed, x = norm.add(added, x)
        else:
            x = x + added
            normed = before_mlp(x) if before_mlp else x
        added = self._mlp(normed, before_mlp, x)
        added = added[0] if isinstance(added, tuple) else added
        return x + self._scaled(after_mlp(added) if after_mlp else added)

    def _remade(self, norm: Any, normed: torch.Tensor, x: torch.Tensor) -> Any:
        """Where norms are made again: a context in which nothing of the norm's output is kept."""
        if norm is None or self.mode not in ("norms", "mlp") or not torch.is_grad_enabled():
            return nullcontext()
        return remade(normed, partial(norm, x.detach()))

    def _mlp(self, normed: torch.Tensor, norm: Any, x: torch.Tensor) -> Any:
        mlp: Any = self.module.mlp
        fused = isinstance(mlp.__dict__.get("forward"), FusedMLP)
        if fused and runs_again() and self.norms[3] is None:  # nothing keeps what follows
            with output_unused():
                return mlp(normed)
        if self.mode == "mlp" and not fused and torch.is_grad_enabled() and self.module.training:
            again = kept_here if norm is None else lambda _: partial(norm, x.detach())
            return recomputed(mlp, normed, again)
        with self._remade(norm, normed, x):
            return mlp(normed)

    def _scaled(self, added: torch.Tensor) -> torch.Tensor:
        return added if self.multiplier == 1.0 else added * self.multiplier


# Children before parents: what a parent is proven with is what it will run.
KINDS: tuple[type[Fused], ...] = (FusedNorm, FusedMLP, FusedAttention, FusedLayer)


def is_linear(module: nn.Module) -> bool:
    """Whether the kernels know how to read a layer's weight: a plain one or one of ours, no other subclass."""
    if type(module) is DoRALinear:
        return not module.dropout  # which takes what is dropped through the base a second time
    return type(module) in (nn.Linear, FrozenLinear, LoRALinear)


def linear(module: nn.Module, x: torch.Tensor) -> Linear:
    """A layer as the kernels take it."""
    if isinstance(module, FrozenLinear):
        return module.linear(x)
    assert isinstance(module, nn.Linear)
    return Linear(module.weight, module.bias)


def outputs(layers: list[nn.Module], x: torch.Tensor, stack: Stack) -> tuple[torch.Tensor, ...]:
    """What layers with one input give, their A's in one multiply."""
    specs = [layer.unscaled(x) if isinstance(layer, DoRALinear) else linear(layer, x) for layer in layers]
    outs = lora_linears(x, specs, stack.of(specs, x.dtype))
    return tuple(
        layer.finish(out) if isinstance(layer, DoRALinear) else out
        for layer, out in zip(layers, outs, strict=True)
    )


def _of(module: nn.Module, names: Any) -> list[nn.Module]:
    return [module.get_submodule(name) for name in names]


def _eps(module: nn.Module) -> Any:
    for name in ("variance_epsilon", "eps"):
        if isinstance(value := getattr(module, name, None), float):
            return value
    return None


def _is_activation(function: Any, kind: str) -> bool:
    """Whether an activation module computes this kind, seen on a few numbers."""
    x = torch.linspace(-4.0, 4.0, 17)
    try:
        return torch.allclose(function(x), gated_forward(x, torch.ones_like(x), kind), atol=1e-6)
    except (TypeError, RuntimeError):
        return False
