"""A PEFT model as a run's model, and back.

PEFT wraps each adapted layer; Luthier has layers of its own, whose files are PEFT's. So an adapter goes over by its
tensors, under the names of those files: PEFT's wrappers are taken off the transformers model for the time of the run,
which puts its own layers there, and afterwards everything is put back and PEFT's adapter is filled with what was
trained. The base weights are the same tensors all along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from luthier.errors import ModelError
from luthier.models.adapter_files import target_names
from luthier.models.restored import restored

# Settings of LoraConfig that change what is trained and that a run has no key for.
_NOT_HERE = (
    "megatron_config",
    "trainable_token_indices",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "layer_replication",
    "lora_bias",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)
# Their part was taken out of the base weights in memory, so that the adapter's files fit no base on disk.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def inner_of(model: Any) -> PreTrainedModel:
    """The transformers model inside, without PEFT's wrapper."""
    found = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(found, PreTrainedModel):
        raise ModelError(
            f"model: {type(model).__name__} is no causal language model of transformers, and no PEFT model of one; "
            "take what FastLanguageModel.from_pretrained or AutoModelForCausalLM.from_pretrained returns"
        )
    return found


def check_lora(config: Any) -> None:
    """Whether a run can train an adapter with these settings.

    Raises:
        ModelError: something that changes the result and has no place here; says what to write instead.
    """
    if not isinstance(config, LoraConfig):
        raise ModelError(
            f"peft_config: {type(config).__name__} is another method; Luthier trains LoRA (and DoRA): write "
            "LoraConfig(r=16, ...)"
        )
    if config.bias != "none":
        raise ModelError(f'bias="{config.bias}": the base\'s biases are not trained here; write bias="none"')
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ModelError(
            f'init_lora_weights="{start}": its part is taken out of the base weights in memory, and the saved adapter '
            "would fit no base on disk; leave it out, or let the run do it: luthier.train({..., "
            f'"peft_init_lora_weights": "{start}"}})'
        )
    used = [name for name in _NOT_HERE if getattr(config, name, None)]
    if isinstance(start, str) and start not in ("gaussian",):
        used.append("init_lora_weights")
    if used:
        raise ModelError(f"LoraConfig: {', '.join(used)}: not built here; leave it out")


def adapter_keys(model: PeftModel) -> dict[str, Any]:
    """The config's keys for the adapter that is on a PEFT model.

    Raises:
        ModelError: several adapters, or one that a run cannot train.
    """
    name = _active(model)
    config: Any = model.peft_config[name]
    check_lora(config)
    found = {
        "adapter": "lora",
        "lora_r": int(config.r),
        "lora_alpha": float(config.lora_alpha),
        "lora_dropout": float(config.lora_dropout),
        "peft_use_rslora": bool(config.use_rslora),
        "peft_use_dora": bool(config.use_dora),
        "rank_pattern": dict(config.rank_pattern or {}),
        "alpha_pattern": {key: float(alpha) for key, alpha in (config.alpha_pattern or {}).items()},
        "lora_modules_to_save": list(config.modules_to_save or []),
        "lora_target_parameters": list(getattr(config, "target_parameters", None) or []),
    }
    layers = [path for path, layer in _adapted(model) if not _of_parameter(layer)]
    if layers:
        every = [path for path, _ in _plain_modules(inner_of(model))]
        found["lora_target_modules"] = target_names(every, layers)
    return {key: value for key, value in found.items() if value not in (False, {}, [])}


def adapter_values(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names of PEFT's files."""
    state = get_peft_model_state_dict(model, adapter_name=_active(model), save_embedding_layers=False)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def fill(model: PeftModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put tensors under those names into the adapter that is on a PEFT model."""
    set_peft_model_state_dict(model, dict(tensors), adapter_name=_active(model))


@contextmanager
def without_adapter(model: Any) -> Iterator[PreTrainedModel]:
    """The transformers model inside with plain layers, for a run to change as it likes; put back on leaving."""
    inner = inner_of(model)
    with restored(model, inner):
        if isinstance(model, PeftModel):
            _take_off(model, inner)
        yield inner


def _take_off(model: PeftModel, inner: PreTrainedModel) -> None:
    name, plain = _active(model), {}
    for path, module in inner.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            plain[path] = module.modules_to_save[name]  # which is what trains
        elif isinstance(module, BaseTunerLayer) and _is_outermost(inner, path):
            if module.merged:
                raise ModelError("the adapter is merged into the base: call model.unmerge_adapter() before training")
            plain[path] = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise ModelError(f"{path}: {type(module).__name__} of PEFT has no place here")
    for path, module in plain.items():
        inner.set_submodule(path, module)
    _tie_again(inner)


def _tie_again(inner: Any) -> None:
    """PEFT trains copies of embeddings and head, which are two tensors where the model has one: here they are one."""
    embeddings, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    tied = getattr(inner.config.get_text_config(decoder=True), "tie_word_embeddings", False)
    both = head is not None and embeddings.weight.requires_grad and head.weight.requires_grad
    if not tied or not both or embeddings.weight is head.weight:
        return
    if not torch.equal(embeddings.weight, head.weight):
        raise ModelError(
            "modules_to_save: embeddings and head are one tensor in this model and were trained apart; begin from a "
            'new adapter, or name one of them, modules_to_save=["lm_head"]'
        )
    head.weight = embeddings.weight


def _adapted(model: PeftModel) -> list[tuple[str, Any]]:
    inner = inner_of(model)
    return [
        (path, module)
        for path, module in inner.named_modules()
        if isinstance(module, BaseTunerLayer) and _is_outermost(inner, path)
    ]


def _is_outermost(inner: nn.Module, path: str) -> bool:
    parent = path.rpartition(".")[0]
    return path == "" or not isinstance(inner.get_submodule(parent), BaseTunerLayer)


def _plain_modules(inner: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by the paths that they have without PEFT's wrappers."""
    for path, module in inner.named_modules():
        parents = path.split(".")
        above = [inner.get_submodule(".".join(parents[:n])) for n in range(1, len(parents))]
        if not any(isinstance(each, BaseTunerLayer | AuxiliaryTrainingWrapper) for each in above):
            yield path, module


def _of_parameter(layer: Any) -> bool:
    return hasattr(layer, "parameter_name")


def _active(model: PeftModel) -> str:
    names = model.active_adapters
    if len(model.peft_config) > 1 or len(names) != 1:
        raise ModelError(
            f"the model has {len(model.peft_config)} adapters ({', '.join(model.peft_config)}): a run trains one; "
            "delete the others with model.delete_adapter(name)"
        )
    return str(names[0])
