"""Unsloth as its notebooks use it: FastLanguageModel, its own checkpointing, and TRL's trainer on top."""

from __future__ import annotations

from bench.peers.common import Clock, job_of_command_line, watch_trainer
from bench.peers.trl import dataset_of, settings_of


def main() -> None:
    job = job_of_command_line()
    import torch
    from unsloth import FastLanguageModel  # before trl, which it changes

    from trl import SFTConfig, SFTTrainer  # isort: skip

    model, tokenizer = FastLanguageModel.from_pretrained(
        job.model, max_seq_length=job.sequence_len, dtype=torch.float32, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=job.lora_r,
        lora_alpha=job.lora_alpha,
        lora_dropout=0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth",
        random_state=job.seed,
    )
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=dataset_of(job),
        args=SFTConfig(**settings_of(job)),
    )
    clock = Clock()
    watch_trainer(trainer, clock)
    trainer.train()
    clock.report(job, ["unsloth", "unsloth_zoo", "trl", "peft", "torch", "transformers"])


if __name__ == "__main__":
    main()
