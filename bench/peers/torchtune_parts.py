"""The parts of a torchtune config that read this benchmark's files and its clock; torchtune finds them by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from torchtune.data import padded_collate_sft

from bench.peers.common import Clock, Job

CLOCK = Clock()


class RowTokenizer:
    """What a recipe and `Rows` want of a tokenizer."""

    def __init__(self, path: str, max_seq_len: int) -> None:
        self.core = Tokenizer.from_file(path)
        self.max_seq_len = max_seq_len
        self.pad_id, self.eos_id = self.core.token_to_id("<|pad|>"), self.core.token_to_id("<|endoftext|>")

    def encode(self, text: str) -> list[int]:
        """The text's tokens, with neither beginning nor end."""
        ids: list[int] = self.core.encode(text).ids
        return ids


class Rows(Dataset):  # type: ignore[misc]
    """The job's rows as tokens and labels."""

    def __init__(self, tokenizer: RowTokenizer, job: str) -> None:
        self.tokenizer, self.job = tokenizer, Job.load(job)
        self.rows = self.job.read_rows()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> dict[str, list[int]]:
        row = self.rows[at]
        prompt = self.tokenizer.encode(row["prompt"])
        answer = [*self.tokenizer.encode(row["output"]), self.tokenizer.eos_id]
        return {
            "tokens": prompt + answer,
            "labels": (prompt if self.job.whole else [-100] * len(prompt)) + answer,
        }


def counting_collate(batch: list[dict[str, list[int]]], **kwargs: Any) -> Any:
    """torchtune's padding; a batch is made when its turn has come, so its tokens belong to the step."""
    CLOCK.begin()
    CLOCK.tokens += sum(len(row["tokens"]) for row in batch)
    return padded_collate_sft(batch, **kwargs)


def constant(optimizer: Any, num_training_steps: int, last_epoch: int) -> LambdaLR:
    """No schedule."""
    return LambdaLR(optimizer, lambda step: 1.0)


class ClockLogger:
    """A metric logger that stamps the steps."""

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = log_dir

    def log_config(self, config: Any) -> None:
        """Not kept."""

    def log_dict(self, payload: dict[str, Any], step: int) -> None:
        """Called at the end of every step."""
        CLOCK.end(loss=float(payload["loss"]))

    def log(self, name: str, data: Any, step: int) -> None:
        """Not kept."""

    def close(self) -> None:
        """Nothing is open."""
