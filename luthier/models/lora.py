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
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.config import AdapterConfig
from luthier.errors import ConfigError, ModelError
from luthier.kernels.lora_linear import Linear, lora_linears
from luthier.models.load import decoder_of

log = logging.getLogger("luthier")

_LAYER_INDEX = re.compile(r"\.(?:layers|h|blocks|block|layer)\.(\d+)\.")


@dataclass
class DropoutState:
    """What seeds the dropout of a pass, shared by all of a model's LoRA layers.

    A document's mask depends on the seed, the layer and the document alone, never on its neighbours in the
    pass, so a step drops the same elements however it is cut. It stays in place until the next forward,
    because recomputation in backward must see it again.
    """

    lengths: Sequence[int] = ()
    seeds: Sequence[int] = ()
    active: bool = False  # whether any layer drops out at all
    generators: dict[torch.device, torch.Generator] = field(default_factory=dict)

    def keep(self, x: torch.Tensor, p: float, layer: int) -> torch.Tensor:
        """What dropout leaves of a layer's input (..., T, D): a boolean mask (T, D), drawn document by document."""
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


class LoRALinear(nn.Module):
    """A linear layer (or GPT-2's transposed Conv1D) with a trained low-rank addition.

    Args:
        base: the layer to adapt; its parameters move here, frozen.
        scale: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023).
        layer: a number of its own among the model's adapted layers, for dropout.
    """

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
        super().__init__()
        self.transposed = isinstance(base, Conv1D)
        self.weight = cast(nn.Parameter, base.weight)
        self.bias = cast(nn.Parameter | None, base.bias)
        rows, columns = self.weight.shape[::-1] if self.transposed else self.weight.shape
        self.in_features, self.out_features = int(columns), int(rows)
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.scale = alpha / math.sqrt(r) if rslora else alpha / r
        self.state, self.layer = state, layer
        self.enabled = True
        self._copies: tuple[Any, torch.Tensor, torch.Tensor] | None = None
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        # Drawn on the CPU, so that a seed means the same adapter on every device.
        a = torch.empty(r, self.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        device = self.weight.device
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return lora_linears(x, [self.linear(x)])[0]

    def linear(self, x: torch.Tensor) -> Linear:
        """The layer as the kernels take it, for the input x (which only dropout looks at)."""
        weight = self.weight.t() if self.transposed else self.weight
        if not self.enabled:
            return Linear(weight, self.bias)
        keep = self.state.keep(x, self.dropout, self.layer) if self.dropout and self.training else None
        a, b = self.in_dtype(x.dtype)
        return Linear(weight, self.bias, self.lora_A, self.lora_B, self.scale, keep, self.dropout, a, b)

    def in_dtype(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B in the compute dtype: a copy that is made once for each state of the masters."""
        if self.lora_A.dtype == dtype:
            return self.lora_A.detach(), self.lora_B.detach()
        state = (self.lora_A._version, self.lora_B._version, dtype, self.lora_A.device)
        if self._copies is None or self._copies[0] != state:
            self._copies = (state, self.lora_A.detach().to(dtype), self.lora_B.detach().to(dtype))
        return self._copies[1], self._copies[2]

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, r={self.r}, alpha={self.alpha:g}"


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Module path -> adapted layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model's function for a while (reference log-probs, before-and-after)."""
    layers = list(lora_layers(model).values())
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def add_lora(model: PreTrainedModel, adapter: AdapterConfig, seed: int) -> DropoutState:
    """Freeze the model and replace the target layers by LoRA layers, B = 0; returns the shared dropout state.

    Raises:
        ModelError: a target that matches nothing, or no linear layer; it lists what there is.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    names = find_targets(model, adapter)
    state = DropoutState(active=adapter.lora_dropout > 0)
    generator = torch.Generator().manual_seed(seed)
    for index, name in enumerate(names):
        base = model.get_submodule(name)
        layer = LoRALinear(
            base,
            adapter.lora_r,
            adapter.lora_alpha,
            adapter.lora_dropout,
            rslora=adapter.peft_use_rslora,
            state=state,
            layer=index,
            generator=generator,
        )
        layer.train(base.training)
        model.set_submodule(name, layer)
    train_modules(model, adapter.lora_modules_to_save)
    return state


def find_targets(model: PreTrainedModel, adapter: AdapterConfig) -> list[str]:
    """Paths of the layers to adapt, in the model's order: what `lora_target_linear` and `lora_target_modules` say.

    A name in the list matches a module of that name or path ending, a string is a regular expression for
    the whole path, as in PEFT.
    """
    targets = adapter.lora_target_modules
    linears = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D | LoRALinear)
    ]
    chosen: set[str] = set()
    read_past = _read_past(model)
    if adapter.lora_target_linear or targets == "all-linear":
        chosen |= set(_decoder_linears(model, linears)) - read_past
        _say_experts(model)
        if read_past:
            log.info(
                "no LoRA on %d state-space output layers: their kernels read the weights alone",
                len(read_past),
            )
    if isinstance(targets, str) and targets != "all-linear":
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ConfigError(
                f"lora_target_modules: {targets!r} is no regular expression: {error}"
            ) from error
        matched = [name for name, _ in model.named_modules() if pattern.fullmatch(name)]
        chosen |= _only_linears(model, matched, targets, linears)
    elif isinstance(targets, list | tuple):
        for target in targets:
            matched = [n for n, _ in model.named_modules() if n == target or n.endswith("." + target)]
            chosen |= _only_linears(model, matched, target, linears)
    if chosen & read_past:
        raise ModelError(
            f"lora_target_modules: {min(chosen & read_past)} is the output of a state-space layer, whose kernels "
            "read its weight alone and would pass over an adapter; leave it out"
        )
    if adapter.peft_layers_to_transform is not None:
        wanted = set(adapter.peft_layers_to_transform)
        found = {int(m[1]) for name in chosen if (m := _LAYER_INDEX.search(f".{name}."))}
        if wanted - found:
            raise ModelError(
                f"peft_layers_to_transform: {sorted(wanted - found)} match no adapted layer; "
                f"the model has layers 0 to {max(found, default=-1)}"
            )
        chosen = {n for n in chosen if (m := _LAYER_INDEX.search(f".{n}.")) and int(m[1]) in wanted}
    if not chosen:
        raise ModelError(f"the adapter would change no layer; the linear layers here are: {_kinds(linears)}")
    return [name for name in linears if name in chosen]


def _decoder_linears(model: PreTrainedModel, linears: Sequence[str]) -> list[str]:
    """All linear layers of the text decoder: the head is outside it, and so are vision and audio towers."""
    decoder = decoder_of(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    head = model.get_output_embeddings()
    return [n for n in linears if n.startswith(prefix + ".") and model.get_submodule(n) is not head]


def _read_past(model: nn.Module) -> set[str]:
    """Linear layers whose weight a fused kernel of their parent reads, so that an adapter on them would be
    passed over: `out_proj` of Mamba's mixers. PEFT refuses them as well.
    """
    return {
        f"{name}.out_proj"
        for name, module in model.named_modules()
        if hasattr(module, "A_log") and isinstance(getattr(module, "out_proj", None), nn.Linear | LoRALinear)
    }


def _say_experts(model: nn.Module) -> None:
    """transformers keeps the experts of a layer in one tensor each, which no linear layer holds."""
    experts = sorted({n.rpartition(".")[2] for n, p in model.named_parameters() if p.dim() == 3})
    if experts:
        log.warning(
            "no LoRA on the experts of this model (%s): they are no linear layers", ", ".join(experts)
        )


def _only_linears(model: nn.Module, matched: list[str], target: str, linears: Sequence[str]) -> set[str]:
    if not matched:
        raise ModelError(
            f"lora_target_modules: nothing in the model matches {target!r}; "
            f"the linear layers here are: {_kinds(linears)}"
        )
    others = sorted(
        {type(model.get_submodule(n)).__name__ for n in matched} - {"Linear", "Conv1D", "LoRALinear"}
    )
    kept = {n for n in matched if n in set(linears)}
    if not kept:
        raise ModelError(
            f"lora_target_modules: {target!r} matches {', '.join(others)} only, and LoRA here adapts linear layers; "
            f"they are: {_kinds(linears)}"
        )
    return kept


def _kinds(linears: Sequence[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in linears})) or "none"


def modules_named(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Paths of the modules that `lora_modules_to_save` names, by last name or path ending; each must exist."""
    paths = []
    for target in names:
        matched = [n for n, _ in model.named_modules() if n == target or n.endswith("." + target)]
        if not matched:
            leaves = sorted(
                {n.rpartition(".")[2] for n, m in model.named_modules() if n and not list(m.children())}
            )
            raise ModelError(
                f"lora_modules_to_save: nothing in the model matches {target!r}; there is: {', '.join(leaves)}"
            )
        paths += matched
    return paths


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
        if adapted := lora_layers(module):
            inside = next(iter(adapted))
            raise ModelError(
                "lora_modules_to_save and the LoRA targets name the same layer"
                + (f" ({type(module).__name__} has {inside} inside)" if inside else "")
                + "; keep one of them"
            )
        for parameter in module.parameters():
            parameter.requires_grad_(True)
