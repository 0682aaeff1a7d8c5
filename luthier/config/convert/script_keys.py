"""The calls of Unsloth, TRL, PEFT and transformers that a script trains with, and what their arguments are here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from luthier.config.convert.conversion import Conversion

TOOL = "a script for Unsloth 2026.10, TRL 1.16 and PEFT 0.21"

Special = Callable[[Conversion, str, Any], None]


@dataclass(frozen=True, slots=True)
class Table:
    """What the arguments of one call are.

    Attributes:
        positional: names of arguments without a name. carried: ours. special: functions for what a table cannot say.
        no_effect, refused: why. passed_on: objects of the program, which are read where they are made. arguments:
            whether those of TrainingArguments are among them.
    """

    positional: tuple[str, ...] = ()
    carried: Mapping[str, str] = field(default_factory=dict)
    special: Mapping[str, Special] = field(default_factory=dict)
    no_effect: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    passed_on: frozenset[str] = frozenset()
    arguments: bool = False


def _dtype(into: Conversion, theirs: str, value: Any) -> None:
    if value in ("bfloat16", "auto"):
        into.carry(theirs, "bf16", True if value == "bfloat16" else "auto")
    elif value in ("float16", "half"):
        into.carry(theirs, "fp16", True)
    elif value == "float32":
        into.carry(theirs, "bf16", False)
    else:
        into.no_effect(theirs, "" if value is None else "bf16 and fp16 of the training say it")


def _loading(key: str) -> Special:
    def load(into: Conversion, theirs: str, value: Any) -> None:
        if value:
            into.carry(theirs, key, True)
        else:
            into.values[key] = False
            into.carried(theirs)

    return load


def _checkpointing(into: Conversion, theirs: str, value: Any) -> None:
    into.carry(theirs, "gradient_checkpointing", "offload" if value == "unsloth" else bool(value))


def _targets(into: Conversion, theirs: str, value: Any) -> None:
    if value == "all-linear":
        into.carry(theirs, "lora_target_linear", True)
    elif value is None:
        into.no_effect(theirs)
    else:
        into.carry(theirs, "lora_target_modules", value)


def _bias(into: Conversion, theirs: str, value: Any) -> None:
    if value in (None, "none"):
        into.no_effect(theirs, "biases stay as they are")
    else:
        into.unsupported(theirs, f"{value}: biases stay as they are.")


def _initial(into: Conversion, theirs: str, value: Any) -> None:
    into.carry(theirs, "peft_init_lora_weights", value)


def _loftq(into: Conversion, theirs: str, value: Any) -> None:
    if value:
        into.carry(theirs, "loftq_config", value)
    else:
        into.no_effect(theirs)


def _task(into: Conversion, theirs: str, value: Any) -> None:
    if value in (None, "CAUSAL_LM"):
        into.no_effect(theirs, "models here write from left to right")
    else:
        into.unsupported(theirs, f"{value}: models here write from left to right.", essential=True)


def _rope(into: Conversion, theirs: str, value: Any) -> None:
    if not value:
        into.no_effect(theirs)
    elif isinstance(value, dict):
        renamed = {("rope_type" if key == "type" else key): item for key, item in value.items()}
        into.carry(theirs, "rope_parameters", renamed)
    else:
        into.unsupported(theirs, "write rope_parameters, with rope_type and factor.")


def _template(into: Conversion, theirs: str, value: Any) -> None:
    name = TEMPLATES.get(str(value), str(value).replace("-", "_"))
    into.carry(theirs, "chat_template", name)


TEMPLATES = {
    "qwen-2.5": "qwen_25", "qwen2.5": "qwen_25", "qwen25": "qwen_25", "qwen-3": "qwen3", "llama-3": "llama3",
    "llama-3.1": "llama3", "llama-3.2": "llama3", "llama-3.3": "llama3", "phi-3": "phi_3", "phi-3.5": "phi_3",
    "phi-4": "phi_4", "gemma2": "gemma", "mistral": "mistral_v2v3", "llama": "llama2",
}  # fmt: skip
"""Unsloth's names of chat templates that have another name here."""

_MEMORY = "memory is planned by the run itself"
_ENGINE = "it is for answering; `luthier generate` and `luthier serve` do that"
_SEED = "the adapter is drawn from seed"
_LOADED = "it is about how the model is loaded here and now"

