"""Unsloth as its notebooks use it, with its own checkpointing; `tuned` does without recomputation."""

from __future__ import annotations

import sys

from bench.gpu.clock import GpuClock, GpuJob, watch
from bench.gpu.peer_trl import trainer_settings


def main() -> None:
    job = GpuJob.load(sys.argv[1])
    assert isinstance(job, GpuJob)
    import torch
    from unsloth import FastLanguageModel  # before trl, which it changes

    from bench.peers.trl import dataset_of
    from trl import SFTConfig, SFTTrainer  # isort: skip

    model, tokenizer = FastLanguageModel.from_pretrained(
        job.model,
        max_seq_length=job.sequence_len,
        dtype=torch.float32 if job.weights == "fp32" else torch.bfloat16,
        load_in_4bit=job.weights == "nf4",
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=job.lora_r,
        lora_alpha=job.lora_alpha,
        lora_dropout=0,
        bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing=False if job.variant == "tuned" else "unsloth",
        random_state=job.seed,
    )
    settings = trainer_settings(job)
    if job.variant == "tuned":
        settings["gradient_checkpointing"] = False
    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=dataset_of(job), args=SFTConfig(**settings)
    )
    clock = GpuClock(job, note=f"attention: {_attention()}")
    watch(trainer, clock)
    trainer.train()
    clock.report(["unsloth", "unsloth_zoo", "trl", "peft", "torch", "transformers"])


def _attention() -> str:
    from unsloth.models import _utils

    found = [name for name in ("HAS_FLASH_ATTENTION", "HAS_XFORMERS") if getattr(_utils, name, False)]
    return {"HAS_FLASH_ATTENTION": "flash-attn", "HAS_XFORMERS": "xformers"}[found[0]] if found else "sdpa"


if __name__ == "__main__":
    main()
