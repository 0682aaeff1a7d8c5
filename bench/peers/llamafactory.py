"""LLaMA-Factory by the function behind `llamafactory-cli train`, with its defaults beside the recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.peers.common import Clock, Job, job_of_command_line, watch_trainer

NOTE = "where prompts are trained on, its mean counts the first token of every row, which nothing predicts"


def arguments_of(job: Job, data: Path) -> dict[str, Any]:
    """The run; `bench` is a template without any text of its own."""
    return {
        "model_name_or_path": job.model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": job.lora_r,
        "lora_alpha": job.lora_alpha,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "dataset_dir": str(data),
        "dataset": "rows",
        "template": "bench",
        "cutoff_len": job.sequence_len,
        "train_on_prompt": job.whole,
        "disable_shuffling": True,
        "output_dir": str(Path(job.scratch) / "out"),
        "per_device_train_batch_size": job.micro_batch_size,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "max_steps": job.steps,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": job.seed,
    }


def main() -> None:
    job = job_of_command_line()
    from llamafactory.data.template import register_template
    from llamafactory.train.sft import trainer as trainers
    from llamafactory.train.tuner import run_exp

    data = Path(job.scratch) / "data"
    data.mkdir()
    rows = [{"prompt": row["prompt"], "output": row["output"]} for row in job.read_rows()]
    (data / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    columns = {"prompt": "prompt", "response": "output"}
    listed = {"rows": {"file_name": "rows.json", "columns": columns}}
    (data / "dataset_info.json").write_text(json.dumps(listed), encoding="utf-8")
    register_template(name="bench")

    clock = Clock(note=NOTE)
    make = trainers.CustomSeq2SeqTrainer.__init__

    def watched(trainer: Any, *args: Any, **kwargs: Any) -> None:
        make(trainer, *args, **kwargs)
        watch_trainer(trainer, clock)

    trainers.CustomSeq2SeqTrainer.__init__ = watched
    run_exp(arguments_of(job, data))
    clock.report(job, ["llamafactory", "torch", "transformers", "peft", "trl", "accelerate"])


if __name__ == "__main__":
    main()
