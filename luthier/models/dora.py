"""DoRA: a trained length for every row of the adapted weight (Liu et al. 2024, equation 5).

    y = m / |W + s B A| * (x W' + s (x A') B') + b

The norms (of rows: one for each output) are constants for the gradient (section 4.3). They change with A and B
only, so they are computed once for each state of these and not at every use, and without the sum itself:
|w + s b A|^2 = |w|^2 + 2 s b (A w') + s^2 b (A A') b', of which |w|^2 never changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Magnitude:
    """The norms of the rows of W + s B A, kept while A and B stay as they are.

    Args:
        weight: gives W (out, in) in fp32. stored: gives it as it is stored, to see whether it is still the same.
        low_rank: gives A (r, in) and B (out, r).
    """

    def __init__(
        self,
        weight: Callable[[], torch.Tensor],
        stored: Callable[[], torch.Tensor],
        low_rank: Callable[[], tuple[torch.Tensor, torch.Tensor]],
        scale: float,
    ) -> None:
        self.weight, self.stored, self.low_rank, self.scale = weight, stored, low_rank, scale
        self.squares: tuple[Any, torch.Tensor] | None = None
        self.kept: tuple[Any, torch.Tensor] | None = None

    def start(self) -> nn.Parameter:
        """The magnitude with which an adapter begins: the norms themselves, so that nothing is rescaled."""
        return nn.Parameter(self.norms().clone())

    @torch.no_grad()
    def norms(self) -> torch.Tensor:
        """(out,) in fp32."""
        a, b = self.low_rank()
        base = _state(self.stored())
        state = (base, _state(a), _state(b))
        if self.kept is None or self.kept[0] != state:
            weight = self.weight()
            if self.squares is None or self.squares[0] != base:
                self.squares = base, weight.square().sum(1)
            a, b = a.float(), b.float()
            both = (weight @ a.t()).mul_(2 * self.scale).add_(b @ (a @ a.t()), alpha=self.scale**2)
            self.kept = state, (self.squares[1] + (both * b).sum(1)).clamp_min_(0).sqrt_()
        return self.kept[1]

    def factor(self, magnitude: torch.Tensor) -> torch.Tensor:
        """m / norm (out,), through which the gradient of m flows."""
        return magnitude / self.norms()


def _state(tensor: torch.Tensor) -> Any:
    """Changes whenever a tensor's values or place may have changed."""
    return tensor._version, tensor.dtype, tensor.device, 0 if tensor.is_meta else tensor.data_ptr()
