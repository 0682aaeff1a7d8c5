"""What keys say together: contradictions between them, and values that follow from others.

The message of a contradiction names every key that could resolve it: that is how one that merely follows from
another mistake is recognised and left out of the report.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from luthier.config import adapters, artifact_names, preference, sharding, streaming
from luthier.config.needs import NEEDS, ONE_OF, Flat, asks_for_something, evaluates, has_samples
from luthier.config.optimizers import ALIASES


@dataclass(frozen=True, slots=True)
class Contradiction:
    """A key that cannot stand beside the others, and what to do about it."""

    key: str
    message: str


def contradictions(c: Flat, written: Collection[str]) -> Iterator[Contradiction]:
    """What cannot hold together, for flat values `c` of which the keys in `written` were set by the user."""
    for need in NEEDS:
        for key in need.keys:
            if key in written and asks_for_something(c[key]) and not need.holds(c):
                yield Contradiction(key, need.message.format(key=key))
    for first, second in (*ONE_OF, *preference.ONE_OF, *sharding.ONE_OF):
        if {first, second} <= set(written) and c[first] and c[second]:
            yield Contradiction(second, f"{first} and {second} exclude each other: leave one of them out.")
    yield from _single_keys(c, written)
    yield from _optimizers(c, written)
    yield from _mixing(c, written)
    for key, message in adapters.flaws(c, written):
        yield Contradiction(key, message)
    for key, message in preference.flaws(c, written):
        yield Contradiction(key, message)
    for key, message in sharding.flaws(c):
        yield Contradiction(key, message)
    for key, message in streaming.flaws(c, written):
        yield Contradiction(key, message)
    for key, message in artifact_names.flaws(c):
        yield Contradiction(key, message)
    yield from _patterns(c)
    yield from _rope(c)


def _single_keys(c: Flat, written: Collection[str]) -> Iterator[Contradiction]:
    if c["bf16"] is True and c["fp16"] is True:
        yield Contradiction("fp16", "bf16 and fp16 are both true: keep one (`bf16: auto` chooses by itself).")
    other_bits = c["load_in_8bit"] or c["load_in_fp8"] or ("load_in_4bit" in written and not c["load_in_4bit"])
    if c["adapter"] == "qlora" and other_bits:
        yield Contradiction(
            "adapter",
            "`adapter: qlora` is LoRA on a base in 4 bits: write `adapter: lora` for load_in_8bit or load_in_fp8, "
            "or without load_in_4bit.",
        )
    if c["chat_template"] == "jinja" and not c["chat_template_jinja"]:
        yield Contradiction(
            "chat_template", "`chat_template: jinja` needs chat_template_jinja: give its text or path."
        )
    if c["lr_scheduler"] == "cosine_with_min_lr" and c["cosine_min_lr_ratio"] is None:
        yield Contradiction(
            "lr_scheduler",
            "cosine_with_min_lr needs cosine_min_lr_ratio, such as 0.1 to end at a tenth of the peak.",
        )
    for key in ("load_best_model_at_end", "early_stopping_patience"):
        if c[key] and c["evals_per_epoch"] == 0:
            yield Contradiction(key, f"{key} needs evaluations, and `evals_per_epoch: 0` turns them off.")
    for key in ("eval_steps", "save_steps", "logging_steps", "val_set_size"):
        if key in written and isinstance(c[key], float) and c[key] > 1:
            yield Contradiction(key, f"{key}: {c[key]} is neither a whole number nor a fraction below 1.")
    if not _is_device(c["device_map"]):
        yield Contradiction(
            "device_map",
            'device_map has to be auto, cpu, cuda, cuda:N, mps, or a mapping with one entry, {"": device}.',
        )
    for key in ("base_model", "output_dir"):
        if not c[key].strip():
            yield Contradiction(key, f"{key} is empty.")


def _optimizers(c: Flat, written: Collection[str]) -> Iterator[Contradiction]:
    fused = c["optimizer_in_backward"]
    if fused and c["gradient_accumulation_steps"] > 1:
        rows = c["micro_batch_size"] * c["gradient_accumulation_steps"]
        yield Contradiction(
            "optimizer_in_backward",
            "optimizer_in_backward frees each gradient before another pass could add to it, so a step is one pass: "
            f"write `micro_batch_size: {rows}` and leave gradient_accumulation_steps out, or optimizer_in_backward.",
        )
    if fused and c["max_tokens_per_pass"] != "auto":
        yield Contradiction(
            "max_tokens_per_pass",
            "with optimizer_in_backward a step is one pass, whatever its length: leave out one of the two.",
        )
    if fused and c["max_grad_norm"] > 0:
        yield Contradiction(
            "optimizer_in_backward",
            "optimizer_in_backward never has all gradients to bound their common norm: write `max_grad_norm: 0`, or "
            "leave optimizer_in_backward out.",
        )
    if fused and c["fp16"] is True:
        yield Contradiction(
            "optimizer_in_backward",
            "optimizer_in_backward cannot take back a step that overflowed, as fp16 needs: leave out fp16 or "
            "optimizer_in_backward.",
        )
    if c["bf16_stochastic_rounding"] and (c["bf16"] is False or c["fp16"] is True):
        yield Contradiction(
            "bf16_stochastic_rounding",
            "bf16_stochastic_rounding is for weights in bfloat16: write `bf16: true`, or leave it out.",
        )
    if c["optimizer"] == "schedule_free_adamw":
        if c["bf16_stochastic_rounding"]:
            yield Contradiction(
                "bf16_stochastic_rounding",
                "schedule_free_adamw finds the weights that it averages out of fp32 ones: leave out "
                "bf16_stochastic_rounding, or choose another optimizer.",
            )
        decays = not str(c["lr_scheduler"]).startswith("constant")
        if (decays and "lr_scheduler" in written) or c["cosine_min_lr_ratio"] is not None:
            yield Contradiction(
                "lr_scheduler",
                "schedule_free_adamw averages weights in place of a falling learning rate: write `lr_scheduler: "
                "constant_with_warmup`, or leave lr_scheduler and cosine_min_lr_ratio out.",
            )
    if c["optimizer"] == "muon" and c["adapter"] is not None:
        yield Contradiction(
            "optimizer",
            "muon is for the matrices of a model that is trained itself: leave out adapter, or take another optimizer.",
        )
    names = [group["name"] for group in c["lr_groups"]]
    for group in c["lr_groups"]:
        if names.count(group["name"]) > 1:
            yield Contradiction("lr_groups", f"lr_groups: two groups are called {group['name']}: rename one.")
            return
        if not group["modules"]:
            yield Contradiction("lr_groups", f"lr_groups: {group['name']} names no modules.")


def _mixing(c: Flat, written: Collection[str]) -> Iterator[Contradiction]:
    counted = any("epochs" in entry and entry["epochs"] is not None for entry in c["datasets"])
    if counted and c["max_steps"] is not None:
        yield Contradiction(
            "max_steps",
            "`epochs` of a dataset says how often the whole run goes through it, and max_steps ends the run "
            "somewhere else: leave out one of the two, or write `weight`.",
        )
    if counted and c["mix_strategy"] != "concat":
        yield Contradiction(
            "mix_strategy",
            "`epochs` of a dataset says how often the run goes through it; where datasets are interleaved, that "
            "follows from the parts of the mix: write `weight` there, or leave mix_strategy out.",
        )
    for number, entry in enumerate(c["test_datasets"]):
        for key in ("weight", "epochs"):
            if entry.get(key) is not None:
                yield Contradiction(
                    "test_datasets",
                    f"test_datasets.{number}.{key} does nothing: validation goes through every row once. Leave it "
                    "out.",
                )


# Keys of `rope_parameters` by type; transformers' names.
_ROPE_KEYS: dict[str, set[str]] = {
    "linear": set(),
    "yarn": {
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
    "llama3": {"original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}


def _rope(c: Flat) -> Iterator[Contradiction]:
    key, rope = "rope_parameters", c["rope_parameters"]
    if not rope:
        return
    kind = rope.get("rope_type", rope.get("type"))
    if kind == "dynamic":
        yield Contradiction(
            key,
            "`rope_type: dynamic` changes the frequencies with the longest document so far, so that documents of a "
            "pass would change each other: write yarn, linear or llama3 in rope_parameters.",
        )
        return
    if kind not in _ROPE_KEYS:
        yield Contradiction(
            key, f"rope_parameters needs a rope_type, one of {', '.join(_ROPE_KEYS)}; it has {kind!r}."
        )
        return
    factor = rope.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or factor < 1:
        yield Contradiction(key, f"rope_parameters needs a factor of 1 or more; it has {factor!r}.")
    if kind == "llama3" and not {"low_freq_factor", "high_freq_factor"} <= set(rope):
        yield Contradiction(
            key, "`rope_type: llama3` needs low_freq_factor and high_freq_factor (Llama 3.1 has 1 and 4)."
        )
    common = {"rope_type", "type", "factor", "rope_theta", "partial_rotary_factor"}
    if unknown := sorted(set(rope) - common - _ROPE_KEYS[kind]):
        known = ", ".join(sorted(_ROPE_KEYS[kind] | {"factor", "rope_theta"}))
        yield Contradiction(
            key, f"rope_parameters: {', '.join(unknown)}: not for `rope_type: {kind}`, which takes {known}."
        )


def _is_device(value: Any) -> bool:
    if isinstance(value, dict):
        return list(value) == [""] and (isinstance(value[""], int) or _is_device(value[""]))
    return value is None or re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value) is not None


def _patterns(c: Flat) -> Iterator[Contradiction]:
    for pattern in c["unfrozen_parameters"]:
        if re.search(r"\[\d*:\d*\]\s*$", pattern):
            yield Contradiction(
                "unfrozen_parameters",
                f"unfrozen_parameters: {pattern!r} asks for a range of rows; a parameter is trained whole.",
            )
        elif problem := _regex_problem(pattern):
            yield Contradiction("unfrozen_parameters", f"unfrozen_parameters: {pattern!r} {problem}")
    for group in c["lr_groups"]:
        for pattern in group["modules"]:
            if problem := _regex_problem(pattern):
                yield Contradiction("lr_groups", f"lr_groups: {group['name']}: {pattern!r} {problem}")
    targets = c["lora_target_modules"]
    if isinstance(targets, str) and (problem := _regex_problem(targets)):
        yield Contradiction("lora_target_modules", f"lora_target_modules: {targets!r} {problem}")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in c[key]:
            if problem := _regex_problem(pattern):
                yield Contradiction(key, f"{key}: {pattern!r} {problem}")


def _regex_problem(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except re.error as error:
        return f"is not a regular expression: {error}."
    return None


def derived(c: Flat, written: Collection[str]) -> dict[str, tuple[Any, str]]:
    """Values that follow from others, each with the reason."""
    values: dict[str, tuple[Any, str]] = preference.derived(c, written) | sharding.derived(c)
    if c["learning_rate"] is None:
        if c["adapter"]:
            values["learning_rate"] = (2e-4, "usual with an adapter")
        else:
            values["learning_rate"] = (2e-5, "usual without an adapter")
    if c["loraplus_lr_ratio"] is not None and c["loraplus_lr_embedding"] is None:
        values["loraplus_lr_embedding"] = (1e-6, "as PEFT has it")
    for key, value in artifact_names.completed(c).items():
        values[key] = (value, "wandb_entity and wandb_project say whose artifact it is")
    if c["mix_strategy"] == "temperature" and c["mix_temperature"] is None:
        values["mix_temperature"] = (2.0, "a usual one")
    if c["optimizer"] in ALIASES:
        values["optimizer"] = (ALIASES[c["optimizer"]], f"{c['optimizer']} is another name of it")
    if c["gradient_checkpointing"] == "unsloth":
        values["gradient_checkpointing"] = ("offload", "unsloth is another name of it")
    if c["optimizer"] == "schedule_free_adamw" and "lr_scheduler" not in written:
        values["lr_scheduler"] = ("constant_with_warmup", "schedule_free_adamw averages weights instead")
    named = c["lora_target_modules"] or c["lora_model_dir"] or c["lora_target_parameters"]
    if isinstance(c["lora_target_parameters"], str):
        values["lora_target_parameters"] = ([c["lora_target_parameters"]], "a list of one")
    if c["loftq_config"] is not None and c["peft_init_lora_weights"] is True:
        values["peft_init_lora_weights"] = ("loftq", "loftq_config is set")
    if c["adapter"] and c["lora_target_linear"] is None and not named:
        values["lora_target_linear"] = (True, "no target is named")
    if c["adapter"] == "qlora":
        values["load_in_4bit"] = (True, "adapter is qlora")
    if c["fp16"] is True and c["bf16"] == "auto":
        values["bf16"] = (False, "fp16 is on")
    if c["lr_scheduler"] == "cosine" and c["cosine_min_lr_ratio"] is not None:
        values["lr_scheduler"] = ("cosine_with_min_lr", "cosine_min_lr_ratio is set")
    if c["save_steps"] is None and c["saves_per_epoch"] is None:
        values |= streaming.derived(c) or {"saves_per_epoch": (1, "save_steps is unset")}
    if evaluates(c) and c["eval_steps"] is None and c["evals_per_epoch"] is None:
        key, value, reason = streaming.evaluations(c)
        values[key] = (value, reason)
    if not c["generate_samples"] and has_samples(c) and "generate_samples" not in written:
        source = "sample_prompts" if c["sample_prompts"] else "num_generation_samples"
        values["generate_samples"] = (True, f"{source} is set")
    if isinstance(c["resume_from_checkpoint"], bool):
        values["resume_from_checkpoint"] = (
            "auto" if c["resume_from_checkpoint"] else None,
            "true means auto",
        )
    trackers = [c["report_to"]] if isinstance(c["report_to"], str) else list(c["report_to"])
    if c["wandb_project"] and "wandb" not in trackers and c["wandb_mode"] != "disabled":
        values["report_to"] = ([*trackers, "wandb"], "wandb_project is set")
    elif isinstance(c["report_to"], str):
        values["report_to"] = (trackers, "a list of one")
    return values
