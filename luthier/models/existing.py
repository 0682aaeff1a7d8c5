"""A model that a program has loaded itself, made ready to be trained here as one that `models.load` loads.

Everything is done on the instance, and `models.restored` undoes it.
"""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from luthier.config import Config
from luthier.errors import ModelError
from luthier.models import storage
from luthier.models.load import embeddings_of, turn_off_randomness, use_flat_attention

log = logging.getLogger("luthier")

_16_BITS = (torch.bfloat16, torch.float16)


def make_trainable_here(
    model: PreTrainedModel, config: Config, tokens: int, dtype: torch.dtype
) -> torch.dtype | None:
    """Give a model the attention, the randomness and the dtype of a run.

    Args:
        tokens: size of the tokenizer. dtype: what the run computes in.

    Returns:
        The 16-bit dtype in which frozen weights stay for `storage.settle`, once the adapter is on; None if all of
        them are in the compute dtype now.

    Raises:
        ModelError: the tokenizer has tokens for which the model has no embeddings.
    """
    rows = int(embeddings_of(model).weight.shape[0])
    if tokens > rows:
        raise ModelError(
            f"the tokenizer has {tokens} tokens and the model embeddings for {rows}: call "
            "model.resize_token_embeddings(len(tokenizer)) before the adapter is put on, and train them with "
            'modules_to_save=["embed_tokens", "lm_head"]'
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        model.gradient_checkpointing_disable()  # `gradient_checkpointing` of the run says what is computed again
    if hasattr(model, "_require_grads_hook"):  # for transformers' checkpointing alone
        model.disable_input_require_grads()
    if config.model.attn_implementation is None:
        use_flat_attention(model)
    turn_off_randomness(model)
    stored = embeddings_of(model).weight.dtype
    others = {p.dtype for p in model.parameters() if p.is_floating_point()} - {dtype}
    if dtype == torch.float32 and stored in _16_BITS and config.adapter.adapter is not None:
        return stored
    if others:
        log.info(
            "the model's weights are in %s and the run computes in %s: they are rounded for the run; load the model "
            "in that dtype to hold them once",
            ", ".join(sorted(str(each)[6:] for each in others)),
            str(dtype)[6:],
        )
        storage.widen(model, dtype)
    return None
