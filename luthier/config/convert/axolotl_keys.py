"""The keys of Axolotl 0.19, and what each is here; what takes more than a table is in `axolotl`.

A key that has the same name here is in none of these tables: it is carried over.
"""

from __future__ import annotations

from typing import Any

from luthier.config.convert.axolotl_plugins import PLUGINS

TOOL = "Axolotl 0.19"

DEFAULTS: dict[str, tuple[Any, str]] = {
    "sequence_len": (512, ""),
    "micro_batch_size": (1, ""),
    "gradient_checkpointing": (False, ""),
    "tf32": ("auto", ""),
    "warmup_ratio": (0.03, "there at most 100 steps"),
    "logging_steps": (0.005, "there at most every 10 steps"),
    "save_total_limit": (4, ""),
}
"""What Axolotl does where a file says nothing, as keys of ours, where ours is another."""
OF_SAMPLES: dict[str, tuple[Any, str]] = {
    "num_generation_samples": (3, ""),
    "generation_max_new_tokens": (50, ""),
    "generation_temperature": (0.7, ""),
    "generation_do_sample": (True, ""),
}
OF_SIMPO: dict[str, tuple[Any, str]] = {"rl_beta": (0.1, "TRL's"), "cpo_alpha": (1.0, "TRL's")}

RENAMED = {
    "dataset_num_proc": "dataset_processes",
    "dpo_beta": "rl_beta",
    "dpo_label_smoothing": "label_smoothing",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "type_of_model": "model_type",
    "revision_of_model": "revision",
    "model_revision": "revision",
}

OTHERWISE = {
    "dataset_exact_deduplication": "rows in both leave the training data here, the evaluation data there",
}
"""Keys of the same name, and what is not quite the same about them."""

ATTENTION = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
    "flex_attention": "flex_attention",
}
"""Switches of one kind of attention each, and the value of attn_implementation."""

