"""Adapters on disk, in PEFT's format: what PEFT, transformers and vLLM load, loads here, and the other way round.

A folder holds `adapter_config.json` and `adapter_model.safetensors`; tensors are named
`base_model.model.<path>.lora_A.weight` (r, in), `.lora_B.weight` (out, r), with DoRA `.lora_magnitude_vector` (out,),
of embeddings `.lora_embedding_A` (r, tokens) and `.lora_embedding_B` (width, r), of experts as `models.experts` says,
and `base_model.model.<path>.<parameter>` for modules trained whole.

What an adapter on disk makes of a base weight: `models.deltas.adapted_weight` for linear layers and embeddings, with
or without DoRA, and `models.experts.adapted_experts`; rank and alpha of each by `models.targets.strengths_by_patterns`.
On a model in memory, `merge_into_base` does all of it.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.artifacts.source import local
from luthier.config import AdapterConfig
from luthier.errors import ModelError
from luthier.models.adapter import ForwardAdapter
from luthier.models.lora import DropoutState, LoRALinear, adapters, add_lora
from luthier.models.targets import modules_named

log = logging.getLogger("luthier")

PREFIX = "base_model.model."
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

# Settings of PEFT that change what an adapter computes and that this loader does not apply.
_UNSUPPORTED = (
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "megatron_config",
    "arrow_config",
    "use_qalora",
    "lora_bias",
    "use_bdlora",
    "exclude_modules",
)

# Ways to begin an adapter that take their part out of the base weights as well.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


def adapter_tensors(
    model: nn.Module, modules_to_save: tuple[str, ...] | list[str] = ()
) -> dict[str, torch.Tensor]:
    """The adapter under the names of PEFT's files, on the CPU."""
    tensors: dict[str, torch.Tensor] = {}
    for path, adapter in adapters(model).items():
        tensors |= {f"{PREFIX}{path}.{name}": tensor for name, tensor in adapter.exported().items()}
    for path in modules_named(model, modules_to_save):
        for name, parameter in model.get_submodule(path).named_parameters():
            tensors[f"{PREFIX}{path}.{name}"] = parameter
    # Tied modules appear under two names; a file needs each to own its bytes.
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def save_adapter(
    model: PreTrainedModel, folder: Path, *, base_model: str, revision: str | None, adapter: AdapterConfig
) -> None:
    """Write the two files into an existing folder."""
    modules_to_save = list(adapter.lora_modules_to_save)
    save_file(adapter_tensors(model, modules_to_save), folder / WEIGHTS, metadata={"format": "pt"})
    described = describe_adapter(model, base_model=base_model, revision=revision, adapter=adapter)
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def describe_adapter(
    model: PreTrainedModel, *, base_model: str, revision: str | None, adapter: AdapterConfig
) -> dict[str, Any]:
    """`adapter_config.json` as a dict."""
    found = adapters(model)
    strengths = {
        f"{path}.{name}" if name else path: strength
        for path, one in found.items()
        for name, strength in one.strengths().items()
    }
    ranks = {name: r for name, (r, _) in strengths.items()}
    # A whole number as one: PEFT's field is an int.
    alphas = {name: int(alpha) if alpha == int(alpha) else alpha for name, (_, alpha) in strengths.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    modules = [path for path, one in found.items() if "" in one.strengths()]
    parameters = [name for name in strengths if name not in found]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": _patterns(ranks, r),
        "alpha_pattern": _patterns(alphas, alpha),
        "lora_dropout": max(one.dropout for one in found.values()),
        "use_rslora": adapter.peft_use_rslora,
        "use_dora": adapter.peft_use_dora,
        "target_modules": target_names([n for n, _ in model.named_modules()], modules),
        "target_parameters": target_names([n for n, _ in model.named_parameters()], parameters, 2) or None,
        "modules_to_save": list(adapter.lora_modules_to_save) or None,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(one, LoRALinear) and one.transposed for one in found.values()),
        "inference_mode": True,
        "init_lora_weights": True,
    }


