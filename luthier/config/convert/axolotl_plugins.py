"""The plugins that come with Axolotl 0.19, and their keys, which exist only in a file that lists the plugin."""

from __future__ import annotations

_LIGER = "axolotl.integrations.liger"
_SPEED = "fused kernels are used as they are, each proven on the model at hand"
PLUGINS: dict[str, dict[str, str]] = {
    _LIGER: {
        **dict.fromkeys(
            (
                "liger_rope", "liger_rms_norm", "liger_rms_norm_gated", "liger_layer_norm", "liger_swiglu",
                "liger_glu_activation", "liger_cross_entropy", "liger_fused_linear_cross_entropy", "liger_kernel_impl",
            ),
            _SPEED,
        ),
        "liger_use_token_scaling": "",
    },
    "axolotl.integrations.cut_cross_entropy": {"cut_cross_entropy": "the head's loss is always computed in chunks"},
    "axolotl.integrations.kernels": {
        **dict.fromkeys(
            (
                "expert_backend", "moe_grouped_backend", "moe_dequant_chunk_size", "moe_bnb_fast", "use_scattermoe",
                "use_sonicmoe", "use_dsv4_kernels", "use_glm_dsa_kernels", "dsv4_fp8_lora_kernel",
                "dsv4_shared_mlp_lora_kernel", "dsv4_fp4_grouped_mode",
            ),
            _SPEED,
        ),
        **dict.fromkeys(
            (
                "nonexpert_quantization", "dsv4_fp8_nonexpert_mode", "dsv4_bf16_all", "gemma4_fp8_nonexpert",
                "gemma4_nf4_nonexpert", "nvfp4_merge_aware", "nvfp4_merge_aware_start_step",
            ),
            "",
        ),
    },
    "axolotl.integrations.densemixer": {"dense_mixer": ""},
    "axolotl.integrations.diffusion": {"diffusion": ""},
    "axolotl.integrations.expert_parallel": {
        f"expert_parallel_{name}": ""
        for name in (
            "size", "backend", "num_nvl_bytes", "num_rdma_bytes", "token_capacity", "fallback_on_unsupported",
        )
    },
    "axolotl.integrations.grokfast": {"grokfast_alpha": "", "grokfast_lamb": ""},
    "axolotl.integrations.hatchery": {"hatchery": ""},
    "axolotl.integrations.kd": {
        f"kd_{name}": ""
        for name in (
            "trainer", "ce_alpha", "alpha", "temperature", "beta", "normalize_topk", "online_server_base_url",
            "online_topk", "online_server", "online_timeout", "temperature_min",
        )
    },
    "axolotl.integrations.llm_compressor": {"llmcompressor": ""},
    "axolotl.integrations.lm_eval": {
        f"lm_eval_{name}": "" for name in ("tasks", "batch_size", "post_train", "model")
    },
    "axolotl.integrations.mora": {"mora": ""},
    "axolotl.integrations.nemo_gym": {
        f"nemo_gym_{name}": ""
        for name in (
            "enabled", "dir", "auto_clone", "config_paths", "head_port", "server_timeout", "verify_timeout",
            "run_timeout", "datasets", "auto_start", "model_name", "multi_turn", "max_turns",
        )
    },
    "axolotl.integrations.spectrum": {"spectrum_top_fraction": "", "spectrum_model_name": ""},
    "axolotl.integrations.swanlab": {
        **{
            f"swanlab_{name}": ""
            for name in (
                "project", "experiment_name", "description", "mode", "workspace", "api_key", "log_model", "web_host",
                "api_host", "lark_webhook_url", "lark_secret", "log_completions", "completion_log_interval",
                "completion_max_buffer",
            )
        },
        "use_swanlab": "",
    },
}  # fmt: skip
"""Plugins by module, each with its keys: why one does nothing here, or nothing where it is not supported."""
SPEED_ONLY = (_LIGER, "axolotl.integrations.cut_cross_entropy", "axolotl.integrations.kernels")
"""Plugins that change how fast a run is, and not what it trains."""