_PADDING = "padding is never computed here"
_FUSED = "fused kernels are used as they are, each proven on the model at hand"
_LOADER = "rows are read from a mapped file, in the run's own order"
_LAUNCH = "`luthier train` says it (--num-processes, --nnodes)"
_RAY = "`luthier train cfg.yml --launcher ray --num-workers N` says it"
_MEMORY = "memory is freed where it runs out, and weights are read from mapped files"
_FAMILY = "the model's own config says it"
_MEASURED = "tokens and their speed are always counted"
_PACKING = "documents are packed as they come, without a search over bins"
_SERVE = "`luthier chat` and `luthier serve` open a model"
NO_EFFECT = {
    "strict": "unknown keys are always errors here",
    "pad_to_sequence_len": _PADDING,
    "pad_to_multiple_of": _PADDING,
    "group_by_length": _PADDING,
    "batch_flattening": _PADDING,
    "dpo_padding_free": _PADDING,
    "dpo_use_logits_to_keep": "logits are only ever computed for tokens of answers",
    "eval_sample_packing": "evaluation gives the same numbers packed or not",
    "sample_packing_group_size": _PACKING,
    "sample_packing_bin_size": _PACKING,
    "sample_packing_sequentially": _PACKING,
    "sample_packing_mp_start_method": _PACKING,
    "sample_packing_eff_est": _PACKING,
    "multipack_real_batches": _PACKING,
    "pretrain_multipack_attn": "packed documents never see each other here",
    "total_num_tokens": "tokens are counted",
    "total_supervised_tokens": "tokens are counted",
    "gradient_checkpointing_kwargs": "what is computed again is so without reentrant autograd",
    "lora_mlp_kernel": _FUSED,
    "lora_qkv_kernel": _FUSED,
    "lora_o_kernel": _FUSED,
    "lora_embedding_kernel": _FUSED,
    "flash_attn_cross_entropy": _FUSED,
    "flash_attn_fuse_mlp": _FUSED,
    "flash_attn_rms_norm": _FUSED,
    "flash_optimum": _FUSED,
    "fused_attn_kernel": _FUSED,
    "chunked_cross_entropy": "the head's loss is always computed in chunks",
    "chunked_cross_entropy_num_chunks": "the head's loss is always computed in chunks",
    "dpo_use_liger_kernel": "the head's loss is always computed in chunks",
    "use_kernels": _FUSED,
    "experts_implementation": _FUSED,
    "torch_compile": _FUSED,
    "torch_compile_backend": _FUSED,
    "torch_compile_mode": _FUSED,
    "torch_compile_options": _FUSED,
    "tiled_mlp_num_shards": "a tile has as many tokens as run at full speed",
    "tiled_mlp_use_original_mlp": "tiles are of the MLP that the model has",
    "sdpa_varlen": "packed documents are never masked by a whole matrix here",
    "flash_attn_d512": _FUSED,
    "large_head_attention": _FUSED,
    "gemma4_hybrid_attn_impl": _FUSED,
    "flex_attn_compile_kwargs": _FUSED,
    "lora_fan_in_fan_out": "it is seen from the layers",
    "lora_on_cpu": _MEMORY,
    "qlora_sharded_model_loading": _MEMORY,
    "peft_autocast_adapter_dtype": "an adapter's masters are always fp32",
    "merge_lora": "`luthier merge-lora` merges",
    "merge_method": "`luthier merge-lora` merges",
    "embeddings_skip_upcast": "frozen weights stay as they are",
    "mean_resizing_embeddings": "rows of added tokens begin with the mean of the others",
    "resize_token_embeddings_to_32x": "the embeddings have as many rows as there are tokens",
    "low_cpu_mem_usage": _MEMORY,
    "max_memory": _MEMORY,
    "gpu_memory_limit": _MEMORY,
    "experimental_skip_move_to_device": _MEMORY,
    "ple_cpu_offload": _MEMORY,
    "gc_steps": _MEMORY,
    "gc_collect_steps": _MEMORY,
    "torch_empty_cache_steps": _MEMORY,
    "auto_find_batch_size": "a step is cut into passes that memory holds",
    "shuffle_merged_datasets": "rows are drawn in a random order, which the seed fixes",
    "shuffle_before_merging_datasets": "rows are drawn in a random order, which the seed fixes",
    "dataset_keep_in_memory": _LOADER,
    "dataloader_pin_memory": _LOADER,
    "dataloader_num_workers": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "dataloader_drop_last": "the last step of an epoch has the rows that are left",
    "accelerator_config": "batches are the run's own, the same on any number of processes",
    "remove_unused_columns": "columns that a type does not read are never in the way",
    "skip_prepare_dataset": "tokenised data is kept in a cache",
    "num_dataset_shards_to_save": "tokenised data is kept in a cache",
    "is_preprocess": "tokenised data is kept in a cache",
    "preprocess_iterable": "tokenised data is kept in a cache",
    "hf_use_auth_token": "the hub's token is HF_TOKEN",
    "axolotl_config_path": "the run folder holds its config",
    "tokenizer_save_jinja_files": "the chat template is always saved beside the tokenizer",
    "tokenizer_use_mistral_common": "tokenizers are those of transformers",
    "is_falcon_derived_model": _FAMILY,
    "is_llama_derived_model": _FAMILY,
    "is_mistral_derived_model": _FAMILY,
    "is_qwen_derived_model": _FAMILY,
    "wandb_watch": "gradients are not sent to trackers",
    "wandb_run_id": "a resumed run goes on by itself",
    "save_safetensors": "weights are always written as safetensors",
    "save_only_model": "a checkpoint is whole, so that a run can go on from it",
    "save_first_step": "checkpoints are written every save_steps",
    "hub_strategy": "nothing is uploaded while training",
    "hub_revision": "nothing is uploaded while training",
    "profiler_steps": "no profile is written",
    "profiler_steps_start": "no profile is written",
    "include_tokens_per_second": _MEASURED,
    "include_tkps": _MEASURED,
    "world_size": _LAUNCH,
    "local_rank": _LAUNCH,
    "ddp_bucket_cap_mb": "gradients are added up once a step, in buckets of the run's own",
    "ddp_broadcast_buffers": "buffers are those of the loaded model, and no step changes them",
    "ddp_find_unused_parameters": "parameters without a gradient are never waited for",
    "fsdp_final_state_dict_type": "the finished model is written in ordinary files",
    "heads_k_stride": "a document is computed on one GPU whole",
    "ring_attn_func": "a document is computed on one GPU whole",
    "use_ray": _RAY,
    "ray_run_name": _RAY,
    "ray_num_workers": _RAY,
    "resources_per_worker": _RAY,
    "gradio_title": _SERVE,
    "gradio_share": _SERVE,
    "gradio_server_name": _SERVE,
    "gradio_server_port": _SERVE,
    "gradio_max_new_tokens": _SERVE,
    "gradio_temperature": _SERVE,
    "generation_prompt_ratio": "a sample answers a row's prompt",
    "eaft_alpha": "it belongs to use_eaft",
    "eaft_k": "it belongs to use_eaft",
    "relora_prune_ratio": "it belongs to relora",
    "relora_prune_method": "it belongs to relora",
    "relora_cpu_offload": "it belongs to relora",
    "lisa_step_interval": "it belongs to lisa_n_layers",
    "lisa_layers_attribute": "it belongs to lisa_n_layers",
    "fp8_config": "it belongs to fp8",
    "fp8_enable_fsdp_float8_all_gather": "it belongs to fp8",
    "fp32_norm_classes": "it belongs to fp32_norms",
    "otel_metrics_host": "it belongs to use_otel_metrics",
    "otel_metrics_port": "it belongs to use_otel_metrics",
    **{
        f"qgalore_{name}": "it belongs to the optimizer q_galore_adamw8bit"
        for name in (
            "rank", "update_proj_gap", "scale", "proj_type", "proj_quant", "proj_bits", "proj_group_size",
            "cos_threshold", "gamma_proj", "queue_size",
        )
    },
    **{
        f"dion_{name}": "it belongs to the optimizer dion"
        for name in ("lr", "momentum", "rank_fraction", "rank_multiple_of")
    },
    "torchdistx_path": "it belongs to the optimizer adamw_anyprecision",
}  # fmt: skip
"""Keys that do nothing here, and why."""

