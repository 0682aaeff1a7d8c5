"""How llama.cpp computes each family: its name for it, its metadata, and what it expects of the weights.

llama.cpp has fixed in its code a part of what transformers reads from the config (which layers have a window, how
queries are scaled, ...). What a config says beyond that is checked here: a file that would compute something else is
not written.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from luthier.errors import ModelError

log = logging.getLogger("luthier")

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Family:
    """Attributes:
    arch: llama.cpp's name. turned: rotary pairs are neighbours there and halves in transformers, so the rows of
        queries and keys change places. plus_one: the norms' weights are stored less one in transformers.
    activation: of the MLP. tied: there is no head of its own.
    """

    arch: str
    turned: bool = False
    plus_one: bool = False
    activation: str = "silu"
    tied: bool = False


# By `model_type` of transformers; SmolLM 1 and 2 are llama.
FAMILIES = {
    "llama": Family("llama", turned=True),
    "mistral": Family("llama", turned=True),
    "smollm3": Family("smollm3", turned=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", plus_one=True, activation="gelu_pytorch_tanh", tied=True),
    "gemma2": Family("gemma2", plus_one=True, activation="gelu_pytorch_tanh", tied=True),
    "gemma3_text": Family("gemma3", plus_one=True, activation="gelu_pytorch_tanh"),
    "phi3": Family("phi3"),
}

# llama.cpp knows the sizes whose queries are scaled by the width instead of the head by their number of layers.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}


def family_of(config: Any, name: str) -> Family:
    """Raises ModelError for a family that is not exported, naming those that are."""
    found = FAMILIES.get(config.model_type)
    if found is None:
        raise ModelError(
            f"{name}: {config.model_type} is not among the families that are exported to GGUF: "
            f"{', '.join(sorted(FAMILIES))} (SmolLM is llama; gemma3 without its eyes). llama.cpp's own "
            "convert_hf_to_gguf.py reads a merged model: export --to merged"
        )
    return found


def check(config: Any, family: Family, name: str) -> None:
    """Raises ModelError for what llama.cpp would compute otherwise; warns of windows that it does not have."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in (family.activation, "gelu_new" if family.plus_one else "swish"):
        # The first Gemma's config says gelu and its model has always computed the other.
        if not (config.model_type == "gemma" and activation == "gelu"):
            raise ModelError(f"{name}: llama.cpp's {family.arch} has {family.activation} in its MLPs, not {activation}")
        log.warning("%s: llama.cpp takes gelu_pytorch_tanh in the place of gelu", name)
    kinds = list(getattr(config, "layer_types", None) or [])
    if config.model_type in ("gemma2", "gemma3_text"):
        every = 2 if config.model_type == "gemma2" else 6
        expected = ["full_attention" if (at + 1) % every == 0 else "sliding_attention" for at in range(len(kinds))]
        if kinds != expected:
            raise ModelError(
                f"{name}: in llama.cpp one of {every} layers of {family.arch} attends to everything, the last of them, "
                "and the others to a window; here it is otherwise (layer_types)"
            )
        _check_scale(config, name)
    elif (window := _window(config)) is not None:
        log.warning(
            "%s attends to the last %d tokens only, and llama.cpp's %s to all: texts longer than that go on otherwise "
            "there",
            name,
            window,
            family.arch,
        )
    if config.model_type == "gemma3_text" and getattr(config, "attn_logit_softcapping", None):
        raise ModelError(f"{name}: llama.cpp's gemma3 has no attn_logit_softcapping")
    if config.model_type == "smollm3":
        every_fourth = [int((at + 1) % 4 != 0) for at in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != every_fourth:
            raise ModelError(
                f"{name}: in llama.cpp every 4th layer of smollm3 has no rotary embedding; here it is otherwise "
                f"(no_rope_layers: {list(config.no_rope_layers)})"
            )


def _check_scale(config: Any, name: str) -> None:
    by_width = _SCALED_BY_WIDTH[config.model_type] == config.num_hidden_layers
    theirs = config.hidden_size // config.num_attention_heads if by_width else config.head_dim
    if not math.isclose(config.query_pre_attn_scalar, theirs):
        raise ModelError(
            f"{name}: llama.cpp scales the queries of this {config.model_type} by {theirs} ** -0.5, and its config by "
            f"{config.query_pre_attn_scalar} ** -0.5 (query_pre_attn_scalar)"
        )


def _window(config: Any) -> int | None:
    """A window that counts: shorter than the context, and on some layer."""
    window = getattr(config, "sliding_window", None)
    if not window or window >= config.max_position_embeddings:
        return None
    if config.model_type == "qwen2" and not config.use_sliding_window:
        return None
    kinds = getattr(config, "layer_types", None)
    return window if kinds is None or "sliding_attention" in kinds else None


def describe(writer: Any, config: Any, family: Family, rows: int) -> None:
    """Shapes and constants as metadata.

    Args:
        writer: gguf's writer. config: the text part. rows: of the embeddings.
    """
    head = head_size(config)
    writer.add_vocab_size(rows)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if family.arch in ("gemma2", "gemma3", "phi3") and getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if family.arch == "phi3" and not getattr(config, "sliding_window", None):
        writer.add_sliding_window(0)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if value := getattr(config, key, None):
            getattr(writer, f"add_{key}")(value)


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


# --- weights ------------------------------------------------------------------------------------------------


def changed(name: str, config: Any, family: Family) -> Callable[[Array], Array]:
    """What becomes of a tensor's values.

    Args:
        name: in transformers.
    """
    owner, _, _ = name.rpartition(".")
    if family.turned and owner.endswith(("self_attn.q_proj", "self_attn.k_proj")):
        heads = config.num_attention_heads if owner.endswith("q_proj") else config.num_key_value_heads
        return lambda value: turned(value, heads)
    if family.plus_one and owner.endswith("norm"):
        return lambda value: value + np.float32(1)
    return lambda value: value


def turned(value: Array, heads: int) -> Array:
    """Rows of each head from first half and second half to pairs of one from each."""
    halves = value.reshape(heads, 2, -1, *value.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(value.shape)


# --- rotary embeddings --------------------------------------------------------------------------------------


def describe_rope(writer: Any, config: Any, family: Family, name: str) -> dict[str, Array]:
    """Base and scaling as metadata; frequencies that llama.cpp cannot compute by itself as tensors, by name.

    Raises:
        ModelError: a scaling that llama.cpp does not have.
    """
    from gguf import RopeScalingType

    rope: Mapping[str, Any] = config.rope_parameters
    local = None
    if "rope_theta" not in rope:  # by type of layer
        rope, local = rope["full_attention"], rope.get("sliding_attention")
    kind = rope.get("rope_type", "default")
    size = int(head_size(config) * float(rope.get("partial_rotary_factor") or 1.0))
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if local is not None:
        if local.get("rope_type", "default") != "default":
            raise ModelError(f"{name}: rotary embeddings of layers with a window are scaled; llama.cpp's are not")
        if family.arch == "gemma3":
            writer.add_rope_freq_base_swa(float(local["rope_theta"]))
        elif local != rope:
            raise ModelError(f"{name}: llama.cpp's {family.arch} has one rotary embedding for all layers")
    if kind == "default":
        return {}
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        return {}
    if kind == "llama3" and family.arch == "llama":
        return {"rope_freqs.weight": _divisors(rope, config, kind, size)}
    if kind == "yarn":
        _describe_yarn(writer, rope, name)
        return {}
    if kind == "longrope" and family.arch == "phi3":
        before = int(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_orig_ctx_len(before)
        writer.add_rope_scaling_attn_factors(_scaled_frequencies(config, kind)[1])
        log.info(
            "rotary embeddings of %s: llama.cpp takes those for long texts where its context is set to more than %d "
            "tokens, transformers where a text is longer than that",
            name,
            before,
        )
        return {
            f"rope_factors_{which}.weight": np.asarray(rope[f"{which}_factor"], dtype=np.float32)
            for which in ("long", "short")
        }
    raise ModelError(f"{name}: llama.cpp's {family.arch} has no rotary embeddings of type {kind}")


def _describe_yarn(writer: Any, rope: Mapping[str, Any], name: str) -> None:
    from gguf import RopeScalingType

    factor = float(rope["factor"])
    own = rope.get("attention_factor")
    if rope.get("mscale") or rope.get("mscale_all_dim") or (own and not math.isclose(own, 0.1 * math.log(factor) + 1)):
        raise ModelError(f"{name}: llama.cpp computes the attention factor of yarn itself, and this model has its own")
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    for key in ("beta_fast", "beta_slow"):
        if rope.get(key):
            getattr(writer, f"add_rope_scaling_yarn_{key}")(float(rope[key]))


def _scaled_frequencies(config: Any, kind: str) -> tuple[torch.Tensor, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, attention = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies, float(attention)


def _divisors(rope: Mapping[str, Any], config: Any, kind: str, size: int) -> Array:
    """By what llama.cpp divides each frequency to have transformers'."""
    plain = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    found: Array = (plain / _scaled_frequencies(config, kind)[0]).float().numpy()
    return found
