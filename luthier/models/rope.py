"""Sequences beyond what a model was made for: scaled rotary embeddings, or a refusal.

A model has seen positions up to its `max_position_embeddings` and no further. `rope_parameters` stretches its rotary
embedding to more (`linear`: Chen et al. 2023; `yarn`: Peng et al. 2023; `llama3`: that of Llama 3.1), which changes
the model for short documents too, so it is part of what is trained and exported. Without it, a document that is
longer than the model knows is an error.

The dynamic kind is refused: its frequencies follow the longest document that a pass has shown so far
(`dynamic_rope_update` in transformers), so a document would come out otherwise beside a longer one, and after it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from luthier.config import Config, ModelConfig
from luthier.errors import ConfigError, ModelError

log = logging.getLogger("luthier")


def apply_rope(model: ModelConfig, model_config: Any) -> None:
    """Put a config's `rope_parameters` into the model's own.

    Sets `max_position_embeddings` to the new length. Where attention is of several types, that over all positions is
    scaled; layers with a window never see more than they were made for. A model that is scaled like this already, as
    one that was trained here is, stays as it is.

    Raises:
        ConfigError: the model has no rotary embedding, is scaled in another way already, or a value is missing.
    """
    asked = dict(model.rope_parameters or {})
    if not asked:
        return
    asked["rope_type"] = kind = asked.pop("type", None) or asked["rope_type"]
    text = model_config.get_text_config(decoder=True)
    everything = getattr(text, "rope_parameters", None)
    if not everything or not getattr(text, "max_position_embeddings", None):
        raise ConfigError(
            f"rope_parameters: {model.base_model} ({text.model_type}) has no rotary embedding that could be scaled; "
            "leave it out"
        )
    nested = text.nested_rope_parameter_keys(everything)
    if nested and "full_attention" not in nested:
        raise ConfigError(
            f"rope_parameters: {model.base_model} has rotary embeddings of its own for {', '.join(nested)}, and none "
            "of them is full_attention; leave it out"
        )
    own = everything["full_attention"] if nested else everything
    own_kind = own.get("rope_type") or "default"
    if own_kind != "default" and all(own.get(key) == value for key, value in asked.items()):
        return
    if own_kind not in ("default", kind) or own_kind == kind == "linear":
        raise ConfigError(
            f"rope_parameters: {model.base_model} is scaled already ({own_kind}, factor {own.get('factor')}, "
            f"{text.max_position_embeddings} positions), and another scaling on top would be a third model; leave it "
            "out, or begin from the model before its scaling"
        )
    before = own.get("original_max_position_embeddings") or text.max_position_embeddings
    original = int(asked.get("original_max_position_embeddings") or before)
    kept = {key: own[key] for key in ("rope_theta", "partial_rotary_factor") if own.get(key) is not None}
    scaled = {**kept, **asked}
    if kind != "linear":
        scaled["original_max_position_embeddings"] = original
    text.rope_parameters = {**everything, "full_attention": scaled} if nested else scaled
    text.max_position_embeddings = int(original * float(scaled["factor"]))
    try:
        text.standardize_rope_params()
        text.validate_rope()
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"rope_parameters: {' '.join(str(error).split())[:300]}") from error


def with_rope(config: Config, model_config: Any) -> Config:
    """The config with all that says how the rotary embedding is scaled, for those who load the base later; says it.

    Args:
        model_config: as `read_model_config` gives it, scaled.
    """
    if not config.model.rope_parameters:
        return config
    text = model_config.get_text_config(decoder=True)
    found = text.rope_parameters
    nested = bool(text.nested_rope_parameter_keys(found))
    found = found["full_attention"] if nested else found
    factor, new = float(found["factor"]), text.max_position_embeddings
    log.info(
        "RoPE scaled (%s): %s positions x %g = %s%s",
        found["rope_type"],
        f"{round(new / factor):,}",
        factor,
        f"{new:,}",
        " in the layers with full attention" if nested else "",
    )
    known = {key: value for key, value in found.items() if value is not None}
    if known == config.model.rope_parameters:
        return config
    return config.replace("rope_parameters, with the model's own values", rope_parameters=known)


def check_length(config: Config, model_config: Any, longest: int) -> None:
    """Whether the model has positions for the longest document, and for what the config says of longer ones.

    Raises:
        ConfigError: `rope_parameters` stretches it to less than `sequence_len`.
        ModelError: a document is longer than the model was made for.
    """
    text = model_config.get_text_config(decoder=True)
    limit = positions(text)
    if limit is None:
        return
    asked, name = config.data.sequence_len, config.model.base_model
    if config.model.rope_parameters and asked > limit:
        factor = float(config.model.rope_parameters["factor"])
        raise ConfigError(
            f"rope_parameters: a factor of {factor:g} gives {limit:,} positions, and sequence_len is {asked:,}: "
            f"write a factor of at least {factor * asked / limit:.3g}, or sequence_len: {limit}"
        )
    if longest > limit:
        ways = f"sequence_len: {limit} leaves such documents out, or cuts them (excess_length_strategy: truncate)"
        if getattr(text, "rope_parameters", None):
            ways += (
                "; `rope_parameters: {rope_type: yarn, factor: " + f"{-(-longest // limit)}" + "}` stretches the "
                "model's positions, which its training has to make up for"
            )
        raise ModelError(
            f"a document has {longest:,} tokens, and {name} was made for {limit:,} (max_position_embeddings): {ways}"
        )
    if asked > limit and config.origins["sequence_len"] != "default":
        log.info(
            "sequence_len is %d and the model was made for %d positions; no document is as long", asked, limit
        )


class Documents(Protocol):
    """Rows of token ids; one that was packed elsewhere says the lengths of the documents inside it."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]: ...
    def __getitem__(self, row: int) -> Any: ...


def with_positions(config: Config, model_config: Any, parts: Sequence[Documents | None]) -> Config:
    """`with_rope`, once it is known that the model has positions for all documents; raises as `check_length` does."""
    limit, longest = positions(model_config.get_text_config(decoder=True)), 0
    for part in parts:
        if part is not None and limit is not None:
            for row in np.flatnonzero(part.lengths > limit).tolist():
                longest = max(longest, *(part[row].lengths or (int(part.lengths[row]),)))
    check_length(config, model_config, longest)
    return with_rope(config, model_config)


def positions(text_config: Any) -> int | None:
    """The most positions that a model was made for; None where it has no such number, or needs none."""
    limit = getattr(text_config, "max_position_embeddings", None)
    if not limit or getattr(text_config, "alibi", False):
        return None
    if getattr(text_config, "position_embedding_type", None) in ("nope", "alibi"):
        return None
    return int(limit)


def carry_scaling(described: dict[str, Any], model_config: Any) -> dict[str, Any]:
    """A base's `config.json`, as read from disk, with the scaling that the model was trained with.

    Args:
        model_config: as `read_model_config` gives it for that base, scaled.
    """
    text = model_config.get_text_config(decoder=True)
    scaled = {
        "rope_parameters": text.rope_parameters,
        "max_position_embeddings": text.max_position_embeddings,
    }
    inner = described.get("text_config")
    if isinstance(inner, dict):
        return {**described, "text_config": {**_without_older_names(inner), **scaled}}
    return {**_without_older_names(described), **scaled}


def _without_older_names(section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in ("rope_scaling", "rope_theta")}