_IMAGES = "models that see or hear are not trained here."
_ONE_GPU = "a document is computed on one GPU whole; `gradient_checkpointing: offload` makes room for long ones."
_ATTENTION = "write attn_implementation, with a name that transformers has."
_ELSEWHERE = "set it as its tracker's own environment variable."
_NOT_BUILT = "it is not built here."
REFUSED = {
    "neftune_noise_alpha": "noise on embeddings is not built here.",
    "noisy_embedding_alpha": "noise on embeddings is not built here.",
    "layer_offloading": "write `gradient_checkpointing: offload`, or share weights by `fsdp_version: 2`.",
    "selective_checkpointing": "`gradient_checkpointing: auto` recomputes the cheap parts first.",
    "fp8": "write `load_in_fp8: true` with `adapter: lora`.",
    "fp32_norms": _NOT_BUILT,
    "xformers_attention": _ATTENTION,
    "sage_attention": _ATTENTION,
    "s2_attention": _ATTENTION,
    "scaling_softmax": _NOT_BUILT,
    "scaling_softmax_factor": _NOT_BUILT,
    "scaling_softmax_bias": _NOT_BUILT,
    "use_eaft": _NOT_BUILT,
    "relora": _NOT_BUILT,
    "lisa_n_layers": _NOT_BUILT,
    "jagged_restart_steps": _NOT_BUILT,
    "jagged_restart_warmup_steps": _NOT_BUILT,
    "jagged_restart_anneal_steps": _NOT_BUILT,
    "lr_quadratic_warmup": _NOT_BUILT,
    "cosine_constant_lr_ratio": _NOT_BUILT,
    "lr_div_factor": _NOT_BUILT,
    "embedding_lr": "write lr_groups, with the names of the embeddings as modules.",
    "embedding_lr_scale": "write lr_groups, with the names of the embeddings as modules.",
    "optim_target_modules": "GaLore and its kin are not built here.",
    "adam_beta3": "no optimizer here has it; optim_args holds what one has beside Adam's.",
    "adam_epsilon2": "no optimizer here has it.",
    "gptq": "bases are quantised by bitsandbytes: load_in_4bit, load_in_8bit.",
    "peft_layers_pattern": "lora_target_modules takes a regular expression for full names.",
    "peft_layer_replication": _NOT_BUILT,
    "peft_trainable_token_indices": "write lora_modules_to_save for whole embeddings.",
    "peft_ensure_weight_tying": _NOT_BUILT,
    "model_quantization_config": "bases are quantised by bitsandbytes: load_in_4bit, load_in_8bit.",
    "model_quantization_config_kwargs": "bases are quantised by bitsandbytes: load_in_4bit, load_in_8bit.",
    "use_onebitllms": _NOT_BUILT,
    "quantize_moe_experts": _NOT_BUILT,
    "llama4_linearized_experts": _NOT_BUILT,
    "overrides_of_model_kwargs": "write what is in it at the top level.",
    "model_kwargs": "write what is in it at the top level.",
    "cls_model_config": "the model's class says which config it has.",
    "tokenizer_legacy": "tokenizers are loaded as their files say.",
    "added_tokens_overrides": "write tokens, which are added behind the vocabulary.",
    "shrink_embeddings": _NOT_BUILT,
    "reinit_weights": "a model begins with its weights.",
    "fix_untrained_tokens": _NOT_BUILT,
    "default_system_message": "write the system text into the rows, or into a chat template of your own.",
    "trainer_cls": "code of its own is not run here.",
    "dataset_shard_num": "write `path: FILE#N` for the first N rows.",
    "dataset_shard_idx": "write `path: FILE#N` for the first N rows.",
    "push_dataset_to_hub": _NOT_BUILT,
    "pretraining_sample_concatenation": "write `sample_packing: true`, which keeps documents apart.",
    "eval_sequence_len": "sequence_len is that of evaluation too.",
    "min_sample_len": "rows are trained however short they are.",
    "use_pose": _NOT_BUILT,
    "pose_split_on_token_ids": _NOT_BUILT,
    "pose_max_context_len": _NOT_BUILT,
    "pose_num_chunks": _NOT_BUILT,
    "do_causal_lm_eval": "`luthier evaluate` measures a run.",
    "eval_causal_lm_metrics": "`luthier evaluate` measures a run.",
    "do_bench_eval": "`luthier evaluate` measures a run.",
    "bench_dataset": "`luthier evaluate` measures a run.",
    "bench_split": "`luthier evaluate` measures a run.",
    "eval_table_size": "write num_generation_samples.",
    "eval_max_new_tokens": "write generation_max_new_tokens, with num_generation_samples.",
    "loss_watchdog_threshold": "a run ends where its loss is not finite; early_stopping_patience looks at evaluations.",
    "loss_watchdog_patience": "a run ends where its loss is not finite; early_stopping_patience looks at evaluations.",
    "dynamic_checkpoint": "SIGTERM ends a run after its step, with a checkpoint.",
    "hub_model_id": "`luthier push` uploads after the training.",
    "deepcompile": _NOT_BUILT,
    "context_parallel_size": _ONE_GPU,
    "sequence_parallel_degree": _ONE_GPU,
    "tensor_parallel_size": "for a model that is too large for one GPU write `fsdp_version: 2`.",
    "max_packed_sequence_len": "write sequence_len with `sample_packing: true`.",
    "rope_scaling": "write rope_parameters, with rope_type and factor.",
    "dpo_generate_during_eval": "write `generate_samples: true`.",
    "dpo_norm_loss": "write `dpo_loss_type: sigmoid_norm`.",
    "dpo_use_weighting": _NOT_BUILT,
    "dpo_loss_weights": "one loss is trained.",
    "center_rewards_coefficient": "reward models are not trained here.",
    "num_labels": "reward models are not trained here.",
    "vllm": "it is for methods that generate answers while they train, and there are none here.",
    "ebft": "it is for methods that generate answers while they train, and there are none here.",
    "quantization": "`luthier export` writes a model in 4 bits or as GGUF.",
    "image_size": _IMAGES,
    "image_resize_algorithm": _IMAGES,
    "processor_type": _IMAGES,
    "processor_kwargs": _IMAGES,
    "freeze_mm_modules": _IMAGES,
    "role_boundaries": _IMAGES,
    **{
        f"mlflow_{name}": _ELSEWHERE for name in ("tracking_uri", "experiment_name", "run_name")
    },
    "hf_mlflow_log_artifacts": _ELSEWHERE,
    **{f"trackio_{name}": _ELSEWHERE for name in ("project_name", "run_name", "space_id")},
    "use_otel_metrics": "figures go to metrics.jsonl and the trackers of report_to.",
    "use_comet": "trackers are tensorboard, wandb, trackio and mlflow.",
    **{
        f"comet_{name}": "trackers are tensorboard, wandb, trackio and mlflow."
        for name in (
            "api_key", "workspace", "project_name", "experiment_key", "mode", "online", "experiment_config",
        )
    },
}  # fmt: skip
"""Keys that would change a run and cannot, and what to write instead."""

