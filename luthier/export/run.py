"""A merge from beginning to end: everything is checked, then written, then proven."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

import luthier
from luthier.config import Config
from luthier.data.tokenizer import load_tokenizer, terminator_ids
from luthier.errors import ConfigError, ModelError, cannot_load
from luthier.export import folder as folders
from luthier.export.adapters import Adapter, Delta, read_adapter, write_adapter
from luthier.export.check import Proof, precision_for_check, prove
from luthier.export.combine import combine
from luthier.export.job import Job
from luthier.export.merge import Base, CannotStreamError, Plan, describe, plan_merge, without_copies
from luthier.export.quantised import Rounding, method_of, stored_bits
from luthier.export.shards import Checkpoint, write_shards
from luthier.export.whole import merge_whole
from luthier.models.device import choose_device, choose_dtype
from luthier.models.load import count_parameters, embeddings_of
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


def merge(
    job: Job,
    combining: Mapping[str, Any],
    *,
    dtype: str | None,
    onto: str | None,
    overwrite: bool,
    shard_bytes: int,
    check: bool,
) -> Proof | None:
    """Write the merged model to `job.out`; the proof of it, unless there was none.

    Raises:
        LuthierError: something does not fit; `job.out` is then as it was before.
    """
    source = folders.base_folder(job.base_model, job.revision)
    folders.check_target(job.out, [source, *job.folders], overwrite=overwrite)
    tokens = _tokens(job, source)
    described = folders.read_json(source / "config.json")
    checkpoint = Checkpoint(source)
    rounding, how = _base_weights(job, described, checkpoint, onto)
    target_dtype = _choose_dtype(dtype, described, checkpoint)
    loading = job.loading(quantized=rounding is not None)
    model = skeleton(loading.model)
    if loading.model.rope_parameters:
        described = carry_scaling(described, model.config)
    base = Base(
        name=job.base_model,
        model=model,
        checkpoint=checkpoint,
        rounding=rounding,
        tokens=len(tokens.tokenizer) if tokens.tokenizer is not None else 0,
    )
    adapter = _one_adapter(job, combining, base)
    log.info("%s onto %s: %s", adapter.source, job.base_model, how)
    plan, why_whole = None, ""
    try:
        plan = plan_merge(base, adapter, target_dtype)
    except CannotStreamError as error:
        why_whole = str(error)
        if rounding is not None or stored_bits(checkpoint):
            raise ModelError(f"{job.base_model}: this quantised base cannot be merged into: {error}") from error
    record: dict[str, Any] = {
        "luthier": luthier.__version__,
        "base_model": job.base_model,
        "revision": job.revision,
        "base_weights": how,
        "adapters": [{"path": str(s.folder), "weight": w} for s, w in zip(job.shares, job.weights, strict=True)],
        **{key: value for key, value in combining.items() if value is not None},
        "dtype": str(target_dtype)[6:],
    }
    with _as_folder(job, adapter) as adapter_folder:
        with folders.new_folder(job.out) as partial:
            if plan is None:
                log.warning("the whole model is loaded to be merged: %s", why_whole)
                merge_whole(loading, adapter_folder, partial, target_dtype, shard_bytes, tokens.tokenizer)
            else:
                _write_plan(plan, partial, described, target_dtype, shard_bytes, base)
            folders.copy_beside_weights(source, partial)
            tokens.write(partial)
            _write_generation_config(source, partial, job.config, tokens.tokenizer, base)
            folders.write_json(partial / folders.RECORD, record)
        proof, why_not = None, "" if check else "--no-check"
        if twice := sorted(p for p in adapter.deltas if f"{p}.weight" in adapter.whole):
            why_not = why_not or f"the adapter both replaces and adds to {twice[0]}"
        if check and tokens.tokenizer is None:
            why_not = "there is no tokenizer to make texts into tokens"
        if not why_not:
            parameters = count_parameters(base.model)[1]
            compute = precision_for_check(loading, parameters)
            if compute is None:
                why_not = f"that loads the whole model ({parameters / 1e9:.1f}B parameters), which does not fit here"
            else:
                proof = _prove(job, loading, base, plan, adapter_folder, target_dtype, compute)
    record["check"] = asdict(proof) if proof is not None else f"left out: {why_not}"
    folders.write_json(job.out / folders.RECORD, record)
    log.info("the merged model is in %s (%s)", job.out, str(target_dtype)[6:])
    if proof is None:
        log.warning("not compared with base + adapter: %s", why_not)
    return proof


def write_combined(job: Job, combining: Mapping[str, Any], *, overwrite: bool) -> None:
    """Several adapters, or one at another strength, as one adapter in PEFT's format."""
    source = folders.base_folder(job.base_model, job.revision)
    folders.check_target(job.out, [source, *job.folders], overwrite=overwrite)
    base = Base(job.base_model, skeleton(job.loading(quantized=False).model), Checkpoint(source))
    adapter = _one_adapter(job, combining, base)
    tokens = _tokens(job, source)
    if tokens.tokenizer is not None:
        base = Base(base.name, base.model, base.checkpoint, tokens=len(tokens.tokenizer))
    try:
        plan_merge(base, adapter, torch.float32)  # that it fits
    except CannotStreamError as error:
        log.info("%s", error)
    with folders.new_folder(job.out) as partial:
        write_adapter(adapter, partial)
        tokens.write(partial)
        record = {
            "luthier": luthier.__version__,
            "base_model": job.base_model,
            "adapters": [
                {"path": str(s.folder), "weight": w} for s, w in zip(job.shares, job.weights, strict=True)
            ],
            **{key: value for key, value in combining.items() if value is not None},
        }
        folders.write_json(partial / folders.RECORD, record)
    log.info("the adapter (r=%d) is in %s", adapter.config["r"], job.out)


