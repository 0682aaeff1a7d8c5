"""From a config to what the plan is made of: the model's shape without its weights, and how it will be trained."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from luthier.config import AdapterConfig, Config, FreezeConfig
from luthier.config.preference import asks_reference_in_steps
from luthier.config.zero import stage_of
from luthier.errors import ConfigError
from luthier.models.device import choose_dtype
from luthier.models.freeze import set_trainable
from luthier.models.load import embeddings_of
from luthier.models.lora import add_lora
from luthier.models.quantize import quantized_as
from luthier.models.recompute import TILE, Mode
from luthier.models.skeleton import skeleton
from luthier.models.storage import WORTH_BYTES
from luthier.plan.cards import Card
from luthier.plan.engine import WHOLE, Engine, Quantised, Sharding
from luthier.plan.shape import Shape, head_of, shape_of

_16_BITS = (torch.float16, torch.bfloat16)
# Keys of an adapter that need weights or data to begin from, and change no shape.
_BEGINNINGS = ("peft_init_lora_weights", "loftq_config", "lora_model_dir")
# DeepSpeed's own, where its settings say nothing: gradients in a buffer, weights gathered at a time.
_BUCKET, _LIVE = 500_000_000, 1_000_000_000
_MODES: dict[object, Mode] = {True: "layer", "offload": "offload"}


def training_shape(config: Config, model_config: Any, *, tokens: int = 0) -> Shape:
    """The shape of the model as this config trains it.

    Args:
        tokens: size of the tokenizer, for which the embeddings grow.

    Raises:
        ModelError: targets or patterns that match nothing, or a model that cannot be planned for.
    """
    if config.adapter.adapter is None:
        return full_shape(config, model_config, config.freeze, tokens=tokens)
    return adapter_shape(config, model_config, config.adapter, tokens=tokens)


def full_shape(config: Config, model_config: Any, freeze: FreezeConfig, *, tokens: int = 0) -> Shape:
    """The shape with the model's own parameters trained."""
    model = _grown(config, model_config, tokens)
    set_trainable(model, freeze)
    return shape_of(model, fused=config.precision.kernels == "auto")


def adapter_shape(config: Config, model_config: Any, adapter: AdapterConfig, *, tokens: int = 0) -> Shape:
    """The shape with an adapter, put on by the function that training uses."""
    model = _grown(config, model_config, tokens)
    fields = AdapterConfig.model_fields
    plain = {name: fields[name].default for name in _BEGINNINGS if name in fields}
    # On the meta device nothing is drawn, so that ranks of any size cost nothing.
    with torch.device("meta"), _quiet():
        add_lora(model, adapter.model_copy(update=plain), config.training.seed)
    return shape_of(model, fused=config.precision.kernels == "auto")


def _grown(config: Config, model_config: Any, tokens: int) -> PreTrainedModel:
    model = skeleton(config.model, model_config)
    head_of(model)
    if tokens > int(embeddings_of(model).weight.shape[0]):
        with torch.device("meta"):
            model.resize_token_embeddings(tokens, mean_resizing=False)
    return model


def compute_dtype(config: Config, card: Card | None, *, on_cpu: bool) -> torch.dtype:
    """What a run will compute in: on this machine's CPU, or like `models.device.choose_dtype` on a card that is not
    here."""
    precision = config.precision
    half = torch.bfloat16 if card is None or card.bf16 else torch.float16
    if on_cpu:
        return choose_dtype(config, torch.device("cpu"))
    if precision.fp16 is True:
        return torch.float16
    return half if precision.bf16 in (True, "auto") or precision.fp16 == "auto" else torch.float32


def on_cpu(config: Config) -> bool:
    """Whether the config names the CPU as its device."""
    device = config.model.device_map
    return (device.get("") if isinstance(device, dict) else device) == "cpu"