ESSENTIAL = {
    "reward_model": "reward models are not trained here.",
    "process_reward_model": "reward models are not trained here.",
    "qat": "training for a quantised model is not built here.",
}
"""The same, where leaving the key out would make it a run of another kind."""

HANDLED = {
    *ATTENTION,
    "activation_offloading", "auto_resume_from_checkpoints", "base_model_config", "batch_size", "bfloat16", "float16",
    "float32", "bnb_config_kwargs", "curriculum_sampling", "device", "eval_strategy", "evaluation_strategy", "fsdp",
    "greater_is_better", "lr_scheduler_kwargs", "metric_for_best_model", "overrides_of_model_config", "model_config",
    "peft", "plugins", "pretraining_dataset", "save_strategy", "tokenizer_use_fast", "trl", "use_mlflow",
    "use_tensorboard", "use_trackio", "use_wandb", "wandb_log_model", "streaming",
    "streaming_multipack_buffer_size", "pretrain_multipack_buffer_size",
}  # fmt: skip
"""Keys that `axolotl` has a function for."""
MAPPINGS = {
    "bnb_config_kwargs", "fsdp_config", "lr_scheduler_kwargs", "model_config", "overrides_of_model_config", "peft",
    "special_tokens", "trl",
}  # fmt: skip
"""Those of them that are mappings."""

