"""`luthier merge-lora`: from what a user has (a run, an adapter, a config) to a model folder, and its proof."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from luthier.errors import ConfigError, RunError

log = logging.getLogger("luthier")


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_ADAPTER | CONFIG",
            help="A run or adapter folder (DIR:0.5 for half its strength), or a run's YAML file: the adapter is that "
            "in its output_dir, or in --lora-model-dir=DIR.",
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="With CONFIG: values for its keys.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the result. Default: DIR/merged.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier merge in that folder.")] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bfloat16, float16, float32, or auto for the base's own. Default: the base's own if that has 16 "
            "bits, else bfloat16."
        ),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base, where it is not the one that the adapter names.")
    ] = None,
    onto: Annotated[
        str | None,
        typer.Option(
            help="Of an adapter trained on a quantised base. quantized: onto the rounded weights, which gives the "
            "model as trained (the default); full: onto the weights before rounding."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="A further adapter, DIR:WEIGHT; may be repeated.", metavar="DIR:WEIGHT")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="How several adapters become one: linear, cat, svd, ties, dare_ties.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Share of entries that ties and dare_ties keep.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of svd's result. Default: the largest of the ranks.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of dare_ties' draws. Default: 0.")] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Write the adapters as one adapter instead of a model.")
    ] = False,
    max_shard_size: Annotated[float, typer.Option(help="Largest file of weights, in GB.")] = 5.0,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not compare the result with base and adapter.")
    ] = False,
) -> None:
    """Merge an adapter, or several, into the base model."""
    if max_shard_size <= 0:
        raise ConfigError(f"--max-shard-size {max_shard_size:g}: more than 0")
    if adapter_only and (dtype or onto or no_check):
        raise ConfigError("--adapter-only writes no model: leave --dtype, --onto and --no-check out")
    # As late as this, so that --help does not wait for torch.
    from luthier.export.combine import check_options
    from luthier.export.job import find_job
    from luthier.export.run import merge, write_combined

    job = find_job(source, overrides or [], adapter or [], base_model=base_model, out=out)
    if len(job.shares) > 1 and method is None:
        raise ConfigError("several adapters need --method: linear, cat, svd, ties or dare_ties")
    if len(job.shares) == 1 and (method or density or rank or seed is not None):
        raise ConfigError("--method and its options are for several adapters: add others with --adapter DIR:WEIGHT")
    if method is not None:
        check_options(method, job.weights, density=density, rank=rank, seed=seed)
    combining = {"method": method, "density": density, "rank": rank, "seed": seed}
    if adapter_only:
        write_combined(job, combining, overwrite=overwrite)
        return
    result = merge(
        job,
        combining,
        dtype=dtype,
        onto=onto,
        overwrite=overwrite,
        shard_bytes=int(max_shard_size * 1e9),
        check=not no_check,
    )
    if result is not None and not result.holds:
        raise RunError(
            f"{job.out}: the merged model is not base + adapter: its logits differ by {result.relative:.1e} of their "
            f"spread, and rounding explains {result.allowed:.1e}. Do not use it; report this"
        )
