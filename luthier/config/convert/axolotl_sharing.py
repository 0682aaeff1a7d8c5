"""Axolotl's keys for several processes: FSDP of either version in both spellings, and DeepSpeed's files."""

from __future__ import annotations

from typing import Any

from luthier.config.convert.arguments import deepspeed
from luthier.config.convert.conversion import Conversion
from luthier.config.distributed import INSIDE_FSDP, ONE_VALUE, FsdpConfig, plain_name


class Sharing:
    """A function for each of those keys, by its name."""

    def __init__(self, into: Conversion) -> None:
        self.into = into

    def _deepspeed(self, key: str, value: Any) -> None:
        deepspeed(self.into, key, value)

    def _fsdp(self, key: str, value: Any) -> None:
        if not value:
            self.into.no_effect(key)
            return
        parts = [str(part) for part in value] if isinstance(value, list) else str(value).split()
        if rest := sorted(set(parts) - {"full_shard", "auto_wrap", "offload"}):
            self.into.unsupported(key, f"{', '.join(rest)}: FSDP2 has full_shard, with dp_shard_size for hybrid ones.")
        else:
            self.into.carry(key, "fsdp_version", 2)
        if "offload" in parts:
            self.into.also("fsdp_config", {"offload_params": True}, key)

    def _fsdp_version(self, key: str, value: Any) -> None:
        self.into.carry(key, "fsdp_version", 2, "" if value == 2 else "FSDP's first version is not built here")

    def _fsdp_config(self, key: str, value: Any) -> None:
        found: dict[str, Any] = dict(self.into.values.get(key) or {})
        for written, item in value.items():
            name = plain_name(written)
            plain = str(written).removeprefix(FsdpConfig.prefix)
            theirs = f"{key}.{written}"
            if item is None:
                self.into.no_effect(theirs)
            elif plain in ("version", "fsdp_version"):
                self._fsdp_version(theirs, item)
            elif plain in ONE_VALUE or (name == "activation_checkpointing" and item is False):
                self.into.no_effect(theirs, "it is always so here, whatever is written")
            elif plain in ("cpu_offload", "offload_params"):
                found["offload_params"] = bool(item)
                self.into.carried(theirs, f"{key}.offload_params: {item}".lower())
            elif plain == "sharding_strategy" and str(item).upper() in ("FULL_SHARD", "SHARD_GRAD_OP", "1", "2"):
                found["reshard_after_forward"] = str(item).upper() in ("FULL_SHARD", "1")
                self.into.carried(theirs, f"{key}.reshard_after_forward")
            elif name in FsdpConfig.model_fields:
                found[name] = _of_fsdp(name, item)
                self.into.carried(theirs)
            elif plain in INSIDE_FSDP and INSIDE_FSDP[plain].startswith("Leave it out: "):
                self.into.no_effect(theirs, INSIDE_FSDP[plain].removeprefix("Leave it out: ").rstrip("."))
            elif plain in INSIDE_FSDP:
                self.into.unsupported(theirs, INSIDE_FSDP[plain])
            else:
                self.into.unknown(theirs, {*FsdpConfig.model_fields, *INSIDE_FSDP}, "fsdp_config")
        if not found.get("offload_params"):
            found.pop("cpu_offload_pin_memory", None)
        if found:
            self.into.values[key] = found

    def sharing(self) -> None:
        """`fsdp_config` alone asks for FSDP in Axolotl."""
        if "fsdp_config" in self.into.values and "fsdp_version" not in self.into.values:
            self.into.also("fsdp_version", 2, "fsdp_config")
        if self.into.values.get("fsdp_config", {}).get("activation_checkpointing"):
            self.into.values.pop("gradient_checkpointing", None)


def _of_fsdp(name: str, value: Any) -> Any:
    if name.endswith(("state_dict_type", "auto_wrap_policy")):
        value = str(value).upper()
        return "SHARDED_STATE_DICT" if value == "LOCAL_STATE_DICT" else value
    return value
