"""`luthier train CONFIG`: by itself on all GPUs of the machine, in this very process where one is enough.

What was asked for is checked before the config is read, and the config before torch is imported; only then is it known
how many processes there will be.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from luthier.config import Config
from luthier.config.arguments import ConfigArgument, OverridesArgument
from luthier.config.convert.command import config_of
from luthier.errors import ConfigError
from luthier.launch.asked import Asked


def command(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    num_processes: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Processes on this machine; without it as many as there are visible GPUs (one on a CPU).",
            show_default=False,
        ),
    ] = None,
    nnodes: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Machines that train together; run the same command on each.", show_default=False
        ),
    ] = None,
    node_rank: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="Which of the machines this one is, from 0; 0 is the one that --rdzv-endpoint names. Without it they "
            "are put into an order.",
            show_default=False,
        ),
    ] = None,
    rdzv_endpoint: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where several machines meet: one of them.", show_default=False),
    ] = None,
    launcher: Annotated[
        str,
        typer.Option(
            metavar="auto|none|ray",
            help="Who starts the processes: auto: luthier, unless WORLD_SIZE says that somebody has; none: somebody "
            "has; ray: Ray.",
        ),
    ] = "auto",
    num_workers: Annotated[
        int | None, typer.Option(metavar="N", help="With ray: its workers.", show_default=False)
    ] = None,
    max_failures: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="With ray: how often the run may begin again from its last checkpoint.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train a model as a config says."""
    asked = Asked(num_processes, nnodes, node_rank, rdzv_endpoint, launcher, num_workers, max_failures)
    asked.check()
    loaded = config_of(config, overrides or [])
    if launcher == "ray":
        _train_with_ray(config, overrides or [], asked)
        return
    if not asked.starts_processes:
        _train_here(loaded)
        return

    from luthier.launch.processes import number_of_processes, run_in_processes

    processes = number_of_processes(loaded, num_processes)
    if processes == 1 and asked.machines == 1:
        _train_here(loaded)
    else:
        run_in_processes(loaded, processes, asked.machines, node_rank, rdzv_endpoint)


def _train_here(config: Config) -> None:
    from luthier.train.run import train

    train(config)


def _train_with_ray(config: Path, overrides: list[str], asked: Asked) -> None:
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--launcher ray needs Ray, which is not installed: pip install 'luthier[ray]'")
    train = importlib.import_module("luthier.launch.ray").train
    train(config, overrides, num_workers=asked.num_workers, max_failures=asked.max_failures)
