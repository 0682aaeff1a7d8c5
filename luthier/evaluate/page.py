"""The page of a run, drawn again when a result has been added to its folder: what it says is what there is."""

from __future__ import annotations

import logging
from pathlib import Path

from luthier.evaluate.results import results_folder, run_folder
from luthier.experiments.report import REPORT, draw_report

log = logging.getLogger("luthier")


def draw_again(target: str, output: Path | None = None) -> None:
    """Draw the page of the run that `target` is, or is a checkpoint of; nothing where it has none, or where the result
    lies elsewhere (in `output`)."""
    folder = run_folder(target)
    if folder is None or not (folder / REPORT).is_file():
        return
    place, of_run = results_folder(target, output).resolve(), results_folder(str(folder)).resolve()
    if of_run in (place, place.parent) and draw_report(folder):
        log.info("%s holds this result now", folder / REPORT)
