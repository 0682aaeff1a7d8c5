"""`luthier report`: a run, or several, as one page that a browser shows without anything else.

The page holds its style and its drawings; it loads nothing and runs nothing. Everything in it that came from data or
from a model is text, and is escaped as such.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

import luthier
from luthier.errors import ConfigError, RunError
from luthier.experiments import given, sections
from luthier.experiments.compare import best_in_words, comparison
from luthier.experiments.evaluations import shown_evaluations
from luthier.experiments.forgetting import endings_table
from luthier.experiments.outcomes import all_verdicts
from luthier.experiments.run_files import Run, read_run
from luthier.experiments.verdict import headline

log = logging.getLogger("luthier")

REPORT = "report.html"
COMPARISON = "comparison.html"
# In every page that is made here; a file without it is somebody else's.
_GENERATOR = '<meta name="generator" content="Luthier'


def command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="One run folder, or several to compare.")],
    output: Annotated[
        Path | None,
        typer.Option(help=f"File to write. Default: RUN/{REPORT}, or {COMPARISON} here for several runs."),
    ] = None,
) -> None:
    """Make a page of what a run did, at any time, or of what several runs differ in."""
    if len({Path(run).expanduser().resolve() for run in runs}) < len(runs):
        raise ConfigError("the same run is named twice")
    found = [read_run(run) for run in runs]
    default = found[0].folder / REPORT if len(found) == 1 else Path(COMPARISON)
    path = output.expanduser() if output is not None else default
    refuse_other_files(path)
    page = comparison_page(found) if len(found) > 1 else run_page(found[0])
    write_page(path, page)
    print(headline(found[0], all_verdicts(found[0])) if len(found) == 1 else best_in_words(found))
    print(f"report: {path}")


def write_report(folder: Path) -> Path:
    """`report.html` of a run folder, from what lies in it now.

    Raises:
        RunError: it is no run folder, or cannot be written.
        ConfigError: a file of that name is there, and not from here.
    """
    path = folder / REPORT
    refuse_other_files(path)
    write_page(path, run_page(read_run(folder)))
    return path


def draw_report(folder: Path) -> bool:
    """`write_report` at the end of something that is worth more than its page: a failure is said, and no error."""
    try:
        write_report(folder)
    except Exception as error:  # whatever it is: `luthier report` can be called again
        log.warning("no report was made: %s: %s; `luthier report %s` tries again", type(error).__name__, error, folder)
        return False
    return True


def run_page(run: Run) -> str:
    """The page of one run."""
    found = all_verdicts(run)
    drawn = sections.curves(run)
    return render(
        "run.html",
        run=run,
        title=run.label,
        headline=headline(run, found),
        lede=sections.lede(run),
        verdicts=found,
        figures=sections.figures(run),
        curves=drawn,
        evaluation_table=sections.evaluation_table(run),
        evaluations=shown_evaluations(run),
        beyond=shown_evaluations(run, beyond=True),
        endings=endings_table(run),
        samples=sections.sample_table(run),
        sources=given.data_sources(run),
        mix=given.data_mix(run),
        drops=given.data_drops(run),
        facts=given.data_facts(run),
        histogram=given.data_histogram(run),
        config_chosen=given.config_parts(run, chosen=True),
        config_rest=given.config_parts(run, chosen=False),
        environment=given.environment(run),
    )


def comparison_page(runs: list[Run]) -> str:
    """The page of several runs."""
    return render("comparison.html", **comparison(runs))


def refuse_other_files(path: Path) -> None:
    """Raises ConfigError for what is there and was not made here."""
    if path.is_dir():
        raise ConfigError(f"--output {path} is a folder; name a file in it")
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            ours = _GENERATOR in file.read(2000)
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not ours:
        raise ConfigError(f"{path} is there and is no report; nothing is overwritten unasked: name another --output")


def write_page(path: Path, page: str) -> None:
    """Write a page whole or not at all."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        partial.write_bytes(page.encode("utf-8", errors="replace"))  # a sample may hold half a surrogate pair
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"{path}: the report cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _with_code(text: str) -> Markup:
    """Text in which what stands between backquotes is code."""
    parts = [escape(part) for part in text.split("`")]
    if len(parts) % 2 == 0:
        return escape(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else part for place, part in enumerate(parts)
    )


@cache
def _pages() -> Environment:
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["code"] = _with_code
    return pages


def render(name: str, **values: Any) -> str:
    """A page of `pages/` with its values."""
    return _pages().get_template(name).render(version=luthier.__version__, **values)
