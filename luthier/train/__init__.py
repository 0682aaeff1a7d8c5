"""Training: from a config to a finished run folder. Other packages call `luthier.train.run` only.

`luthier.train` is this package, and a function as well: `luthier.train("run.yml", learning_rate=1e-4)`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.config import Config
    from luthier.train.run import RunResult


def train_from(config: Config | str | Path | Mapping[str, Any], /, **overrides: Any) -> RunResult:
    """Train as a config says; everything that the run makes is in its `output_dir`.

    Args:
        config: a Config, a YAML file, or flat keys. overrides: values for any of its keys; None unsets one.

    Raises:
        LuthierError: anything that the user can mend, before the first step wherever possible.
    """
    from luthier.train.run import train

    return train(_as_config(config, overrides))


def _as_config(config: Config | str | Path | Mapping[str, Any], overrides: dict[str, Any]) -> Config:
    from luthier.config import Config

    if isinstance(config, str | Path):
        return Config.load(config, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])
    if isinstance(config, Config):
        if not overrides:
            return config
        # What was derived is derived anew, from what was written and the overrides.
        written = {key: value for key, value in config.flat().items() if config.place(key)}
        return Config.from_flat({**written, **overrides})
    return Config.from_flat({**config, **overrides})


class _Package(ModuleType):
    """A package that can be called: its name is the best one for both, and a name cannot be two attributes."""

    def __call__(self, config: Config | str | Path | Mapping[str, Any], /, **overrides: Any) -> RunResult:
        return train_from(config, **overrides)


sys.modules[__name__].__class__ = _Package
