"""Which keys need others: tables of what does nothing alone, and of what says the same thing twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.config.optimizers import OPTIMIZERS
from luthier.config.preference import READ_BY

Flat = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Need:
    """Keys that do something only where a condition on the others holds."""

    keys: tuple[str, ...]
    holds: Callable[[Flat], bool]
    message: str


def _has_validation(c: Flat) -> bool:
    return bool(c["val_set_size"] or c["test_datasets"])


def has_samples(c: Flat) -> bool:
    """Whether a key asks for samples."""
    return bool(c["generate_samples"] or c["sample_prompts"] or c["num_generation_samples"])


def evaluates(c: Flat) -> bool:
    """Whether there is anything to evaluate: a loss, or samples."""
    return _has_validation(c) or has_samples(c)


def without_eval_loss(c: Flat) -> str | None:
    """Why a run measures no loss on held-out data, and what to do; None if it does."""
    if not _has_validation(c):
        return "there is no validation data: set val_set_size or test_datasets"
    if c["evals_per_epoch"] == 0:
        return "`evals_per_epoch: 0` turns evaluations off: set evals_per_epoch or eval_steps"
    steps, most = c["eval_steps"], c["max_steps"]
    if steps is not None and most is not None and steps > most:
        return f"`eval_steps: {steps}` is behind the last step ({most}): lower it"
    return None


def _has_chat(c: Flat) -> bool:
    return any(entry.get("type") == "chat_template" for entry in (*c["datasets"], *c["test_datasets"]))


def _is_adam(c: Flat) -> bool:
    return OPTIMIZERS[c["optimizer"]].adam


def _values(key: str, names: Sequence[str]) -> str:
    """`rl: dpo`, `ipo` or `kto`."""
    first, *others = (f"`{name}`" for name in names)
    first = f"`{key}: {first[1:]}"
    return " or ".join([", ".join([first, *others[:-1]]), *others[-1:]])


def _that(methods: Sequence[str]) -> str:
    return "that" if len(methods) == 1 else "one of these"


_VALIDATION = "there is no validation data: set val_set_size or test_datasets, or leave {key} out."

# One table for two uses: a key written where it would do nothing is an error, and `to_yaml` leaves it as a
# comment.
NEEDS: tuple[Need, ...] = (
    Need(
        (
            "lora_r",
            "lora_alpha",
            "lora_dropout",
            "lora_target_modules",
            "lora_target_parameters",
            "lora_target_linear",
            "lora_modules_to_save",
            "peft_use_rslora",
            "peft_use_dora",
            "peft_init_lora_weights",
            "loftq_config",
            "rank_pattern",
            "alpha_pattern",
            "lora_rank_budget",
            "lora_model_dir",
            "peft_layers_to_transform",
            "loraplus_lr_ratio",
        ),
        lambda c: c["adapter"] is not None,
        "{key} does nothing without an adapter: write `adapter: lora`, or leave {key} out.",
    ),
    Need(
        ("load_in_4bit", "load_in_8bit", "load_in_fp8", "dequantized_copies_gib"),
        lambda c: c["adapter"] is not None,
        "quantised weights cannot be trained, only an adapter on them: write `adapter: lora`, or leave {key} out.",
    ),
    Need(
        ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
        lambda c: c["load_in_4bit"] or c["adapter"] == "qlora",
        "{key} goes with `load_in_4bit: true` only: write that, or leave {key} out.",
    ),
    Need(
        ("unfrozen_parameters", "train_last_n_layers", "freeze_embeddings"),
        lambda c: c["adapter"] is None,
        "{key} is for training without an adapter, which freezes the model: leave out {key} or adapter.",
    ),
    Need(
        ("eval_steps", "evals_per_epoch"),
        evaluates,
        "nothing is evaluated: set val_set_size, test_datasets or sample_prompts, or leave {key} out.",
    ),
    Need(
        ("eval_batch_size", "early_stopping_patience", "load_best_model_at_end", "num_generation_samples"),
        _has_validation,
        _VALIDATION,
    ),
    Need(
        (
            "generation_max_new_tokens",
            "generation_temperature",
            "generation_top_p",
            "generation_top_k",
            "generation_do_sample",
        ),
        has_samples,
        "no samples are generated: set sample_prompts or num_generation_samples, or leave {key} out.",
    ),
    Need(
        ("generate_samples",),
        lambda c: bool(c["sample_prompts"]) or _has_validation(c),
        "generate_samples has nothing to answer: set sample_prompts, val_set_size or test_datasets.",
    ),
    Need(
        ("chat_template_jinja",),
        lambda c: c["chat_template"] == "jinja",
        "chat_template_jinja is read only with `chat_template: jinja`: write that, or leave it out.",
    ),
    Need(
        ("chat_template_kwargs",),
        _has_chat,
        "chat_template_kwargs does nothing without a dataset of `type: chat_template`: leave it out.",
    ),
    Need(
        ("num_epochs",),
        lambda c: not c["streaming"],
        "{key}: the length of a stream is not known, and max_steps ends the run: leave {key} out.",
    ),
    Need(
        ("shuffle_buffer_size",),
        lambda c: c["streaming"],
        "{key} is for streams, and other data is shuffled as a whole: write `streaming: true`, or leave {key} out.",
    ),
    Need(
        ("mix_stopping",),
        lambda c: c["mix_strategy"] != "concat",
        "{key} does nothing where datasets are put together whole: write `mix_strategy: interleave`, or leave {key} "
        "out.",
    ),
    Need(
        ("mix_temperature",),
        lambda c: c["mix_strategy"] == "temperature",
        "{key} is for `mix_strategy: temperature`: write that, or leave {key} out.",
    ),
    Need(
        ("cosine_min_lr_ratio",),
        lambda c: str(c["lr_scheduler"]).startswith("cosine"),
        "cosine_min_lr_ratio goes with `lr_scheduler: cosine_with_min_lr` only: change one of the two.",
    ),
    Need(
        ("warmup_steps", "warmup_ratio"),
        lambda c: c["lr_scheduler"] != "constant",
        "`lr_scheduler: constant` has no warm-up: write constant_with_warmup, or leave {key} out.",
    ),
    Need(
        ("loraplus_lr_embedding",),
        lambda c: c["loraplus_lr_ratio"] is not None,
        "loraplus_lr_embedding is part of LoRA+: set loraplus_lr_ratio too, or leave it out.",
    ),
    Need(
        ("optimizer_in_backward", "bf16_stochastic_rounding"),
        lambda c: c["adapter"] is None,
        "{key} saves memory where the model itself is trained; an adapter is small: leave out {key} or adapter.",
    ),
    Need(
        ("adam_beta1", "adam_beta2", "adam_epsilon"),
        _is_adam,
        "{key} is for the adam optimizers: leave it out, or choose another optimizer.",
    ),
    Need(
        ("wandb_entity", "wandb_name", "wandb_job_type", "wandb_mode", "wandb_tags"),
        lambda c: bool(c["wandb_project"]) or "wandb" in c["report_to"],
        "{key} needs Weights & Biases: set wandb_project or `report_to: wandb`, or leave {key} out.",
    ),
    Need(
        ("wandb_log_model",),
        lambda c: c["wandb_log_model"] == "false" or bool(c["wandb_project"]) or "wandb" in c["report_to"],
        "{key} needs Weights & Biases: set wandb_project or `report_to: wandb`, or leave {key} out.",
    ),
)

NEEDS += tuple(
    Need(
        (key,),
        lambda c, methods=methods: c["rl"] in methods,  # type: ignore[misc]
        "{key} is for " + _values("rl", methods) + ": set rl to " + _that(methods) + ", or leave {key} out.",
    )
    for key, methods in READ_BY.items()
)

# Pairs of keys that say the same thing in two ways, or opposite things.
ONE_OF: tuple[tuple[str, str], ...] = (
    ("eval_steps", "evals_per_epoch"),
    ("save_steps", "saves_per_epoch"),
    ("warmup_steps", "warmup_ratio"),
    ("val_set_size", "test_datasets"),
    ("unfrozen_parameters", "train_last_n_layers"),
    ("unfrozen_parameters", "freeze_embeddings"),
    ("lora_model_dir", "loftq_config"),
    ("lora_model_dir", "lora_rank_budget"),
    ("lora_model_dir", "lora_target_parameters"),
    ("rank_pattern", "lora_rank_budget"),
    ("alpha_pattern", "lora_rank_budget"),
    ("lora_target_parameters", "lora_rank_budget"),
    ("lora_target_parameters", "peft_use_dora"),
    ("lora_target_parameters", "lora_dropout"),
    ("load_in_4bit", "load_in_8bit"),
    ("load_in_4bit", "load_in_fp8"),
    ("load_in_8bit", "load_in_fp8"),
)


def is_idle(key: str, c: Flat) -> bool:
    """Whether the key's value does nothing beside the others, and would be an error if a user wrote it."""
    return asks_for_something(c[key]) and any(key in need.keys and not need.holds(c) for need in NEEDS)


def asks_for_something(value: Any) -> bool:
    """Unset, empty and false ask for nothing; a number does, even 0."""
    return not (value is None or value is False or value in ([], {}))
