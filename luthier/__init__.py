"""Luthier fine-tunes open language models from one YAML file.

    from luthier import Config, run
    result = run(Config.load("my-run.yml"))

The names below are imported when they are first used, so that `import luthier` and `luthier --help` load
neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# OpenMP's threads spin while they wait for work. With two torch threads and any other busy process on the
# machine a training step was measured to take more than ten times longer (3.9 s against 0.3 s). Without any
# spinning, each of a step's thousands of small operations wakes its threads through the system. A short spin
# (some microseconds) keeps both small. The settings are read once, when torch loads its OpenMP runtime, so they
# have to be made here, before anything imports torch; whoever has set one keeps it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

if TYPE_CHECKING:
    from luthier.config import Config
    from luthier.train.run import train as run

__version__ = "0.1.0"
__all__ = ["Config", "__version__", "run"]

# The function is `run` here: `luthier.train` is a package, and a name cannot be both.
_HOME = {"Config": ("luthier.config", "Config"), "run": ("luthier.train.run", "train")}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    module, attribute = _HOME[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
