"""Loading a base model as it is on the hub or on disk, ready to be changed on the instance.

Anything that `AutoModelForCausalLM` knows can be trained. Checkpoints with a vision or audio part come as
their whole class, of which the text part is what trains. Nothing of the model's own is left to chance: weights
that the checkpoint lacks are an error, and a model's own dropout is turned off and said, since a step must give
the same gradients however it is cut into passes.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.artifacts.source import local
from luthier.config import Config, ModelConfig
from luthier.errors import ConfigError, ModelError, cannot_load
from luthier.models import attention
from luthier.models.frozen import FrozenLinear
from luthier.models.quantize import is_quantized, quantization, quantized_as
from luthier.models.rope import apply_rope

log = logging.getLogger("luthier")

# Below 1 they divide by zero somewhere in a family's own code.
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


def load_model(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    dtype: torch.dtype,
    model_config: Any = None,
) -> PreTrainedModel:
    """The base model of a config on its device, in eval mode, with room for the tokenizer's added tokens.

    Args:
        model_config: as `read_model_config` gives it, where it is read already: on the hub each reading is a request.

    Raises:
        ModelError: not found, gated, weights missing, or no causal LM.
        ConfigError: a `model_type` that transformers does not have.
    """
    model_config = model_config or read_model_config(config.model)
    auto_class = model_class(config.model, model_config)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    if config.model.trust_remote_code:
        log.warning("trust_remote_code: code that comes with %s is run", config.model.base_model)
    arguments: dict[str, Any] = dict(
        config=model_config,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
        dtype=dtype,
        attn_implementation=_attention_here(config.model.attn_implementation),
        output_loading_info=True,
    )
    if (found := quantization(config.model, model_config, device, dtype)) is not None:
        arguments["quantization_config"] = found
    if device.type == "cuda" or found is not None or quantized_as(model_config):
        arguments["device_map"] = {"": device}  # straight to the card: the host never holds the whole model
    try:
        model, info = auto_class.from_pretrained(local(config.model.base_model), **arguments)
    except Exception as error:  # safetensors, pickle and the families' own code raise any kind
        raise cannot_load("model", config.model.base_model, error) from error
    model = (model if is_quantized(model) else model.to(device)).eval()
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{config.model.base_model}: the checkpoint lacks {len(missing)} of the model's weights "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); is it a checkpoint of "
            f"{type(model).__name__}?"
        )
    if info["unexpected_keys"]:
        unexpected = sorted(info["unexpected_keys"])
        log.info(
            "%d weights of the checkpoint have no place in %s and are left out (%s, ...)",
            len(unexpected),
            type(model).__name__,
            unexpected[0],
        )
    if arguments["attn_implementation"] is None:
        use_flat_attention(model)
    turn_off_randomness(model)
    grow_embeddings(model, len(tokenizer))
    return model


def _attention_here(name: str | None) -> str | None:
    """The attention that a config names; None, for the default, where that is FlashAttention and it is not installed.

    Configs of other tools ask for it to be fast, which the default is without a package, with the same numbers.
    """
    available = {
        "flash_attention_2": transformers.utils.is_flash_attn_2_available,
        "flash_attention_3": transformers.utils.is_flash_attn_3_available,
    }
    if name not in available or available[name]():
        return name
    log.warning("attn_implementation: %s is not installed here: the default is used, which needs no package", name)
    return None


def read_model_config(model: ModelConfig) -> Any:
    """The checkpoint's `config.json` as transformers reads it, with RoPE scaled as the config asks; no weights are
    touched.

    Raises:
        ModelError: it cannot be read. ConfigError: `rope_parameters` does not go with it.
    """
    try:
        found = transformers.AutoConfig.from_pretrained(
            local(model.base_model), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, ImportError, KeyError, StrictDataclassError) as error:
        raise cannot_load("model", model.base_model, error) from error
    except ZeroDivisionError as error:
        wrong = f"one of {', '.join(_SIZES)} is 0"
        raise ModelError(f"{model.base_model}: its config.json describes no model: {wrong}") from error
    text = found.get_text_config(decoder=True)
    none = [name for name in _SIZES if isinstance(size := getattr(text, name, None), int) and size < 1]
    if none:
        said = ", ".join(f"{name} {getattr(text, name)}" for name in none)
        raise ModelError(f"{model.base_model}: its config.json describes no model: {said}; it must be 1 or more")
    apply_rope(model, found)
    return found


def model_class(model: ModelConfig, model_config: Any) -> Any:
    if model.model_type != "AutoModelForCausalLM":
        chosen = getattr(transformers, model.model_type, None)
        if chosen is not None and model.model_type.startswith("AutoModel"):
            return chosen
        if not (isinstance(chosen, type) and issubclass(chosen, PreTrainedModel)):
            raise ConfigError(
                f"model_type: transformers {transformers.__version__} has no model class {model.model_type!r}"
            )
        if (reads := getattr(chosen, "config_class", None)) is not None and not isinstance(model_config, reads):
            raise ConfigError(
                f"model_type: {model.model_type} does not read {model.base_model}, which is a "
                f"{model_config.model_type!r} model; leave model_type out"
            )
        return chosen
    causal = transformers.AutoModelForCausalLM
    remote = model.trust_remote_code and "AutoModelForCausalLM" in (
        getattr(model_config, "auto_map", None) or {}
    )
    if remote or type(model_config) in causal._model_mapping:
        return causal
    if type(model_config) in transformers.AutoModelForImageTextToText._model_mapping:
        log.info("%s has parts beside its text model; the text model is what trains", model.base_model)
        return transformers.AutoModelForImageTextToText
    raise ModelError(
        f"{model.base_model}: a {model_config.model_type!r} model generates no text from left to right; "
        "base_model must be a causal language model"
    )


def use_flat_attention(model: PreTrainedModel) -> bool:
    """Let the model attend through Luthier, where its family asks transformers' registry; says whether it does."""
    attention.register()
    if not model._can_set_attn_implementation():
        return False
    model.set_attn_implementation(attention.NAME)
    return True


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module from token ids to the last hidden states; of a multimodal model its text part."""
    decoder = model.get_decoder()
    if decoder is model:
        raise ModelError(f"{type(model).__name__} has no text decoder that transformers can name")
    return decoder


def text_config_of(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def embeddings_of(model: PreTrainedModel) -> nn.Embedding:
    """The input embeddings, of whatever class; what is read of them is their `weight` (V, D)."""
    return cast(nn.Embedding, model.get_input_embeddings())


def rows_of_embeddings(model: PreTrainedModel) -> int:
    """V, also where DeepSpeed has the weight in pieces."""
    weight = embeddings_of(model).weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def turn_off_randomness(model: nn.Module) -> None:
    """The model's own dropout and jitter, which would tell apart what the cut of a step must not."""
    found: dict[str, float] = {}
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            found["dropout"] = module.p
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if ("dropout" in name or "jitter" in name) and isinstance(value, float) and value > 0:
                found[name] = value
                setattr(module, name, 0.0)
    if found:
        listed = ", ".join(f"{name} {value:g}" for name, value in sorted(found.items()))
        log.info("the model's own randomness is off (%s); lora_dropout is what drops out here", listed)


def grow_embeddings(model: PreTrainedModel, tokens: int) -> int:
    """Room for `tokens` rows in the embeddings and the head; returns how many rows were added.

    A tokenizer smaller than the embeddings is common (padded vocabularies) and changes nothing.
    """
    rows = int(embeddings_of(model).weight.shape[0])
    if tokens <= rows:
        return 0
    model.resize_token_embeddings(tokens, mean_resizing=True)
    log.info(
        "embeddings grown from %d to %d rows for added tokens, set to the mean of the others", rows, tokens
    )
    return tokens - rows


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and all parameters; tied ones count once, those packed into 4 bits as what they stand for."""
    packed = {
        id(layer.weight): layer.in_features * layer.out_features
        for layer in model.modules()
        if isinstance(layer, FrozenLinear) and layer.storage == "4bit"
    }
    trainable = total = 0
    for parameter in model.parameters():
        total += packed.get(id(parameter), parameter.numel())
        trainable += parameter.numel() if parameter.requires_grad else 0
    return trainable, total