def target_names(every: Iterable[str], chosen: list[str], parts: int = 1) -> list[str]:
    """The shortest list of names that matches the chosen ones and no other: their last parts, else all of them."""
    short = sorted({".".join(name.split(".")[-parts:]) for name in chosen})
    matched = {n for n in every if any(n == s or n.endswith("." + s) for s in short)}
    return short if matched == set(chosen) else chosen


def _patterns(values: Mapping[str, Any], common: Any) -> dict[str, Any]:
    """PEFT's `rank_pattern` or `alpha_pattern` for what has another value than most: by last name where all of that
    name agree, else by whole path."""
    by_last: dict[str, set[Any]] = {}
    for name, value in values.items():
        by_last.setdefault(name.rpartition(".")[2], set()).add(value)
    found = {}
    for name, value in values.items():
        last = name.rpartition(".")[2]
        if value != common:
            found[last if len(by_last[last]) == 1 else name] = value
    return found


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """`adapter_config.json` of a folder.

    Raises:
        ModelError: missing, malformed, no LoRA, or with settings that would change the result unseen.
    """
    path = Path(local(str(folder))) / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{folder}: no adapter here ({CONFIG} is missing)") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        kind = found.get("peft_type") if isinstance(found, dict) else type(found).__name__
        raise ModelError(f"{path}: peft_type is {kind!r}; only LORA adapters can be loaded")
    start = found.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ModelError(
            f"{path}: init_lora_weights: {start!r} changed the base model's weights, which are not in these files; "
            "save the adapter as an ordinary LoRA first (path_initial_model_for_weight_conversion in PEFT)"
        )
    used = [name for name in _UNSUPPORTED if found.get(name)]
    if used:
        raise ModelError(f"{path}: the adapter uses {', '.join(used)}, which Luthier does not apply")
    if found.get("bias", "none") != "none":
        raise ModelError(
            f"{path}: bias: {found['bias']!r} trains the base model's biases, which Luthier does not load"
        )
    return found


def adapter_settings(folder: str | Path, *, dropout: float = 0.0) -> AdapterConfig:
    """The adapter section that describes an adapter on disk."""
    found = read_adapter_config(folder)
    targets = found.get("target_modules")
    return AdapterConfig(
        adapter="lora",
        lora_r=found["r"],
        lora_alpha=found["lora_alpha"],
        lora_dropout=dropout,
        lora_target_modules=targets if isinstance(targets, str) else list(targets or []),
        lora_modules_to_save=list(found.get("modules_to_save") or []),
        lora_target_parameters=list(found.get("target_parameters") or []),
        peft_use_rslora=bool(found.get("use_rslora")),
        peft_use_dora=bool(found.get("use_dora")),
        rank_pattern=found.get("rank_pattern") or {},
        alpha_pattern=found.get("alpha_pattern") or {},
        peft_layers_to_transform=_layers(found),
        lora_model_dir=str(folder),
    )


def _layers(found: dict[str, Any]) -> list[int] | None:
    layers = found.get("layers_to_transform")
    return [layers] if isinstance(layers, int) else layers


def load_adapter(
    model: PreTrainedModel, folder: str | Path, settings: AdapterConfig, seed: int = 0, *, trained_on: bool = False
) -> DropoutState:
    """Put an adapter from disk onto a base model; returns the dropout state of the new layers.

    Args:
        trained_on: the adapter will be saved again, from which embeddings that are not its own would be missing: they
            are refused then.

    Raises:
        ModelError: tensors that have no place in this model, or places that have no tensor.
    """
    state = add_lora(model, settings, seed)
    tensors = read_adapter_tensors(folder)
    resized = {} if trained_on else resized_embeddings(model, tensors)
    if resized:
        log.info("%s brings embeddings of its own, which take the place of the base's", folder)
    fill_adapter(model, tensors, settings.lora_modules_to_save, str(folder), resized)
    return state


