"""Low-rank adaptation: a frozen linear map plus a trained low-rank one (Hu et al. 2021, section 4.1).

    x (T, in) --+----------- W (out, in), frozen -----------+-- + --> y (T, out)
                +-- dropout -- A (r, in) -- B (out, r) -- * scale --+

A linear layer is replaced on the instance by `LoRALinear`, which keeps the layer's own parameters under
their own names, so that the model's other weights are called what they were called before. A and B are fp32
whatever the model computes in: they are small, and their updates are smaller than bf16 can add to them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from luthier.config import AdapterConfig
from luthier.errors import ModelError
from luthier.kernels.lora_linear import Linear, lora_linears
from luthier.models.adapter import Adapter, adds_nothing, scale_of
from luthier.models.deltas import adapted_weight
from luthier.models.dora import Magnitude
from luthier.models.embedding import LoRAEmbedding
from luthier.models.experts import LoRAExperts
from luthier.models.frozen import FrozenLinear
from luthier.models.lora_init import Sources, begin, changes_base, earlier_ranks
from luthier.models.rank_budget import choose_ranks, looks_at_data
from luthier.models.targets import (
    check_kinds,
    find_parameters,
    find_targets,
    modules_named,
    strengths_by_patterns,
)

log = logging.getLogger("luthier")


@dataclass
class DropoutState:
    """What seeds the dropout of a pass, shared by all of a model's LoRA layers.

    The mask of a stretch of tokens (a document, or the prompt of a pair) depends on its seed, its length and the layer
    alone, never on its neighbours in the pass, so a step drops the same elements however it is cut. It stays in
    place until the next forward, because recomputation in backward must see it again.
    """

    lengths: Sequence[int] = ()  # tokens of each stretch
    seeds: Sequence[int] = ()
    active: bool = False  # whether any layer drops out at all
    generators: dict[torch.device, torch.Generator] = field(default_factory=dict)

    def keep(self, x: torch.Tensor, p: float, layer: int) -> torch.Tensor:
        """What dropout leaves of a layer's input (..., T, D): a boolean mask (T, D), drawn stretch by stretch."""
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        if sum(self.lengths) != rows:  # called from outside a flat pass, e.g. by another library's trainer
            return torch.rand(rows, width, device=x.device) >= p
        generator = self.generators.setdefault(x.device, torch.Generator(x.device))
        masks = []
        for length, seed in zip(self.lengths, self.seeds, strict=True):
            generator.manual_seed(mix(seed, layer))
            masks.append(torch.rand((length, width), generator=generator, device=x.device) >= p)
        return torch.cat(masks) if len(masks) > 1 else masks[0]


