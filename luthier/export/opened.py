"""What is to be saved, opened: base, adapter and tokenizer, with everything checked and nothing loaded.

A run, an adapter or a whole model becomes the same thing here: a list of tensors that are made one at a time. Every
format is written from that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from luthier.config import Config
from luthier.data.tokenizer import load_tokenizer
from luthier.errors import ConfigError, ModelError, cannot_load
from luthier.export import folder as folders
from luthier.export.adapters import Adapter, Delta, read_adapter
from luthier.export.combine import combine
from luthier.export.job import Job
from luthier.export.merge import Base, without_copies
from luthier.export.quantised import Rounding, method_of, stored_bits
from luthier.export.shards import Checkpoint
from luthier.models.device import choose_device, choose_dtype
from luthier.models.rope import carry_scaling
from luthier.models.skeleton import skeleton

log = logging.getLogger("luthier")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Tokens:
    """The tokenizer of the result, and the folder whose files are copied; None: it is saved as it is in memory."""

    tokenizer: PreTrainedTokenizerBase | None
    folder: Path | None

    def write(self, target: Path) -> None:
        if self.folder is not None:
            folders.copy_files(self.folder, target, folders.TOKENIZER_FILES)
        elif self.tokenizer is not None:
            self.tokenizer.save_pretrained(target)
        else:
            log.warning("neither adapter nor base has a tokenizer: the merged folder has none")


@dataclass(frozen=True)
class Opened:
    """Attributes:
    source: folder of the base. described: its `config.json`, as it is true of the run.
    how: which weights of the base these are, in words. loading: the config by which the base is loaded.
    adapter: what is merged in; empty for a whole model.
    """

    job: Job
    source: Path
    tokens: Tokens
    described: Mapping[str, Any]
    how: str
    loading: Config
    base: Base
    adapter: Adapter

    def say_weights(self) -> None:
        """What is merged, and onto which weights."""
        if self.job.shares:
            log.info("%s onto %s: %s", self.adapter.source, self.job.base_model, self.how)
        elif stored_bits(self.base.checkpoint) is not None:
            log.info("%s: %s", self.job.base_model, self.how)


def open_job(job: Job, combining: Mapping[str, Any], onto: str | None, *, overwrite: bool) -> Opened:
    """Everything that a job needs, and a target that may be written.

    Raises:
        LuthierError: something does not fit.
    """
    source = folders.base_folder(job.base_model, job.revision)
    folders.check_target(job.out, [source, *job.folders], overwrite=overwrite)
    tokens = find_tokens(job, source)
    described: Mapping[str, Any] = folders.read_json(source / "config.json")
    checkpoint = Checkpoint(source)
    rounding, how = _base_weights(job, described, checkpoint, onto)
    loading = job.loading(quantized=rounding is not None)
    model = skeleton(loading.model)
    if loading.model.rope_parameters:
        described = carry_scaling(dict(described), model.config)
    base = Base(
        name=job.base_model,
        model=model,
        checkpoint=checkpoint,
        rounding=rounding,
        tokens=len(tokens.tokenizer) if tokens.tokenizer is not None else 0,
    )
    return Opened(job, source, tokens, described, how, loading, base, one_adapter(job, combining, base))


def one_adapter(job: Job, combining: Mapping[str, Any], base: Base) -> Adapter:
    if not job.shares:  # a whole model
        return Adapter(job.base_model, {}, {})
    adapters = [without_copies(base, read_adapter(share.folder)) for share in job.shares]
    if len(adapters) == 1:
        return _scaled(adapters[0], job.weights[0])
    paths = [path for path, _ in base.model.named_modules()]
    adapter = combine(adapters, job.weights, paths=paths, **combining)
    left = {path for each in adapters for path in each.deltas} - set(paths)
    if left:
        raise ModelError(
            f"{adapter.source}: {len(left)} of their modules are not in {job.base_model} ({min(left)}, ...)"
        )
    if adapter.whole:
        log.info("taken as they are, without a weight: %s", ", ".join(sorted(adapter.whole)[:4]))
    return adapter


def _scaled(adapter: Adapter, weight: float) -> Adapter:
    if weight == 1.0:
        return adapter
    if any(delta.magnitude is not None for delta in adapter.deltas.values()):
        raise ModelError(f"{adapter.source}: a DoRA adapter can be merged with weight 1 only")
    deltas = {
        path: Delta(d.a * (weight * d.scale), d.b, 1.0, embedding=d.embedding) for path, d in adapter.deltas.items()
    }
    ranks = {delta.r for delta in deltas.values()}
    alphas = {path: delta.r for path, delta in deltas.items()} if len(ranks) > 1 else {}
    config = {
        **adapter.config,
        "r": max(ranks),
        "lora_alpha": max(ranks),
        "use_rslora": False,
        "rank_pattern": alphas,
        "alpha_pattern": alphas,
    }
    return Adapter(f"{adapter.source}:{weight:g}", config, deltas, adapter.whole)


def find_tokens(job: Job, source: Path) -> Tokens:
    """The adapter's own tokenizer, else the config's, else the base's."""
    remote = job.config is not None and job.config.model.trust_remote_code
    own = job.folders[0] if job.shares else source
    if not (own / "tokenizer_config.json").is_file():
        if job.config is not None and job.shares:
            return Tokens(load_tokenizer(job.config), None)
        own = source
    if not any((own / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")):
        return Tokens(None, None)
    try:
        return Tokens(AutoTokenizer.from_pretrained(own, trust_remote_code=remote), own)
    except Exception as error:  # tokenizers raises bare Exception for a broken tokenizer.json
        raise cannot_load("tokenizer", str(own), error) from error


def _base_weights(
    job: Job, described: Mapping[str, Any], checkpoint: Checkpoint, onto: str | None
) -> tuple[Rounding | None, str]:
    """How the base's linear layers are quantised before they are merged into, and which weights these are, in words.

    Raises:
        ConfigError: `onto` asks for weights that there are not.
        ModelError: a base quantised by something that cannot be read here.
    """
    if onto not in (None, "quantized", "full"):
        raise ConfigError(f"--onto: there is no {onto!r}; there are quantized and full")
    method, bits = method_of(described), stored_bits(checkpoint)
    if method is not None and bits is None:
        raise ModelError(
            f"{job.base_model}: its weights are quantised ({method}), and only bitsandbytes' can be read here; name "
            "the model that they were made from with --base-model"
        )
    if bits is not None:
        if onto == "full":
            raise ConfigError(
                f"--onto full: {job.base_model} holds weights in {bits} bits only; name the model that they were made "
                "from with --base-model"
            )
        return None, f"its {bits}-bit weights, dequantised; that is the model as trained"
    rounding = _trained_rounding(job)
    if rounding is None:
        if onto is not None:
            raise ConfigError(
                f"--onto {onto}: nothing says that the adapter was trained on a quantised base; give the config of "
                "its run: luthier merge-lora CONFIG --lora-model-dir=DIR"
            )
        if job.config is not None and job.config.model.load_in_fp8:
            return None, "its weights before the rounding to 8-bit floating point that training had beside the adapter"
        return None, "its weights as they are"
    if onto == "full":
        return None, f"its weights before the rounding to {rounding} that training had beside the adapter"
    return rounding, (
        f"its weights rounded to {rounding} and read again, as in training; that is the model as trained "
        "(--onto full takes them before rounding)"
    )


def _trained_rounding(job: Job) -> Rounding | None:
    """How the run quantised its base at load."""
    if job.config is None or not job.shares:
        return None
    model = job.config.model
    if model.load_in_8bit:
        return Rounding(8)
    if not model.load_in_4bit:
        return None
    dtype = choose_dtype(job.config, choose_device(model.device_map))
    for place in (job.folders[0], job.folders[0].resolve().parent):  # of a checkpoint, the run is above
        if (place / "environment.json").is_file():
            found = folders.read_json(place / "environment.json").get("dtype")
            dtype = DTYPES.get(str(found), dtype)
            break
    return Rounding(4, model.bnb_4bit_quant_type, model.bnb_4bit_use_double_quant, dtype)


def choose_target_dtype(asked: str | None, described: Mapping[str, Any], checkpoint: Checkpoint) -> torch.dtype:
    if asked in DTYPES:
        return DTYPES[asked]
    if asked not in (None, "auto"):
        raise ConfigError(f"--dtype: there is no {asked!r}; there are {', '.join(DTYPES)} and auto")
    own = own_dtype(checkpoint) if stored_bits(checkpoint) is None else None
    if own is None:
        named = described.get("dtype") or described.get("torch_dtype")
        own = DTYPES.get(str(named), torch.bfloat16)
        own = own if own.itemsize == 2 else torch.bfloat16
    return own if asked == "auto" or own.itemsize == 2 else torch.bfloat16


def own_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """The format of most of a checkpoint's numbers."""
    sizes = dict.fromkeys(DTYPES.values(), 0)
    for tensor in checkpoint.stored.values():
        if tensor.dtype in sizes:
            sizes[tensor.dtype] += torch.Size(tensor.shape).numel()
    return max(sizes, key=lambda dtype: sizes[dtype]) if any(sizes.values()) else None
