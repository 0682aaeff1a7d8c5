"""DeepSpeed's ZeRO (Rajbhandari et al. 2020): stages 1 to 3 share out optimizer state, then gradients, then weights.

DeepSpeed does the sharing, the sums and the step; the loop, the losses, the learning rates and the checkpoints are the
run's own, so that the numbers are those of one process. What has to be known for that:

    sums      DeepSpeed takes the mean over processes, and shares of a loss add up: each is multiplied by their number.
    passes    All processes run as many (`StepLoader.lockstep`); only the last one of a step is told to be a boundary.
    optimizer It is the run's own, and steps on flat pieces of the parameters; DeepSpeed's own are not compiled.
    formats   In full fine-tuning in 16 bits the fp32 masters are DeepSpeed's. An adapter is in fp32 as everywhere, and
              DeepSpeed is told of no 16 bits at all, so that a frozen base stays as it is stored.
    stage 3   A fused forward reads the weights of a whole layer, so that a layer is gathered at once (DeepSpeed's leaf
              modules). Embeddings, head and the last norm are gathered where they are called or read.
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import warnings
from typing import Any

import torch
from torch import distributed, nn

from luthier.config import Config
from luthier.config.zero import stage_of
from luthier.errors import ConfigError, ModelError
from luthier.models.layers import layers_of
from luthier.models.load import decoder_of, embeddings_of
from luthier.models.memory import size
from luthier.models.policy import Policy
from luthier.train.distributed import Processes
from luthier.train.optimizers import build_optimizer
from luthier.train.zero_engine import Zero, ZeroMasters

log = logging.getLogger("luthier")


def check(config: Config, device: torch.device, dtype: torch.dtype, *, given: bool) -> None:
    """Say what DeepSpeed cannot do here, before anything is loaded.

    Args:
        dtype: what the run computes in. given: it trains a model that a program made.

    Raises:
        ConfigError: it is not installed, the device is none of its, the run computes in fp16, the model belongs to a
            program, or its settings ask for what is not built.
    """
    if device.type == "cpu":
        # Before anybody imports it: transformers does when it saves, and it would print that it has found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if config.distributed.strategy != "deepspeed":
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "deepspeed: DeepSpeed is not installed: pip install 'luthier[deepspeed]', or write `fsdp_version: 2` in "
            "place of deepspeed"
        )
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"deepspeed computes with CUDA or on CPUs, and the device is {device.type}: leave it out")
    if given:
        raise ConfigError("deepspeed takes a model's weights apart, and this one belongs to a program: leave it out")
    if dtype == torch.float16:
        raise ConfigError(
            "deepspeed: this run computes in fp16, whose loss scaling is not built with DeepSpeed: write `bf16: true`, "
            "or `fp16: false` for fp32, or leave deepspeed out"
        )


def shares_weights(config: Config, *, several: bool) -> bool:
    """Whether a device never has to hold the whole model: stage 3, of several processes or with the weights in the
    host's memory."""
    if config.distributed.strategy != "deepspeed":
        return False
    settings = config.distributed.zero
    return stage_of(settings) == 3 and (several or "offload_param" in settings["zero_optimization"])


def spread(config: Config, policy: Policy, device: torch.device, dtype: torch.dtype, processes: Processes) -> Zero:
    """Hand a policy whose model is whole in every process to DeepSpeed.

    Args:
        dtype: what is computed in.

    Raises:
        ConfigError: DeepSpeed does not take its settings. ModelError: stage 3 cannot share out a model like this.
    """
    masters = ZeroMasters(policy.model)
    optimizer = build_optimizer(masters, config.training)
    settings = _settings(config, dtype)
    stage, own = stage_of(settings), config.adapter.adapter is not None
    if stage == 3:
        _gather_by_layers(policy)
    if device.type == "cpu" and any(key.startswith("offload") for key in settings["zero_optimization"]):
        log.info("deepspeed: offloading does nothing, since the run computes in the host's memory anyway")
    if "bf16" in settings and (wide := [n for n, p in policy.named_parameters() if p.dtype == torch.float32]):
        log.warning("deepspeed: %d fp32 parameters, such as %s, are computed in bf16", len(wide), wide[0])
    before = sum(p.nbytes for p in policy.parameters())
    engine = _start(policy, optimizer, settings, device, stage)
    kept = sum(getattr(p, "ds_tensor", p).nbytes for p in policy.parameters())
    log.info(
        "DeepSpeed %s, ZeRO stage %d: %s of weights are %s in each of %s",
        engine.luthier_version,
        stage,
        size(before),
        size(kept),
        "1 process" if processes.size == 1 else f"{processes.size} processes",
    )
    found = Zero(policy, masters, optimizer, processes, device=device, engine=engine, stage=stage, adapter=own)
    found.gather_adapter()
    return found


