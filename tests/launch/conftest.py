"""The toy run of `tests/train`, for runs in several processes."""

from __future__ import annotations

from tests.train.conftest import rows_file, run_config

__all__ = ["rows_file", "run_config"]
