"""What a user probably meant by a key that does not exist.

Three guesses, best first: another tool's name for the same thing, a slip of the pen, a key of another depth.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from luthier.config.datasets import DatasetEntry, UserPreference, UserPrompt
from luthier.config.distributed import ELSEWHERE as OF_PROCESSES
from luthier.config.distributed import INSIDE_FSDP, VALUES_OF_PROCESSES, FsdpConfig, plain_name
from luthier.config.schema import FIELDS, SECTIONS, LoftQ, LrGroup, SpecialTokens

# Names that other tools use, and what to write here.
ELSEWHERE: dict[str, str] = {
    "model_name_or_path": "Write base_model.",
    "num_train_epochs": "Write num_epochs.",
    "per_device_train_batch_size": "Write micro_batch_size.",
    "per_device_eval_batch_size": "Write eval_batch_size.",
    "batch_size": "Write micro_batch_size and gradient_accumulation_steps.",
    "max_seq_length": "Write sequence_len.",
    "max_length": "Write sequence_len.",
    "cutoff_len": "Write sequence_len.",
    "lora_rank": "Write lora_r.",
    "peft": "Write what is inside it at the top level, such as `loftq_config: {loftq_bits: 4}`.",
    "use_dora": "Write `peft_use_dora: true`.",
    "init_lora_weights": "Write peft_init_lora_weights.",
    "target_parameters": "Write lora_target_parameters.",
    "pissa_init": "Write `peft_init_lora_weights: pissa_niter_16`.",
    "lora_target": "Write lora_target_modules, or `lora_target_linear: true` for all.",
    "lr_scheduler_type": "Write lr_scheduler.",
    "optim": "Write optimizer.",
    "finetuning_type": "Write `adapter: lora`, or leave it out to train the model itself.",
    "quantization_bit": "Write `load_in_4bit: true` or `load_in_8bit: true`.",
    "bnb_4bit_compute_dtype": "Leave it out: the run's own precision is what is computed in (bf16, fp16).",
    "bnb_config_kwargs": "Write bnb_4bit_quant_type and bnb_4bit_use_double_quant at the top level.",
    "dataset": "Write datasets, a list of entries with path and type.",
    "epochs": "Did you mean num_epochs? Inside an entry of datasets, it is how often the run goes through that one.",
    "interleave_probs": "Write `weight` in each entry of datasets, and `mix_strategy: interleave`.",
    "packing": "Write sample_packing.",
    "flash_attention": "Write `attn_implementation: flash_attention_2`.",
    "sdp_attention": "Write `attn_implementation: sdpa`.",
    "eager_attention": "Write `attn_implementation: eager`.",
    "pad_to_sequence_len": "Leave it out: padding is never computed here.",
    "eval_sample_packing": "Leave it out: evaluation gives the same numbers packed or not.",
    "group_by_length": "Leave it out: padding is never computed here.",
    "strict": "Leave it out: unknown keys are always errors here.",
    "tiled_mlp_num_shards": "Leave it out: a tile has as many tokens as run at full speed.",
    "gradient_checkpointing_kwargs": "Leave it out: what is computed again is so without reentrant autograd.",
    "activation_offloading": "Write `gradient_checkpointing: offload`.",
    "dpo_beta": "Write rl_beta.",
    "dpo_label_smoothing": "Write label_smoothing.",
    "loss_type": "Write dpo_loss_type for the kin of `rl: dpo`; any other method is a value of rl.",
    "max_prompt_length": "Write max_prompt_len.",
    "desirable_weight": "Write kto_desirable_weight.",
    "undesirable_weight": "Write kto_undesirable_weight.",
    "pref_beta": "Write rl_beta.",
    "pref_loss": "Write rl, or dpo_loss_type.",
    "pref_ftx": "Write rpo_alpha, or for simpo cpo_alpha.",
    "kto_chosen_weight": "Write kto_desirable_weight.",
    "kto_rejected_weight": "Write kto_undesirable_weight.",
    "kto_beta": "Write rl_beta.",
    "orpo_beta": "Write rl_beta.",
    "simpo_beta": "Write rl_beta.",
    "stage": "Write rl for preference tuning; without it a run is supervised fine-tuning.",
    "trl": "It is for methods that generate answers while they train, and there are none here.",
    "loss_weights": "One loss is trained: rpo_alpha adds the likelihood of the chosen answers to that of dpo.",
    "dpo_loss_weights": "One loss is trained: rpo_alpha adds the likelihood of the chosen answers to that of dpo.",
    "dpo_norm_loss": "Write `dpo_loss_type: sigmoid_norm`, which compares mean log-probs.",
    "average_log_prob": "Write `dpo_loss_type: sigmoid_norm`, which compares mean log-probs.",
    "f_divergence_type": "Leave it out: the losses are those of the reverse KL divergence, which TRL's default is.",
    "discopop_tau": "Leave it out: it is 0.05, as in the paper.",
    "ld_alpha": "Leave it out: every token of an answer counts alike here.",
    "dpo_use_weighting": "Leave it out: pairs count alike here.",
    "use_weighting": "Leave it out: pairs count alike here.",
    "ref_model": "Leave it out: the reference is the model as the run begins, never a second one.",
    "ref_model_mixup_alpha": "Leave it out: the reference stays the model as the run begins.",
    "ref_model_sync_steps": "Leave it out: the reference stays the model as the run begins.",
    "sync_ref_model": "Leave it out: the reference stays the model as the run begins.",
    "force_use_ref_model": "Leave it out: the reference is the model as the run begins, never a second one.",
    "rl_adapter_ref_model": "Leave it out: the reference is the model as the run begins, never a second one.",
    "ref_adapter_name": "Leave it out: the reference is the model as the run begins, never a second one.",
    "model_adapter_name": "Leave it out: there is one adapter.",
    "reference_free": "Leave it out, or take a method without a reference: `rl: orpo` or `rl: simpo`.",
    "precompute_ref_batch_size": "Leave it out: its passes are those of training (max_tokens_per_pass).",
    "max_completion_length": "Leave it out: sequence_len bounds prompt and answer together, max_prompt_len the prompt.",
    "max_target_length": "Leave it out: sequence_len bounds prompt and answer together, max_prompt_len the prompt.",
    "padding_free": "Leave it out: padding is never computed here.",
    "dpo_padding_free": "Leave it out: padding is never computed here.",
    "use_logits_to_keep": "Leave it out: logits are only ever computed for tokens of answers.",
    "dpo_use_logits_to_keep": "Leave it out: logits are only ever computed for tokens of answers.",
    "remove_unused_columns": "Leave it out: columns that a type does not read are never in the way.",
    "generate_during_eval": "Write `generate_samples: true`.",
    "disable_dropout": "Write `lora_dropout: 0`.",
    "rope_scaling": "Write rope_parameters, with rope_type and factor.",
    "overrides_of_model_config": "Write what is inside it at the top level: rope_parameters for rope_scaling.",
    "use_wandb": "Write `report_to: wandb`.",
    "wandb_run_id": "Leave it out: a resumed run goes on by itself.",
    "wandb_watch": "Leave it out: gradients are not sent to trackers.",
    **OF_PROCESSES,
}

# The same for values, each after its key.
VALUES_ELSEWHERE: dict[str, str] = {
    "gradient_checkpointing: offload_disk": " Write offload.",
    "mix_strategy: interleave_under": " Write interleave, and `mix_stopping: first_exhausted`.",
    "mix_strategy: interleave_over": " Write interleave, and `mix_stopping: all_exhausted`.",
    "mix_strategy: interleave_once": " Write concat, which has every row once.",
    **dict.fromkeys(
        (f"rl: {name}" for name in ("grpo", "gdpo", "ppo", "rloo", "reinforce", "online_dpo", "ebft")),
        " Methods that generate answers while they train are not here; these learn from answers that exist.",
    ),
    "rl: cpo": " Nearest is `rl: simpo`, with cpo_alpha for the likelihood of the chosen answers.",
    "rl: bco": " For pairs, write `rl: dpo` and `dpo_loss_type: bco_pair`.",
    "dpo_loss_type: simpo": " Write `rl: simpo`.",
    "dpo_loss_type: orpo": " Write `rl: orpo`.",
    "dpo_loss_type: kto": " Write `rl: kto`.",
    "dpo_loss_type: kto_pair": " Write `rl: kto`, which takes pairs apart.",
    "dpo_loss_type: sft": " Write rpo_alpha, which adds the likelihood of the chosen answers.",
    **VALUES_OF_PROCESSES,
}

# Mappings inside the config: what they are called in a message, and where they stand.
_INNER: dict[type[BaseModel], tuple[str, str]] = {
    DatasetEntry: ("a dataset entry", "an entry of datasets"),
    UserPrompt: ("a prompt format", "the type of a dataset entry"),
    UserPreference: ("a format for preference runs", "the type of a dataset entry"),
    SpecialTokens: ("special_tokens", "special_tokens"),
    LoftQ: ("loftq_config", "loftq_config"),
    LrGroup: ("a learning-rate group", "an entry of lr_groups"),
    FsdpConfig: ("fsdp_config", "fsdp_config"),
}


def unknown_key(key: str, value: Any, model: type[BaseModel] | None = None, shown: str = "") -> str:
    """The message for a key that `model` (unset: the top level) does not have; `shown` is its dotted name."""
    known = FIELDS if model is None else model.model_fields
    place = "the config" if model is None else _INNER[model][0]
    message = f"{shown or key} is not a key of {place}."
    if model is None and key in ELSEWHERE:
        return f"{message} {ELSEWHERE[key]}"
    if model is None and key in SECTIONS and isinstance(value, dict):
        return f"{message} Keys are flat: write what is inside {key} at the top level."
    if model is FsdpConfig:
        key = key.removeprefix(FsdpConfig.prefix)
        if key in INSIDE_FSDP:
            return f"{message} {INSIDE_FSDP[key]}"
    if model is not None and key in FIELDS:
        return f"{message} It belongs at the top level."
    for inner, (_, home) in _INNER.items():
        if inner is not model and (plain_name(key) if inner is FsdpConfig else key) in inner.model_fields:
            return f"{message} It belongs inside {home}."
    if (found := nearest(key, known)) or model is not None:
        return message + found
    # A misspelt key of another tool: what is said of the right one.
    return message + nearest(key, ELSEWHERE)


def nearest(key: str, known: Iterable[str]) -> str:
    """A sentence that names what was probably meant, or nothing."""
    names = {name.lower(): name for name in known}
    plain = key.lower().replace("-", "_")
    matches = difflib.get_close_matches(plain, names, n=1, cutoff=0.7)
    # `pad` for pad_token, `epochs` for num_epochs
    longer = [name for name in names if name.startswith(f"{plain}_") or name.endswith(f"_{plain}")]
    if not matches and len(longer) == 1:
        matches = longer
    return f" Did you mean {names[matches[0]]}?" if matches else ""
