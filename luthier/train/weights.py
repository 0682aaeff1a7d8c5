"""The result of a run in the formats of other tools: PEFT's for an adapter, transformers' for a whole model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.artifacts.source import local
from luthier.config import Config
from luthier.models.adapter_files import save_adapter
from luthier.train.optim import Masters


def write_model(
    folder: Path,
    weights: dict[str, torch.Tensor] | None,
    *,
    model: PreTrainedModel,
    masters: Masters,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> None:
    """The adapter or the whole model, with tokenizer and chat template, as other tools load them.

    Args:
        weights: the model's, where this process does not hold them.
    """
    if weights is None:  # else training goes on meanwhile, and must not see its weights touched
        masters.publish()
    if config.adapter.adapter:
        save_adapter(
            model,
            folder,
            base_model=local(config.model.base_model),  # as PEFT takes it
            revision=config.model.revision,
            adapter=config.adapter,
        )
    else:
        model.save_pretrained(folder, state_dict=weights)
        if weights is not None:
            _say_dtype(folder / "config.json", weights)
    tokenizer.save_pretrained(folder)


def _say_dtype(file: Path, weights: dict[str, torch.Tensor]) -> None:
    """The format of the weights that were written; transformers writes that of the shares, which are fp32."""
    dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
    settings = json.loads(file.read_text(encoding="utf-8")) | {"dtype": str(dtype)[6:]}
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