SAME = {
    "adam_beta1", "adam_beta2", "adam_epsilon", "adapter", "attn_implementation", "base_model", "bf16",
    "chat_template", "chat_template_jinja", "chat_template_kwargs", "cosine_min_lr_ratio", "cpo_alpha",
    "dataset_prepared_path", "dataset_processes", "datasets", "ddp", "ddp_timeout", "deepspeed", "device_map",
    "dp_replicate_size", "dp_shard_size", "dpo_loss_type", "early_stopping_patience", "eot_tokens", "eval_batch_size",
    "eval_steps", "evals_per_epoch", "excess_length_strategy", "fp16", "fsdp_config", "fsdp_version",
    "generate_samples", "generation_do_sample", "generation_max_new_tokens", "generation_temperature",
    "generation_top_k", "generation_top_p", "gradient_accumulation_steps", "gradient_checkpointing",
    "kto_desirable_weight", "kto_undesirable_weight", "learning_rate", "load_best_model_at_end", "load_in_4bit",
    "load_in_8bit", "logging_steps", "lora_alpha", "lora_dropout", "lora_model_dir", "lora_modules_to_save", "lora_r",
    "lora_target_linear", "lora_target_modules", "lora_target_parameters", "loraplus_lr_embedding",
    "loraplus_lr_ratio", "lr_groups", "lr_scheduler", "max_grad_norm", "max_prompt_len", "max_steps",
    "micro_batch_size", "model_type", "num_epochs", "num_generation_samples", "optim_args", "optimizer",
    "orpo_alpha", "output_dir", "peft_init_lora_weights", "peft_layers_to_transform", "peft_use_dora",
    "peft_use_rslora", "precompute_ref_log_probs", "resume_from_checkpoint", "rl", "rl_beta", "rpo_alpha",
    "sample_packing", "save_steps", "save_total_limit", "saves_per_epoch", "seed", "sequence_len", "simpo_gamma",
    "special_tokens", "test_datasets", "tf32", "tiled_mlp", "tokenizer_config", "tokenizer_type", "tokens",
    "train_on_inputs", "trust_remote_code", "unfrozen_parameters", "val_set_size", "wandb_entity", "wandb_mode",
    "wandb_name", "wandb_project", "warmup_ratio", "warmup_steps", "weight_decay",
}  # fmt: skip
"""Keys with the same name and meaning here, for guesses at what was meant."""

