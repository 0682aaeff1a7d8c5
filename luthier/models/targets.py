"""Which parts of a model get an adapter, of which rank and strength, and which are trained whole: by name.

A name that matches nothing is an error that lists what there is, and so is a pattern that decides nothing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.config import AdapterConfig
from luthier.errors import ConfigError, ModelError
from luthier.models.adapter import pattern_of
from luthier.models.frozen import FrozenLinear
from luthier.models.load import decoder_of
from luthier.models.quantize import experts_of

log = logging.getLogger("luthier")

_LAYER_INDEX = re.compile(r"\.(?:layers|h|blocks|block|layer)\.(\d+)\.")
_LINEAR = (nn.Linear, Conv1D, FrozenLinear)


def find_targets(model: PreTrainedModel, adapter: AdapterConfig) -> list[str]:
    """Paths of the layers to adapt, in the model's order: what `lora_target_linear` and `lora_target_modules` say.

    A name in the list matches a module of that name or path ending, a string is a regular expression for
    the whole path, as in PEFT.
    """
    targets = adapter.lora_target_modules
    linears = [name for name, module in model.named_modules() if isinstance(module, _LINEAR)]
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    chosen: set[str] = set()
    read_past = _read_past(model)
    if adapter.lora_target_linear or targets == "all-linear":
        chosen |= set(_decoder_linears(model, linears)) - read_past
        _say_experts(model, adapter)
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
        chosen |= _adaptable(model, matched, targets, linears, embeddings)
    elif isinstance(targets, list | tuple):
        for target in targets:
            matched = [n for n, _ in model.named_modules() if n == target or n.endswith("." + target)]
            chosen |= _adaptable(model, matched, target, linears, embeddings)
    if chosen & read_past:
        raise ModelError(
            f"lora_target_modules: {min(chosen & read_past)} is the output of a state-space layer, whose kernels "
            "read its weight alone and would pass over an adapter; leave it out"
        )
    if adapter.peft_layers_to_transform is not None:
        wanted = set(adapter.peft_layers_to_transform)
        found = {int(m[1]) for name in chosen if (m := _LAYER_INDEX.search(f".{name}."))}
        if wanted - found and (chosen or not adapter.lora_target_parameters):
            raise ModelError(
                f"peft_layers_to_transform: {sorted(wanted - found)} match no adapted layer; "
                f"the model has layers 0 to {max(found, default=-1)}"
            )
        chosen = {n for n in chosen if (m := _LAYER_INDEX.search(f".{n}.")) and int(m[1]) in wanted}
    if not chosen and not adapter.lora_target_parameters:
        raise ModelError(f"the adapter would change no layer; the linear layers here are: {_kinds(linears)}")
    return [name for name, _ in model.named_modules() if name in chosen]


def find_parameters(model: PreTrainedModel, adapter: AdapterConfig) -> dict[str, list[str]]:
    """Module path -> its parameters that `lora_target_parameters` names, by path ending: for the tensors that hold
    the experts of a layer, and others that belong to no linear layer.

    Raises:
        ModelError: a name that matches nothing, or what another kind of adapter is for; it lists what there is.
    """
    found: dict[str, list[str]] = {}
    loose = _loose_parameters(model)
    for target in _named_parameters(adapter):
        matched = [n for n, _ in model.named_parameters() if n == target or n.endswith("." + target)]
        if not matched:
            raise ModelError(
                f"lora_target_parameters: nothing in the model matches {target!r}; there is: {_endings(loose)}"
            )
        for name in matched:
            if name not in loose:
                raise ModelError(
                    f"lora_target_parameters: {name} can have no adapter of its own: it has to be a matrix, or one "
                    "for each expert, and what belongs to a linear layer or an embedding is named in "
                    f"lora_target_modules; there is: {_endings(loose)}"
                )
            path, _, parameter = name.rpartition(".")
            layer = _LAYER_INDEX.search(f".{path}.")
            # PEFT's files name parameters whatever they say of layers.
            wanted = None if adapter.lora_model_dir else adapter.peft_layers_to_transform
            if wanted is not None and (layer is None or int(layer[1]) not in wanted):
                continue
            if parameter not in found.setdefault(path, []):
                found[path].append(parameter)
    if found and adapter.lora_dropout > 0:
        raise ConfigError(
            f"lora_dropout: {adapter.lora_dropout:g}, but adapters of experts are added to the weights themselves and "
            "cannot drop inputs: leave lora_dropout out"
        )
    if adapter.lora_target_parameters and not found:
        raise ModelError(
            f"peft_layers_to_transform: {adapter.peft_layers_to_transform} match none of lora_target_parameters' layers"
        )
    return found


def _named_parameters(adapter: AdapterConfig) -> list[str]:
    named = adapter.lora_target_parameters
    return [named] if isinstance(named, str) else named


def _loose_parameters(model: nn.Module) -> list[str]:
    """Names of matrices and stacks of them that are held by no linear layer or embedding."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if path and not isinstance(module, (*_LINEAR, nn.Embedding))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() in (2, 3) and parameter.is_floating_point() and not name.endswith("_bias")
    ]


