"""Every op is tested in both implementations: torch's, and Triton's on a GPU or else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from luthier.kernels.backend import backend


@pytest.fixture(params=["torch", "triton"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Runs the test's ops in one implementation; where their tensors go."""
    if request.param == "triton":
        pytest.importorskip("triton")
    with backend(request.param):
        on_gpu = request.param == "triton" and torch.cuda.is_available()
        yield torch.device("cuda" if on_gpu else "cpu")
