"""`luthier convert FILE`, and how `luthier train` takes an Axolotl config as it is.

A file that is valid here is ours. Of one that is not, and whose unknown keys are all Axolotl's, `config_of` trains the
conversion; all other files have their errors shown as ever.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from luthier.config.convert import axolotl, llamafactory, script
from luthier.config.convert.conversion import Conversion
from luthier.config.emit import short_yaml
from luthier.config.load import Config, raise_problems
from luthier.config.yaml_source import read_file
from luthier.errors import ConfigError

log = logging.getLogger("luthier")


def command(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="An Axolotl or LLaMA-Factory YAML, or a script or notebook for Unsloth and TRL.",
            show_default=False,
        ),
    ],
    allow_unsupported: Annotated[
        bool, typer.Option("--allow-unsupported", help="Leave out what is not supported, instead of an error.")
    ] = False,
) -> None:
    """Write another tool's config as one of ours to standard output, and what became of each key to standard error."""
    text, report = converted_text(file, allow_unsupported)
    log.info("%s", report)
    print(text, end="")


def converted_text(file: Path, allow_unsupported: bool = False) -> tuple[str, str]:
    """Our YAML for a file of another tool, and the report.

    Raises:
        ConfigError: keys that are unknown or not supported, or a result that would be no valid config; the report is
            logged before.
    """
    found = convert(file)
    try:
        found.report.raise_for(allow_unsupported)
        Config.from_source(found.result())
    except ConfigError:
        log.info("%s", found.report.text())
        raise
    head = f"# {file.name}, which is {found.report.tool}, as a config of Luthier's.\n"
    return head + short_yaml(found.values, found.remarks()), found.report.text()


def convert(file: Path) -> Conversion:
    """The conversion of a file, by what it is. Raises ConfigError if it is none of the tools'."""
    if file.suffix in script.SUFFIXES:
        return script.convert(file)
    source = read_file(file)
    raise_problems(source.name, source.problems)
    if llamafactory.is_theirs(source):
        return llamafactory.convert(source)
    if "base_model" in source.values:
        return axolotl.convert(source)
    if isinstance(source.values.get("model"), str):
        raise ConfigError(f"{file}: this is LLaMA-Factory's v1 schema; its v0 schema (model_name_or_path) is read.")
    raise ConfigError(f"{file}: neither base_model (Axolotl) nor model_name_or_path (LLaMA-Factory) is there.")


def config_of(path: str | Path, overrides: Sequence[str] = (), *, quiet: bool = False) -> Config:
    """A config file of ours, or one of Axolotl's, converted and reported. Raises ConfigError as `Config.load` does."""
    try:
        return Config.load(path, overrides)
    except ConfigError:
        source = read_file(path)
        if source.problems or not axolotl.is_theirs(source):
            raise
        if is_valid(path):
            raise  # the overrides are what is wrong
    found = axolotl.convert(source)
    if not quiet and os.environ.get("RANK", "0") == "0":
        log.info("%s", found.report.text())
    found.report.raise_for(allow_unsupported=False)
    return Config.from_source(found.result(), overrides)


def is_valid(path: str | Path) -> bool:
    """Whether a file is a config of ours as it stands."""
    try:
        Config.load(path)
    except ConfigError:
        return False
    return True
