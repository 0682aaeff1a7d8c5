"""TRL + PEFT: the recipe and its config's defaults, those with Liger's kernels, or `tuned`; the model is in bf16."""

from __future__ import annotations

import sys
from typing import Any

from bench.gpu.clock import LOGGED_EVERY, GpuClock, GpuJob, watch
from bench.peers.trl import settings_of, trainer_of, tuned


def trainer_settings(job: GpuJob) -> dict[str, Any]:
    """For the config of the task's trainer."""
    settings = settings_of(job) | {"logging_steps": LOGGED_EVERY}
    if job.task == "sft":
        settings["packing"] = job.packing
    if job.device == "cuda":
        settings |= {"bf16": True, "use_cpu": False}
    return settings


def main() -> None:
    job = GpuJob.load(sys.argv[1])
    assert isinstance(job, GpuJob)
    import torch
    from peft import LoraConfig

    settings = trainer_settings(job)
    dtype = torch.float32 if job.weights == "fp32" else torch.bfloat16
    loading: dict[str, Any] = {"dtype": dtype}
    if job.weights == "nf4":
        from transformers import BitsAndBytesConfig

        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    settings |= {"use_liger_kernel": job.variant == "liger", "model_init_kwargs": loading}
    if job.variant == "tuned":
        settings |= tuned(job)
    lora = LoraConfig(
        r=job.lora_r,
        lora_alpha=job.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    trainer = trainer_of(job, settings, model=job.model, peft_config=lora)
    attention = trainer.model.config._attn_implementation
    clock = GpuClock(job, note=f"attention: {attention}")
    watch(trainer, clock)
    trainer.train()
    clock.report(["trl", "peft", "torch", "transformers", "accelerate", "datasets"])


if __name__ == "__main__":
    main()
