"""What a page says of what a run was not trained for: what got worse, what did not, and what nobody looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.experiments.evaluations import shown_figure
from luthier.experiments.forgetting import forgetting
from luthier.experiments.report import comparison_page, run_page
from luthier.experiments.run_files import read_run
from luthier.experiments.verdict import BAD, GOOD, OPEN
from tests.experiments.conftest import MakeRun, Page, curve

KINDS = ("facts", "code", "prose")


def group(before: float, after: float, beyond: bool) -> dict[str, Any]:
    """A group of rows, as `luthier evaluate --general` writes it."""
    change = {"value": after - before, "low": after - before - 0.02, "high": after - before + 0.02}
    better = after < before if beyond else None
    return {
        "rows": 18, "asked": 0, "tokens": 400,
        "target": {"loss": {"value": after, "low": after - 0.1, "high": after + 0.1}},
        "compare": {"loss": {"value": before, "low": before - 0.1, "high": before + 0.1},
                    "perplexity": {"value": 2.718**before, "low": 1.0, "high": 9e9}},
        "difference": {"loss": change | {"beyond_chance": beyond, "better": better}},
    }  # fmt: skip


def general(whole: tuple[float, float, bool], *kinds: tuple[float, float, bool], **more: Any) -> dict[str, Any]:
    by = {name: group(*values) for name, values in zip(KINDS, kinds, strict=True)}
    return {"kind": "general", "target": "run", "compare": "org/base", "created": "2026-01-02T00:00:00+00:00",
            "figures": {"all": group(*whole), "by": {"category": by}}, "rows": None, **more}  # fmt: skip


def figure(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def sides(before: float, after: float, beyond: bool, name: str) -> dict[str, Any]:
    difference = figure(after - before) | {"beyond_chance": beyond, "better": after > before}
    return {"compare": {name: figure(before)}, "target": {name: figure(after)}, "difference": {name: difference}}


def benchmark(kind: str, **tasks: tuple[float, float, bool]) -> dict[str, Any]:
    if kind == "mmlu_pro":
        figures = {"all": {"rows": 20, **sides(*tasks["all"], "accuracy")}, "by": {"category": {}}}
    else:
        figures = {"tasks": {name: {"questions": 90, **sides(*values, "acc")} for name, values in tasks.items()}}
    created = "2026-01-02T00:00:00+00:00"
    return {"kind": kind, "compare": "org/base", "created": created, "figures": figures, "rows": None}


def verdict_of(make_run: MakeRun, **results: dict[str, Any]) -> Any:
    files = {f"evaluation/{name}.json": result for name, result in results.items()}
    return forgetting(read_run(make_run(metrics=curve(), files=files)))


SAME = (2.0, 2.001, False)
LOST = general((2.0, 2.3, True), (2.0, 2.1, True), (2.0, 2.7, True), SAME)


def test_what_got_worse_is_named_the_worst_first_with_the_loss_and_its_interval(make_run: MakeRun) -> None:
    found = verdict_of(make_run, general=LOST)
    assert found.answer == (
        "Yes: the loss on the general set went from 2.0000 to 2.3000 (+0.3000, 95% interval +0.2800 to +0.3200). "
        "Worse beyond chance: code (+0.7000), facts (+0.1000)."
    )
    assert (found.question, found.mood, found.short) == (
        "Did it forget?", BAD, "got worse on what it was not trained for",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("result", "starts", "has", "mood"),
    [
        (general(SAME, SAME, SAME, SAME), "No:", "Nothing got worse beyond chance.", GOOD),
        (general((2.0, 1.8, True), SAME, SAME, SAME), "No:", "Nothing got worse beyond chance.", GOOD),
        (general((2.0, 2.01, True), SAME, SAME, SAME), "Hardly:", "No kind of text by itself got worse", OPEN),
        (general(SAME, (2.0, 2.5, True), SAME, SAME), "In part:", "(+0.5000). One of 3 kinds may be chance.", OPEN),
        (general((2.0, 1.9, True), (2.0, 2.5, True), (2.0, 2.2, True), SAME), "In part:", "(+0.5000), code", OPEN),
        (general((9.0, 9.5, True), SAME, SAME, SAME), "No telling:", "unknown to its base itself", OPEN),
        (general((2.0, 2.3, True), SAME, SAME, SAME, compare="org/other"), "Yes:", "against org/other", BAD),
    ],
)
def test_each_outcome_has_its_words(
    make_run: MakeRun, result: dict[str, Any], starts: str, has: str, mood: str
) -> None:
    found = verdict_of(make_run, general=result)
    assert found.answer.startswith(starts) and has in found.answer and found.mood == mood


def test_benchmarks_that_got_worse_are_named(make_run: MakeRun) -> None:
    tasks = benchmark("harness", arc_easy=(0.62, 0.5, True), gsm8k=(0.1, 0.2, True), piqa=(0.7, 0.69, False))
    found = verdict_of(make_run, general=general(SAME, SAME, SAME, SAME), tasks=tasks)
    assert found.mood == BAD and found.answer.startswith("Yes: the loss on the general set")
    assert "Worse on benchmarks: arc_easy (acc) 62.0% → 50.0%." in found.answer
    assert "Better on benchmarks: gsm8k (acc) 10.0% → 20.0%." in found.answer and "piqa" not in found.answer
    mmlu = verdict_of_another(make_run, mmlu=benchmark("mmlu_pro", all=(0.3, 0.2, True)))
    assert mmlu.answer == "Yes: worse on benchmarks: MMLU-Pro (accuracy) 30.0% → 20.0%."
    none = verdict_of_another(make_run, "third", tasks=benchmark("harness", piqa=(0.7, 0.69, False)))
    assert none.answer == "No: of benchmarks nothing got worse beyond chance, in the one figure." and none.mood == GOOD


def verdict_of_another(make_run: MakeRun, name: str = "second", **results: dict[str, Any]) -> Any:
    files = {f"evaluation/{file}.json": result for file, result in results.items()}
    return forgetting(read_run(make_run(name, curve(), files)))


@pytest.mark.parametrize(
    "results",
    [
        {},
        {"general": {**LOST, "figures": {"all": {"target": {"loss": figure(2.0)}}}}},  # one model
        {"general": {**LOST, "created": "2025-01-01T00:00:00+00:00"}},  # before the training went on
        {"tasks": benchmark("harness", arc=(0.62, 0.5, True)) | {"created": "2025-01-01T00:00:00+00:00"}},
        {"broken": {"kind": "general", "figures": {"all": [], "by": 3}}},
        {"broken": {"kind": "harness", "figures": {"tasks": {"arc": 3}}}},
        {"broken": {"kind": "mmlu_pro", "figures": {"accuracy": 0.3}}},
    ],
    ids=["nothing", "one model", "older", "older benchmark", "broken", "broken benchmark", "other figures"],
)
def test_what_was_not_measured_is_called_that_and_how_to_have_it(make_run: MakeRun, results: dict[str, Any]) -> None:
    files: dict[str, Any] = {f"evaluation/{name}.json": result for name, result in results.items()}
    files["summary.json"] = {"steps": 60, "finished": "2026-01-01T00:00:00+00:00"}
    folder = make_run(metrics=curve(), files=files)
    found = forgetting(read_run(folder))
    assert found.answer.startswith("Not measured: `luthier evaluate RUN --general`") and found.mood == OPEN
    assert "Not measured: luthier evaluate RUN --general" in Page(run_page(read_run(folder))).text


def test_the_page_has_them_in_a_part_of_their_own(make_run: MakeRun) -> None:
    metrics = [*curve(), {"step": 10, "samples_stopped": 0.25}, {"step": 60, "samples_stopped": 1.0}]
    data = {"rows": 9, "asked": 9, **sides(0.1, 0.9, True, "stopped")}
    results = {
        "evaluation/general.json": LOST,
        "evaluation/arc.json": benchmark("harness", arc_easy=(0.62, 0.5, True)),
        "evaluation/validation.json": {**LOST, "kind": "data", "figures": {"all": data, "by": {}}},
    }
    page = run_page(read_run(make_run(metrics=metrics, files=results)))
    parts = page.split("<section id=")
    evaluations, beyond = (next(p for p in parts if p.startswith(f'"{name}"')) for name in ("evaluations", "beyond"))
    assert "What it was not trained for" in beyond and "The general set" in beyond and "Benchmarks: arc" in beyond
    assert "loss, by category" in beyond and "code (18)" in beyond
    assert "Held-out data" in evaluations and "general set" not in evaluations and "Benchmarks" not in evaluations
    text = " ".join(Page(page).text.split())
    assert "but got worse on what it was not trained for" in text
    assert "answers to validation, of its base and of this run 10% 90%" in text
    assert "samples at step 10 and at step 60 25% 100%" in text
    # What is beyond is no part of the other answer.
    assert "Better than its base? Not measured." not in text and "general" not in text.split("Did it forget?")[0]


def test_the_whole_set_speaks_before_some_rows_of_it(make_run: MakeRun) -> None:
    whole, some = general((2.0, 2.5, True), *[SAME] * 3), general((2.0, 2.1, False), *[SAME] * 3)
    assert "from 2.0000 to 2.5000" in verdict_of(make_run, **{"general": whole, "general-limit20": some}).answer


def test_a_page_without_any_of_it_has_no_such_part(make_run: MakeRun) -> None:
    assert "beyond" not in Page(run_page(read_run(make_run(metrics=curve())))).headings()


def test_several_runs_have_it_in_their_figures(make_run: MakeRun) -> None:
    with_it = make_run("one", curve(), {"evaluation/general.json": LOST})
    folders: list[Path] = [with_it, make_run("two", curve())]
    text = " ".join(Page(comparison_page([read_run(folder) for folder in folders])).text.split())
    assert "general set, loss" in text and "2.0000 → 2.3000" in text
    neither = [make_run("three", curve()), make_run("four", curve())]
    assert "general set, loss" not in Page(comparison_page([read_run(folder) for folder in neither])).text


def test_a_large_perplexity_is_a_number_to_read() -> None:
    assert [shown_figure("perplexity", value) for value in (5.918, 999.4, 1697.2, 155767.0, 3e12)] == [
        "5.92", "999", "1,697", "155,767", "3e+12",
    ]  # fmt: skip
