"""The other way to merge: load the model, merge in memory, save it. For bases whose tensors are not the parameters."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from luthier.config import Config
from luthier.errors import ModelError
from luthier.models import adapter_files
from luthier.models.load import embeddings_of, load_model


def merge_whole(
    config: Config,
    adapter: Path,
    target: Path,
    dtype: torch.dtype,
    shard_bytes: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Merge an adapter folder into the base of a config, in the host's memory in fp32, and save it to a folder."""
    if tokenizer is None:
        raise ModelError(f"{config.model.base_model}: it has to be loaded whole, which needs a tokenizer beside it")
    model = load_model(config, tokenizer, torch.device("cpu"), torch.float32)
    adapter_files.load_adapter(model, adapter, adapter_files.adapter_settings(adapter))
    adapter_files.merge_into_base(model)
    head = model.get_output_embeddings()
    if head is not None and head.weight is not embeddings_of(model).weight:
        for section in (model.config, model.config.get_text_config(decoder=True)):
            section.tie_word_embeddings = False
    nn.Module.to(model, dtype)
    model.save_pretrained(target, max_shard_size=shard_bytes)