def _settings(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's settings, with what the YAML and this module say."""
    settings = config.distributed.zero
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    settings |= {
        "train_micro_batch_size_per_gpu": 1,  # what a pass is, the loader says
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.training.max_grad_norm,
    }
    if config.adapter.adapter is None and dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings.setdefault("communication_data_type", "fp32")
    return settings


def _gather_by_layers(policy: Policy) -> None:
    """Let stage 3 gather each of the decoder's layers as a whole."""
    decoder = decoder_of(policy.model)
    layers = layers_of(decoder)
    if not policy.flat or not policy.own_head:
        raise ModelError(
            "deepspeed: stage 3 sends a layer's gradients away once in a pass, and on this model the documents of a "
            "pass run one by one: write `deepspeed: zero2`, or `fsdp_version: 2` in place of deepspeed"
        )
    if layers == [decoder]:
        raise ModelError(
            f"deepspeed: stage 3 gathers layer by layer, and those of {type(decoder).__name__} are not in one list: "
            "write `deepspeed: zero2`"
        )
    for layer in layers:
        layer._z3_leaf = True  # type: ignore[assignment] # what `set_z3_leaf_modules` sets for a class
        layer.register_forward_pre_hook(_has_trained_input)
    # DeepSpeed sends a layer's gradients away when that of its input is there, and thinks so at once if it needs none.
    embeddings_of(policy.model).register_forward_hook(_with_gradient)


def _with_gradient(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


def _has_trained_input(module: nn.Module, args: tuple[Any, ...]) -> None:
    if torch.is_grad_enabled() and module.training and not (args and getattr(args[0], "requires_grad", False)):
        raise ModelError(
            f"deepspeed: stage 3 does not see when the gradients of a {type(module).__name__} are complete, since its "
            "input is no first argument that has a gradient: write `deepspeed: zero2`"
        )


def _start(
    policy: Policy, optimizer: torch.optim.Optimizer, settings: dict[str, Any], device: torch.device, stage: int
) -> Any:
    """DeepSpeed's engine around a policy; what DeepSpeed says goes to the log, at the level of debugging."""
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    old_names = ".*all_gather_into_tensor.*|.*reduce_scatter_tensor.*"  # torch's, which DeepSpeed calls
    warnings.filterwarnings("ignore", message=old_names, category=FutureWarning)
    import deepspeed
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import Init, register_external_parameter
    from deepspeed.utils import groups, logger

    logger.handlers = [_Quietly()]
    # Sums between CPUs through shared memory: it would be compiled, with a print and a minute's wait.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if comm.cdb is not None:  # of an earlier run of this process, whose connections are closed
        groups._release_process_group_references()
        comm.cdb = None
    if not distributed.is_initialized():  # a single process, which DeepSpeed wants in a group too
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
        atexit.register(_leave)
    try:
        if stage == 3:  # weight by weight, also where the device has no room for all
            Init(module=policy, config_dict_or_path=settings)
            for module in policy.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, buffer.to(device))
        engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=settings)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"deepspeed: DeepSpeed does not take its settings: {error}") from error
    if stage == 3:  # DeepSpeed finds out by itself only if the head is in pieces when the policy first reads it
        head = policy.model.get_output_embeddings()
        for parameter in [] if head is None else head.parameters():
            register_external_parameter(policy, parameter)
    engine.luthier_version = deepspeed.__version__
    return engine


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


class _Quietly(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level = logging.WARNING if record.levelno >= logging.ERROR else logging.DEBUG
        log.log(level, "DeepSpeed: %s", record.getMessage())
