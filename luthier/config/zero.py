"""DeepSpeed's settings: the four presets, and what of a JSON file of one's own the run takes.

Nothing here needs DeepSpeed. What the rest of the config says already (batch sizes, clipping, number format, optimizer,
schedule) is no part of the settings: whoever starts DeepSpeed adds it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_CPU = {"device": "cpu", "pin_memory": True}
_STAGE_3 = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "stage3_gather_16bit_weights_on_model_save": True,
}
PRESETS: dict[str, dict[str, Any]] = {
    "zero1": {"zero_optimization": {"stage": 1, "overlap_comm": True, "contiguous_gradients": True}},
    "zero2": {"zero_optimization": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True}},
    "zero3": {"zero_optimization": _STAGE_3},
    "zero3_offload": {"zero_optimization": {**_STAGE_3, "offload_optimizer": _CPU, "offload_param": _CPU}},
}

# What Luthier itself tells DeepSpeed, out of the YAML.
FROM_YAML = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "optimizer",
    "scheduler",
)
# Those of them that are one of its keys under another name.
_SAME = {
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
# What else a JSON file may hold: how, and nothing of what is computed.
_PASSED_ON = (
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "aio",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
)
# Optimizers whose state ZeRO knows how to share out; names of the key `optimizer`.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adam")


def zero_settings(deepspeed: str | Mapping[str, Any]) -> dict[str, Any]:
    """The settings behind a value of the key `deepspeed`: a preset's, a file's or those written, without what the YAML
    says (FROM_YAML), and without "auto", for which DeepSpeed's own default holds.

    Raises:
        OSError: there is no such file. ValueError: it is not JSON.
    """
    if not isinstance(deepspeed, str):
        settings = dict(deepspeed)
    elif deepspeed in PRESETS:
        settings = PRESETS[deepspeed]
    else:
        settings = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
    kept = {key: value for key, value in settings.items() if key not in FROM_YAML}
    return copy.deepcopy(_without_auto(kept))


def stage_of(settings: Mapping[str, Any]) -> int:
    """ZeRO's stage, 1 to 3."""
    return int(settings["zero_optimization"]["stage"])


def flaws(deepspeed: str | Mapping[str, Any], c: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a value of the key `deepspeed` beside the flat values `c`."""
    if isinstance(deepspeed, str) and deepspeed in PRESETS:
        return
    settings: Any = deepspeed
    if isinstance(deepspeed, str):
        try:
            settings = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
        except OSError as error:
            yield (
                f"deepspeed: {deepspeed!r} is none of {', '.join(PRESETS)}, and as a file it cannot be read "
                f"({error.strerror}).{_preset_like(deepspeed)}"
            )
            return
        except ValueError as error:
            yield f"deepspeed: {deepspeed} is not JSON: {error}."
            return
    where = f"deepspeed: {deepspeed}" if isinstance(deepspeed, str) else "deepspeed"
    if not isinstance(settings, dict):
        yield f"{where}: it has to be a mapping of DeepSpeed's settings, with zero_optimization in it."
        return
    of_zero = settings.get("zero_optimization")
    stage = of_zero.get("stage") if isinstance(of_zero, dict) else None
    if type(stage) is not int or stage not in range(4):
        yield f"{where}: it needs `zero_optimization` with a `stage` from 1 to 3, and has {stage!r}."
    elif stage == 0:
        yield f"{where}: stage 0 shares nothing: leave deepspeed out, or write zero1, zero2 or zero3."
    for key in ("offload_optimizer", "offload_param"):
        offload = of_zero.get(key) if isinstance(of_zero, dict) else None
        if isinstance(offload, dict) and offload.get("device") == "nvme":
            yield f"{where}: {key} to nvme is not built: write `device: cpu` there."
    for key, value in settings.items():
        if key in FROM_YAML:
            if value != "auto" and (message := _beside_yaml(key, value, c)):
                yield f"{where}: {message}"
        elif key not in _PASSED_ON:
            yield (
                f"{where}: {key} is not passed on to DeepSpeed: it changes what a step computes, or does what the "
                f"YAML's own keys do. Leave it out; what is passed on is {', '.join(_PASSED_ON)}."
            )


def _preset_like(name: str) -> str:
    """What to write for a file of another tool, such as Axolotl's `deepspeed_configs/zero3_bf16.json`."""
    match = re.search(r"zero_?([123])", Path(name).name)
    if match is None:
        return ""
    offload = match[1] == "3" and "offload" in name
    return f" Luthier's own settings of that stage are `deepspeed: zero{match[1]}{'_offload' if offload else ''}`."


def _beside_yaml(key: str, value: Any, c: Mapping[str, Any]) -> str | None:
    """What is wrong with a setting that the YAML makes, None if they agree."""
    if key in _SAME:
        same = _SAME[key]
        if value == c[same] and not isinstance(value, bool):
            return None
        return f"{key} is {value!r} there, and {same} is {c[same]}: leave {key} out there, or make them alike."
    if key == "train_batch_size":
        return (
            f"{key} is {value!r} there, and micro_batch_size x gradient_accumulation_steps x processes makes it: "
            f"leave {key} out there."
        )
    if key in ("bf16", "fp16"):
        return _number_format(key, value, c)
    if key == "optimizer":
        params = value.get("params", {}) if isinstance(value, dict) else None
        kind = str(value.get("type", "")).lower() if isinstance(value, dict) else ""
        if kind in ("adam", "adamw") and isinstance(params, dict) and all(v == "auto" for v in params.values()):
            return None
        return f"{key} is made from the YAML (optimizer, learning_rate, weight_decay, ...): leave {key} out there."
    return f"{key} is made from the YAML (lr_scheduler, warmup_steps, learning_rate): leave {key} out there."


def _number_format(key: str, value: Any, c: Mapping[str, Any]) -> str | None:
    enabled = value.get("enabled", "auto") if isinstance(value, dict) else value
    others = sorted(set(value) - {"enabled"}) if isinstance(value, dict) else []
    # Where fp16 is off, its loss scaling is not used by DeepSpeed either; many files have it.
    if others and (key == "bf16" or c["fp16"]):
        return f"{key}.{others[0]}: how {key} is computed in is the run's own: leave all but `enabled` out there."
    if enabled == "auto":
        return None
    if enabled is True and c[key] is not True:
        return f"{key} is on there: write `{key}: true` in the YAML too, or leave {key} out there."
    if enabled is False and c[key] not in (False, None) and not (key == "bf16" and c["fp16"] is True):
        return f"{key} is off there: write `{key}: false` in the YAML too, or leave {key} out there."
    if not isinstance(enabled, bool):
        return f"{key}.enabled has to be true, false or auto."
    return None


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_auto(item) for key, item in value.items() if item != "auto"}
    return value