def resized_embeddings(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of embeddings and head that PEFT has written beside an adapter, as it does where a notebook resized
    them for new tokens, and their places in the model."""
    tables = [id(model.get_input_embeddings()), id(model.get_output_embeddings())]
    names = {f"{PREFIX}{path}.weight": module for path, module in model.named_modules() if id(module) in tables}
    return {name: cast(torch.Tensor, module.weight) for name, module in names.items() if name in tensors}


def read_adapter_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder; a pickled `adapter_model.bin` is read without running any code of it."""
    folder = Path(local(str(folder)))
    try:
        if (folder / WEIGHTS).exists():
            return load_file(folder / WEIGHTS)
        if (folder / PICKLED).exists():
            loaded = torch.load(folder / PICKLED, map_location="cpu", weights_only=True)
            return {name: tensor for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)}
    except Exception as error:  # safetensors and pickle raise many kinds for a damaged file
        raise ModelError(
            f"{folder}: the adapter's weights cannot be read: {' '.join(str(error).split())[:200]}"
        ) from error
    raise ModelError(f"{folder}: neither {WEIGHTS} nor {PICKLED} is here")


@torch.no_grad()
def fill_adapter(
    model: nn.Module,
    tensors: dict[str, torch.Tensor],
    modules_to_save: tuple[str, ...] | list[str],
    source: str,
    beside: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Copy tensors under PEFT's names into the adapter of a model, and into the places `beside` it; every name must
    match in both directions."""
    places: dict[str, torch.Tensor] = dict(beside or {})
    for path, adapter in adapters(model).items():
        places |= {f"{PREFIX}{path}.{name}": tensor for name, tensor in adapter.tensors().items()}
        # PEFT writes the base weight of adapted embeddings, and of a head, beside the adapter.
        if (whole := f"{PREFIX}{path}.base_layer.weight") in tensors:
            places[whole] = cast(torch.Tensor, model.get_submodule(path).weight)
    for path in modules_named(model, modules_to_save):
        for name, parameter in model.get_submodule(path).named_parameters():
            places[f"{PREFIX}{path}.{name}"] = parameter
    missing, extra = sorted(places.keys() - tensors.keys()), sorted(tensors.keys() - places.keys())
    wrong = sorted(n for n in places.keys() & tensors.keys() if places[n].shape != tensors[n].shape)
    if missing or extra or wrong:
        says = [f"{len(missing)} tensors are missing (first: {missing[0]})"] if missing else []
        says += [f"{len(extra)} have no place in the model (first: {extra[0]})"] if extra else []
        says += (
            [f"{wrong[0]} is {tuple(tensors[wrong[0]].shape)}, expected {tuple(places[wrong[0]].shape)}"]
            if wrong
            else []
        )
        raise ModelError(f"{source}: the adapter does not fit this base model: {'; '.join(says)}")
    for name, place in places.items():
        place.copy_(tensors[name])


@torch.no_grad()
def merge_into_base(model: nn.Module) -> None:
    """Add every adapter to its base weight and put plain modules back: for generation without extra cost.

    An adapted head that shares its weight with the embeddings gets one of its own, for they were not adapted, and
    the other way round. A base that is quantised stays as it is, with the adapter beside it.
    """
    kept = 0
    for path, adapter in adapters(model).items():
        module = model.get_submodule(path)
        if isinstance(module, LoRALinear) and module.storage != "dense":
            kept += 1
            continue
        for name, value in adapter.merged().items():
            weight = module._parameters[name]
            assert weight is not None
            if _is_shared(model, module, weight):
                weight = nn.Parameter(weight.clone(), requires_grad=False)
                module._parameters[name] = weight
            weight.copy_(value.to(weight.dtype))
        if isinstance(module, LoRALinear):
            model.set_submodule(path, _plain(module))
        elif isinstance(adapter, ForwardAdapter):
            del module.forward
            for name in [n for n in module._parameters if "lora_" in n]:
                del module._parameters[name]
    if kept:
        log.info("the adapter stays beside %d quantised layers: merged, they would have to be quantised anew", kept)


def _is_shared(model: nn.Module, module: nn.Module, weight: torch.Tensor) -> bool:
    return any(p is weight for m in model.modules() if m is not module for p in m.parameters(recurse=False))


def _plain(layer: LoRALinear) -> nn.Module:
    with torch.device("meta"):  # only the shell is new; the parameters are the layer's
        if layer.transposed:
            plain: nn.Module = Conv1D(layer.out_features, layer.in_features)
        else:
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = layer.weight
    if layer.bias is not None:
        plain.bias = layer.bias
    return plain
