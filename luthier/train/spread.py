"""How a run is spread over its processes, by its config: the engine, and where the model is loaded before.

Each of the three ways has a module: `engine` (replicas), `fsdp`, and `zero`, which is DeepSpeed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from luthier.config import Config
from luthier.errors import ConfigError
from luthier.models.kinds import one_of_each_layer
from luthier.models.layers import layers_of
from luthier.models.load import decoder_of
from luthier.models.memory import free_memory
from luthier.models.policy import Policy
from luthier.models.storage import checkpoint_files
from luthier.train import zero
from luthier.train.distributed import Processes
from luthier.train.engine import Engine
from luthier.train.optim import Masters
from luthier.train.optimizers import build_optimizer

log = logging.getLogger("luthier")

# Share of a GPU's free memory that a whole model may take before it is shared out.
_ROOM = 0.6


def check_spread(
    config: Config, model_config: Any, device: torch.device, dtype: torch.dtype, processes: Processes, *, given: bool
) -> None:
    """Say what cannot be shared out as the config asks, before anything is loaded.

    Args:
        dtype: what the run computes in. given: it trains a model that a program made.

    Raises:
        ConfigError: DeepSpeed cannot do it (`zero.check`), fp32 shares would need a loss scale of their own, or the
            layers are called otherwise than the config says.
    """
    zero.check(config, device, dtype, given=given)
    if config.distributed.strategy != "fsdp":
        return
    if processes.size == 1:
        section, keys = config.distributed, ("fsdp_version", "fsdp_config", "dp_shard_size", "dp_replicate_size")
        idle = [key for key in keys if getattr(section, key)]
        offloads = "; deepspeed: zero3_offload is for one GPU too" if section.fsdp.offload_params else ""
        log.warning("one process has nothing to share out: without effect here: %s%s", ", ".join(idle), offloads)
        return
    check_layers(config.distributed.fsdp.layer_classes, layer_classes(model_config))
    if config.adapter.adapter is None and dtype == torch.float16:
        raise ConfigError(
            "fsdp_version: 2 trains a whole model in bf16 or fp32, and this run computes in fp16, which needs a loss "
            "scale: write `bf16: true`, or `fp16: false` for fp32, or train an adapter"
        )


def layer_classes(model_config: Any) -> list[str]:
    """Names that a family of transformers gives its layers, read off its class; none where that is not known."""
    known = AutoModelForCausalLM._model_mapping
    found = known.get(type(model_config), None)
    return sorted(getattr(found, "_no_split_modules", None) or [])


def check_layers(written: Sequence[str], there: Sequence[str]) -> None:
    """Raises ConfigError where the layers that a config names are none of a model's."""
    if written and there and not set(written) <= set(there):
        raise ConfigError(
            f"fsdp_config.transformer_layer_cls_to_wrap: {', '.join(written)}, but this model's layers are "
            f"{', '.join(there)}: write that, or leave the key out"
        )


def engine_of(
    config: Config, policy: Policy, device: torch.device, dtype: torch.dtype, processes: Processes
) -> Engine:
    """What brings gradients together and takes the step, by how the config spreads the run over its processes."""
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    max_norm = config.training.max_grad_norm
    if config.distributed.strategy == "fsdp" and processes.size > 1:
        from luthier.train import fsdp

        fsdp.shard(policy, config, device, dtype, processes)
        shares = fsdp.ShardedMasters(policy.model)
        each = config.distributed.fsdp.state_dict_type == "SHARDED_STATE_DICT"
        optimizer = build_optimizer(shares, config.training)
        parts = (policy, shares, optimizer, scaler, processes)
        return fsdp.Sharded(*parts, dtype=dtype, max_norm=max_norm, each_writes=each)
    if config.distributed.strategy == "deepspeed":
        return zero.spread(config, policy, device, dtype, processes)
    masters = Masters(policy.model, copies=not config.training.bf16_stochastic_rounding)
    optimizer = build_optimizer(masters, config.training)
    return Engine(policy, masters, optimizer, scaler, processes, max_norm=max_norm)


def loading_device(config: Config, device: torch.device, processes: Processes) -> torch.device:
    """Where a model is loaded that is to be shared out: on the GPU if that holds it whole, else in the host's memory,
    as mapped files, of which the processes of a machine have one copy."""
    several = processes.size > 1
    shared_out = several if config.distributed.strategy == "fsdp" else zero.shares_weights(config, several=several)
    if not shared_out or device.type != "cuda":
        return device
    stored = sum(path.stat().st_size for path in checkpoint_files(config.model))
    size = stored / 4 if config.model.load_in_4bit else stored
    if 0 < size < _ROOM * free_memory(device):
        return device
    log.info("the model is loaded in the host's memory, and shared out from there")
    return torch.device("cpu")


def show(model: PreTrainedModel, device: torch.device) -> None:
    """Bring what proofs compute with to the device: everything but the layers that look like one before them. One
    proof stands for all modules of a kind, and the others follow when they are shared out."""
    decoder = decoder_of(model)
    everything = layers_of(decoder)
    with one_of_each_layer(model):
        shown = set(layers_of(decoder))
    left = {id(part) for layer in everything if layer not in shown for part in layer.modules()}
    for module in model.modules():
        if id(module) not in left and not any(id(part) in left for part in module.modules()):
            module.to(device)
