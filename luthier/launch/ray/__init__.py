"""A run in workers of Ray: `luthier train CONFIG --launcher ray`.

`driver` is what the command itself does, `worker` what runs in Ray's processes, `desk` is between them, and `ended`
makes one message of how the workers ended. Nothing is imported here: Ray's processes import what they run, and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def train(
    config_path: str | Path,
    overrides: Sequence[str],
    *,
    num_workers: int | None = None,
    max_failures: int | None = None,
) -> None:
    """Train a config in workers of Ray, and wait for their end.

    The cluster is the one that RAY_ADDRESS names or `ray start` has started on this machine; without one, a cluster of
    this machine alone is there for as long as the run.

    Args:
        num_workers: default: one for each GPU of the cluster that the config may use, else one.
        max_failures: how often the run may begin again from its last checkpoint; default: 0.

    Raises:
        LuthierError: a worker has failed too often, or in a way that beginning again does not mend.
    """
    from luthier.config.convert.command import config_of
    from luthier.launch.ray import driver

    driver.train(config_of(config_path, overrides, quiet=True), num_workers, max_failures or 0)