_MODEL = Table(
    positional=("model_name",),
    carried={
        "model_name": "base_model",
        "pretrained_model_name_or_path": "base_model",
        "max_seq_length": "sequence_len",
        "revision": "revision",
        "trust_remote_code": "trust_remote_code",
        "attn_implementation": "attn_implementation",
        "device_map": "device_map",
    },
    special={
        "dtype": _dtype,
        "torch_dtype": _dtype,
        "load_in_4bit": _loading("load_in_4bit"),
        "load_in_8bit": _loading("load_in_8bit"),
        "load_in_fp8": _loading("load_in_fp8"),
        "rope_scaling": _rope,
        "use_gradient_checkpointing": _checkpointing,
    },
    no_effect={
        "token": "the hub's token is HF_TOKEN",
        "use_auth_token": "the hub's token is HF_TOKEN",
        "cache_dir": "the hub's cache is where HF_HOME says",
        "low_cpu_mem_usage": _LOADED,
        "load_in_16bit": "it is how a model is loaded that is not quantised",
        "full_finetuning": "a model without an adapter is trained itself",
        "fix_tokenizer": "the tokenizer is taken as it is, and checked",
        "use_exact_model_name": "names are taken as they are",
        "use_cache": "training keeps no cache",
        "fast_inference": _ENGINE,
        "gpu_memory_utilization": _ENGINE,
        "float8_kv_cache": _ENGINE,
        "disable_log_stats": _ENGINE,
        "max_lora_rank": _ENGINE,
        "random_state": _SEED,
        "unsloth_tiled_mlp": "tiled_mlp is auto",
        "offload_embedding": _MEMORY,
        "text_only": "models here read text",
        "device_map_planner_kwargs": _MEMORY,
        "max_memory": _MEMORY,
    },
    refused={
        "qat_scheme": "training for a quantised model is not built here.",
        "resize_model_vocab": "the embeddings grow with tokens.",
        "float32_mixed_precision": "write `bf16: false` for fp32.",
    },
    passed_on=frozenset({"quantization_config", "config"}),
)
_PEFT = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "peft_use_rslora",
    "use_dora": "peft_use_dora",
    "modules_to_save": "lora_modules_to_save",
    "layers_to_transform": "peft_layers_to_transform",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "target_parameters": "lora_target_parameters",
}
_PEFT_SPECIAL: dict[str, Special] = {
    "target_modules": _targets,
    "bias": _bias,
    "init_lora_weights": _initial,
    "loftq_config": _loftq,
    "task_type": _task,
}
_PEFT_REFUSED = {
    "layers_pattern": "lora_target_modules takes a regular expression for full names.",
    "finetune_last_n_layers": "write peft_layers_to_transform.",
    "layer_replication": "it is not built here.",
    "exclude_modules": "name the modules that are meant in lora_target_modules.",
    "trainable_token_indices": "write lora_modules_to_save for whole embeddings.",
    "qat_scheme": "training for a quantised model is not built here.",
    "megatron_config": "it is not built here.",
    "use_qalora": "it is not built here.",
}
_PEFT_NO_EFFECT = {
    "random_state": _SEED,
    "max_seq_length": "the model's own call says it",
    "temporary_location": _MEMORY,
    "inference_mode": "training trains",
    "fan_in_fan_out": "it is seen from the layers",
    "base_model_name_or_path": "base_model says it",
    "ensure_weight_tying": "tied weights stay tied",
    "offload_layers": _MEMORY,
    "checkpoint_skip_layers": _MEMORY,
    "finetune_vision_layers": "models here read text",
    "finetune_language_layers": "models here read text",
}
_OBJECTS = frozenset({
    "model", "args", "tokenizer", "processing_class", "train_dataset", "eval_dataset", "peft_config",
})  # fmt: skip
_TRAINER = Table(
    positional=("model",),
    no_effect={"data_collator": "no padding is ever computed, and columns say what is trained"},
    refused={
        "callbacks": "code of its own is not run here.",
        "compute_metrics": "`luthier evaluate` measures a run.",
        "formatting_func": "code of its own is not run here: write what it makes of a row as type.",
        "optimizers": "write optimizer and lr_scheduler.",
        "ref_model": "the reference is the model as the run begins.",
        "model_init": "a model begins with its weights.",
        "compute_loss_func": "code of its own is not run here.",
        "preprocess_logits_for_metrics": "code of its own is not run here.",
        "dataset_kwargs": "write what is in it as keys of a dataset entry.",
    },
    passed_on=_OBJECTS | {"dataset_text_field"},
    arguments=True,
)
_ARGUMENTS = Table(positional=("output_dir",), arguments=True, passed_on=frozenset({
    "dataset_text_field", "assistant_only_loss", "completion_only_loss", "dataset_kwargs",
}), refused={"embedding_learning_rate": "write lr_groups, with the names of the embeddings as modules."})  # fmt: skip