# --- what goes in -------------------------------------------------------------------------------------------


def _one_adapter(job: Job, combining: Mapping[str, Any], base: Base) -> Adapter:
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


@contextmanager
def _as_folder(job: Job, adapter: Adapter) -> Iterator[Path]:
    """Where the adapter is on disk, for what loads it from there."""
    if job.weights == [1.0] and not adapter.whole:
        yield job.folders[0]
        return
    with tempfile.TemporaryDirectory() as temporary:
        write_adapter(adapter, Path(temporary))
        yield Path(temporary)


def _tokens(job: Job, source: Path) -> Tokens:
    """The adapter's own tokenizer, else the config's, else the base's."""
    remote = job.config is not None and job.config.model.trust_remote_code
    own = job.folders[0]
    if not (own / "tokenizer_config.json").is_file():
        if job.config is not None:
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
    if job.config is None:
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


def _choose_dtype(asked: str | None, described: Mapping[str, Any], checkpoint: Checkpoint) -> torch.dtype:
    if asked in DTYPES:
        return DTYPES[asked]
    if asked not in (None, "auto"):
        raise ConfigError(f"--dtype: there is no {asked!r}; there are {', '.join(DTYPES)} and auto")
    own = _own_dtype(checkpoint) if stored_bits(checkpoint) is None else None
    if own is None:
        named = described.get("dtype") or described.get("torch_dtype")
        own = DTYPES.get(str(named), torch.bfloat16)
        own = own if own.itemsize == 2 else torch.bfloat16
    return own if asked == "auto" or own.itemsize == 2 else torch.bfloat16


def _own_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """The format of most of a checkpoint's numbers."""
    sizes = dict.fromkeys(DTYPES.values(), 0)
    for tensor in checkpoint.stored.values():
        if tensor.dtype in sizes:
            sizes[tensor.dtype] += torch.Size(tensor.shape).numel()
    return max(sizes, key=lambda dtype: sizes[dtype]) if any(sizes.values()) else None


# --- what comes out -----------------------------------------------------------------------------------------


def _write_plan(
    plan: Plan, partial: Path, described: Mapping[str, Any], dtype: torch.dtype, shard_bytes: int, base: Base
) -> None:
    if plan.rounded:
        log.info("%d weights are quantised and read again", plan.rounded)
    if plan.untied:
        log.info("embeddings and head were one tensor and are two now: tie_word_embeddings is false in the result")
    if plan.grown:
        log.info("embeddings and head have %d rows now; those of new tokens are the mean of the others", plan.rows)
    if base.checkpoint.pickled:
        log.info("%s comes as PyTorch's pickles, which are read file by file", base.name)
    size = write_shards(partial, plan.tensors, shard_bytes)
    shown = f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
    log.info("%d tensors written, %s", len(plan.tensors), shown)
    quantised = stored_bits(base.checkpoint) is not None
    folders.write_json(partial / "config.json", describe(described, plan, dtype, dequantised=quantised))


def _write_generation_config(
    source: Path, partial: Path, config: Config | None, tokenizer: PreTrainedTokenizerBase | None, base: Base
) -> None:
    """The base's, which also ends where training taught the model to end."""
    name = "generation_config.json"
    if (source / name).is_file():
        settings = folders.read_json(source / name)
    else:
        settings = GenerationConfig.from_model_config(base.model.config).to_diff_dict()
    if config is not None and tokenizer is not None:
        ends = settings.get("eos_token_id")
        known = [] if ends is None else list(ends) if isinstance(ends, list) else [ends]
        if new := [end for end in terminator_ids(tokenizer, config) if end not in known]:
            settings["eos_token_id"] = [*known, *new]
            log.info(
                "generation_config: generation ends at %s too, as in training",
                ", ".join(repr(tokenizer.convert_ids_to_tokens(end)) for end in new),
            )
    folders.write_json(partial / name, settings)


def _prove(
    job: Job,
    loading: Config,
    base: Base,
    plan: Plan | None,
    folder: Path,
    dtype: torch.dtype,
    compute: torch.dtype,
) -> Proof:
    rows = None
    if plan is not None and plan.grown:  # `load_model` draws them around the mean
        rows = int(embeddings_of(base.model).weight.shape[0])
    rounded_from = base.rounding.dtype if base.rounding is not None and base.rounding.bits == 4 else None
    proof = prove(
        loading,
        folder,
        job.out,
        dtype,
        compute,
        rounded_from=rounded_from,
        exact=rounded_from in (torch.float32, _own_dtype(base.checkpoint)),
        samples=job.config,
        rows=rows,
    )
    log.info("%s", proof)
    if warning := proof.warning():
        log.warning("%s", warning)
    return proof
