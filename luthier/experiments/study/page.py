"""The page in which a study ends: what it found, a table of its settings, drawings, and every run.

The page loads nothing; its few lines of script sort and filter the tables, which are in order without them. All that
came from a study, a config or a run is text, and is escaped as such. The same sentences are in `findings.md` beside it.
"""

from __future__ import annotations

from pathlib import Path

from luthier.experiments.report import REPORT, refuse_other_files, render
from luthier.experiments.report import write_page as write_file
from luthier.experiments.run_files import Run
from luthier.experiments.study import findings, plots, table
from luthier.experiments.study.noise import Comparison
from luthier.experiments.study.results import StudyResult, read_study, write_whole
from luthier.experiments.study.settings import groups_of, has_figure, read_runs
from luthier.experiments.study.words import Finding, metric_name

FINDINGS = "findings.md"
# Rows of a table from which on it can be filtered.
_MANY = 8
# And from which on it scrolls in a frame of its own.
_LONG = 24


def write_page(folder: Path) -> Path:
    """Write `report.html` and `findings.md` of a study folder, from what lies in it now.

    Raises:
        RunError: it is no study folder, or cannot be written.
        ConfigError: a file of that name is there, and not from here.
    """
    result = read_study(folder)
    runs = read_runs(result)
    path = result.folder / REPORT
    refuse_other_files(path)
    comparisons = compare(result, runs)
    found = findings.findings_of(result, comparisons)
    write_file(path, study_page(result, runs, comparisons, found))
    write_whole(result.folder / FINDINGS, findings.as_markdown(result, found))
    return path


def compare(result: StudyResult, runs: dict[str, Run]) -> list[Comparison]:
    """The settings, in groups that were measured alike."""
    return [Comparison(group, result.subsets) for group in groups_of(result, runs)]


def study_page(
    result: StudyResult, runs: dict[str, Run], comparisons: list[Comparison], found: list[Finding]
) -> str:
    done = sum(has_figure(trial) for trial in result.trials)
    ranked = [compared for compared in comparisons if len(compared.settings) > 1]
    drawn = [plots.best_so_far(result)] if result.search else []
    drawn += [chart for compared in ranked for chart in plots.key_plots(result, compared)]
    return render(
        "study.html",
        title=result.name,
        question=result.question,
        headline=findings.headline(result, comparisons),
        findings=found,
        notes=result.notes,
        lede=_lede(result, done),
        tables=[table.settings_table(result, compared) for compared in comparisons],
        unranked=table.unranked_table(result, runs),
        trials=table.trials_table(result, runs),
        many=_MANY,
        long=_LONG,
        charts=[chart for chart in drawn if chart],
        heats=[(compared.group.why, heat) for compared in ranked if (heat := plots.heat(result, compared))],
        costs=plots.cost_plots(result, comparisons),
        curves=plots.curves(result, runs),
        metric=metric_name(result),
    )


def _lede(result: StudyResult, done: int) -> str:
    seeds = result.seeds
    of = f" with {len(seeds)} seeds" if len(seeds) > 1 else ""
    best = "larger" if result.goal == "max" else "smaller"
    return (
        f"{done} of {len(result.trials)} runs{of} ended with a figure. Ranked by {result.metric}, {best} is better. "
        "Every figure of every run is in results.csv and results.jsonl."
    )
