"""TrainingArguments, and TRL's classes of them, as the keys of a Config.

Every argument ends in one of three ways: its value is carried over, it has no effect here and that is said once, or it
is an error that says what to write instead. What nobody set (a default) says nothing. `docs/porting.md` is this table
in words.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from typing import Any, get_args

import torch

from luthier.api.said import say_once
from luthier.config.convert.trl_arguments import CARRIED as CARRIED
from luthier.config.convert.trl_arguments import NO_EFFECT as NO_EFFECT
from luthier.config.convert.trl_arguments import REFUSED as REFUSED
from luthier.config.optimizers import OPTIMIZERS, OptimizerName
from luthier.errors import ConfigError

# Read by the functions below, or by the trainers.
HANDLED = {
    "output_dir",
    "max_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "optim",
    "optim_args",
    "bf16",
    "fp16",
    "tf32",
    "gradient_checkpointing",
    "activation_checkpointing",
    "activation_offloading",
    "logging_strategy",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "report_to",
    "run_name",
    "metric_for_best_model",
    "greater_is_better",
    "train_sampling_strategy",
    "use_cpu",
    "data_seed",
    "max_length",
    "dataset_text_field",
    "completion_only_loss",
    "assistant_only_loss",
    "loss_type",
    "disable_dropout",
    "eos_token",
    "model_init_kwargs",
    # What transformers makes of other arguments.
    "do_eval",
    "disable_tqdm",
    "accelerator_config",
    "fsdp_config",
    "logging_dir",
    "local_rank",
    "hub_strategy",
}

_SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr")
_OPTIMIZERS = {"adamw_hf": "adamw_torch", "paged_adamw": "paged_adamw_32bit"}
_TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


def keys_of(args: Any, *, has_eval_data: bool, device: torch.device) -> dict[str, Any]:
    """The flat keys that arguments say.

    Raises:
        ConfigError: something that cannot be had; says what to write instead.
    """
    where = type(args).__name__
    keys: dict[str, Any] = {}
    untouched = type(args)(use_cpu=args.use_cpu)  # of what transformers makes of its defaults nobody asked anything
    for field in dataclasses.fields(args):
        name, value = field.name, getattr(args, field.name)
        asked = value != getattr(untouched, name)
        if name in CARRIED:
            if value is not None:
                keys[CARRIED[name]] = value
        elif name in HANDLED or not asked:
            continue
        elif name in NO_EFFECT:
            say_once(f"{where}: {name} has no effect here: {NO_EFFECT[name]}")
        elif name not in REFUSED:
            raise ConfigError(f"{where}: {name}={value!r} is not known here; leave it out")
        elif value not in (None, False, "", []):
            raise ConfigError(f"{where}: {name}={value!r}: {REFUSED[name]}")
    if args.max_steps and args.max_steps > 0:
        keys["max_steps"] = args.max_steps
    keys |= _schedule(args, where) | _optimizer(args, where)
    keys |= _logging(args, where) | _saving(args, where) | _evaluating(args, where, has_eval_data)
    keys |= _recomputation(args)
    if _word(getattr(args, "train_sampling_strategy", "random")) == "sequential":
        keys["shuffle"] = False
    if args.data_seed not in (None, args.seed):
        say_once(f"{where}: data_seed has no effect here: the order of the rows is drawn from seed")
    if args.use_cpu and device.type != "cpu":
        raise ConfigError(f'{where}: use_cpu=True, and the model is on {device}: load it with device_map="cpu"')
    return keys


def precision_keys(
    args: Any, model_dtype: torch.dtype, compute: torch.dtype | None, device: torch.device
) -> dict[str, Any]:
    """What the run computes in.

    Args:
        model_dtype: of the weights that are not quantised. compute: of a quantised model's multiplies, else None.
    """
    keys: dict[str, Any] = {}
    if args.tf32 is not None and device.type == "cuda":
        keys["tf32"] = bool(args.tf32)
    if args.fp16 and device.type == "cpu":
        say_once(
            f"{type(args).__name__}: fp16=True: this run is on a CPU, which computes in fp16 far too slowly; training "
            "in fp32 instead. Write fp16=False, or fp16=torch.cuda.is_available()",
            logging.WARNING,
        )
        return {**keys, "bf16": False}
    if args.fp16:
        return {**keys, "fp16": True}
    if args.bf16:
        return {**keys, "bf16": True}
    sixteen = (torch.bfloat16, torch.float16)
    return {**keys, "bf16": "auto" if model_dtype in sixteen or compute in sixteen else False}


def _word(value: Any) -> str:
    """The text of an enum of transformers', or of a text."""
    return str(getattr(value, "value", value))


