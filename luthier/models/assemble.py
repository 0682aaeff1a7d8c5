"""From a config, or from a folder, to a model that is ready: for training, or for inference."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from luthier.artifacts.source import local, reference_of
from luthier.config import Config
from luthier.config.preference import has_reference
from luthier.errors import ConfigError, ModelError, cannot_load
from luthier.models import adapter_files, quantize, storage
from luthier.models.device import choose_device, choose_dtype
from luthier.models.existing import make_trainable_here
from luthier.models.freeze import set_trainable
from luthier.models.from_hub import fetched
from luthier.models.frozen import keep_copies
from luthier.models.lean import make_lean
from luthier.models.load import count_parameters, load_model, read_model_config
from luthier.models.lora import DropoutState, add_lora
from luthier.models.lora_init import OriginalWeights, Sources, changes_base
from luthier.models.rank_budget import looks_at_data

log = logging.getLogger("luthier")

RUN_CONFIG = "config.yaml"

# What an adapter on disk settles; dropout is the run's.
_OF_ADAPTER = (
    "lora_r",
    "lora_alpha",
    "peft_use_rslora",
    "peft_use_dora",
    "rank_pattern",
    "alpha_pattern",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_target_linear",
    "lora_modules_to_save",
    "peft_layers_to_transform",
)


def build_model(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    dtype: torch.dtype,
    *,
    documents: Sequence[torch.Tensor] | None = None,
    resume_from: Path | None = None,
    given: PreTrainedModel | None = None,
    adapter: Mapping[str, torch.Tensor] | None = None,
) -> tuple[PreTrainedModel, DropoutState | None]:
    """The model that a config trains: base weights, adapter or unfrozen parameters; says what trains.

    Args:
        documents: token ids of training documents, for adapters that look at data before they begin.
        resume_from: the checkpoint that the run goes on from.
        given: a model to take instead of loading one. adapter: values that its adapter begins with, by PEFT's names.
    """
    model_config = read_model_config(config.model) if given is None else given.config
    quantize.check_trains(config, model_config)
    if given is None:
        narrow = _narrow_dtype(config, model_config, len(tokenizer), dtype)
        model = load_model(config, tokenizer, device, narrow or dtype, model_config)
    else:
        narrow = make_trainable_here(given, config, len(tokenizer), dtype)
        model = given.eval()
    dropout = make_trainable(model, config, _sources(model, config, documents, resume_from))
    if adapter is not None:
        adapter_files.fill_adapter(model, dict(adapter), config.adapter.lora_modules_to_save, "the model's adapter")
    quantize.take_over(model)
    if narrow is not None:
        storage.settle(model, dtype)
    if copies := config.precision.dequantized_copies_gib:
        keep_copies(model, copies * 2**30, dtype)
    _check_added_tokens(model, tokenizer, config)
    trainable, total = count_parameters(model)
    log.info(
        "trainable parameters: %s of %s (%.2f%%)", f"{trainable:,}", f"{total:,}", 100 * trainable / total
    )
    return model, dropout


def _narrow_dtype(config: Config, model_config: Any, tokens: int, dtype: torch.dtype) -> torch.dtype | None:
    """The checkpoint's 16-bit dtype, where the frozen weights beside an adapter may stay in it."""
    adapter = config.adapter
    # What runs through the model before it is settled, or is taken out of its weights, would be rounded.
    if adapter.adapter is None or looks_at_data(adapter) or changes_base(adapter.peft_init_lora_weights):
        return None
    return storage.smaller_dtype(config.model, model_config, tokens, dtype)


def _sources(
    model: PreTrainedModel, config: Config, documents: Sequence[torch.Tensor] | None, resume_from: Path | None
) -> Sources:
    """What the start of a new adapter may need."""
    if config.adapter.adapter is None or config.adapter.lora_model_dir is not None:
        return Sources()
    original = earlier = None
    how = config.adapter.peft_init_lora_weights
    if resume_from is not None:
        needed = changes_base(how) or looks_at_data(config.adapter)
        tensors = adapter_files.read_adapter_tensors(resume_from) if needed else {}
        earlier = {name.removeprefix(adapter_files.PREFIX): tensor for name, tensor in tensors.items()}
    # What it begins with is also what a reference is made of, before the checkpoint's values follow.
    if how == "loftq" and (resume_from is None or has_reference(config.preference.rl)):
        original = OriginalWeights(storage.checkpoint_files(config.model), model.base_model_prefix)
    return Sources(documents, original, earlier)


def make_trainable(
    model: PreTrainedModel, config: Config, sources: Sources | None = None
) -> DropoutState | None:
    """Put on the adapter that the config asks for (new, or from `lora_model_dir`, whose settings
    `with_adapter_settings` has put into the config), or unfreeze parameters.
    """
    adapter = config.adapter
    if adapter.adapter is None:
        set_trainable(model, config.freeze)
        return None
    if adapter.lora_model_dir is None:
        return add_lora(model, adapter, config.training.seed, sources)
    log.info(
        "going on from the adapter in %s (r=%d, alpha=%g): its own settings and targets hold",
        adapter.lora_model_dir,
        adapter.lora_r,
        adapter.lora_alpha,
    )
    return adapter_files.load_adapter(
        model, adapter.lora_model_dir, adapter, config.training.seed, trained_on=True
    )


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
    for key in ("lora_r", "lora_alpha", "peft_use_rslora", "peft_use_dora", "rank_pattern", "alpha_pattern"):
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


