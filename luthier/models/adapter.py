"""What every kind of adapter can tell: its tensors in PEFT's files, its ranks, its base weight with it merged."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class Adapter:
    """An adapter of one module: of a linear layer, an embedding, or of a layer's experts.

    Attributes:
        enabled: whether it takes part in the forward pass.
        dropout: probability of its dropout.
    """

    enabled: bool = True
    dropout: float = 0.0

    def idle(self) -> bool:
        """Whether with the values that it has now, the module computes what it computes with the adapter off."""
        raise NotImplementedError

    def tensors(self) -> dict[str, torch.Tensor]:
        """Name in PEFT's files, below the module's path -> the live tensor."""
        raise NotImplementedError

    def exported(self) -> dict[str, torch.Tensor]:
        """What a file holds, which is the same unless the base weight was changed for the adapter's start."""
        return self.tensors()

    def strengths(self) -> dict[str, tuple[int, float]]:
        """Name of a parameter of the module, empty for a module as a whole -> rank and alpha of what is exported."""
        raise NotImplementedError

    def merged(self) -> dict[str, torch.Tensor]:
        """Name of a parameter -> its value with the adapter added, in fp32, shaped as it is stored."""
        raise NotImplementedError


class ForwardAdapter(Adapter):
    """An adapter that takes the place of its module's `forward`, on the instance; its tensors are parameters of the
    module, which keeps its class, its parameters and their names."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module  # a module's attributes are whatever its family has
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def adds_nothing(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether B A is 0 because A or B is."""
    return not (bool(a.any()) and bool(b.any()))


def scale_of(alpha: float, r: int, rslora: bool) -> float:
    """Factor on B A: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023)."""
    return alpha / math.sqrt(r) if rslora else alpha / r


def pattern_of(patterns: Iterable[str], name: str) -> str | None:
    """The first key of a `rank_pattern` or `alpha_pattern` that a name matches, as in PEFT: a regular expression for
    the end of the name, from the start or from behind a dot."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), None)
