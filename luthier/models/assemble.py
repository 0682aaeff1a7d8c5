"""From a config, or from a folder, to a model that is ready: for training, or for inference."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from luthier.config import Config
from luthier.errors import ConfigError, ModelError, cannot_load
from luthier.models import adapter_files
from luthier.models.device import choose_device, choose_dtype
from luthier.models.freeze import set_trainable
from luthier.models.load import count_parameters, load_model
from luthier.models.lora import DropoutState, add_lora

log = logging.getLogger("luthier")

RUN_CONFIG = "config.yaml"

# What an adapter on disk settles; dropout is the run's.
_OF_ADAPTER = (
    "lora_r",
    "lora_alpha",
    "peft_use_rslora",
    "lora_target_modules",
    "lora_target_linear",
    "lora_modules_to_save",
    "peft_layers_to_transform",
)


def build_model(
    config: Config, tokenizer: PreTrainedTokenizerBase, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, DropoutState | None]:
    """The model that a config trains: base weights, adapter or unfrozen parameters; says what trains."""
    model = load_model(config, tokenizer, device, dtype)
    dropout = make_trainable(model, config)
    _check_added_tokens(model, tokenizer, config)
    if config.precision.gradient_checkpointing:
        _checkpoint_layers(model)
    trainable, total = count_parameters(model)
    log.info(
        "trainable parameters: %s of %s (%.2f%%)", f"{trainable:,}", f"{total:,}", 100 * trainable / total
    )
    return model, dropout


def make_trainable(model: PreTrainedModel, config: Config) -> DropoutState | None:
    """Put on the adapter that the config asks for (new, or from `lora_model_dir`, whose settings
    `with_adapter_settings` has put into the config), or unfreeze parameters.
    """
    adapter = config.adapter
    if adapter.adapter is None:
        set_trainable(model, config.freeze)
        return None
    if adapter.lora_model_dir is None:
        return add_lora(model, adapter, config.training.seed)
    log.info(
        "going on from the adapter in %s (r=%d, alpha=%g): its own settings and targets hold",
        adapter.lora_model_dir,
        adapter.lora_r,
        adapter.lora_alpha,
    )
    return adapter_files.load_adapter(model, adapter.lora_model_dir, adapter, config.training.seed)


def with_adapter_settings(config: Config) -> Config:
    """The config with what the adapter in `lora_model_dir` brings (rank, strength, targets), if there is one.

    Raises:
        ConfigError: the config asks for another rank or strength than the adapter has.
    """
    folder = config.adapter.lora_model_dir
    if folder is None:
        return config
    found = adapter_files.adapter_settings(folder)
    asked = config.flat()
    for key in ("lora_r", "lora_alpha", "peft_use_rslora"):
        if config.origins[key] != "default" and asked[key] != getattr(found, key):
            raise ConfigError(
                f"{key}: {asked[key]}, but the adapter in {folder} has {getattr(found, key)}; leave {key} out, "
                "or lora_model_dir"
            )
    return config.replace(f"the adapter in {folder}", **{key: getattr(found, key) for key in _OF_ADAPTER})


def _check_added_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    added = [
        token for token in tokenizer.new_tokens if token != tokenizer.pad_token
    ]  # nothing is ever padded
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    trained = embeddings.weight.requires_grad and (head is None or head.weight.requires_grad)
    if added and not trained:
        remedy = (
            "name embeddings and head in lora_modules_to_save (for most models [embed_tokens, lm_head])"
            if config.adapter.adapter
            else "leave embeddings and head unfrozen"
        )
        raise ModelError(
            f"{', '.join(added[:3])}: tokens that are new to the vocabulary begin as the mean of the others "
            f"and would never be trained; {remedy}"
        )


def _checkpoint_layers(model: PreTrainedModel) -> None:
    # transformers renamed it; the old name warns from then on
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        # Every random draw is seeded by document, so there is no state to restore for the second computation.
        enable({"use_reentrant": False, "preserve_rng_state": False})
    except ValueError as error:
        raise ModelError(f"gradient_checkpointing: {type(model).__name__} does not support it") from error


def open_for_inference(
    path: str, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Config | None]:
    """A model for generation and evaluation from what a user has: a run folder, an adapter, or a model.

    An adapter is merged into its base in memory, so that generating costs nothing extra.

    Returns:
        The model in eval mode, its tokenizer, and the config of the run if the folder is one.

    Raises:
        ModelError: nothing loadable there.
    """
    folder = Path(path).expanduser()
    config = None
    if (folder / RUN_CONFIG).is_file():
        config = Config.load(folder / RUN_CONFIG)
    source = folder if folder.is_dir() else None
    is_adapter = source is not None and (source / adapter_files.CONFIG).is_file()
    if (
        source is not None
        and config is not None
        and not is_adapter
        and not (source / "config.json").is_file()
    ):
        raise ModelError(
            f"{path}: the run has not ended yet, or was cut off: no adapter or model at its top; "
            f"give one of its checkpoint-N folders, or go on with resume_from_checkpoint: auto"
        )
    if source is not None and not is_adapter and not (source / "config.json").is_file():
        raise ModelError(
            f"{path}: neither a run, an adapter nor a model: {adapter_files.CONFIG} or config.json is missing"
        )
    described = adapter_files.read_adapter_config(source) if is_adapter and source else {}
    base = described.get("base_model_name_or_path") or str(source or path)
    loading = _loading_config(base, described.get("revision"), config)
    device = device or choose_device(loading.model.device_map)
    dtype = dtype or choose_dtype(loading, device)
    tokenizer = _tokenizer_beside(source, base, loading)
    model = load_model(loading, tokenizer, device, dtype)
    if is_adapter and source:
        settings = adapter_files.adapter_settings(source)
        adapter_files.load_adapter(model, source, settings)
        adapter_files.merge_into_base(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval(), tokenizer, config


def _loading_config(base: str, revision: str | None, run: Config | None) -> Config:
    """What is needed to load a base: the run's own settings where there is a run."""
    values: dict[str, object] = {"base_model": base, "datasets": [{"path": "none", "type": "completion"}]}
    if revision:
        values["revision"] = revision
    if run is not None:
        for key in (
            "model_type",
            "trust_remote_code",
            "attn_implementation",
            "device_map",
            "bf16",
            "fp16",
            "tf32",
        ):
            value = run.flat().get(key)
            if value is not None:
                values[key] = value
    return Config.from_flat(values)


def _tokenizer_beside(source: Path | None, base: str, config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer saved with an adapter or model if there is one, else the base model's."""
    name = str(source) if source is not None and (source / "tokenizer_config.json").is_file() else base
    try:
        return AutoTokenizer.from_pretrained(
            name,
            revision=config.model.revision if name == base else None,
            trust_remote_code=config.model.trust_remote_code,
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise cannot_load("tokenizer", name, error) from error