def engine_of(
    config: Config, model_config: Any, shape: Shape, card: Card | None, *, cpu: bool, gpus: int = 1
) -> Engine:
    """How the config's run uses memory; `gradient_checkpointing: auto` as nothing recomputed (see `plan.command`)."""
    compute = compute_dtype(config, card, on_cpu=cpu).itemsize
    quantised, double = _quantised(config, model_config)
    stored = getattr(model_config, "dtype", None)
    narrow = compute == 4 and stored in _16_BITS and config.adapter.adapter and quantised is None
    # Where it is worth it, frozen weights stay as the checkpoint has them.
    frozen = 2 if narrow and 2 * shape.total >= WORTH_BYTES else compute
    asked = config.precision.gradient_checkpointing
    sharding = sharding_of(config, gpus)
    return Engine(
        compute=compute,
        frozen=frozen,
        quantised=quantised if config.adapter.adapter else None,
        double=double,
        optimizer=config.training.optimizer,
        momentum=bool(config.training.optim_args.get("momentum")),
        masters=not config.training.bf16_stochastic_rounding,
        in_backward=config.training.optimizer_in_backward,
        recompute="layer" if asked == "offload" and cpu else _MODES.get(asked, "keep"),
        tiled=config.precision.tiled_mlp is True,
        tile=TILE["cpu" if cpu else "cuda"] if config.precision.tiled_mlp else sys.maxsize,
        cpu=cpu,
        slices=cpu or compute == 4,  # torch's kernel for many documents takes 16 bits
        weighted=config.preference.rl is None,
        reference=asks_reference_in_steps(config.preference),
        moved=bool(config.adapter.lora_model_dir or config.adapter.loftq_config),
        sharding=replace(sharding, offload=False) if cpu else sharding,
    )


def sharding_of(config: Config, gpus: int) -> Sharding:
    """How the config's own strategy lays a model out on so many GPUs.

    Raises:
        ConfigError: sizes of hybrid sharding that do not make that number.
    """
    keys = config.distributed
    if gpus == 1 or keys.strategy == "replicas":
        return WHOLE
    if keys.strategy == "deepspeed":
        return zero_sharding(keys.zero, gpus)
    copies = keys.dp_replicate_size or 1
    over = keys.dp_shard_size or gpus // copies
    if over * copies != gpus:
        raise ConfigError(
            f"dp_shard_size {over} x dp_replicate_size {copies} are {over * copies} processes, and --num-gpus says "
            f"{gpus}: make the product the number of GPUs"
        )
    return Sharding(over, 3, True, keys.fsdp.reshard_after_forward, keys.fsdp.offload_params)


def zero_sharding(settings: Mapping[str, Any], gpus: int) -> Sharding:
    """How DeepSpeed does, by its settings."""
    stage, zero = stage_of(settings), settings["zero_optimization"]
    if stage == 0:
        return WHOLE
    return Sharding(
        gpus,
        stage,
        offload=any((zero.get(name) or {}).get("device") == "cpu" for name in ("offload_optimizer", "offload_param")),
        live=int(zero.get("stage3_max_live_parameters", _LIVE)) if stage == 3 else 0,
        bucket=int(zero.get("reduce_bucket_size", _BUCKET)),
    )


def _quantised(config: Config, model_config: Any) -> tuple[Quantised | None, bool]:
    """The format of frozen weights, and whether NF4's scales are quantised: by the checkpoint, or by the config."""
    model = config.model
    if (stored := quantized_as(model_config)) in ("4bit", "8bit"):
        values = model_config.quantization_config
        values = values if isinstance(values, dict) else values.to_dict()
        return stored, bool(values.get("bnb_4bit_use_double_quant"))  # type: ignore[return-value]
    if model.load_in_fp8:
        return "fp8", True
    if model.load_in_4bit or config.adapter.adapter == "qlora":
        return "4bit", model.bnb_4bit_use_double_quant
    return ("8bit", True) if model.load_in_8bit else (None, True)


@contextmanager
def _quiet() -> Iterator[None]:
    """What putting an adapter on has to say is said when the model is really loaded."""
    log = logging.getLogger("luthier.models.lora").parent or logging.getLogger()
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
