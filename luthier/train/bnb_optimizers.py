"""bitsandbytes' optimizers: states in 8 bits by blocks (Dettmers et al. 2022), in memory that can be paged out.

What they work on stays as it is: fp32 masters, of which only the moments are in 8 bits.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch

_KINDS: dict[str, Any] = {
    "AdamW8bit": bnb.optim.AdamW8bit,
    "AdamW32bit": bnb.optim.AdamW32bit,
    "Lion8bit": bnb.optim.Lion8bit,
    "AdEMAMix8bit": bnb.optim.AdEMAMix8bit,
}


def build(
    name: str, groups: list[dict[str, Any]], lr: float, settings: dict[str, Any], *, paged: bool
) -> torch.optim.Optimizer:
    """The optimizer of that class; with `paged`, its large states lie in memory that CUDA moves to the host when the
    card is full."""
    optimizer: torch.optim.Optimizer = _KINDS[name](groups, lr=lr, is_paged=paged, **settings)
    if paged:
        load = optimizer.load_state_dict

        def load_paged(state_dict: dict[str, Any], *arguments: Any) -> None:
            load(state_dict, *arguments)
            for parameter, state in optimizer.state.items():
                for field in ("state1", "state2"):
                    if field in state:
                        # Loaded tensors are ordinary ones of the card.
                        state[field] = _page_out(optimizer, parameter, state[field])

        optimizer.load_state_dict = load_paged  # type: ignore[method-assign]
    return optimizer


def _page_out(optimizer: Any, parameter: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    doubled = state.dim() == parameter.dim() + 1  # AdEMAMix's two averages
    get = optimizer._get_state_double_buffer if doubled else optimizer.get_state_buffer
    return get(parameter, dtype=state.dtype).copy_(state)
