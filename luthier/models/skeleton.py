"""A model without weights: every module and shape of it, for what can be known before anything is loaded."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import PreTrainedModel

from luthier.config import ModelConfig
from luthier.errors import cannot_load
from luthier.models.load import model_class, read_model_config


def skeleton(model: ModelConfig, model_config: Any = None) -> PreTrainedModel:
    """The model of a config as `load_model` would make it, with parameters that have a shape and no storage.

    Args:
        model_config: the checkpoint's `config.json` where it is read already, or changed.

    Raises:
        ModelError: the class cannot be found or made, or is no causal LM.
    """
    model_config = read_model_config(model) if model_config is None else model_config
    auto_class = model_class(model, model_config)
    # Of the two kinds of class, the automatic one chooses by the config and has a method for that.
    make = getattr(auto_class, "from_config", None) or auto_class._from_config
    extra = {"trust_remote_code": model.trust_remote_code} if hasattr(auto_class, "from_config") else {}
    try:
        with torch.device("meta"):
            return cast(PreTrainedModel, make(model_config, **extra))
    except Exception as error:  # the families' own code raises any kind
        raise cannot_load("model", model.base_model, error) from error
