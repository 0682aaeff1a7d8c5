"""The keys of LLaMA-Factory 0.9 (its v0 schema) beside those of transformers, and what each is here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from luthier.config.convert.arguments import TRANSFORMERS

TOOL = "LLaMA-Factory 0.9"

DEFAULTS: dict[str, tuple[Any, str]] = {
    **{key: (value, "transformers'") for key, value in TRANSFORMERS.items() if key != "gradient_checkpointing"},
    "gradient_checkpointing": (True, ""),
    "excess_length_strategy": ("truncate", ""),
}
OF_LORA: dict[str, tuple[Any, str]] = {"lora_r": (8, ""), "lora_target_linear": (True, "lora_target: all")}
OF_STREAMS: dict[str, tuple[Any, str]] = {"shuffle_buffer_size": (16384, "")}
OF_SIMPO: dict[str, tuple[Any, str]] = {"rl_beta": (0.1, ""), "simpo_gamma": (0.5, "")}

RENAMED = {
    "model_name_or_path": "base_model",
    "model_revision": "revision",
    "trust_remote_code": "trust_remote_code",
    "cutoff_len": "sequence_len",
    "train_on_prompt": "train_on_inputs",
    "preprocessing_num_workers": "dataset_processes",
    "tokenized_path": "dataset_prepared_path",
    "val_size": "val_set_size",
    "lora_rank": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "peft_use_rslora",
    "use_dora": "peft_use_dora",
    "loraplus_lr_ratio": "loraplus_lr_ratio",
    "loraplus_lr_embedding": "loraplus_lr_embedding",
    "quantization_type": "bnb_4bit_quant_type",
    "double_quantization": "bnb_4bit_use_double_quant",
    "pref_beta": "rl_beta",
    "dpo_label_smoothing": "label_smoothing",
    "kto_chosen_weight": "kto_desirable_weight",
    "kto_rejected_weight": "kto_undesirable_weight",
    "simpo_gamma": "simpo_gamma",
}

_FUSED = "fused kernels are used as they are, each proven on the model at hand"
_CACHE = "tokenised data is kept in a cache, by what it was made of"
_ANSWERS = "it is about answers; `luthier generate` has options for it"
_EXPORT = "`luthier merge-lora` and `luthier export` write the model after the training"
_LOADED = "weights are read from mapped files"
_IMAGES = "no images, videos or sounds are read"
_OTHER_ENGINE = "it is for answering; `luthier generate` and `luthier serve` do that"
NO_EFFECT = {
    "do_train": "`luthier train` trains",
    "overwrite_cache": _CACHE,
    "preprocessing_batch_size": _CACHE,
    "data_shared_file_system": _CACHE,
    "ignore_pad_token_for_loss": "padding is never computed here",
    "eval_on_each_dataset": "the loss of each test dataset is one figure with the others",
    "eval_num_beams": _ANSWERS,
    "do_sample": _ANSWERS,
    "temperature": _ANSWERS,
    "top_p": _ANSWERS,
    "top_k": _ANSWERS,
    "num_beams": _ANSWERS,
    "max_new_tokens": _ANSWERS,
    "max_length": _ANSWERS,
    "repetition_penalty": _ANSWERS,
    "length_penalty": _ANSWERS,
    "skip_special_tokens": _ANSWERS,
    "generation_max_length": _ANSWERS,
    "generation_num_beams": _ANSWERS,
    "generation_config": _ANSWERS,
    "predict_with_generate": _ANSWERS,
    "sortish_sampler": "padding is never computed here",
    "plot_loss": "the curves are in the run's report.html",
    "include_effective_tokens_per_second": "tokens and their speed are always counted",
    "compute_accuracy": "`luthier evaluate` measures a run",
    "print_param_status": "what is trained is always said",
    "cache_dir": "the hub's cache is where HF_HOME says",
    "use_fast_tokenizer": "tokenizers are fast ones wherever there is one",
    "low_cpu_mem_usage": _LOADED,
    "offload_folder": _LOADED,
    "use_unsloth": _FUSED,
    "enable_liger_kernel": _FUSED,
    "use_v1_kernels": _FUSED,
    "use_reentrant_gc": "what is computed again is so without reentrant autograd",
    "upcast_layernorm": "norms compute in fp32",
    "upcast_lmhead_output": "the loss is computed in fp32",
    "infer_backend": _OTHER_ENGINE,
    "infer_dtype": _OTHER_ENGINE,
    "use_kv_cache": _OTHER_ENGINE,
    "vllm_maxlen": _OTHER_ENGINE,
    "vllm_gpu_util": _OTHER_ENGINE,
    "vllm_enforce_eager": _OTHER_ENGINE,
    "vllm_max_lora_rank": _OTHER_ENGINE,
    "vllm_config": _OTHER_ENGINE,
    **{f"sglang_{name}": _OTHER_ENGINE for name in ("maxlen", "mem_fraction", "tp_size", "config", "lora_backend")},
    "hf_hub_token": "the hub's token is HF_TOKEN",
    "ms_hub_token": "the hub's token is HF_TOKEN",
    "om_hub_token": "the hub's token is HF_TOKEN",
    "quantization_device_map": "a base that is quantised is on its device",
    "pissa_iter": "it belongs to pissa_init",
    **{
        f"export_{name}": _EXPORT
        for name in (
            "dir", "size", "device", "quantization_bit", "quantization_dataset", "quantization_nsamples",
            "quantization_maxlen", "legacy_format", "hub_model_id",
        )
    },
    "freeze_vision_tower": _IMAGES,
    "freeze_multi_modal_projector": _IMAGES,
    "media_dir": _IMAGES,
    **{f"image_{name}": _IMAGES for name in ("max_pixels", "min_pixels", "do_pan_and_scan")},
    "crop_to_patches": _IMAGES,
    **{f"video_{name}": _IMAGES for name in ("max_pixels", "min_pixels", "fps", "maxlen")},
    "use_audio_in_video": _IMAGES,
    "audio_sampling_rate": _IMAGES,
    "asft_alpha": "it belongs to use_asft_loss",
    "eaft_alpha": "it belongs to use_eaft_loss",
    **{f"ppo_{name}": "it belongs to stage ppo" for name in (
        "buffer_size", "epochs", "score_norm", "target", "whiten_rewards",
    )},
    **{f"reward_model{name}": "it belongs to stage ppo" for name in ("", "_adapters", "_quantization_bit", "_type")},
    **{f"oft_{name}": "it belongs to finetuning_type oft" for name in ("rank", "block_size", "target")},
    "module_dropout": "it belongs to finetuning_type oft",
    **{f"freeze_{name}": "it belongs to finetuning_type freeze" for name in (
        "trainable_layers", "trainable_modules", "extra_modules",
    )},
    **{f"{tool}_{name}": f"it belongs to use_{tool}" for tool, names in {
        "galore": ("target", "rank", "update_interval", "scale", "proj_type", "layerwise"),
        "apollo": (
            "target", "rank", "update_interval", "scale", "proj", "proj_type", "scale_type", "layerwise", "scale_front",
        ),
        "badam": (
            "mode", "start_block", "switch_mode", "switch_interval", "update_ratio", "mask_mode", "verbose",
        ),
        "swanlab": (
            "project", "workspace", "run_name", "mode", "api_key", "logdir", "lark_webhook_url", "lark_secret",
        ),
    }.items() for name in names},
    **{f"kt_{name}": "it belongs to use_kt" for name in (
        "weight_path", "expert_checkpoint_path", "use_lora_experts", "lora_expert_num",
        "lora_expert_intermediate_size",
    )},
    **{f"ray_{name}": "`luthier train cfg.yml --launcher ray --num-workers N` says it" for name in (
        "num_workers", "init_kwargs", "run_name", "storage_path",
    )},
    "resources_per_worker": "`luthier train cfg.yml --launcher ray --num-workers N` says it",
    "master_addr": "`luthier train` says it (--rdzv-endpoint)",
    "master_port": "`luthier train` says it (--rdzv-endpoint)",
    **{f"profiler_{name}": "no profile is written" for name in (
        "output_dir", "wait_steps", "warmup_steps", "active_steps", "repeat", "record_shapes", "profile_memory",
        "with_stack",
    )},
    "enable_torch_profiler": "no profile is written",
    "profile_modules": "no profile is written",
    "fp8_backend": "it belongs to fp8",
    "fp8_enable_fsdp_float8_all_gather": "it belongs to fp8",
    "hyper_parallel_args": "it belongs to use_hyper_parallel",
}  # fmt: skip

_NOT_BUILT = "it is not built here."
REFUSED = {
    "mask_history": "all answers of a conversation are trained.",
    "pissa_convert": "an adapter is saved as it was trained.",
    "tool_format": "the chat template says how tools are set.",
    "resize_vocab": "the embeddings grow with tokens.",
    "split_special_tokens": "special tokens in rows are what the tokenizer makes of them.",
    "new_special_tokens_config": "write tokens, and lora_modules_to_save for the embeddings.",
    "rope_scaling": "write rope_parameters, with rope_type and factor.",
    "shift_attn": _NOT_BUILT,
    "mixture_of_depths": _NOT_BUILT,
    "moe_aux_loss_coef": "the router's auxiliary loss is not built here.",
    "train_from_scratch": "a model begins with its weights.",
    "adapter_folder": "write the adapter's own folder as adapter_name_or_path.",
    "create_new_adapter": "merge the first adapter by `luthier merge-lora`, and train on the result.",
    "ref_model": "the reference is the model as the run begins.",
    "ref_model_adapters": "the reference is the model as the run begins.",
    "ref_model_quantization_bit": "the reference is the model as the run begins.",
    "ld_alpha": "every token of an answer counts alike here.",
    "pref_bco_weight": "one loss is trained.",
    "use_galore": "GaLore and its kin are not built here.",
    "use_apollo": "GaLore and its kin are not built here.",
    "use_badam": _NOT_BUILT,
    "use_adam_mini": _NOT_BUILT,
    "use_llama_pro": _NOT_BUILT,
    "use_mca": _NOT_BUILT,
    "use_hyper_parallel": _NOT_BUILT,
    "use_kt": _NOT_BUILT,
    "use_dft_loss": _NOT_BUILT,
    "use_asft_loss": _NOT_BUILT,
    "use_eaft_loss": _NOT_BUILT,
    "use_swanlab": "trackers are tensorboard, wandb, trackio and mlflow.",
    "freeze_language_model": _NOT_BUILT,
    "fp8": "write `load_in_fp8: true` with `adapter: lora`.",
    "do_predict": "`luthier generate` answers prompts after the training.",
}

HANDLED = {
    "template", "default_system", "dataset", "eval_dataset", "dataset_dir", "max_samples", "mix_strategy", "packing",
    "neat_packing", "enable_thinking", "preserve_thinking", "stage", "finetuning_type", "lora_target",
    "additional_target", "pissa_init", "quantization_bit", "quantization_method", "flash_attn", "add_tokens",
    "add_special_tokens", "init_special_tokens", "adapter_name_or_path", "use_unsloth_gc",
    "disable_gradient_checkpointing", "pref_loss", "pref_ftx", "pure_bf16", "use_muon", "disable_shuffling",
    "early_stopping_steps", "interleave_probs", "streaming", "buffer_size",
}  # fmt: skip

ALL = {*RENAMED, *NO_EFFECT, *REFUSED, *HANDLED}


@dataclass(frozen=True, slots=True)
class Template:
    """How a template sets turns.

    Attributes:
        chat: the chat template of ours that is the same. user: a question up to the answer, with `{}` in it.
        system: the system text, where it is a turn of its own. default_system: that of rows that have none.
        ends: the token that ends a turn, where that is not the model's EOS already.
    """

    chat: str
    user: str
    system: str | None = None
    ends: str | None = None
    default_system: str | None = None


_CHATML = ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>system\n{}<|im_end|>\n")
_QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)
TEMPLATES = {
    "chatml": Template("chatml", *_CHATML, "<|im_end|>"),
    "qwen": Template("qwen_25", *_CHATML, "<|im_end|>", _QWEN),
    "qwen3": Template("qwen3", *_CHATML, "<|im_end|>"),
    "qwen3_nothink": Template("chatml", *_CHATML, "<|im_end|>"),
    "llama3": Template(
        "llama3",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        "<|eot_id|>",
    ),
    "phi": Template(
        "phi_3", "<|user|>\n{}<|end|>\n<|assistant|>\n", "<|system|>\n{}<|end|>\n", "<|end|>"
    ),
    "gemma": Template("gemma", "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n", ends="<end_of_turn>"),
    "mistral": Template("mistral_v2v3", "[INST] {}[/INST] "),
    "alpaca": Template("alpaca", "### Instruction:\n{}\n\n### Response:\n", "{}", default_system=_ALPACA),
}
"""Templates whose text is known, for rows that are no conversations."""
