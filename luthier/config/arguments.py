"""The command-line arguments of every verb that takes a config: the file, then overrides for its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE | --KEY VALUE]...",
        help="Values for keys of the config; `luthier train --help` lists the keys.",
        show_default=False,
    ),
]