def mix(*values: int) -> int:
    """Integers to one well-spread 63-bit seed (splitmix64 steps)."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


class LoRALinear(FrozenLinear, Adapter):
    """A linear layer (or GPT-2's transposed Conv1D) with a trained low-rank addition.

    Args:
        base: the layer to adapt; its parameters move here, frozen.
        layer: a number of its own among the model's adapted layers, for dropout.

    Attributes:
        start_A, start_B: what was taken out of the base weight for the adapter to begin with (PiSSA); else None.
    """

    start_A: torch.Tensor | None
    start_B: torch.Tensor | None

    def __init__(
        self,
        base: nn.Module,
        r: int,
        alpha: float,
        dropout: float,
        *,
        rslora: bool,
        state: DropoutState,
        layer: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(base)
        self.r, self.alpha, self.dropout, self.rslora = r, alpha, dropout, rslora
        self.scale = scale_of(alpha, r, rslora)
        self.state, self.layer = state, layer
        self.enabled = True
        self._copies: tuple[Any, torch.Tensor, torch.Tensor] | None = None
        # Drawn on the CPU, so that a seed means the same adapter on every device.
        a = torch.empty(r, self.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        device = self.weight.device
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=device))
        self.register_buffer("start_A", None, persistent=False)
        self.register_buffer("start_B", None, persistent=False)

    def linear(self, x: torch.Tensor) -> Linear:
        """The layer as the kernels take it, for the input x (which only dropout looks at)."""
        if not self.enabled:  # the base model's function, of which a part may have been taken out
            base = super().linear(x)
            return base if self.start_A is None else replace(base, a=self.start_A, b=self.start_B, scale=self.scale)
        keep = self.state.keep(x, self.dropout, self.layer) if self.dropout and self.training else None
        a, b = self.in_dtype(x.dtype)
        return Linear(
            self.plain_weight,
            self.bias,
            self.lora_A,
            self.lora_B,
            self.scale,
            keep,
            self.dropout,
            a,
            b,
            **self.reading(x.dtype),
        )

    def in_dtype(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B in the compute dtype: a copy that is made once for each state of the masters."""
        if self.lora_A.dtype == dtype:
            return self.lora_A.detach(), self.lora_B.detach()
        state = (self.lora_A._version, self.lora_B._version, dtype, self.lora_A.device)
        if self._copies is None or self._copies[0] != state:
            self._copies = (state, self.lora_A.detach().to(dtype), self.lora_B.detach().to(dtype))
        return self._copies[1], self._copies[2]

    @torch.no_grad()
    def take_out(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Begin with A and B, and subtract s B A from the base weight, so that the function stays the same."""
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)
        self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()
        rest = torch.addmm(self.weight_in(torch.float32), self.start_B, self.start_A, alpha=-self.scale)
        # A parameter of its own: a head may share its weight with the embeddings, which stay as they are.
        stored = (rest.t() if self.transposed else rest).to(self.weight.dtype).contiguous()
        self.weight = nn.Parameter(stored, requires_grad=False)

    def idle(self) -> bool:
        if self.start_A is None or self.start_B is None:
            return adds_nothing(self.lora_A, self.lora_B)
        return torch.equal(self.lora_A, self.start_A) and torch.equal(self.lora_B, self.start_B)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def exported(self) -> dict[str, torch.Tensor]:
        """For the base as it was: B A less what was taken out is an ordinary adapter of twice the rank."""
        found = self.tensors()
        if self.start_A is not None and self.start_B is not None:
            found["lora_A.weight"] = torch.cat([self.lora_A, self.start_A])
            found["lora_B.weight"] = torch.cat([self.lora_B, -self.start_B], 1)
        return found

    def strengths(self) -> dict[str, tuple[int, float]]:
        if self.start_A is None:
            return {"": (self.r, self.alpha)}
        return {"": (2 * self.r, self.alpha * (math.sqrt(2) if self.rslora else 2))}

    def merged(self) -> dict[str, torch.Tensor]:
        magnitude = getattr(self, "lora_magnitude_vector", None)
        whole = adapted_weight(
            self.weight_in(torch.float32), self.lora_A, self.lora_B, self.scale, magnitude
        )
        return {"weight": whole.t() if self.transposed else whole}

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, r={self.r}, alpha={self.alpha:g}"


class DoRALinear(LoRALinear):
    """A LoRA layer whose outputs are rescaled, each by a trained magnitude over the norm of its row."""

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float, **others: Any) -> None:
        super().__init__(base, r, alpha, dropout, **others)
        self.magnitude = Magnitude(self._rows, self._stored, self._low_rank, self.scale)
        self.lora_magnitude_vector = nn.Parameter(torch.empty(self.out_features, device=self.lora_A.device))

    def begin(self) -> None:
        """Set the magnitude so that nothing is rescaled; A and B have their first values by now."""
        self.lora_magnitude_vector.data = self.magnitude.norms().clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.unscaled(x)
        if layer.keep is None:
            return self.finish(lora_linears(x, [layer])[0])
        # As in PEFT, what dropout leaves goes through base and adapter, rescaled, and the rest through the base as it
        # is: then the mean over masks is right.
        dropped = x * layer.keep.view(x.shape) * (1.0 / (1.0 - layer.p))
        out = self.finish(lora_linears(dropped, [replace(layer, keep=None)])[0])
        return out + lora_linears(x - dropped, [replace(layer, a=None, b=None, keep=None)])[0]

    def unscaled(self, x: torch.Tensor) -> Linear:
        """What the kernels compute of the layer; `finish` does the rest."""
        return replace(self.linear(x), bias=None) if self.enabled else self.linear(x)

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """The layer's output from what `unscaled` gives (..., O): by magnitude over norm, and the bias."""
        if not self.enabled:
            return out
        out = (out * self.magnitude.factor(self.lora_magnitude_vector)).to(out.dtype)
        return out if self.bias is None else out + self.bias

    def idle(self) -> bool:
        return super().idle() and torch.equal(self.lora_magnitude_vector, self.magnitude.norms())

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**super().tensors(), "lora_magnitude_vector": self.lora_magnitude_vector}

    def _rows(self) -> torch.Tensor:
        return self.weight_in(torch.float32)

    def _stored(self) -> torch.Tensor:
        return self.weight

    def _low_rank(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lora_A, self.lora_B


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Module path -> adapted linear layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Module path -> adapter, of whatever kind."""
    found: dict[str, Adapter] = {}
    for name, module in model.named_modules():
        adapter = module if isinstance(module, LoRALinear) else vars(module).get("forward")
        if isinstance(adapter, Adapter):
            found[name] = adapter
    return found


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model's function for a while (reference log-probs, before-and-after)."""
    layers = list(adapters(model).values())
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def add_lora(
    model: PreTrainedModel, adapter: AdapterConfig, seed: int, sources: Sources | None = None
) -> DropoutState:
    """Freeze the model and put an adapter on its targets; returns the shared dropout state.

    The adapter begins as the config says; one that comes from `lora_model_dir`, whose values the caller will fill
    in, and one on the meta device have shapes only.

    Raises:
        ModelError: a target or pattern that matches nothing, or nothing that can be adapted; it lists what there is.
    """
    sources = sources or Sources()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    names = find_targets(model, adapter)
    expert_parameters = find_parameters(model, adapter)
    check_kinds(model, adapter, names)
    strengths, directions = _strengths(model, adapter, names, expert_parameters, sources)
    state = DropoutState(active=adapter.lora_dropout > 0)
    generator = torch.Generator().manual_seed(seed)
    chosen = [name for name in names if name in strengths]
    for index, name in enumerate(chosen):
        base = model.get_submodule(name)
        r, alpha = strengths[name]
        common: Any = dict(rslora=adapter.peft_use_rslora, generator=generator)
        if isinstance(base, nn.Embedding):
            # Into the instance's own attributes, beside its class's method.
            vars(base)["forward"] = LoRAEmbedding(base, r, alpha, dora=adapter.peft_use_dora, **common)
            continue
        kind = DoRALinear if adapter.peft_use_dora else LoRALinear
        layer = kind(base, r, alpha, adapter.lora_dropout, state=state, layer=index, **common)
        layer.train(base.training)
        model.set_submodule(name, layer)
        if adapter.lora_model_dir is None and not layer.weight.is_meta:
            begin(layer, name, adapter.peft_init_lora_weights, seed + index, sources, directions.get(name))
        if isinstance(layer, DoRALinear) and not layer.weight.is_meta:
            layer.begin()
    for path, parameters in expert_parameters.items():
        module = model.get_submodule(path)
        vars(module)["forward"] = LoRAExperts(
            module,
            {parameter: strengths[f"{path}.{parameter}"] for parameter in parameters},
            rslora=adapter.peft_use_rslora,
            gaussian=adapter.peft_init_lora_weights == "gaussian",
            generator=generator,
        )
    train_modules(model, adapter.lora_modules_to_save)
    if adapter.lora_model_dir is None and changes_base(adapter.peft_init_lora_weights):
        log.info(
            "%s: the adapter's part is taken out of the base weights in memory; it is saved as an ordinary adapter of "
            "twice the rank, for the base as it is",
            adapter.peft_init_lora_weights,
        )
    return state


def _strengths(
    model: PreTrainedModel,
    adapter: AdapterConfig,
    names: list[str],
    expert_parameters: dict[str, list[str]],
    sources: Sources,
) -> tuple[dict[str, tuple[int, float]], dict[str, torch.Tensor]]:
    """Rank and alpha of everything that gets an adapter, by patterns or by the budget; and first A's, if the data
    gave them."""
    every = [*names, *(f"{path}.{name}" for path, found in expert_parameters.items() for name in found)]
    by_patterns = strengths_by_patterns(adapter, every)
    if not looks_at_data(adapter):
        return by_patterns, {}
    layers = {name: model.get_submodule(name) for name in names}
    if sources.earlier is not None:
        ranks = earlier_ranks(sources.earlier, names, adapter.peft_init_lora_weights)
        directions: dict[str, torch.Tensor] = {}
        log.info("ranks by layer are those of the checkpoint")
    else:
        ranks, directions = choose_ranks(model, layers, adapter, sources.documents)
    if adapter.lora_rank_budget is None:
        return by_patterns, directions
    # The factor on B A stays that of lora_r, as in PEFT; what rank stabilisation says of ranks holds for these.
    grow = 0.0 if adapter.peft_use_rslora else 1.0
    alphas = {name: adapter.lora_alpha * (r / adapter.lora_r) ** grow for name, r in ranks.items()}
    return {name: (r, alphas[name]) for name, r in ranks.items() if r > 0}, directions


def train_modules(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Train whole modules beside the adapter.

    Where embeddings and head are one tensor and only one of them is named, that one gets a copy of its own, as
    its file in the adapter will be loaded; with both named they stay tied and are written twice.
    """
    saved = [model.get_submodule(path) for path in modules_named(model, names)]
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    if tied and any(m is embeddings for m in saved) != any(m is head for m in saved):
        log.info(
            "embeddings and head are tied in this model and only one is trained: it gets a copy of its own"
        )
        alone = cast(nn.Linear, embeddings if any(m is embeddings for m in saved) else head)
        alone.weight = nn.Parameter(alone.weight.detach().clone())
    for module in saved:
        if adapted := adapters(module):
            inside = next(iter(adapted))
            raise ModelError(
                "lora_modules_to_save and the LoRA targets name the same layer"
                + (f" ({type(module).__name__} has {inside} inside)" if inside else "")
                + "; keep one of them"
            )
        for parameter in module.parameters():
            parameter.requires_grad_(True)
