"""A merge from beginning to end: everything is checked, then written, then proven."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

import luthier
from luthier.config import Config
from luthier.data.tokenizer import terminator_ids
from luthier.errors import ModelError
from luthier.export import folder as folders
from luthier.export.adapters import Adapter, write_adapter
from luthier.export.check import Proof, precision_for_check, prove
from luthier.export.job import Job
from luthier.export.merge import Base, CannotStreamError, Plan, describe, plan_merge
from luthier.export.opened import choose_target_dtype, find_tokens, one_adapter, open_job, own_dtype
from luthier.export.quantised import stored_bits
from luthier.export.room import claim_room, in_words
from luthier.export.shards import Checkpoint, write_shards
from luthier.export.whole import merge_whole
from luthier.models.load import count_parameters, embeddings_of
from luthier.models.skeleton import skeleton

log = logging.getLogger("luthier")


def merge(
    job: Job,
    combining: Mapping[str, Any],
    *,
    dtype: str | None,
    onto: str | None,
    overwrite: bool,
    shard_bytes: int,
    check: bool,
    say_room: bool = False,
) -> Proof | None:
    """Write the merged model to `job.out`; the proof of it, unless there was none.

    Args:
        say_room: say beforehand what it takes on the disk, and refuse where there is less.

    Raises:
        LuthierError: something does not fit; `job.out` is then as it was before.
    """
    opened = open_job(job, combining, onto, overwrite=overwrite)
    source, tokens, loading = opened.source, opened.tokens, opened.loading
    base, adapter = opened.base, opened.adapter
    target_dtype = choose_target_dtype(dtype, opened.described, base.checkpoint)
    opened.say_weights()
    plan, why_whole = None, ""
    try:
        plan = plan_merge(base, adapter, target_dtype)
    except CannotStreamError as error:
        why_whole = str(error)
        if base.rounding is not None or stored_bits(base.checkpoint):
            raise ModelError(f"{job.base_model}: this quantised base cannot be merged into: {error}") from error
    if say_room:
        whole = target_dtype.itemsize * count_parameters(base.model)[1]
        claim_room(whole if plan is None else sum(tensor.bytes for tensor in plan.tensors), job.out)
    record: dict[str, Any] = {
        "luthier": luthier.__version__,
        "base_model": job.base_model,
        "revision": job.revision,
        "base_weights": opened.how,
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
                _write_plan(plan, partial, opened.described, target_dtype, shard_bytes, base)
            folders.copy_beside_weights(source, partial)
            tokens.write(partial)
            write_generation_config(source, partial, job.config, tokens.tokenizer, base)
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
    adapter = one_adapter(job, combining, base)
    tokens = find_tokens(job, source)
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


# --- what goes in and comes out ----------------------------------------------------------------------------


@contextmanager
def _as_folder(job: Job, adapter: Adapter) -> Iterator[Path]:
    """Where the adapter is on disk, for what loads it from there."""
    if job.weights == [1.0] and not adapter.whole:
        yield job.folders[0]
        return
    with tempfile.TemporaryDirectory() as temporary:
        write_adapter(adapter, Path(temporary))
        yield Path(temporary)


def _write_plan(
    plan: Plan, partial: Path, described: Mapping[str, Any], dtype: torch.dtype, shard_bytes: int, base: Base
) -> None:
    say_plan(plan, base)
    size = write_shards(partial, plan.tensors, shard_bytes)
    log.info("%d tensors written, %s", len(plan.tensors), in_words(size))
    quantised = stored_bits(base.checkpoint) is not None
    folders.write_json(partial / "config.json", describe(described, plan, dtype, dequantised=quantised))


def say_plan(plan: Plan, base: Base) -> None:
    """What becomes otherwise than it was, besides the weights that the adapter changes."""
    if plan.rounded:
        log.info("%d weights are quantised and read again", plan.rounded)
    if plan.untied:
        log.info("embeddings and head were one tensor and are two now: tie_word_embeddings is false in the result")
    if plan.grown:
        log.info("embeddings and head have %d rows now; those of new tokens are the mean of the others", plan.rows)
    if base.checkpoint.pickled:
        log.info("%s comes as PyTorch's pickles, which are read file by file", base.name)


def write_generation_config(
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
        exact=rounded_from in (torch.float32, own_dtype(base.checkpoint)),
        samples=job.config,
        rows=rows,
    )
    log.info("%s", proof)
    if warning := proof.warning():
        log.warning("%s", warning)
    return proof
