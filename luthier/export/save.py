"""`luthier export`: a run, an adapter or a model in one of the formats that others read."""

from __future__ import annotations

import difflib
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.errors import ConfigError, RunError

if TYPE_CHECKING:
    from luthier.config import Config
    from luthier.export.job import Job

log = logging.getLogger("luthier")

FORMATS = ("adapter", "merged", "merged-4bit", "gguf")


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_ADAPTER_OR_MODEL",
            help="A run, a checkpoint or an adapter (DIR:0.5 for half its strength), a model folder, or a model's "
            "name.",
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            help="adapter: PEFT's files. merged: 16-bit safetensors. merged-4bit: the same in NF4 (bitsandbytes). "
            "gguf: for llama.cpp and Ollama."
        ),
    ],
    quant: Annotated[
        str | None,
        typer.Option(
            help="Of gguf: f32, f16, bf16, q8_0 (the default), q5_1, q5_0, q4_1, q4_0; with llama-cpp-python also "
            "q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, q3_k_l, q3_k_m, q3_k_s, q2_k."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(help="Folder of the result, or the .gguf file. Default: a folder inside of the source."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export there.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="The base, where it is not the one that the adapter names.")
    ] = None,
    onto: Annotated[
        str | None,
        typer.Option(help="Of an adapter trained on a quantised base: quantized (the default) or full, as merge-lora."),
    ] = None,
    max_shard_size: Annotated[
        float | None, typer.Option(help="Largest file of weights of merged and merged-4bit, in GB. Default: 5.")
    ] = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not compare the result with what it was made of.")
    ] = False,
) -> None:
    """Save a run, an adapter or a model in a format that others read. The disk it takes is said before."""
    export(
        source,
        to,
        quant=quant,
        output=output,
        overwrite=overwrite,
        base_model=base_model,
        onto=onto,
        max_shard_size=max_shard_size,
        check=not no_check,
    )


def export(
    source: str,
    to: str,
    *,
    quant: str | None = None,
    output: str | None = None,
    overwrite: bool = False,
    base_model: str | None = None,
    onto: str | None = None,
    max_shard_size: float | None = None,
    check: bool = True,
) -> Path:
    """As the command, from Python.

    Args:
        source: a run, checkpoint, adapter or model. to: one of `FORMATS`. quant: of gguf. max_shard_size: in GB.

    Returns:
        The folder, or the GGUF file.

    Raises:
        LuthierError: something does not fit, and nothing is written; or the result is not what it was made of.
    """
    _check_options(to, quant=quant, onto=onto, max_shard_size=max_shard_size)
    # As late as this, so that --help does not wait for torch.
    from luthier.export.gguf.quants import find_quant

    chosen = find_quant(quant or "q8_0")
    part = f"gguf-{chosen.name}" if to == "gguf" else to
    job, run = find_source(source, part, base_model=base_model, output=output)
    shard_bytes = int((max_shard_size or 5.0) * 1e9)
    if to == "adapter":
        return _export_adapter(job, source, overwrite=overwrite)
    if to == "merged":
        return _export_merged(job, source, onto, overwrite=overwrite, shard_bytes=shard_bytes, check=check)
    from luthier.export.opened import open_job

    if to == "merged-4bit":
        from luthier.export.four_bit import export_four_bit

        return export_four_bit(open_job(job, {}, onto, overwrite=overwrite), run, shard_bytes=shard_bytes)
    from luthier.export.gguf.job import export_gguf

    own = Path(source.rpartition(":")[0] or source) if not Path(source).exists() else Path(source)
    file = job.out if job.out.suffix == ".gguf" else job.out / f"{own.resolve().name}-{chosen.name}.gguf"
    # The folder may hold other things: it is the two files that must not be there.
    opened = open_job(replace(job, out=file.with_name(f".partial-{file.name}")), {}, onto, overwrite=overwrite)
    export_gguf(opened, run, chosen, file, overwrite=overwrite, check=check)
    return file