def _schedule(args: Any, where: str) -> dict[str, Any]:
    name = _word(args.lr_scheduler_type)
    if name not in _SCHEDULES:
        known = ", ".join(_SCHEDULES)
        raise ConfigError(f'{where}: lr_scheduler_type="{name}" is not built here: write one of {known}')
    keys: dict[str, Any] = {"lr_scheduler": name}
    settings = dict(args.lr_scheduler_kwargs or {})
    if name == "cosine_with_min_lr" and "min_lr_rate" in settings:
        keys["cosine_min_lr_ratio"] = float(settings.pop("min_lr_rate"))
    elif name == "cosine_with_min_lr" and "min_lr" in settings:
        keys["cosine_min_lr_ratio"] = float(settings.pop("min_lr")) / args.learning_rate
    if settings:
        raise ConfigError(f"{where}: lr_scheduler_kwargs={settings} is not known for {name}; leave it out")
    steps, ratio = args.warmup_steps or 0, getattr(args, "warmup_ratio", None)
    if 0 < steps < 1:
        steps, ratio = 0, steps
    if steps:
        keys["warmup_steps"] = int(steps)
    elif ratio:
        keys["warmup_ratio"] = float(ratio)
    return keys


def _optimizer(args: Any, where: str) -> dict[str, Any]:
    asked = _word(args.optim)
    name = _OPTIMIZERS.get(asked, asked)
    if name not in get_args(OptimizerName):
        known = ", ".join(get_args(OptimizerName))
        raise ConfigError(f'{where}: optim="{asked}" is not built here: write one of {known}')
    info = OPTIMIZERS[name]
    if info.package and importlib.util.find_spec(info.package) is None:
        raise ConfigError(
            f'{where}: optim="{asked}" needs {info.package}: pip install \'luthier[{info.extra}]\', or write '
            'optim="adamw_torch_fused"'
        )
    keys: dict[str, Any] = {"optimizer": name}
    if not info.adam:
        keys |= {"adam_beta1": None, "adam_beta2": None, "adam_epsilon": None}
    if args.optim_args:
        keys["optim_args"] = dict(_setting(part) for part in str(args.optim_args).replace(" ", "").split(","))
    return keys


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        return name, {"True": True, "False": False}.get(value, value)


def _logging(args: Any, where: str) -> dict[str, Any]:
    steps: float = args.logging_steps
    if _word(args.logging_strategy) != "steps":
        steps = 10
        say_once(f'{where}: logging_strategy="{_word(args.logging_strategy)}": rows are logged every {steps} steps')
    keys: dict[str, Any] = {"logging_steps": steps if 0 < steps < 1 else int(steps)}
    asked = args.report_to if isinstance(args.report_to, list) else [args.report_to]
    trackers = [_word(name) for name in asked if name not in (None, "none")]
    unknown = [name for name in trackers if name not in _TRACKERS]
    if unknown:
        raise ConfigError(f"{where}: report_to={unknown}: write one of {', '.join(_TRACKERS)}, or \"none\"")
    if trackers:
        keys["report_to"] = trackers
    if args.run_name and "wandb" in trackers:
        keys["wandb_name"] = args.run_name
    return keys


def _saving(args: Any, where: str) -> dict[str, Any]:
    strategy = _word(args.save_strategy)
    if strategy == "no":
        return {"saves_per_epoch": 0}
    if strategy == "epoch":
        return {"saves_per_epoch": 1}
    if strategy == "best":
        return {"load_best_model_at_end": True}
    return {"save_steps": args.save_steps if 0 < args.save_steps < 1 else int(args.save_steps)}


def _evaluating(args: Any, where: str, has_data: bool) -> dict[str, Any]:
    metric = args.metric_for_best_model
    if metric not in (None, "loss", "eval_loss") or args.greater_is_better:
        raise ConfigError(
            f'{where}: metric_for_best_model="{metric}": the best is what has the lowest eval_loss; leave it out'
        )
    strategy = _word(args.eval_strategy)
    if strategy == "no" or not has_data:
        if strategy != "no":
            raise ConfigError(f'{where}: eval_strategy="{strategy}", and the trainer was given no eval_dataset')
        return {"evals_per_epoch": 0} if has_data else {}
    if strategy == "epoch":
        return {"evals_per_epoch": 1}
    steps = args.eval_steps or args.logging_steps
    return {"eval_steps": steps if 0 < steps < 1 else int(steps)}


def _recomputation(args: Any) -> dict[str, Any]:
    if getattr(args, "activation_offloading", False):
        return {"gradient_checkpointing": "offload"}
    asked = args.gradient_checkpointing or getattr(args, "activation_checkpointing", None)
    return {"gradient_checkpointing": True} if asked else {}
