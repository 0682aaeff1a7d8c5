"""The config: its keys, how it is read, and what it says of itself."""

from luthier.config.datasets import DataConfig, DatasetEntry, UserPreference, UserPrompt
from luthier.config.distributed import DistributedConfig, FsdpConfig
from luthier.config.load import Config
from luthier.config.schema import (
    AdapterConfig,
    EvaluationConfig,
    FreezeConfig,
    LoggingConfig,
    ModelConfig,
    OutputConfig,
    PrecisionConfig,
    SpecialTokens,
    TrainingConfig,
)

__all__ = [
    "AdapterConfig",
    "Config",
    "DataConfig",
    "DatasetEntry",
    "DistributedConfig",
    "EvaluationConfig",
    "FreezeConfig",
    "FsdpConfig",
    "LoggingConfig",
    "ModelConfig",
    "OutputConfig",
    "PrecisionConfig",
    "SpecialTokens",
    "TrainingConfig",
    "UserPreference",
    "UserPrompt",
]
