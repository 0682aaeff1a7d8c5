"""The resolved config for a person: one line per value, with where it came from.

What the user wrote or what was derived stands out; defaults are dim. Keys that do nothing in this config are
left out.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from luthier.config.emit import config_lines
from luthier.config.load import DEFAULT, Config

_WIDEST = 60  # columns; longer values push their origin to the right


def show_config(config: Config, console: Console | None = None) -> None:
    """Print all sections to the console (default: standard output)."""
    console = console or Console(highlight=False, soft_wrap=True)
    for heading, lines in config_lines(config.flat(), config.origins):
        shown = [line for line in lines if not line.idle]
        if not shown:
            continue
        console.print(Text(heading, style="bold"), soft_wrap=True)
        width = min(_WIDEST, max(len(line.text) for line in shown))
        for line in shown:
            is_default = line.origin == DEFAULT
            row = Text(f"  {line.text:<{width}}  ", style="dim" if is_default else "")
            row.append(line.origin, style="dim" if is_default else "cyan")
            console.print(row, soft_wrap=True)
        console.print()
