"""Which implementation of an op runs: Triton's where the tensors are on an NVIDIA or AMD GPU, torch's elsewhere.

Triton comes with the CUDA builds of torch and not with the CPU builds, so it is imported at the first use only.
Tests run its kernels on the CPU, in Triton's own interpreter (`TRITON_INTERPRET=1` in the environment before
triton is imported), and say so with `backend("triton")`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch

Backend = Literal["torch", "triton"]

# Backward may run in a thread of autograd's own, so this is one value for the process and not per thread.
_chosen: Backend | None = None


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Runs every op inside the block with the named implementation, whatever the tensors' device."""
    global _chosen
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether an op on this tensor runs its Triton kernel."""
    if _chosen is not None:
        return _chosen == "triton"
    return tensor.is_cuda and _triton_is_installed()


@cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
