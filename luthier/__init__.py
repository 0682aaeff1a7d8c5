"""Luthier fine-tunes open language models: from one YAML file, or from Python.

    import luthier
    result = luthier.train("my-run.yml", learning_rate=1e-4)
    print(luthier.load(result.output_dir).generate("What is a luthier?"))

    from luthier import FastLanguageModel, SFTTrainer, SFTConfig  # in place of `unsloth` and `trl`

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
    from luthier.api.arguments import (
        CPOConfig,
        DPOConfig,
        KTOConfig,
        ORPOConfig,
        SFTConfig,
        TrainingArguments,
    )
    from luthier.api.devices import is_bfloat16_supported
    from luthier.api.loaded import Loaded, load
    from luthier.api.models import FastLanguageModel
    from luthier.api.preference_trainers import CPOTrainer, DPOTrainer, KTOTrainer, ORPOTrainer
    from luthier.api.responses import get_chat_template, train_on_responses_only
    from luthier.api.trainers import SFTTrainer
    from luthier.config import Config
    from luthier.train import train_from as train
    from luthier.train.run import RunResult
    from luthier.train.run import train as run

__version__ = "0.1.0"

_HOME = {
    "Config": "luthier.config",
    "CPOConfig": "luthier.api.arguments",
    "CPOTrainer": "luthier.api.preference_trainers",
    "DPOConfig": "luthier.api.arguments",
    "DPOTrainer": "luthier.api.preference_trainers",
    "FastLanguageModel": "luthier.api.models",
    "KTOConfig": "luthier.api.arguments",
    "KTOTrainer": "luthier.api.preference_trainers",
    "Loaded": "luthier.api.loaded",
    "ORPOConfig": "luthier.api.arguments",
    "ORPOTrainer": "luthier.api.preference_trainers",
    "RunResult": "luthier.train.run",
    "SFTConfig": "luthier.api.arguments",
    "SFTTrainer": "luthier.api.trainers",
    "TrainingArguments": "luthier.api.arguments",
    "get_chat_template": "luthier.api.responses",
    "is_bfloat16_supported": "luthier.api.devices",
    "load": "luthier.api.loaded",
    "train_on_responses_only": "luthier.api.responses",
}
# Names of Unsloth and TRL that notebooks import and that are not here, and what to write instead.
_ELSEWHERE = {
    "DataCollatorForCompletionOnlyLM": "rows of `prompt` and `completion`, or SFTConfig(assistant_only_loss=True)",
    "FastModel": "FastLanguageModel",
    "FastVisionModel": "FastLanguageModel; only text is trained",
    "GRPOTrainer": "luthier.SFTTrainer, ORPOTrainer or DPOTrainer; there is no training with rewards",
    "UnslothTrainer": "SFTTrainer",
    "UnslothTrainingArguments": "SFTConfig",
    "PatchDPOTrainer": "nothing: no other library is patched; leave it out",
    "to_sharegpt": "rows of `messages`, made by dataset.map",
    "standardize_sharegpt": "nothing: rows of `conversations` with from and value are read as they are",
    "setup_chat_format": "get_chat_template(tokenizer, \"chatml\"), or `chat_template: chatml` in a config",
    "unsloth_train": "trainer.train()",
}
__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "Config",
    "DPOConfig",
    "DPOTrainer",
    "FastLanguageModel",
    "KTOConfig",
    "KTOTrainer",
    "Loaded",
    "ORPOConfig",
    "ORPOTrainer",
    "RunResult",
    "SFTConfig",
    "SFTTrainer",
    "TrainingArguments",
    "__version__",
    "get_chat_template",
    "is_bfloat16_supported",
    "load",
    "run",
    "train",
    "train_on_responses_only",
]


def __getattr__(name: str) -> Any:
    value: Any
    if name == "train":  # the package, which can be called; it is its own attribute here once it is imported
        return importlib.import_module("luthier.train")
    if name == "run":
        value = importlib.import_module("luthier.train.run").train
    elif name in _HOME:
        value = getattr(_imported(_HOME[name]), name)
    elif name in _ELSEWHERE:  # `from luthier import NAME` would hide the text of an AttributeError
        raise ImportError(f"luthier has no {name}; write {_ELSEWHERE[name]} (docs/porting.md)")
    else:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    globals()[name] = value
    return value


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ModuleNotFoundError(
            "models for notebooks are PEFT models: pip install 'luthier[notebook]' (or peft)", name="peft"
        ) from error


def __dir__() -> list[str]:
    return sorted(__all__)
