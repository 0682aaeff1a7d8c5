"""What an adapter adds to a weight: W + s B A in fp32, and DoRA's rescaling of the rows of that sum."""

from __future__ import annotations

import torch


@torch.no_grad()
def adapted_weight(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    """A weight (out, in) with its adapter merged, in fp32, for the caller to round once.

    Args:
        a: (r, in). b: (out, r). scale: lora_alpha / r, or lora_alpha / sqrt(r).
        magnitude: (out,), of DoRA (Liu et al. 2024, equation 5): each row of the sum gets this length.
    """
    merged = torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)
    if magnitude is not None:
        merged *= (magnitude.float() / merged.norm(dim=1)).unsqueeze(1)
    return merged
