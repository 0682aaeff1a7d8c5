"""Axolotl from its YAML, by what `axolotl train c.yml --launcher python` calls; a plugin hands over its trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.peers.common import Clock, Job, job_of_command_line, watch_trainer

NOTE = "its loss weighs every micro batch alike, however long its rows"


def config_of(job: Job) -> dict[str, Any]:
    """The run; whatever is not of the recipe is left at Axolotl's default."""
    verbatim = {
        "field_instruction": "prompt",
        "field_output": "output",
        "format": "{instruction}",
        "no_input_format": "{instruction}",
    }
    return {
        "base_model": job.model,
        "plugins": ["bench.peers.axolotl_plugin.Watch"],
        "datasets": [{"path": job.rows, "ds_type": "json", "type": verbatim}],
        "dataset_prepared_path": str(Path(job.scratch) / "prepared"),
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,
        "train_on_inputs": job.whole,
        "output_dir": str(Path(job.scratch) / "out"),
        "adapter": "lora",
        "lora_r": job.lora_r,
        "lora_alpha": job.lora_alpha,
        "lora_dropout": 0.0,
        "lora_target_linear": True,
        # Its own kernels, otherwise on by default, are Triton's and want a GPU.
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "sequence_len": job.sequence_len,
        "micro_batch_size": job.micro_batch_size,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "max_steps": job.steps,
        "learning_rate": job.learning_rate,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": job.seed,
    }


def main() -> None:
    job = job_of_command_line()
    import yaml
    from axolotl.cli.train import do_cli

    from bench.peers import axolotl_plugin

    config = Path(job.scratch) / "run.yml"
    config.write_text(yaml.safe_dump(config_of(job), sort_keys=False), encoding="utf-8")
    clock = Clock(note=NOTE)
    axolotl_plugin.on_trainer = lambda trainer: watch_trainer(trainer, clock)
    do_cli(config=str(config))
    clock.report(job, ["axolotl", "torch", "transformers", "peft", "trl", "accelerate"])


if __name__ == "__main__":
    main()
