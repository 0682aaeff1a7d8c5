"""What the keys say of the way in which an adapter begins: which of them go together."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any


def flaws(c: Mapping[str, Any], written: Collection[str]) -> Iterator[tuple[str, str]]:
    """Key and message of what the keys about an adapter's start cannot say together, for flat values `c` of which the
    keys in `written` were set by the user."""
    key, how, loftq = "peft_init_lora_weights", c["peft_init_lora_weights"], c["loftq_config"]
    if how is not True and c["lora_model_dir"]:
        yield key, f"{key} is for a new adapter, and lora_model_dir has one: leave one of them out."
    if how is not True and not re.fullmatch(r"gaussian|pissa|pissa_niter_[1-9]\d*|olora|loftq|eva", str(how)):
        yield key, f"{key} is true, gaussian, pissa, pissa_niter_16 (or another number), olora, loftq or eva."
        return
    if loftq is not None and key in written and how != "loftq":
        yield "loftq_config", f"loftq_config is for `{key}: loftq`: write that, or leave loftq_config out."
    in_4bit = c["load_in_4bit"] or c["adapter"] == "qlora"
    if (how == "loftq" or loftq is not None) and c["adapter"] and not in_4bit:
        yield (
            key if loftq is None else "loftq_config",
            "LoftQ makes up for quantising the base, and load_in_4bit is not set: write `load_in_4bit: true`, or leave "
            "loftq_config and peft_init_lora_weights out.",
        )
    if loftq and loftq.get("loftq_bits", 4) != 4:
        yield (
            "loftq_config",
            f"loftq_bits: {loftq['loftq_bits']} is not what the base has; write 4, which load_in_4bit gives it.",
        )
    if loftq and loftq.get("loftq_iter", 1) != 1:
        yield (
            "loftq_config",
            f"loftq_iter: {loftq['loftq_iter']} would quantise the base anew, differently from what the adapter is "
            "loaded onto later: write 1.",
        )
    if str(how).startswith(("pissa", "olora")) and (in_4bit or c["load_in_8bit"]):
        yield (
            key,
            f"{how} takes its part out of the base weights, which are quantised here: use `loftq` with load_in_4bit, "
            "or leave load_in_4bit and load_in_8bit out.",
        )
    if c["lora_target_parameters"] and how not in (True, "gaussian"):
        yield key, f"{key}: {how} is for linear layers: leave it out, or lora_target_parameters."
