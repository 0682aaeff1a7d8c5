"""What a program brings along to a run, where the config alone does not say it: a model that exists already, and
somebody who follows the run as it goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel


class Follower:
    """Is told what happens in a run, in the process that reports, and may end it. Does nothing by itself."""

    def begins(self, total_steps: int, steps_per_epoch: float, from_step: int) -> None:
        """Before the first step."""

    def step(self, step: int) -> None:
        """After an optimizer step."""

    def row(self, row: dict[str, Any], step: int) -> None:
        """A row as `metrics.jsonl` has it: of training, or of an evaluation (`eval_loss`)."""

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is written."""

    def ended(self) -> str:
        """Asked after each step: why the run should end here; empty if it should go on."""
        return ""


@dataclass(frozen=True)
class Given:
    """A model for a run to train instead of loading one.

    Attributes:
        model: what `base_model` names, as transformers loaded it, without an adapter on it. The run changes it on the
            instance; who gave it puts it back.
        adapter: what the run's adapter begins with, under the names of PEFT's files; None: as the config says.
    """

    model: PreTrainedModel
    adapter: Mapping[str, torch.Tensor] | None = None
    follower: Follower = field(default_factory=Follower)
