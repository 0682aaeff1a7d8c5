"""What the keys about several processes cannot say together, or beside the rest of the config.

A weight that is shared out is a piece of a matrix with no owner of the whole; what treats weights as matrices, or has
them whole in every process, cannot stand beside that. All of it shows in the config alone; what depends on the number
of processes is checked where that number is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from luthier.config import zero
from luthier.config.distributed import ONE_VALUE
from luthier.config.optimizers import OPTIMIZERS

Flat = Mapping[str, Any]
Flaws = Iterator[tuple[str, str]]

ONE_OF = (("fsdp_version", "deepspeed"), ("ddp", "fsdp_version"), ("ddp", "deepspeed"))


def flaws(c: Flat) -> Flaws:
    """Key and message of what cannot hold together, for flat values `c`."""
    yield from _strategies(c)
    yield from _fsdp(c)
    stage = None
    if c["deepspeed"] is not None:
        found = list(zero.flaws(c["deepspeed"], c))
        yield from (("deepspeed", message) for message in found)
        stage = None if found else zero.stage_of(zero.zero_settings(c["deepspeed"]))
        yield from _deepspeed(c, stage)
    if c["fsdp_version"] is not None or c["deepspeed"] is not None:
        yield from _sharded(c, "deepspeed" if c["fsdp_version"] is None else "fsdp_version", stage)


def derived(c: Flat) -> dict[str, tuple[Any, str]]:
    """Values that follow from others, each with the reason."""
    values: dict[str, tuple[Any, str]] = {}
    if (c["fsdp_config"] or {}).get("activation_checkpointing") and c["gradient_checkpointing"] == "auto":
        values["gradient_checkpointing"] = (True, "from fsdp_config.activation_checkpointing")
    if isinstance(c["deepspeed"], str) and c["deepspeed"] not in zero.PRESETS:
        values["deepspeed"] = (zero.zero_settings(c["deepspeed"]), f"read from {c['deepspeed']}")
    return values


def _strategies(c: Flat) -> Flaws:
    """Keys of one strategy where another one holds."""
    fsdp, deepspeed = c["fsdp_version"] is not None, c["deepspeed"] is not None
    if c["ddp"] is False and not fsdp and not deepspeed:
        yield (
            "ddp",
            "`ddp: false` leaves several processes nothing to do: write `fsdp_version: 2` or `deepspeed: zero2`, or "
            "leave ddp out.",
        )
    if c["fsdp_config"] is not None and not fsdp:
        instead = " in place of deepspeed" if deepspeed else ""
        yield (
            "fsdp_config",
            f"fsdp_config does nothing without fsdp_version: write `fsdp_version: 2`{instead}, or leave fsdp_config "
            "out.",
        )
    for key in ("dp_shard_size", "dp_replicate_size"):
        if c[key] is not None and not fsdp:
            why = "DeepSpeed shares the model out over all processes" if deepspeed else "every process has a copy"
            instead = " in place of deepspeed" if deepspeed else ""
            yield (
                key,
                f"{key} is about copies that are shared out by FSDP, and without fsdp_version {why}: write "
                f"`fsdp_version: 2`{instead}, or leave {key} out.",
            )
    if fsdp and c["dp_shard_size"] == 1:
        yield (
            "dp_shard_size",
            "`dp_shard_size: 1` shares nothing: leave out fsdp_version (with fsdp_config, dp_shard_size and "
            "dp_replicate_size), and every process has the whole model; or write 2 or more.",
        )


def _fsdp(c: Flat) -> Flaws:
    """What stands inside `fsdp_config`."""
    inside, key = c["fsdp_config"] or {}, "fsdp_config"
    for name, only in ONE_VALUE.items():
        if only is True and inside.get(name) is False:
            yield key, f"fsdp_config.{name} cannot be false: it is always so here. Leave it out."
    if inside.get("cpu_offload_pin_memory") is False and not inside.get("offload_params"):
        yield (
            key,
            "fsdp_config.cpu_offload_pin_memory is about weights in the host's memory: write `offload_params: true` "
            "beside it, or leave it out.",
        )
    if inside.get("activation_checkpointing") and c["gradient_checkpointing"] is False:
        yield (
            key,
            "fsdp_config.activation_checkpointing is true and gradient_checkpointing false, and they are one thing: "
            "leave one of them out.",
        )


def _deepspeed(c: Flat, stage: int | None) -> Flaws:
    if c["optimizer"] not in zero.OPTIMIZERS:
        yield (
            "optimizer",
            f"`optimizer: {c['optimizer']}` is not for deepspeed, which flattens what it shares out and knows Adam: "
            f"write one of {', '.join(zero.OPTIMIZERS)}, or `fsdp_version: 2` in place of deepspeed.",
        )
    if stage == 3 and (c["load_in_4bit"] or c["adapter"] == "qlora"):
        yield (
            "deepspeed",
            "ZeRO's stage 3 cannot share out weights in 4 bits: write `fsdp_version: 2` in place of deepspeed, "
            "`deepspeed: zero2`, which leaves the base whole, or leave out load_in_4bit (`adapter: lora` for qlora).",
        )


def _sharded(c: Flat, key: str, stage: int | None) -> Flaws:
    """What cannot stand beside any sharing; `key` is the one that asks for it, `stage` that of ZeRO if known."""
    whole = f"leave out {key} or"
    if c["optimizer_in_backward"]:
        yield (
            "optimizer_in_backward",
            "optimizer_in_backward steps before the other processes have added their gradients: "
            f"{whole} optimizer_in_backward.",
        )
    if c["bf16_stochastic_rounding"]:
        yield (
            "bf16_stochastic_rounding",
            f"bf16_stochastic_rounding has no fp32 copies, and with {key} each process keeps those of its share: "
            f"{whole} bf16_stochastic_rounding.",
        )
    for bits in ("load_in_8bit", "load_in_fp8"):
        if c[bits]:
            instead = "`load_in_4bit: true`" if key == "fsdp_version" else "`fsdp_version: 2` with load_in_4bit"
            yield (
                bits,
                f"{bits} keeps scales for whole rows, which {key} would tear from their weights: write {instead} in "
                f"place of it, {whole} {bits}.",
            )
    if c["fp16"] is True and c["adapter"] is None:
        yield (
            "fp16",
            f"full fine-tuning with {key} has no loss scaling, which fp16 needs: write `bf16: true` in place of fp16, "
            f"{whole} fp16.",
        )
    shares_base = key == "fsdp_version" or stage == 3
    if c["dequantized_copies_gib"] and shares_base:
        yield (
            "dequantized_copies_gib",
            f"dequantized_copies_gib keeps whole weights in every process, which {key} shares out: {whole} "
            "dequantized_copies_gib.",
        )
    info = OPTIMIZERS[c["optimizer"]]
    if key == "fsdp_version" and c["adapter"] is None:
        eight_bit = c["optimizer"].endswith("8bit")
        if eight_bit or info.factored or info.matrices is not None:
            what = (
                "keeps its state in blocks of 256 numbers that shares of a weight would cut anew"
                if eight_bit
                else "treats each weight as a matrix, of which a process has only a share"
            )
            yield (
                "optimizer",
                f"`optimizer: {c['optimizer']}` {what}: write adamw_torch_fused, or leave out fsdp_version.",
            )
