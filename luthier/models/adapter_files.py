"""Adapters on disk, in PEFT's format: what PEFT, transformers and vLLM load, loads here, and the other way round.

A folder holds `adapter_config.json` and `adapter_model.safetensors`; tensors are named
`base_model.model.<path>.lora_A.weight` (r, in), `.lora_B.weight` (out, r), and
`base_model.model.<path>.<parameter>` for modules trained whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.config import AdapterConfig
from luthier.errors import ModelError
from luthier.models.lora import DropoutState, LoRALinear, add_lora, lora_layers, modules_named

PREFIX = "base_model.model."
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

# Settings of PEFT that change what an adapter computes and that this loader does not apply.
_UNSUPPORTED = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
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
    tensors = {}
    for path, layer in lora_layers(model).items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_B
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
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": first.r,
        "lora_alpha": first.alpha if first.alpha != int(first.alpha) else int(first.alpha),
        "lora_dropout": first.dropout,
        "use_rslora": adapter.peft_use_rslora,
        "target_modules": target_names(model, list(layers)),
        "modules_to_save": list(adapter.lora_modules_to_save) or None,
        "bias": "none",
        "fan_in_fan_out": first.transposed,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def target_names(model: nn.Module, paths: list[str]) -> list[str]:
    """The shortest list of names that matches these layers and no other module: last names, else whole paths."""
    short = sorted({path.rpartition(".")[2] for path in paths})
    matched = {n for n, _ in model.named_modules() if any(n == s or n.endswith("." + s) for s in short)}
    return short if matched == set(paths) else paths


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """`adapter_config.json` of a folder.

    Raises:
        ModelError: missing, malformed, no LoRA, or with settings that would change the result unseen.
    """
    path = Path(folder) / CONFIG
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
        peft_use_rslora=bool(found.get("use_rslora")),
        peft_layers_to_transform=_layers(found),
        lora_model_dir=str(folder),
    )


def _layers(found: dict[str, Any]) -> list[int] | None:
    layers = found.get("layers_to_transform")
    return [layers] if isinstance(layers, int) else layers


def load_adapter(
    model: PreTrainedModel, folder: str | Path, settings: AdapterConfig, seed: int = 0
) -> DropoutState:
    """Put an adapter from disk onto a base model; returns the dropout state of the new layers.

    Raises:
        ModelError: tensors that have no place in this model, or places that have no tensor.
    """
    state = add_lora(model, settings, seed)
    fill_adapter(model, read_adapter_tensors(folder), settings.lora_modules_to_save, str(folder))
    return state


def read_adapter_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder; a pickled `adapter_model.bin` is read without running any code of it."""
    folder = Path(folder)
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
) -> None:
    """Copy tensors under PEFT's names into the adapter of a model; every name must match in both directions."""
    places: dict[str, torch.Tensor] = {}
    for path, layer in lora_layers(model).items():
        places[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_A
        places[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_B
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


def merge_into_base(model: nn.Module) -> None:
    """Add every adapter to its base weight and put plain layers back: for generation without extra cost.

    An adapted head that shares its weight with the embeddings gets one of its own: they were not adapted.
    """
    layers = lora_layers(model)
    heads = [path for path, layer in layers.items() if _is_tied(model, layer)]
    for path, layer in layers.items():
        delta = (layer.lora_B @ layer.lora_A) * layer.scale
        with torch.no_grad():
            if path in heads:
                layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
            weight = layer.weight
            merged = weight.float() + (delta.T if layer.transposed else delta)
            weight.copy_(merged.to(weight.dtype))
        model.set_submodule(path, _plain(layer))


def _is_tied(model: nn.Module, layer: LoRALinear) -> bool:
    return any(isinstance(m, nn.Embedding) and m.weight is layer.weight for m in model.modules())


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
