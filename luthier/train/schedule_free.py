"""Schedule-free AdamW (Defazio et al. 2024), with which gradients are taken at one point and models kept at another.

Gradients belong to y, between the fast iterate z and the average x; x is what is evaluated and saved. The library
goes from y to x and back by interpolation, which rounds; here y is put aside meanwhile, so that looking at a model,
or saving it, changes nothing in its training.
"""

from __future__ import annotations

from typing import Any

import torch
from schedulefree import AdamWScheduleFree


class ScheduleFree(AdamWScheduleFree):
    """schedulefree's AdamW; `eval` and `train` are each other's exact inverse, also across a checkpoint between."""

    group_state = ("k", "weight_sum", "lr_max", "scheduled_lr")

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.train()

    @torch.no_grad()
    def eval(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if group["train_mode"] and "z" in self.state[p]:
                    self.state[p]["y"] = p.clone()
        super().eval()

    @torch.no_grad()
    def train(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if (y := self.state[p].pop("y", None)) is not None:
                    p.copy_(y)
            group["train_mode"] = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.train()
