"""torchtune's recipe `lora_finetune_single_device`, from a config like those that it ships for Llama 3.2.

It knows the Llama shapes with a tied head; it has no Qwen3.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

from bench.peers.common import Job, job_of_command_line

PARTS = "bench.peers.torchtune_parts"


def config_of(job: Job, job_path: str) -> dict[str, Any]:
    """The recipe's config; activation checkpointing is off, as in the config that it ships."""
    values = json.loads((Path(job.model) / "config.json").read_text(encoding="utf-8"))
    out = str(Path(job.scratch) / "out")
    return {
        "output_dir": out,
        "model": {
            "_component_": "torchtune.models.llama3_2.lora_llama3_2",
            "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
            "apply_lora_to_mlp": True,
            "lora_rank": job.lora_r,
            "lora_alpha": job.lora_alpha,
            "lora_dropout": 0.0,
            "vocab_size": values["vocab_size"],
            "num_layers": values["num_hidden_layers"],
            "num_heads": values["num_attention_heads"],
            "num_kv_heads": values["num_key_value_heads"],
            "embed_dim": values["hidden_size"],
            "intermediate_dim": values["intermediate_size"],
            "max_seq_len": job.sequence_len,
            "norm_eps": values["rms_norm_eps"],
            "rope_base": int((values.get("rope_parameters") or values)["rope_theta"]),
            "scale_factor": 1,
        },
        "tokenizer": {
            "_component_": f"{PARTS}.RowTokenizer",
            "path": str(Path(job.model) / "tokenizer.json"),
            "max_seq_len": job.sequence_len,
        },
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": job.model,
            "checkpoint_files": ["model.safetensors"],
            "recipe_checkpoint": None,
            "output_dir": out,
            "model_type": "LLAMA3_2",
        },
        "resume_from_checkpoint": False,
        "save_adapter_weights_only": True,
        "dataset": {"_component_": f"{PARTS}.Rows", "job": job_path},
        "collate_fn": f"{PARTS}.counting_collate",
        "seed": job.seed,
        "shuffle": False,
        "batch_size": job.micro_batch_size,
        "optimizer": {
            "_component_": "torch.optim.AdamW",
            "fused": True,
            "weight_decay": 0.0,
            "lr": job.learning_rate,
        },
        "lr_scheduler": {"_component_": f"{PARTS}.constant"},
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "epochs": 1,
        "max_steps_per_epoch": job.steps,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "clip_grad_norm": 1.0,
        "compile": False,
        "metric_logger": {"_component_": f"{PARTS}.ClockLogger", "log_dir": out},
        "log_every_n_steps": 1,
        "device": "cpu",
        "dtype": "fp32",
        "enable_activation_checkpointing": False,
        "enable_activation_offloading": False,
    }


def main() -> None:
    import sys

    job = job_of_command_line()
    import torchtune
    from omegaconf import OmegaConf

    from bench.peers.torchtune_parts import CLOCK

    recipes = Path(torchtune.__file__).parents[1] / "recipes"
    recipe_class = runpy.run_path(str(recipes / "lora_finetune_single_device.py"))[
        "LoRAFinetuneRecipeSingleDevice"
    ]
    config = OmegaConf.create(config_of(job, sys.argv[1]))
    recipe = recipe_class(cfg=config)
    recipe.setup(cfg=config)
    recipe.train()
    recipe.cleanup()
    CLOCK.report(job, ["torchtune", "torchao", "torch"])


if __name__ == "__main__":
    main()