def find_source(
    source: str, part: str, *, base_model: str | None, output: str | None
) -> tuple[Job, Config | None]:
    """What is to be saved, and the config of its run, if one is known.

    Args:
        part: name of the folder of the result inside of the source, where `output` does not say another.

    Raises:
        ConfigError, ModelError: there is nothing to save.
    """
    from luthier.config import Config
    from luthier.export.job import Job, config_of, find_job
    from luthier.models import adapter_files

    folder = Path(source).expanduser()
    is_model = folder.is_dir() and (folder / "config.json").is_file()
    is_name = not folder.exists() and source.count("/") == 1 and source[0] not in "./~" and ":" not in source
    if (folder / adapter_files.CONFIG).is_file() or not (is_model or is_name):
        if folder.suffix in (".yml", ".yaml"):
            raise ConfigError(f"{source}: give the run's folder, not its config")
        job = find_job(source, [], [], base_model=base_model, out=output)
        return (job if output else replace(job, out=job.folders[0] / part)), job.config
    if base_model is not None:
        raise ConfigError(f"--base-model: {source} is a whole model, and has no base")
    if is_name and output is None:
        raise ConfigError(f"{source} is no folder: say with --output where the result goes")
    run = config_of(folder) if is_model else None
    if run is None and is_model and folder.resolve().name.startswith("merged"):
        above = folder.resolve().parent / "config.yaml"
        run = Config.load(above) if above.is_file() else None
    out = Path(output).expanduser() if output else folder / part
    return Job((), source, None, None, out), run


def _check_options(to: str, *, quant: str | None, onto: str | None, max_shard_size: float | None) -> None:
    if to not in FORMATS:
        near = difflib.get_close_matches(to.lower().replace("_", "-"), FORMATS, n=1, cutoff=0.5)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"--to: there is no {to!r}.{meant} There are {', '.join(FORMATS)}")
    if quant is not None and to != "gguf":
        raise ConfigError(f"--quant is for --to gguf, not {to}")
    if max_shard_size is not None and to not in ("merged", "merged-4bit"):
        raise ConfigError(f"--max-shard-size: --to {to} is one file")
    if max_shard_size is not None and max_shard_size <= 0:
        raise ConfigError(f"--max-shard-size {max_shard_size:g}: more than 0")
    if onto is not None and to == "adapter":
        raise ConfigError("--onto: an adapter is saved without its base")


def _need_adapter(job: Job, source: str, to: str) -> None:
    if not job.shares:
        raise ConfigError(
            f"{source} holds a whole model and no adapter, so there is nothing to export as {to}; --to merged-4bit and "
            "gguf are for models too"
        )


def _export_adapter(job: Job, source: str, *, overwrite: bool) -> Path:
    """The adapter's files by themselves, or at another strength."""
    _need_adapter(job, source, "adapter")
    from luthier.export import folder as folders
    from luthier.export.room import claim_room, in_words
    from luthier.export.run import write_combined
    from luthier.models import adapter_files

    folder = job.folders[0]
    files = [path for name in (adapter_files.CONFIG, "adapter_model.*") for path in folder.glob(name)]
    size = sum(path.stat().st_size for path in files)
    folders.check_target(job.out, job.folders, overwrite=overwrite)
    claim_room(size, job.out)
    if job.weights != [1.0]:
        write_combined(job, {}, overwrite=overwrite)
        return job.out
    with folders.new_folder(job.out) as partial:
        folders.copy_files(folder, partial, [path.name for path in files])
        folders.copy_files(folder, partial, [*folders.TOKENIZER_FILES, "README.md"])
        folders.write_json(partial / folders.RECORD, {"adapter": str(folder), "base_model": job.base_model})
    log.info("the adapter (%s) is in %s; its base is %s", in_words(size), job.out, job.base_model)
    return job.out


def _export_merged(
    job: Job, source: str, onto: str | None, *, overwrite: bool, shard_bytes: int, check: bool
) -> Path:
    _need_adapter(job, source, "merged")
    from luthier.export.run import merge

    proof = merge(
        job, {}, dtype=None, onto=onto, overwrite=overwrite, shard_bytes=shard_bytes, check=check, say_room=True
    )
    if proof is not None and not proof.holds:
        raise RunError(
            f"{job.out}: the merged model is not base + adapter: its logits differ by {proof.relative:.1e} of their "
            f"spread, and rounding explains {proof.allowed:.1e}. Do not use it; report this"
        )
    return job.out