ENTRY_NO_EFFECT = {
    "trust_remote_code": "no code of a dataset is run",
    "preprocess_shards": "rows are read in one pass",
}
ENTRY_REFUSED = {
    "shards": "write `path: FILE#N` for the first N rows.",
    "shards_idx": "write `path: FILE#N` for the first N rows.",
    "skip": "write `path: FILE#N` for the first N rows.",
    "input_format": "write a mapping as type, with format.",
    "input_transform": "code of its own is not run here.",
    "chat_template_jinja": "write the path of a .jinja file as chat_template.",
    "field_human": "write `type: chat_template` with message_property_mappings.",
    "field_model": "write `type: chat_template` with message_property_mappings.",
    "field_thinking": "the chat template says how thinking is set.",
    "template_thinking_key": "the chat template says how thinking is set.",
    "split_thinking": "the chat template says how thinking is set.",
    "message_field_training": "a message has `train: true` or `train: false`.",
    "message_field_training_detail": "parts of a message are not trained by themselves.",
    "drop_system_message": "leave the system text out of the rows.",
    "train_on_eot": "train_on_eos says it for the tokens that end a turn.",
    "logprobs_field": "distillation is not built here.",
    "temperature": "distillation is not built here.",
    "step_separator": "reward models are not trained here.",
    "max_completion_length": "sequence_len bounds prompt and answer together.",
    "train_on_last_step_only": "reward models are not trained here.",
    "length": "made-up rows are not built here.",
    "sequence_length": "made-up rows are not built here.",
    "min_input_id": "made-up rows are not built here.",
    "max_input_id": "made-up rows are not built here.",
    "seed": "made-up rows are not built here.",
}
ENTRY_HANDLED = {"conversation", "text_column"}

TYPES: dict[str, dict[str, str]] = {
    "chat_template.default": {"type": "chat_template"},
    "sharegpt": {"type": "chat_template", "field_messages": "conversations"},
    "chat_template.load_default": {"type": "chat_template"},
    "pretrain": {"type": "completion"},
    "gpteacher": {"type": "alpaca", "field_output": "response"},
    "oasst": {"type": "alpaca", "field_instruction": "INSTRUCTION", "field_output": "RESPONSE"},
}
"""Types of rows that are another one here, with columns of their own."""

TEMPLATES = {
    "alpaca", "chatml", "deepseek", "deepseek_v3", "gemma", "gemma2", "gemma3", "jinja", "llama2", "llama3", "llama_2",
    "llama_3", "mistral", "mistral_tekken", "mistral_v1", "mistral_v2v3", "mistral_v3_tekken", "phi", "phi3", "phi4",
    "phi_3", "phi_35", "phi_4", "qwen", "qwen2", "qwen25", "qwen3", "qwen_25", "qwen_3", "tokenizer_default", "vicuna",
    "zephyr",
}  # fmt: skip
"""Chat templates that have a name here."""

ALL = {*SAME, *RENAMED, *NO_EFFECT, *REFUSED, *ESSENTIAL, *HANDLED} | {
    key for keys in PLUGINS.values() for key in keys
}
