"""Benchmarks on a run's page: of one model and of two, and results of a run's parts beside those of the run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from luthier.evaluate.results import results_folder, write_results
from luthier.experiments.evaluations import shown_evaluations
from luthier.experiments.outcomes import all_verdicts
from luthier.experiments.report import write_report
from luthier.experiments.run_files import read_run
from tests.experiments.conftest import MakeRun, Page, curve

SUMMARY = {"steps": 60, "finished": "2026-01-01T00:00:00+00:00"}


def figure(value: float, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, **more}


def asked(before: float, after: float, *, beyond: bool, no_answer: tuple[int, int] = (3, 1)) -> dict[str, Any]:
    """A group of MMLU-Pro's questions with two models."""
    difference = figure(after - before, beyond_chance=beyond, better=after > before if beyond else None)
    return {
        "rows": 50,
        "target": {"accuracy": figure(after), "accuracy_with_guess": figure(after + 0.02)},
        "compare": {"accuracy": figure(before), "accuracy_with_guess": figure(before + 0.02)},
        "difference": {"accuracy": difference},
        "counts": {"compare": {"no_answer": no_answer[0]}, "target": {"no_answer": no_answer[1]}},
    }


def result(kind: str, figures: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"kind": kind, "target": "run", "compare": "org/base", "created": "2026-01-02T00:00:00+00:00",
            "figures": figures, "rows": None, **more}  # fmt: skip


def mmlu_pro(**more: Any) -> dict[str, Any]:
    law, math = asked(0.2, 0.5, beyond=True), asked(0.4, 0.35, beyond=False)
    whole = asked(0.3, 0.42, beyond=True, no_answer=(6, 2))
    return result("mmlu_pro", {"all": whole, "by": {"category": {"law": law, "math": math}}}, **more)


def tables_of(folder: Path, *, beyond: bool = True) -> dict[str, list[list[str]]]:
    shown = shown_evaluations(read_run(folder), beyond=beyond)
    return {each.title: [list(each.tables[0].head), *map(list, each.tables[0].rows)] for each in shown}


def test_mmlu_pro_of_two_models(make_run: MakeRun) -> None:
    folder = make_run(metrics=curve(), files={"evaluation/mmlu.json": mmlu_pro()})
    assert tables_of(folder)["MMLU-Pro: mmlu"] == [
        ["category", "questions", "its base", "this run", "difference"],
        ["law", "50", "20.0% [10.0%, 30.0%]", "50.0% [40.0%, 60.0%]", "better by 30.0 [20.0, 40.0] points"],
        ["math", "50", "40.0% [30.0%, 50.0%]", "35.0% [25.0%, 45.0%]", "no telling: -5.0 [-15.0, +5.0] points"],
        ["all", "50", "30.0% [20.0%, 40.0%]", "42.0% [32.0%, 52.0%]", "better by 12.0 [2.0, 22.0] points"],
    ]
    assert "No answer: 6 of its base, 2 of this run." in Page(write_report(folder).read_text()).text


def test_mmlu_pro_of_one_model(make_run: MakeRun) -> None:
    group = asked(0, 0.5, beyond=False)
    group = {name: group[name] for name in ("rows", "target", "counts")}
    figures = {"all": group, "by": {"category": {"law": group}}}
    settings = {"mode": "loglik"}
    found = result("mmlu_pro", figures, compare=None, settings=settings)
    folder = make_run(metrics=curve(), files={"evaluation/mmlu.json": found})
    assert tables_of(folder)["MMLU-Pro: mmlu"][1:] == [["law", "50", "50.0% [40.0%, 60.0%]", "52.0%", "1"]]
    assert "another measure than that of published accuracies" in Page(write_report(folder).read_text()).text


@pytest.mark.parametrize(
    ("metric", "before", "after", "beyond", "better", "said"),
    [
        ("acc_norm", 0.5, 0.8, True, True, "better by 30.0 [20.0, 40.0] points"),
        ("exact_match,strict-match", 0.8, 0.5, True, False, "worse by 30.0 [20.0, 40.0] points"),
        ("acc", 0.5, 0.55, False, None, "no telling: +5.0 [-5.0, +15.0] points"),
        ("word_perplexity", 9.0, 8.5, True, True, "better by 0.5000 [0.4000, 0.6000]"),
        ("word_perplexity", 9.0, 9.0, False, None, "no telling: +0.0000 [-0.1000, +0.1000]"),
    ],
)
def test_tasks_of_two_models(
    metric: str, before: float, after: float, beyond: bool, better: bool | None, said: str, make_run: MakeRun
) -> None:
    group = {
        "questions": 1200, "shots": 5, "target": {metric: figure(after)}, "compare": {metric: figure(before)},
        "difference": {metric: figure(after - before, beyond_chance=beyond, better=better)},
    }  # fmt: skip
    folder = make_run(metrics=curve(), files={"evaluation/t.json": result("harness", {"tasks": {"arc": group}})})
    head, row = tables_of(folder)["Benchmarks: t"]
    assert head == ["task", "metric", "its base", "this run", "difference"]
    assert row[0] == "arc (1,200 questions, 5 examples)" and row[1] == metric.replace("_", " ") and row[4] == said
    assert ("%" in row[2]) == ("perplexity" not in metric)


def test_results_of_parts_are_on_the_page_under_their_names_and_say_nothing_of_the_run(make_run: MakeRun) -> None:
    early = {"created": "2025-12-31T00:00:00+00:00"}  # before the run ended: a checkpoint is what it was
    compared = {"rows": 9, "target": {"loss": figure(1.0)}, "compare": {"loss": figure(2.0)},
                "difference": {"loss": figure(-1.0, beyond_chance=True, better=True)}}  # fmt: skip
    folder = make_run(metrics=curve(), files={"summary.json": SUMMARY})
    before = all_verdicts(read_run(folder))
    for name in ("", "checkpoint-100", "checkpoint-40", "merged", "elsewhere"):
        target = folder / name
        target.mkdir(exist_ok=True)
        asked_for = folder / "evaluation" / name if name == "elsewhere" else None
        write_results(results_folder(str(target), asked_for), "mmlu", **mmlu_pro(target=str(target), **early))  # type: ignore[arg-type]
    assert list(tables_of(folder)) == [
        "MMLU-Pro: mmlu", "MMLU-Pro: mmlu, step 40", "MMLU-Pro: mmlu, step 100", "MMLU-Pro: mmlu, the merged model",
    ]  # fmt: skip
    assert tables_of(folder)["MMLU-Pro: mmlu, step 40"][0][3] == "step 40"
    own = result("data", {"all": compared, "by": {}})
    write_results(folder / "evaluation" / "checkpoint-40", "own", **own)  # type: ignore[arg-type]
    (table,) = tables_of(folder, beyond=False).values()
    assert table[0] == ["", "its base", "step 40", "difference"]
    (folder / "evaluation" / "mmlu.json").unlink()
    assert all_verdicts(read_run(folder)) == before
    text = re.sub(r"\s+", " ", Page(write_report(folder).read_text()).text)
    assert "step 40 against its base" in text and "step 40 against its base, 2025-12-31 Measured before" not in text
