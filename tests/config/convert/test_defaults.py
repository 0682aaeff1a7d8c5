"""The tables of defaults against the libraries that are installed."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from luthier.config.convert import arguments, script_keys
from luthier.config.convert.arguments import CARRIED

_NAMES = {"lr_scheduler": "lr_scheduler_type", "sequence_len": "max_length"} | {
    key: name for name, key in CARRIED.items()
}


def classes() -> dict[str, type]:
    import transformers
    import trl
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    every = (transformers.TrainingArguments, transformers.Seq2SeqTrainingArguments)
    return {cls.__name__: cls for cls in (*every, trl.SFTConfig, trl.DPOConfig, trl.KTOConfig, ORPOConfig, CPOConfig)}


@pytest.mark.parametrize("name", [name for name in arguments.CLASSES if name != "UnslothTrainingArguments"])
def test_defaults_of_a_class_are_its_own(name: str) -> None:
    theirs: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(classes()[name])}
    for key, value in arguments.CLASSES[name].items():
        found = theirs[_NAMES.get(key, key)] if key != "excess_length_strategy" else "truncate"
        if key == "bf16":
            assert (found is None) == (value == "auto")  # None is what the device is fast at
        elif key == "gradient_checkpointing":
            assert bool(found) == value
        else:
            assert getattr(found, "value", found) == value, key


@pytest.mark.parametrize("name", [name for name in arguments.CLASSES if name != "UnslothTrainingArguments"])
def test_every_argument_of_a_class_is_known(name: str) -> None:
    table = script_keys.CALLS[name]
    known = arguments.KNOWN | table.passed_on | set(table.refused) | {"sortish_sampler", "generation_num_beams"}
    known |= {"generation_config", "generation_max_length", "predict_with_generate"}
    assert {field.name for field in dataclasses.fields(classes()[name])} <= known


def test_defaults_of_peft_are_its_own() -> None:
    from peft import LoraConfig

    given = inspect.signature(LoraConfig).parameters
    assert given["r"].default == script_keys.ADAPTER_OF_PEFT["lora_r"]
    assert given["lora_alpha"].default == script_keys.ADAPTER_OF_PEFT["lora_alpha"]
    assert given["lora_dropout"].default == 0.0
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as MODULES

    assert MODULES["llama"] == script_keys.ADAPTER_OF_PEFT["lora_target_modules"]


def test_defaults_of_bitsandbytes_config_are_its_own() -> None:
    from transformers import BitsAndBytesConfig

    given = BitsAndBytesConfig(load_in_4bit=True)
    for key, value in script_keys.OF_BITSANDBYTES.items():
        assert getattr(given, key) == value
