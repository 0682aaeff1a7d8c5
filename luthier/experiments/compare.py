"""Several runs side by side: what they differ in, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from luthier.experiments.beside import evaluation_tables
from luthier.experiments.charts import Chart, Series, line_chart, number, percent
from luthier.experiments.forgetting import general_losses
from luthier.experiments.outcomes import all_verdicts
from luthier.experiments.run_files import Run
from luthier.experiments.sections import Table, clipped, lede
from luthier.experiments.verdict import headline

# Colours of the style sheet that runs take in turn.
COLOURS = 8
# Keys that say where a run lies and how it was started, not what it is.
_NOT_OF_THE_RUN = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint"}
# What has to be the same for two eval losses to be of the same measure.
_MEASURE = ("test_datasets", "val_set_size", "seed", "rl", "rl_beta", "dpo_loss_type", "sequence_len")
_UNSET = "(not set)"


def comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """What the page of several runs shows."""
    label_apart(runs)
    found = [all_verdicts(run) for run in runs]
    differing, cells = config_table(runs)
    return {
        "title": f"{len(runs)} runs compared",
        "headline": best_in_words(runs),
        "caveats": caveats(runs),
        "runs": [
            {
                "label": run.label,
                "colour": _colour(place),
                "headline": headline(run, found[place]),
                "lede": lede(run),
                "verdicts": found[place],
            }
            for place, run in enumerate(runs)
        ],
        "figures": figures_table(runs),
        "config": differing,
        "config_cells": cells,
        "curves": curves(runs),
        "evaluations": evaluation_tables(runs),
    }


def label_apart(runs: Sequence[Run]) -> None:
    """Longer labels for folders of the same name."""
    for length in (2, 3):
        names = [run.label for run in runs]
        for run in runs:
            if names.count(run.label) > 1:
                run.label = "/".join(run.folder.resolve().parts[-length:])


def best_in_words(runs: Sequence[Run]) -> str:
    ranked = sorted((loss[1], loss[0], run.label) for run in runs if (loss := _best_loss(run)))
    if not ranked:
        return "None of them was evaluated on held-out data."
    if measures_differ(runs):
        return "Their eval losses are not of the same data or loss, and cannot be compared."
    lowest, step, label = ranked[0]
    if len(ranked) == 1:
        return f"{label} alone was evaluated on held-out data: eval loss {lowest:.4f} at its best."
    return f"{label} has the lowest eval loss: {lowest:.4f} at step {step:,.0f}; the next has {ranked[1][0]:.4f}."


def caveats(runs: Sequence[Run]) -> list[str]:
    found = []
    if differ := measures_differ(runs):
        found.append(f"Eval losses are not of the same measure: the runs differ in {', '.join(differ)}.")
    unfinished = [run.label for run in runs if not run.finished]
    if unfinished:
        found.append(f"Not finished: {', '.join(unfinished)}.")
    return found


def measures_differ(runs: Sequence[Run]) -> list[str]:
    """In what the runs differ of all that an eval loss depends on, apart from what was trained."""
    evaluated = [run for run in runs if run.points("eval_loss")]
    found = [key for key in _MEASURE if len({_plain(run.config.get(key)) for run in evaluated}) > 1]
    if not any(run.config.get("val_set_size") for run in evaluated):
        found = [key for key in found if key != "seed"]  # it draws what is held out, and nothing is drawn
    # What is tested on other rows may have been trained on any: which do better is what such runs are compared for.
    tested = all(run.config.get("test_datasets") for run in evaluated)
    names = ("test_sources",) if tested else ("sources", "test_sources")
    data = {_plain([_fingerprints(run, name) for name in names]) for run in evaluated}
    return [*found, "the data"] if len(data) > 1 else found


def figures_table(runs: Sequence[Run]) -> tuple[Table, list[list[tuple[str, bool]]]]:
    """Runs as rows; each cell with whether it is the best of its column."""
    comparable = not measures_differ(runs)
    rows: list[list[tuple[str, bool]]] = []
    losses = [_best_loss(run) for run in runs]
    lowest = min((loss[1] for loss in losses if loss), default=None) if comparable else None
    accuracies = [run.last("eval_rewards/accuracies") for run in runs]
    forgotten = [general_losses(run) for run in runs]
    for run, loss, accuracy, general in zip(runs, losses, accuracies, forgotten, strict=True):
        speeds = sorted(value for _, value in run.points("tokens_per_second"))
        peak = run.summary.get("measured_peak_gib") or max((v for _, v in run.points("peak_memory_gib")), default=None)
        rows.append(
            [
                (run.label, False),
                (f"{loss[1]:.4f}" if loss else "", loss is not None and loss[1] == lowest),
                (f"{loss[0]:,.0f}" if loss else "", False),
                (_form(run.last("eval_loss"), ".4f"), False),
                (_form(run.last("loss"), ".4f"), False),
                *([(_form(accuracy, ".1%"), False)] if any(accuracies) else []),
                *([(f"{general[0]:.4f} → {general[1]:.4f}" if general else "", False)] if any(forgotten) else []),
                (f"{run.steps:,}", False),
                (number(run.last("tokens") or 0), False),
                (_form(run.summary.get("seconds") or run.last("seconds"), ",.0f"), False),
                (f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "", False),
                (_form(peak, ".2f"), False),
            ]
        )
    head = ["run", "best eval loss", "at step", "at the end", "training loss"]
    head += ["preferred as labelled"] if any(accuracies) else []
    head += ["general set, loss"] if any(forgotten) else []
    head += ["steps", "tokens", "seconds", "tokens/s", "peak GiB"]
    return Table(head, [], numeric=frozenset(range(1, len(head)))), rows


def config_table(runs: Sequence[Run]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The runs' labels, and each key that they differ in with its values."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    cells = []
    for key in keys:
        values = [_plain(run.config[key]) if key in run.config else _UNSET for run in runs]
        if key not in _NOT_OF_THE_RUN and len(set(values)) > 1:
            cells.append((key, [clipped(value, 200) for value in values]))
    return [run.label for run in runs], cells


def curves(runs: Sequence[Run]) -> list[Markup]:
    """One drawing a figure, one curve a run."""

    def over(name: str, *, dots: bool = False) -> list[Series]:
        return [Series(run.label, run.points(name), _colour(place), dots) for place, run in enumerate(runs)]

    charts = [
        Chart("Evaluation loss", over("eval_loss", dots=True), log=None),
        Chart("Training loss", over("loss"), log=None),
        Chart("Margin of rewards, held-out", over("eval_rewards/margins", dots=True)),
        Chart("Preferred as labelled, held-out", over("eval_rewards/accuracies", dots=True), form=percent),
        Chart("Learning rate", over("learning_rate"), from_zero=True),
        Chart("Gradient norm", over("grad_norm"), log=None),
        Chart("Tokens a second", over("tokens_per_second"), from_zero=True),
        Chart("Peak memory, GiB", over("peak_memory_gib"), from_zero=True),
    ]
    return [drawn for chart in charts if (drawn := line_chart(chart))]


def _best_loss(run: Run) -> tuple[float, float] | None:
    """(step, eval loss) of the best evaluation."""
    return min(run.points("eval_loss"), key=lambda point: point[1], default=None)


def _fingerprints(run: Run, name: str) -> list[Any]:
    return [source.get("fingerprint") for source in run.data.get(name) or []]


def _colour(place: int) -> str:
    return f"c{place % COLOURS + 1}" + (" dashed" if place >= COLOURS else "")


def _form(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