def _endings(names: Sequence[str]) -> str:
    """The last two parts of each name: what tells an expert's tensor from another of the same name."""
    return ", ".join(sorted({".".join(name.split(".")[-2:]) for name in names})) or "none"


def strengths_by_patterns(adapter: AdapterConfig, names: Sequence[str]) -> dict[str, tuple[int, float]]:
    """Name of an adapted layer or parameter -> rank and alpha: those of the first pattern that it matches, or the
    config's.

    Raises:
        ModelError: a pattern that decides nothing (unless the adapter comes from a file, where that does no harm).
    """
    used: dict[str, set[str | None]] = {"rank_pattern": set(), "alpha_pattern": set()}
    found = {}
    for name in names:
        rank, alpha = pattern_of(adapter.rank_pattern, name), pattern_of(adapter.alpha_pattern, name)
        used["rank_pattern"].add(rank)
        used["alpha_pattern"].add(alpha)
        found[name] = (
            adapter.lora_r if rank is None else adapter.rank_pattern[rank],
            adapter.lora_alpha if alpha is None else adapter.alpha_pattern[alpha],
        )
    for key, patterns in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        if (idle := [p for p in patterns if p not in used[key]]) and adapter.lora_model_dir is None:
            taken = any(pattern_of([idle[0]], name) for name in names)
            why = "what it matches has an earlier pattern" if taken else "nothing that gets an adapter matches it"
            raise ModelError(
                f"{key}: {idle[0]!r} decides nothing: {why}. A pattern is a regular expression for the end of a "
                f"name, such as q_proj or layers.0.self_attn.q_proj; adapted are: {_kinds(names)}"
            )
    return found


def check_kinds(model: nn.Module, adapter: AdapterConfig, names: Sequence[str]) -> None:
    """Refuse what the config asks of embeddings among the targets and embeddings cannot do."""
    embeddings = [name for name in names if isinstance(model.get_submodule(name), nn.Embedding)]
    if embeddings and adapter.lora_dropout > 0:
        log.info("lora_dropout drops nothing in adapters of embeddings, whose inputs are tokens")
    if not embeddings or adapter.lora_model_dir is not None:
        return
    if adapter.lora_rank_budget is not None or adapter.peft_init_lora_weights not in (True, "gaussian"):
        key = "peft_init_lora_weights" if adapter.lora_rank_budget is None else "lora_rank_budget"
        raise ModelError(
            f"{key} is for linear layers, and lora_target_modules names the embeddings {embeddings[0]} too: leave one "
            "of them out"
        )


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
        if hasattr(module, "A_log") and isinstance(getattr(module, "out_proj", None), _LINEAR)
    }


def _say_experts(model: nn.Module, adapter: AdapterConfig) -> None:
    """transformers keeps the experts of a layer in one tensor each, which no linear layer holds."""
    experts = [n for n in experts_of(model) if not n.endswith("_bias")]
    left = [n for n in experts if not any(n.endswith("." + t) or n == t for t in _named_parameters(adapter))]
    if left:
        log.warning(
            "no LoRA on the experts of this model (%s): they are no linear layers; lora_target_parameters takes them",
            _endings(left),
        )


def _adaptable(
    model: nn.Module, matched: list[str], target: str, linears: Sequence[str], embeddings: Sequence[str]
) -> set[str]:
    if not matched:
        raise ModelError(
            f"lora_target_modules: nothing in the model matches {target!r}; "
            f"the linear layers here are: {_kinds(linears)}"
        )
    kept = {n for n in matched if n in {*linears, *embeddings}}
    if not kept:
        others = sorted({type(model.get_submodule(n)).__name__ for n in matched})
        raise ModelError(
            f"lora_target_modules: {target!r} matches {', '.join(others)} only, and LoRA here adapts linear layers and "
            f"embeddings; they are: {_kinds([*linears, *embeddings])}"
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
