"""Arguments of transformers' TrainingArguments and TRL's classes as a script or a YAML file says them.

What was written is all that is known: a default says nothing here, and is written where it is not ours (`DEFAULTS`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.config.convert.conversion import Conversion
from luthier.config.convert.trl_arguments import CARRIED, NO_EFFECT, REFUSED
from luthier.config.yaml_source import parse_scalar

# What the same argument is in a config, where that is another thing than in a notebook that runs.
_RENAMED = {
    "max_seq_length": "sequence_len",
    "max_length": "sequence_len",
    "per_device_eval_batch_size": "eval_batch_size",
    "ddp_timeout": "ddp_timeout",
    "dataset_num_proc": "dataset_processes",
    "resume_from_checkpoint": "resume_from_checkpoint",
    "output_dir": "output_dir",
    "tf32": "tf32",
    "wandb_project": "wandb_project",
}
_LAUNCH = "`luthier train` starts a process for each GPU by itself"
_NO_EFFECT = {
    **{name: _LAUNCH for name, why in NO_EFFECT.items() if name.startswith("ddp_") or "one process" in why},
    "do_eval": "eval_strategy says it",
    "do_predict": "`luthier generate` answers prompts afterwards",
    "predict_with_generate": "`luthier evaluate` and `luthier generate` do it afterwards",
    "disable_tqdm": "a bar is shown where there is a terminal",
    "logging_dir": "all that is logged goes into output_dir",
    "local_rank": _LAUNCH,
    "evaluation_strategy": "eval_strategy says it",
    "hub_strategy": "nothing is uploaded while training",
    "hub_model_id": "nothing is uploaded while training; `luthier push` does it afterwards",
    "gradient_checkpointing_kwargs": "what is computed again is so without reentrant autograd",
    "activation_checkpointing_kwargs": "what is computed again is so without reentrant autograd",
    "torch_compile": "fused kernels are used as they are",
    "torch_compile_backend": "fused kernels are used as they are",
    "torch_compile_mode": "fused kernels are used as they are",
    "liger_kernel_config": "fused kernels are used as they are",
    "group_by_length": "no padding is ever computed",
    "length_column_name": "no padding is ever computed",
    "padding_free": "no padding is ever computed",
    "eval_packing": "a loss over documents does not depend on packing",
    "disable_dropout": "lora_dropout says it",
    "save_safetensors": "weights are always written as safetensors",
    "eos_token": "the chat template and the tokenizer say it",
    "use_liger_loss": "the head's loss is never held whole",
    "save_on_each_node": "one process writes the run folder",
}
_REFUSED = {
    "fsdp": "write `fsdp_version: 2`, with fsdp_config, into the result.",
    "push_to_hub": "`luthier push` uploads after the training.",
    "generate_during_eval": "write `generate_samples: true` into the result.",
    "reference_free": "`rl: orpo` and `rl: simpo` need no reference.",
    "chat_template_path": "write its path as chat_template into the result.",
    "generation_max_length": "generation_max_new_tokens is the key for samples.",
    "accelerator_config": "batches are the run's own, the same on any number of processes.",
    "fsdp_config": "write `fsdp_version: 2`, with fsdp_config, into the result.",
    "model_init_kwargs": "write what is in it as keys of the model into the result.",
}
_OPTIMIZERS = {"adamw_hf": "adamw_torch", "paged_adamw": "paged_adamw_32bit"}
_TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")

# Where transformers (5.6 and 5.23 alike) and TRL 1.16 begin, as keys of ours.
TRANSFORMERS: dict[str, Any] = {
    "micro_batch_size": 8,
    "num_epochs": 3.0,
    "learning_rate": 5e-5,
    "lr_scheduler": "linear",
    "logging_steps": 500,
    "bf16": False,
    "gradient_checkpointing": False,
}
TRL = TRANSFORMERS | {
    "sequence_len": 1024,
    "excess_length_strategy": "truncate",
    "logging_steps": 10,
    "bf16": "auto",
    "gradient_checkpointing": True,
}
CLASSES: dict[str, dict[str, Any]] = {
    "TrainingArguments": TRANSFORMERS,
    "Seq2SeqTrainingArguments": TRANSFORMERS,
    "UnslothTrainingArguments": TRANSFORMERS,
    "SFTConfig": TRL | {"learning_rate": 2e-5},
    "DPOConfig": TRL | {"learning_rate": 1e-6},
    "KTOConfig": TRL | {"learning_rate": 1e-6},
    "ORPOConfig": TRL | {"learning_rate": 1e-6},
    "CPOConfig": TRL | {"learning_rate": 1e-6},
}
"""Defaults of each class."""

HANDLED = {
    "optim", "optim_args", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "max_steps",
    "bf16", "fp16", "gradient_checkpointing", "activation_checkpointing", "activation_offloading", "logging_strategy",
    "logging_steps", "eval_strategy", "evaluation_strategy", "eval_steps", "save_strategy", "save_steps", "report_to",
    "run_name", "metric_for_best_model", "greater_is_better", "train_sampling_strategy", "use_cpu", "no_cuda",
    "data_seed", "loss_type", "deepspeed", "truncation_mode", "packing_strategy", "f_divergence_type",
}  # fmt: skip
KNOWN = {*CARRIED, *NO_EFFECT, *REFUSED, *_RENAMED, *_NO_EFFECT, *_REFUSED, *HANDLED}


def convert(into: Conversion, given: Mapping[str, Any], names: Mapping[str, str] | None = None) -> set[str]:
    """Carry over what of `given` is an argument of these classes; the names of those that are not.

    Args:
        names: what to call an argument in the report (`SFTConfig.optim`), where that is not its own name.
    """
    names = names or {}
    rest: set[str] = set()
    for name, value in given.items():
        theirs = names.get(name, name)
        if name not in KNOWN:
            rest.add(name)
        elif value is None:
            into.no_effect(theirs)
        elif name in HANDLED:
            continue
        elif name in _RENAMED:
            into.carry(theirs, _RENAMED[name], value)
        elif name in CARRIED:
            into.carry(theirs, CARRIED[name], value)
        elif name in _NO_EFFECT or name in NO_EFFECT:
            into.no_effect(theirs, _NO_EFFECT.get(name) or NO_EFFECT[name])
        else:
            into.refuse(theirs, value, _REFUSED.get(name) or f"{REFUSED[name]}.")
    written = {name: value for name, value in given.items() if value is not None and name in HANDLED}
    _Special(into, written, names).all()
    return rest


class _Special:
    """Arguments whose value becomes another one, or that several keys follow from."""

    def __init__(self, into: Conversion, given: Mapping[str, Any], names: Mapping[str, str]) -> None:
        self.into, self.given, self.names = into, given, names

    def name(self, argument: str) -> str:
        return self.names.get(argument, argument)

    def all(self) -> None:
        for argument, value in self.given.items():
            method = getattr(self, f"_{argument}", None)
            if method is not None:
                method(self.name(argument), value)
        self._schedule()
        self._saving()
        self._evaluating()
        self._recomputation()

    def _optim(self, theirs: str, value: Any) -> None:
        self.into.carry(theirs, "optimizer", _OPTIMIZERS.get(str(value), value))

    def _optim_args(self, theirs: str, value: Any) -> None:
        self.into.carry(theirs, "optim_args", settings(value) if isinstance(value, str) else value)

    def _max_steps(self, theirs: str, value: Any) -> None:
        if isinstance(value, int) and value > 0:
            self.into.carry(theirs, "max_steps", value)
        else:
            self.into.no_effect(theirs)

    def _bf16(self, theirs: str, value: Any) -> None:
        self.into.carry(theirs, "bf16", value)

    def _fp16(self, theirs: str, value: Any) -> None:
        if value is False:
            self.into.no_effect(theirs)
        else:
            self.into.carry(theirs, "fp16", value)
            if value is True:
                self.into.values.setdefault("bf16", False)

    def _logging_strategy(self, theirs: str, value: Any) -> None:
        if value == "steps":
            self.into.no_effect(theirs, "rows are always logged by steps")
        else:
            self.into.no_effect(theirs, "rows are logged by steps: logging_steps")

    def _logging_steps(self, theirs: str, value: Any) -> None:
        self.into.carry(theirs, "logging_steps", value)

    def _report_to(self, theirs: str, value: Any) -> None:
        trackers = [name for name in (value if isinstance(value, list | tuple) else [value]) if name != "none"]
        if "all" in trackers:
            self.into.unsupported(theirs, f"all: name the trackers ({', '.join(_TRACKERS)}).")
        elif trackers:
            self.into.carry(theirs, "report_to", trackers)
        else:
            self.into.no_effect(theirs)

    def _run_name(self, theirs: str, value: Any) -> None:
        self.into.carry(theirs, "wandb_name", value)

    def _metric_for_best_model(self, theirs: str, value: Any) -> None:
        if value in ("loss", "eval_loss"):
            self.into.no_effect(theirs, "the best is what has the lowest loss")
        else:
            self.into.unsupported(theirs, f"{value}: the best is what has the lowest loss.")

    def _greater_is_better(self, theirs: str, value: Any) -> None:
        self.into.refuse(theirs, value, "the best is what has the lowest loss.")

    def _train_sampling_strategy(self, theirs: str, value: Any) -> None:
        if value == "sequential":
            self.into.carry(theirs, "shuffle", False)
        else:
            self.into.no_effect(theirs, "no padding is ever computed")

    def _use_cpu(self, theirs: str, value: Any) -> None:
        if value:
            self.into.carry(theirs, "device_map", "cpu")
        else:
            self.into.no_effect(theirs)

    _no_cuda = _use_cpu

    def _data_seed(self, theirs: str, value: Any) -> None:
        self.into.no_effect(theirs, "the order of the rows is drawn from seed")

    def _truncation_mode(self, theirs: str, value: Any) -> None:
        self._only(theirs, value, "keep_start", "longer rows are cut at their end")

    def _packing_strategy(self, theirs: str, value: Any) -> None:
        self._only(theirs, value, "bfd", "documents are packed whole")

    def _f_divergence_type(self, theirs: str, value: Any) -> None:
        self._only(theirs, value, "reverse_kl", "the losses are those of the reverse KL divergence")

    def _only(self, theirs: str, value: Any, only: str, why: str) -> None:
        if value == only:
            self.into.no_effect(theirs, why)
        else:
            self.into.unsupported(theirs, f"{value}: {why}.")

    def _deepspeed(self, theirs: str, value: Any) -> None:
        deepspeed(self.into, theirs, value)

    def _schedule(self) -> None:
        into, given = self.into, self.given
        if "lr_scheduler_type" in given:
            into.carry(self.name("lr_scheduler_type"), "lr_scheduler", given["lr_scheduler_type"])
        written = given.get("lr_scheduler_kwargs")
        more = dict(written) if isinstance(written, dict) else {}
        if "min_lr_rate" in more:
            into.carry(self.name("lr_scheduler_kwargs"), "cosine_min_lr_ratio", more.pop("min_lr_rate"))
        elif "min_lr" in more and isinstance(rate := into.values.get("learning_rate"), float):
            into.carry(self.name("lr_scheduler_kwargs"), "cosine_min_lr_ratio", float(more.pop("min_lr")) / rate)
        if written and (more or not isinstance(written, dict)):
            for name in more or [str(written)]:
                into.unsupported(f"{self.name('lr_scheduler_kwargs')}.{name}", "no key here says it.")
        elif written is not None and not written:
            into.no_effect(self.name("lr_scheduler_kwargs"))
        steps, ratio = given.get("warmup_steps"), given.get("warmup_ratio")
        if isinstance(steps, float) and 0 < steps < 1:
            into.carry(self.name("warmup_steps"), "warmup_ratio", steps)
        elif steps is not None and (steps or not ratio):
            into.carry(self.name("warmup_steps"), "warmup_steps", steps)
        if ratio is not None and steps:
            into.no_effect(self.name("warmup_ratio"), "warmup_steps goes before it")
        elif ratio is not None:
            into.carry(self.name("warmup_ratio"), "warmup_ratio", ratio)

    def _saving(self) -> None:
        into, strategy = self.into, self.given.get("save_strategy", "steps")
        theirs = self.name("save_strategy")
        if strategy in ("no", "epoch"):
            into.carry(theirs, "saves_per_epoch", int(strategy == "epoch"))
        elif strategy == "best":
            into.carry(theirs, "load_best_model_at_end", True)
        elif strategy != "steps":
            into.unsupported(theirs, f"{strategy}: steps, epoch, best or no.")
        elif "save_strategy" in self.given:
            into.no_effect(theirs, "save_steps says it")
        if "save_steps" in self.given and strategy == "steps":
            into.carry(self.name("save_steps"), "save_steps", self.given["save_steps"])
        elif "save_steps" in self.given:
            into.no_effect(self.name("save_steps"), f'save_strategy is "{strategy}"')
        elif strategy == "steps":
            into.default("save_steps", 500, whose="transformers")

    def _evaluating(self) -> None:
        into, given = self.into, self.given
        key = "eval_strategy" if "eval_strategy" in given else "evaluation_strategy"
        strategy, steps = given.get(key), given.get("eval_steps")
        if strategy in ("no", "epoch"):
            into.carry(self.name(key), "evals_per_epoch", int(strategy == "epoch"))
        elif strategy == "steps":
            into.no_effect(self.name(key), "eval_steps says it")
        elif strategy is not None:
            into.unsupported(self.name(key), f"{strategy}: steps, epoch or no.")
        if steps is not None and strategy == "steps":
            into.carry(self.name("eval_steps"), "eval_steps", steps)
        elif steps is not None:
            into.no_effect(self.name("eval_steps"), "eval_strategy is not steps")
        elif strategy == "steps":
            into.default("eval_steps", given.get("logging_steps", 500), "as often as rows are logged", "transformers")
        if strategy is None:
            into.default("evals_per_epoch", 0, "nothing is evaluated without eval_strategy", "transformers")

    def _recomputation(self) -> None:
        into, given = self.into, self.given
        for argument in ("gradient_checkpointing", "activation_checkpointing"):
            if argument in given and not given.get("activation_offloading"):
                value = given[argument]
                into.carry(self.name(argument), "gradient_checkpointing", value)
            elif argument in given:
                into.no_effect(self.name(argument), "activation_offloading says more")
        if given.get("activation_offloading"):
            into.carry(self.name("activation_offloading"), "gradient_checkpointing", "offload")
        elif "activation_offloading" in given:
            into.no_effect(self.name("activation_offloading"))

    def _loss_type(self, theirs: str, value: Any) -> None:
        losses(self.into, theirs, value)


def losses(into: Conversion, theirs: str, value: Any) -> None:
    """TRL's `loss_type`: text, or a list of one."""
    value = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    if value in ("nll", "kto"):
        into.no_effect(theirs, "it is the loss of the method")
    elif value == "simpo":
        into.carry(theirs, "rl", value)
    elif into.values.get("rl") in ("dpo", "ipo"):
        into.carry(theirs, "dpo_loss_type", value)
    else:
        into.unsupported(theirs, f"{value}: this loss is not built here.", essential=True)


def settings(text: str) -> dict[str, Any]:
    """`a=1,b=x` as a mapping."""
    pairs = (part.partition("=") for part in text.replace(" ", "").split(",") if part)
    return {name: parse_scalar(value) for name, _, value in pairs}


# Names by which the files that other tools ship begin, and the preset that does what is in them.
_ZERO_FILES = (
    ("zero3_bf16_cpuoffload", "zero3_offload"),
    ("ds_z3_offload", "zero3_offload"),
    *((f"zero{stage}", f"zero{stage}") for stage in (1, 2, 3)),
    *((f"ds_z{stage}", f"zero{stage}") for stage in (2, 3)),
)


def deepspeed(into: Conversion, theirs: str, value: Any) -> None:
    """A path of DeepSpeed's settings; where the file is not there and has the name of one that the tool ships, the
    preset of ours."""
    if isinstance(value, str) and value.endswith(".json") and not Path(value).is_file():
        name = Path(value).name
        for begin, preset in _ZERO_FILES:
            if name.startswith(begin):
                into.carry(theirs, "deepspeed", preset, f"{value} is not here, and has the name of a shipped one")
                return
    into.carry(theirs, "deepspeed", value)