def open_for_inference(
    path: str, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Config | None]:
    """A model for generation and evaluation from what a user has: a run folder, an adapter, or a model.

    An adapter is merged into its base in memory, so that generating costs nothing extra; one that was trained on a
    quantised base stays beside it.

    Returns:
        The model in eval mode, its tokenizer, and the config of the run if the folder is one, or a run's checkpoint.

    Raises:
        ModelError: nothing loadable there.
    """
    found = find(path)
    tokenizer = tokenizer_of(found)
    adapter = str(found.folder) if found.is_adapter else None
    return _open(found.loading, tokenizer, adapter, device, dtype), tokenizer, found.run


def tokenizer_for_inference(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer that `open_for_inference` gives, without the model: to see first whether the data is in order.

    Raises:
        ModelError: nothing loadable there.
    """
    return tokenizer_of(find(path))


def open_base(
    run: Config,
    tokenizer: PreTrainedTokenizerBase,
    *,
    adapter: str | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """The base model of a run as it was before: stored as in the run, with room for the tokens that the run added (each
    the mean of the others), without an adapter unless one is given."""
    return _open(run, tokenizer, adapter, device, dtype)


def _open(
    loading: Config,
    tokenizer: PreTrainedTokenizerBase,
    adapter: str | None,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> PreTrainedModel:
    model = load_base(loading, tokenizer, device, dtype)
    if adapter is not None:
        adapter_files.load_adapter(model, adapter, adapter_files.adapter_settings(adapter))
    if quantize.is_quantized(model):
        quantize.take_over(model)
    elif adapter is not None:
        adapter_files.merge_into_base(model)
    make_ready(model)
    return model


def load_base(
    loading: Config,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> PreTrainedModel:
    """A base as its weights are stored; what is None is chosen."""
    device = device or choose_device(loading.model.device_map)
    return load_model(loading, tokenizer, device, dtype or choose_dtype(loading, device))


def make_ready(model: PreTrainedModel) -> None:
    """For inference: nothing is trained, and the forwards that are proven for that."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    make_lean(model.eval())


class Found(NamedTuple):
    """What lies at a path: the folder (None on the hub), the base and what it is loaded with, the run's config."""

    folder: Path | None
    is_adapter: bool
    base: str
    loading: Config
    run: Config | None


def find(path: str) -> Found:
    """What is at a path, without loading any of it.

    Raises:
        ModelError: nothing loadable there.
    """
    path = local(path)
    folder = fetched(path) or Path(path).expanduser()
    if folder.is_file():
        raise ModelError(f"{path} is a file: give the folder of a run, an adapter or a model, or a name on the hub")
    config = None
    # A checkpoint is loaded as its run's last state is: on the base as it was stored in training.
    of_run = folder.resolve().parent if folder.name.startswith("checkpoint-") else folder
    if (of_run / RUN_CONFIG).is_file():
        config = Config.load(of_run / RUN_CONFIG)
    source = folder if folder.is_dir() else None
    is_adapter = source is not None and (source / adapter_files.CONFIG).is_file()
    if (
        source is not None
        and (source / RUN_CONFIG).is_file()
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
    beside = source is not None and (source / "config.json").is_file()
    if is_adapter and not beside and not described.get("base_model_name_or_path"):
        raise ModelError(
            f"{path}: the adapter does not say which base it is for; write that into base_model_name_or_path of its "
            f"{adapter_files.CONFIG}"
        )
    base = described.get("base_model_name_or_path") or str(source or path)
    base = base if source is None else _from_above(base, source)
    # Of the run of a merged model only the format counts: its weights are neither rounded nor stretched once more.
    as_trained = config if config is None or is_adapter or config.adapter.adapter is None else None
    return Found(source, is_adapter, base, _loading_config(base, described.get("revision"), as_trained), config)


def _from_above(base: str, source: Path) -> str:
    """A base that a run names by a relative path, which held where the run was started: mostly a folder above it."""
    if Path(base).exists():
        return base
    if (artifact := reference_of(base)) is not None:
        log.info("%s is not here; it is %s", base, artifact)
        return artifact
    if Path(base).expanduser().is_absolute():
        return base
    for above in source.resolve().parents:
        if (above / base / "config.json").is_file():
            log.info("%s is not here, and is in %s, above the run", base, above)
            return str(above / base)
    return base


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
            "rope_parameters",
        ):
            value = run.flat().get(key)
            if value is not None:
                values[key] = value
        stored = run.model
        if stored.load_in_4bit or stored.load_in_8bit:  # the weights that the adapter was trained on
            values |= {"adapter": "lora", "load_in_4bit": stored.load_in_4bit, "load_in_8bit": stored.load_in_8bit}
        if stored.load_in_4bit:
            values |= {
                "bnb_4bit_quant_type": stored.bnb_4bit_quant_type,
                "bnb_4bit_use_double_quant": stored.bnb_4bit_use_double_quant,
            }
    return Config.from_flat(values)


def tokenizer_of(found: Found) -> PreTrainedTokenizerBase:
    """The tokenizer saved with what was found, else its base model's."""
    return _tokenizer_beside(found.folder, found.base, found.loading)


def _tokenizer_beside(source: Path | None, base: str, config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer saved with an adapter or model if there is one, else the base model's."""
    name = str(source) if source is not None and (source / "tokenizer_config.json").is_file() else base
    try:
        return AutoTokenizer.from_pretrained(
            local(name),
            revision=config.model.revision if name == base else None,
            trust_remote_code=config.model.trust_remote_code,
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise cannot_load("tokenizer", name, error) from error
