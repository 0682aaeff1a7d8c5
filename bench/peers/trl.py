"""TRL + PEFT: as its users run it (`default`), and with what makes it fastest here (`tuned`).

`default` sets the recipe and nothing else, so gradient checkpointing stays on, as TRL's configs have it. Only bf16,
also their default, is off: a CPU without bf16 units would not come to an end.
"""

from __future__ import annotations

from typing import Any

from bench.peers.common import Clock, Job, job_of_command_line, watch_trainer


def dataset_of(job: Job) -> Any:
    """Rows in TRL's own forms: text for the loss over everything, prompt and completion for answers only; what is
    compared is in its forms already."""
    from datasets import Dataset

    rows = job.read_rows()
    if job.task != "sft":
        return Dataset.from_list(rows)
    if job.whole:
        return Dataset.from_list([{"text": row["text"]} for row in rows])
    return Dataset.from_list([{"prompt": row["prompt"], "completion": row["output"]} for row in rows])


def settings_of(job: Job) -> dict[str, Any]:
    """The recipe, for the config of any of its trainers."""
    return {
        "output_dir": job.scratch,
        "per_device_train_batch_size": job.micro_batch_size,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "max_length": job.sequence_len,
        "max_steps": job.steps,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "seed": job.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
    }


def four_bits() -> Any:
    """NF4 as QLoRA has it, computed with in fp32."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def tuned(job: Job) -> dict[str, Any]:
    """What makes it fastest here. Of TRL's trainers only that of SFT still knows how to do without padding; without
    packing TRL leaves the length there to whoever wants no padding, and all rows fit."""
    packed = {"padding_free": True, "max_length": None} if job.task == "sft" else {}
    return {"gradient_checkpointing": False, **packed}


def note_of(job: Job) -> str:
    """What a reader of the table must know."""
    said = {
        "default": f"gradient checkpointing is on, as {job.task.upper()}Config has it; bf16, also its default, is off",
        "tuned": "gradient checkpointing off, padding_free on, sdpa; packing to 1024 tokens was slower here"
        if job.task == "sft"
        else "gradient checkpointing off, sdpa; padding_free is not there for this trainer",
        "qlora": "the base in NF4 with double quantisation (bitsandbytes), so that its loss is another; "
        "checkpointing on",
        "precomputed": "as tuned, and the reference's log-probs are computed before the first step, in no "
        "figure but its time",
    }[job.variant]
    means = {
        "orpo": "; its likelihood weighs every micro batch alike, however long its rows",
        "kto": "; it estimates the KL term from each micro batch by itself",
    }
    return said + means.get(job.task, "")


def trainer_of(job: Job, settings: dict[str, Any], **given: Any) -> Any:
    """The task's trainer, with the rows."""
    import trl

    place: Any = trl
    if job.task == "orpo":
        from trl.experimental import orpo as place
    name = job.task.upper()
    config = getattr(place, f"{name}Config")(**settings)
    return getattr(place, f"{name}Trainer")(args=config, train_dataset=dataset_of(job), **given)


def main() -> None:
    job = job_of_command_line()
    from peft import LoraConfig

    settings, loading = settings_of(job), {"dtype": "float32"}
    if job.variant in ("tuned", "precomputed"):
        settings |= tuned(job)
        loading |= {"attn_implementation": "sdpa"}
    if job.variant == "precomputed":
        settings |= {"precompute_ref_log_probs": True}
    if job.variant == "qlora":
        loading |= {"quantization_config": four_bits(), "device_map": {"": "cpu"}}
    settings["model_init_kwargs"] = loading
    lora = LoraConfig(
        r=job.lora_r,
        lora_alpha=job.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    trainer = trainer_of(job, settings, model=job.model, peft_config=lora)
    clock = Clock(note=note_of(job))
    watch_trainer(trainer, clock)
    trainer.train()
    clock.report(job, ["trl", "peft", "torch", "transformers", "accelerate", "datasets"])


if __name__ == "__main__":
    main()
