"""What a config cannot have in several processes. Their number is the command line's and not the config's, so that this
is no rule of the config alone (`config.rules`); and whoever only hands a run on can ask without importing torch."""

from __future__ import annotations

from luthier.config import Config
from luthier.errors import ConfigError


def check_processes(config: Config, size: int) -> None:
    """Raises ConfigError for what `size` processes cannot do."""
    if size == 1:
        return
    if config.training.optimizer_in_backward:
        raise ConfigError(
            f"optimizer_in_backward takes steps before the gradients of all {size} processes are added up: leave it "
            "out, or run a single process (--num-processes 1; as a Kubernetes job, --gpus 1)"
        )
    section = config.distributed
    replicas, shares = section.dp_replicate_size, section.dp_shard_size
    if (replicas or shares) and (replicas or size // (shares or 1)) * (shares or size // (replicas or 1)) != size:
        raise ConfigError(
            f"dp_replicate_size {replicas or 'unset'} x dp_shard_size {shares or 'unset'} has to be the number of "
            f"processes, which is {size}"
        )
    device = config.model.device_map
    if device not in (None, "auto", "cpu", "cuda") and device != {"": "cpu"}:
        raise ConfigError(
            f"device_map: {device} would be the device of all {size} processes: leave it out, and each process takes "
            "its own"
        )
