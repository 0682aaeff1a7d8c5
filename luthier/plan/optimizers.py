"""Bytes of an optimizer's state for a model's trained parameters, and of what its step makes on the way.

The figures for each number are in `config.optimizers`; here they meet the model. Paged state may move to the host when
the device is full; it is counted as lying on the device.
"""

from __future__ import annotations

from luthier.config.optimizers import OPTIMIZERS
from luthier.plan.shape import Shape


def state_bytes(name: str, shape: Shape, *, momentum: bool = False) -> float:
    """Bytes of state once it is all there."""
    info = OPTIMIZERS[name]
    if info.factored:
        return info.state * shape.factors
    each = info.with_momentum if momentum and info.with_momentum is not None else info.state
    of_hidden = each if info.matrices is None else info.matrices
    state = of_hidden * shape.hidden_matrices + each * (shape.trainable - shape.hidden_matrices)
    if each % 4:  # 8-bit moments; of small tensors they are in fp32
        state += (4 * int(each) - each) * shape.small
    return state


def temporary_bytes(name: str, shape: Shape, *, at_once: bool) -> float:
    """Bytes that the step makes and frees.

    Args:
        at_once: for all parameters together, as on a GPU; a CPU goes tensor by tensor, and makes two or three of the
            largest.
    """
    each = OPTIMIZERS[name].temporary
    if at_once:
        return each * shape.trainable
    return 8.0 * shape.largest_trained if each else 0.0
