"""LitGPT's `finetune_lora`, by the function behind the command. Its loss is the mean of the micro batches' means.

Two things are not LitGPT's own: rows come in order, and the learning rate is constant (its schedule begins at
zero and cannot be turned off). It has no clipping of gradients.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers.common import Clock, Job, job_of_command_line

NOTE = "no gradient clipping; its loss weighs every micro batch alike, however long its rows"


def data_of(job: Job, clock: Clock) -> Any:
    """LitGPT's JSON data in the rows' order; its two validation rows are only there because it wants some."""
    from litgpt.data import JSON, get_sft_collate_fn
    from litgpt.prompts import Default
    from torch.utils.data import DataLoader

    folder = Path(job.scratch) / "data"
    folder.mkdir()
    rows = [{"instruction": row["prompt"], "output": row["output"]} for row in job.read_rows()]
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "val.json").write_text(json.dumps(rows[:2]), encoding="utf-8")

    @dataclass
    class InOrder(JSON):  # type: ignore[misc]
        def train_dataloader(self) -> Any:
            return DataLoader(
                self.train_dataset,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                collate_fn=get_sft_collate_fn(
                    max_seq_length=self.max_seq_length, ignore_index=self.ignore_index
                ),
            )

    return InOrder(json_path=folder, prompt_style=Default(), mask_prompt=not job.whole)


def main() -> None:
    job = job_of_command_line()
    import torch
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.finetune import lora

    clock = Clock(note=NOTE)
    make_optimizer = lora.instantiate_torch_optimizer

    def watched_optimizer(*args: Any, **kwargs: Any) -> Any:
        optimizer = make_optimizer(*args, **kwargs)
        optimizer.register_step_post_hook(lambda *_: clock.end())
        return optimizer

    lora.instantiate_torch_optimizer = watched_optimizer
    make_batches = lora.CycleIterator

    def watched_batches(loader: Any) -> Any:
        clock.begin()
        return make_batches(loader)

    lora.CycleIterator = watched_batches
    lora.get_lr_scheduler = lambda optimizer, **_: torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1.0
    )
    lora.save_hyperparameters = lambda *_: None  # reads the command line, which is not LitGPT's here,
    lora.merge_lora = lambda **_: None  # and this what that wrote; both come after the training
    out = Path(job.scratch) / "out"
    lora.setup(
        checkpoint_dir=Path(job.model),
        out_dir=out,
        precision="32-true",
        lora_r=job.lora_r,
        lora_alpha=job.lora_alpha,
        lora_dropout=0.0,
        lora_query=True,
        lora_key=True,
        lora_value=True,
        lora_projection=True,
        lora_mlp=True,
        data=data_of(job, clock),
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=job.micro_batch_size * job.gradient_accumulation_steps,
            micro_batch_size=job.micro_batch_size,
            epochs=2,
            max_steps=job.steps,
            max_seq_length=job.sequence_len,
        ),
        eval=EvalArgs(interval=10**9, max_new_tokens=1, final_validation=False),
        optimizer={
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": job.learning_rate, "weight_decay": 0.0},
        },
        seed=job.seed,
    )
    [metrics] = out.rglob("metrics.csv")
    with metrics.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("loss")]
    before = 0
    for number, row in enumerate(
        rows[job.gradient_accumulation_steps - 1 :: job.gradient_accumulation_steps]
    ):
        clock.losses[number] = float(row["loss"])
        clock.counts[number], before = int(float(row["tokens"])) - before, int(float(row["tokens"]))
    clock.report(job, ["litgpt", "lightning", "torch"])


if __name__ == "__main__":
    main()