LOADERS = ("FastLanguageModel.from_pretrained", "FastModel.from_pretrained", "AutoModelForCausalLM.from_pretrained")
ADAPTERS = ("FastLanguageModel.get_peft_model", "FastModel.get_peft_model", "LoraConfig")
TRAINERS: dict[str, str | None] = {
    "SFTTrainer": None,
    "UnslothTrainer": None,
    "Trainer": None,
    "DPOTrainer": "dpo",
    "ORPOTrainer": "orpo",
    "KTOTrainer": "kto",
    "CPOTrainer": "simpo",
    "GRPOTrainer": "",
    "PPOTrainer": "",
    "RewardTrainer": "",
    "OnlineDPOTrainer": "",
}
"""Trainers and their method here; none for fine-tuning, an empty one for what is not built."""

CALLS: dict[str, Table] = {
    **dict.fromkeys(LOADERS, _MODEL),
    **dict.fromkeys(
        ADAPTERS[:2],
        Table(
            positional=("model",),
            carried=_PEFT,
            special=_PEFT_SPECIAL | {"use_gradient_checkpointing": _checkpointing},
            no_effect=_PEFT_NO_EFFECT,
            refused=_PEFT_REFUSED,
            passed_on=frozenset({"model"}),
        ),
    ),
    "LoraConfig": Table(
        positional=("task_type",),
        carried=_PEFT,
        special=_PEFT_SPECIAL,
        no_effect=_PEFT_NO_EFFECT,
        refused=_PEFT_REFUSED,
    ),
    "BitsAndBytesConfig": Table(
        carried={name: name for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")},
        special={"load_in_4bit": _loading("load_in_4bit"), "load_in_8bit": _loading("load_in_8bit")},
        no_effect={
            "bnb_4bit_compute_dtype": "the run's own precision is what is computed in",
            "bnb_4bit_quant_storage": "the run's own precision is what is computed in",
        },
        refused={"llm_int8_threshold": "bitsandbytes' other settings stay as they are."},
    ),
    "get_chat_template": Table(
        positional=("tokenizer", "chat_template"),
        special={"chat_template": _template},
        no_effect={"map_eos_token": "the token that ends a turn is found from the chat template"},
        refused={
            "mapping": "write message_property_mappings and roles into the dataset's entry.",
            "system_message": "write the system text into the rows, or into a chat template of your own.",
        },
        passed_on=frozenset({"tokenizer"}),
    ),
    "AutoTokenizer.from_pretrained": Table(
        positional=("pretrained_model_name_or_path",),
        no_effect={
            "use_fast": "tokenizers are fast ones wherever there is one",
            "padding_side": "no padding is ever computed",
            "token": "the hub's token is HF_TOKEN",
            "model_max_length": "sequence_len says it",
        },
        carried={"pretrained_model_name_or_path": "tokenizer_config", "trust_remote_code": "trust_remote_code"},
    ),
    **dict.fromkeys(
        (
            "TrainingArguments", "Seq2SeqTrainingArguments", "UnslothTrainingArguments", "SFTConfig", "DPOConfig",
            "KTOConfig", "ORPOConfig", "CPOConfig",
        ),
        _ARGUMENTS,
    ),
    **dict.fromkeys(TRAINERS, _TRAINER),
}  # fmt: skip

ASKS_FOR_BF16 = re.compile(r"is_bfloat16_supported\(\)|is_bf16_supported\(\)")
"""What notebooks write for bf16 and fp16, which is `auto` here."""

OF_BITSANDBYTES: dict[str, Any] = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
OF_UNSLOTH: dict[str, Any] = {"load_in_4bit": True, "sequence_len": 2048, "gradient_checkpointing": "offload"}
ADAPTER_OF_UNSLOTH: dict[str, Any] = {
    "lora_alpha": 16.0,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gradient_checkpointing": "offload",
}
ADAPTER_OF_PEFT: dict[str, Any] = {"lora_r": 8, "lora_alpha": 8.0, "lora_target_modules": ["q_proj", "v_proj"]}
OF_SIMPO: dict[str, Any] = {"rl_beta": 0.1, "simpo_gamma": 0.5, "cpo_alpha": 1.0}
