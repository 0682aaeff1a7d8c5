"""Prompts to the engine in batches that memory holds, with no answer lost where it does not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from luthier.errors import RunError
from luthier.generate.engine import MAX_CACHED_TOKENS, Engine
from luthier.models.memory import free_memory, free_unused, is_out_of_memory

log = logging.getLogger("luthier")

SHARE_OF_MEMORY = 0.5  # of what is free, for cached keys and values


def in_batches(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    is_done: Callable[[int], bool],
    ask: Callable[[list[int]], None],
    advice: str,
) -> None:
    """Ask for all prompts that are not done. Each time that memory ends, the engine's batches get half as large.

    Args:
        is_done: whether the prompt of an index has its answer. ask: puts the prompts of some indices to the engine and
            keeps each answer as it ends. advice: what to do where memory does not hold a single prompt.

    Raises:
        RunError: memory does not hold a single prompt with its answer.
    """
    while waiting := [index for index in range(len(prompts)) if not is_done(index)]:
        try:
            ask(waiting)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # Smaller than two of the shortest: every prompt has been by itself.
            if engine.max_cached_tokens < 2 * min(len(prompts[index]) for index in waiting):
                raise RunError(f"out of memory with a single prompt and its answer: {advice}") from error
        # Outside of the except block: while there is a traceback, its frames hold the batch.
        free_unused(engine.model.get_input_embeddings().weight.device)
        smaller = engine.max_cached_tokens // 2
        log.warning(
            "out of memory with batches of up to %d tokens: going on with %d", engine.max_cached_tokens, smaller
        )
        engine.max_cached_tokens = smaller


def cached_tokens(model: Any) -> int:
    """Prompt and answer tokens of a batch over all its rows, by the memory that is free for keys and values."""
    device = model.get_input_embeddings().weight.device
    if device.type != "cuda":
        return MAX_CACHED_TOKENS
    config = model.config.get_text_config(decoder=True)
    # The prompts' own pass holds an MLP's two inner states and more; when ended rows leave, the cache is there twice.
    passing = 4 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    passing *= model.get_input_embeddings().weight.element_size()
    return max(MAX_CACHED_TOKENS // 4, int(SHARE_OF_MEMORY * free_memory(device) / (2 * cache_bytes(model) + passing)))


def cache_bytes(model: Any) -> int:
    """Keys and values of a token over all layers; on the large side where layers keep less."""
    config = model.config.get_text_config(decoder=True)
    layers = getattr(config, "num_hidden_layers", None) or 1
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", None) or 1) // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return max(1, 2 * layers * kept * width * model.get_input_embeddings().weight.element_size())
