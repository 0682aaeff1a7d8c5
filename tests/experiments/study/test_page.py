"""The page of a study: what is on it, in which order, what is compared with what, and that it needs nothing else."""

import copy
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.errors import ConfigError, RunError
from luthier.experiments.charts import Chart, Series, line_chart
from luthier.experiments.study.findings import findings
from luthier.experiments.study.page import write_page
from luthier.experiments.study.plots import heat
from luthier.experiments.study.results import StudyResult, Trial, read_study, write_trials
from luthier.experiments.study.settings import groups_of, read_runs
from luthier.experiments.study.strips import Strip, strips
from tests.experiments.conftest import FALLS, TRAIN, MakeRun, Page, curve
from tests.experiments.study.made import judged, study, subsets

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&"
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path, make_run: MakeRun) -> Save:
    """(study, run folders too?, environment of a trial's run, config keys of a trial's run) -> study folder."""

    def write(
        result: StudyResult,
        runs: bool = True,
        environment: Callable[[Trial], dict[str, Any]] = lambda trial: {},
        keys: Callable[[Trial], dict[str, Any]] = lambda trial: {},
        name: str = "study",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        told = {
            "name": result.name, "question": result.question, "metric": result.metric, "goal": result.goal,
            "varied": result.varied, "notes": result.notes, "parts": result.subsets, "plots": result.plots,
            "search": result.search,
        }  # fmt: skip
        (folder / "study.yaml").write_text(yaml.safe_dump(told), encoding="utf-8")
        for trial in result.trials:
            trial.folder = f"runs/{trial.name}"
            if runs and trial.status != "waiting":
                files = {"environment.json": environment(trial)}
                make_run(f"{name}/{trial.folder}", curve(TRAIN, FALLS), files, **keys(trial))
        write_trials(folder, result.trials, result.metric)
        return folder

    return write


def page_of(folder: Path) -> Page:
    return Page(write_page(folder).read_text(encoding="utf-8"))


def rows_of(page: str, label: str) -> list[list[str]]:
    """The cells of the table with this caption."""
    body = page.split(f"<caption>{label}</caption>", 1)[1].split("<tbody>", 1)[1].split("</tbody>", 1)[0]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in body.split("</tr>")[:-1]]


def heads_of(page: str, label: str) -> list[str]:
    head = page.split(f"<caption>{label}</caption>", 1)[1].split("</thead>", 1)[0]
    return re.findall(r"<th [^>]*>(.*?)</th>", head)


def test_a_row_for_each_setting_the_best_first(save: Save):
    result = study({"lora_r": [8, 16, 32], "dropout": [0.1]}, lambda lora_r, dropout: 1 + abs(lora_r - 16) / 10)
    folder = save(result, runs=False)
    text = write_page(folder).read_text(encoding="utf-8")
    heads, rows = heads_of(text, "Settings, best first"), rows_of(text, "Settings, best first")
    assert heads == ["#", "lora_r", "eval loss", "seeds", "lowest to highest", "behind the best", "seconds", "peak GiB",
                     "trainable", "% of all", "tokens/s"]  # fmt: skip
    assert [row[1] for row in rows] == ["16", "8", "32"]
    numbers = [trial.metric or 0.0 for trial in result.trials if trial.settings["lora_r"] == 16]
    mean = sum(numbers) / 3
    spread = math.sqrt(sum((each - mean) ** 2 for each in numbers) / 2)
    shown = re.fullmatch(r"([\d.]+) ± ([\d.]+)", rows[0][2])
    assert shown and [float(each) for each in shown.groups()] == pytest.approx([mean, spread], abs=6e-4)
    assert rows[0][3] == "3" and rows[0][5] == "–" and rows[0][6:] == ["70.0", "1.10", "2,000", "0.2", "900"]
    assert not any("≈" in row[5] for row in rows) and text.count('class="n worse"') == 2
    assert len(rows_of(text, "All runs")) == 9


def test_differences_within_the_noise_are_marked(save: Save):
    text = write_page(save(study({"lora_r": [8, 16, 32]}, draw=3), runs=False)).read_text(encoding="utf-8")
    assert ["≈" in row[5] for row in rows_of(text, "Settings, best first")] == [False, True, True]
    assert 'class="n worse"' not in text and "No setting can be told from another" in text


def test_what_did_not_end_well_has_a_table_of_its_own(save: Save):
    result = study({"lora_r": [8, 16]}, lambda lora_r: 1 / lora_r)
    error = "Traceback\nOutOfMemory: too large"
    result.trials[0] = replace(result.trials[0], status="failed", metric=None, error=error)
    result.trials[1] = replace(result.trials[1], metric=math.nan)
    result.trials[5] = replace(result.trials[5], status="waiting", metric=None)
    folder = save(result)
    text = write_page(folder).read_text(encoding="utf-8")
    rows = rows_of(text, "Runs without a figure")
    assert [row[2] for row in rows] == ["failed", "ended without a finite eval_loss", "waiting"]
    assert rows[0][3] == "Traceback\nOutOfMemory: too large" and 'href="runs/0-s0.log"' in rows[0][0]
    assert [row[1:4:2] for row in rows_of(text, "Settings, best first")] == [["16", "2"], ["8", "1"]]


def test_everything_that_comes_from_a_study_is_text(save: Save):
    result = study({EVIL: ["a", EVIL], "lora_r": [1, 2]}, lambda **values: len(str(values)), name=EVIL, question=EVIL,
                   metric=f"m{EVIL}", notes=[EVIL, "see `this`"])  # fmt: skip
    result.trials[0] = replace(result.trials[0], status="failed", metric=None, error=EVIL)
    text = write_page(save(result)).read_text(encoding="utf-8")
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and not {"link", "img", "iframe", "object", "embed", "base"} & set(tags)
    assert not any(name.startswith("on") or name == "src" for _, attrs in page.tags for name in attrs)
    assert EVIL in page.text and "<code>this</code>" in text
    assert not re.search(r"https?://|//\w+\.\w|url\(|@import", text.replace(EVIL, ""))
    assert all((attrs.get("href") or "runs/").startswith("runs/") for tag, attrs in page.tags if tag == "a")


def test_the_sentences_are_beside_the_page(save: Save):
    result = study({"lora_r": [8, 16]}, lambda lora_r: 1 / lora_r, notes=["Toy size."])
    folder = save(result, runs=False)
    text = " ".join(page_of(folder).text.split())
    told = (folder / "findings.md").read_text(encoding="utf-8")
    for each in findings(result):
        assert f"- **{each.about}.** {each.text}\n" in told
        assert each.text.replace("`", "") in text
    assert "- Toy size." in told and "Toy size." in text and told.startswith("# a-study\n\nWhich?\n")


def test_a_study_from_its_first_run_to_its_last_has_a_page(save: Save):
    full = study({"lora_r": [8, 16]}, lambda lora_r: 1 / lora_r, seeds=2)
    for count in range(len(full.trials) + 1):
        result = copy.deepcopy(full)
        for trial in result.trials[count:]:
            trial.status, trial.metric = "waiting", None
        assert page_of(save(result, runs=False, name=f"study-{count}")).headings() >= {"findings", "runs"}


def test_a_page_is_made_again_but_nobody_elses(save: Save, tmp_path: Path):
    folder = save(study({"lora_r": [8, 16]}), runs=False)
    assert write_page(folder) == write_page(folder) == folder / "report.html"
    (folder / "report.html").write_text("<p>mine</p>")
    with pytest.raises(ConfigError, match="is no report"):
        write_page(folder)
    with pytest.raises(RunError, match="is no study folder"):
        write_page(tmp_path / "nowhere")


def source(kept: int = 90, fingerprint: str = "abc") -> dict[str, Any]:
    return {"fingerprint": fingerprint, "kept": kept, "tokens": 50 * kept, "trained_tokens": kept, "dropped": {}}


def test_losses_of_other_data_are_not_ranked_against_each_other(save: Save):
    result = study({"sequence_len": [128, 512], "lora_r": [8, 16]}, lambda sequence_len, lora_r: sequence_len + lora_r,
                   seeds=1)  # fmt: skip

    def environment(trial: Trial) -> dict[str, Any]:
        return {"data": {"sources": [source(kept=trial.settings["sequence_len"])], "test_sources": []}}

    def keys(trial: Trial) -> dict[str, Any]:
        return {"sequence_len": trial.settings["sequence_len"], "val_set_size": 0.1}

    folder = save(result, environment=environment, keys=keys)
    text = write_page(folder).read_text(encoding="utf-8")
    told = " ".join(Page(text).text.split())
    assert "Eval loss is not of the same measure in all runs" in told
    assert "Best (sequence_len 128)" in told and "Best (sequence_len 512)" in told
    for length in (128, 512):
        assert [row[1:3] for row in rows_of(text, f"Settings with sequence_len {length}")] == [
            [str(length), "8"],
            [str(length), "16"],
        ]
    # The same rows whole in both: no row reached the limit, and the loss is the same measure.
    folder = save(result, environment=lambda trial: {"data": {"sources": [source()]}}, keys=keys, name="same")
    assert "Settings, best first" in write_page(folder).read_text(encoding="utf-8")
    # What is no figure of held-out data is the same measure on any.
    folder = save(replace(result, metric="mmlu.accuracy"), environment=environment, keys=keys, name="benchmark")
    assert "Settings, best first" in write_page(folder).read_text(encoding="utf-8")


def test_seeds_that_draw_their_own_held_out_rows_are_compared_seed_by_seed(save: Save):
    result = study({"lora_r": [8, 16]}, lambda lora_r: lora_r / 100, of_seed=1.0)
    folder = save(result, keys=lambda trial: {"seed": trial.seed, "val_set_size": 0.1})
    result = read_study(folder)
    (group,) = groups_of(result, read_runs(result))
    assert group.by_seed
    told = " ".join(each.text for each in findings(result, read_runs(result)))
    assert "seed by seed" in told and "each seed draws held-out data of its own" in told
    assert "beyond the noise" in told


def test_the_metric_is_drawn_against_what_was_varied(save: Save):
    result = study(
        {"lora_r": [8, 64, 512], "lora_alpha": [1, 2, 4], "optimizer": ["adamw", "sgd"]},
        lambda lora_r, lora_alpha, optimizer: 1 / lora_r + 0.1 * abs(lora_alpha - 2) + (optimizer == "sgd"),
        seeds=1,
    )
    folder = save(result)
    text = write_page(folder).read_text(encoding="utf-8")
    page = Page(text)
    charts = page.charts()
    assert any(about.startswith("Eval loss against lora_r: 8 ") for about in charts)
    assert any(about.startswith("Eval loss against lora_alpha: 1 ") for about in charts)
    assert {about.split(":")[0] for about in charts} >= {"adamw", "sgd", "Peak memory (GiB) against time"}
    assert any("Evaluation loss of 18 runs over the steps" in about for about in charts)
    assert "lora_alpha 4</span>" in text  # a curve for each
    assert page.headings() == {"findings", "settings", "plots", "costs", "curves", "runs"}
    drawn = heat(result, judged(result))
    assert drawn is not None and (drawn.down, drawn.across) == ("lora_r", "lora_alpha")
    best = max((good or 0.0, row, column) for row, (_, cells) in enumerate(drawn.rows)
               for column, (_, good) in enumerate(cells))  # fmt: skip
    assert best == (1.0, 2, 1) and 'style="--h:45%"' in text
    assert len(text) < 400_000
    result.plots = ["optimizer"]
    only = Page(write_page(save(result, runs=False, name="only")).read_text(encoding="utf-8")).charts()
    assert not any("against lora_r" in about for about in only) and any(about.startswith("sgd") for about in only)


def test_a_logarithmic_axis_from_left_to_right():
    points = [(8.0, 1.0), (64.0, 2.0), (512.0, 3.0)]
    chart = Chart("y", [Series("a", points, "c1")], x="rank", x_log=True, x_ticks=[8, 64, 512], labels=[(64, 2, "<b>")])
    drawn = line_chart(chart)
    path = re.search(r'class="line c1" d="M([\d. ]+)L([\d. ]+)L([\d. ]+)"', drawn)
    assert path and [float(part.split()[0]) for part in path.groups()] == [0.0, 500.0, 1000.0]
    assert 'left:50.00%" aria-hidden="true">64<' in drawn and "&lt;b&gt;" in drawn and ">rank<" in drawn


@pytest.mark.parametrize(
    ("second", "fits"),
    [
        ((0.55, 1.0), False),  # its words go to the left, towards the first one's
        ((0.95, 1.0), True),
        ((0.1, 1.0), False),
        ((0.1, 8.0), True),
        ((0.55, 8.0), True),
    ],
)
def test_words_beside_points_do_not_lie_on_each_other(second: tuple[float, float], fits: bool):
    points = [(0.0, 0.0), (0.05, 1.0), second, (1.0, 10.0)]
    labels = [(*points[1], "the first of them"), (*second, "the second one")]
    dots = Series("a", points, "c1", dots=True, line=False)
    drawn = line_chart(Chart("y", [dots], x="rank", labels=labels))
    assert "the first of them</span>" in drawn and ("the second one</span>" in drawn) is fits


def test_dots_and_bars_without_a_line():
    chart = Chart("y", [Series("a", [(1.0, 1.0), (2.0, 5.0)], "c1", dots=True, line=False, names=["one", "two"],
                               spans=[(1.0, 0.0, 9.0)])], x="rank")  # fmt: skip
    drawn = line_chart(chart)
    assert drawn.count('class="dot') == 2 and "<title>two</title>" in drawn and drawn.count('class="line') == 1
    assert ">10</span>" in drawn  # the axis holds the bar
    assert line_chart(Chart("y", [Series("a", [(1.0, 1.0)], "c1", dots=True, line=False)], x="rank")) == ""


def test_strips_hold_their_dots():
    rows = [Strip("a <b>", 2.0, [(1.0, "first"), (3.0, "second")]), Strip("b", 4.0, [(4.0, "third")], (3.5, 4.5))]
    drawn = strips("By kind", rows, lambda number: f"{number:.1f}")
    places = [float(x) for x in re.findall(r'class="dot c1" d="M([\d.]+) 50h0"', drawn)]
    assert places == sorted(places) and all(0 <= x <= 1000 for x in places) and "a &lt;b&gt;" in drawn
    assert Page(drawn).charts() == ["a <b>: 2.0", "b: 4.0"]
    assert strips("By kind", rows[:1], str) == ""


def test_members_of_subsets_and_a_search_have_drawings_of_their_own(save: Save):
    page = page_of(save(subsets(0, [-0.05, 0.0, -0.08, -0.03, -0.1, 0.0]), runs=False))
    assert "v_proj: -0.08" in " ".join(page.charts()) and "What each member changes in eval loss" in page.text
    trials = [Trial(f"t{n}", {"lr": 10.0**-n}, status="finished", metric=1 + (n - 3) ** 2) for n in range(1, 7)]
    result = StudyResult("s", "", "eval_loss", "min", ["lr"], trials, Path(), search=True)
    charts = page_of(save(result, runs=False, name="search")).charts()
    assert "Eval loss over 6 trials; the best went from 5 to 1" in charts


def test_a_large_study_stays_small(save: Save):
    result = study({"a": list(range(8)), "b": list(range(8)), "c": ["x", "y"]}, lambda a, b, c: a + b, seeds=3)
    text = write_page(save(result, runs=False)).read_text(encoding="utf-8")
    assert len(text) < 1_000_000 and len(rows_of(text, "Settings, best first")) == 128


@pytest.mark.slow
def test_a_browser_sorts_and_filters(save: Save, tmp_path: Path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser")
    result = study({"lora_r": list(range(8, 18))}, lambda lora_r: 1 - lora_r / 10, seeds=2)
    path = write_page(save(result, runs=False))
    told = """
    const table = document.querySelector("#settings table");
    const first = () => table.tBodies[0].rows[0].cells[1].textContent;
    const seen = [first()], click = () => table.tHead.rows[0].cells[1].querySelector("button").click();
    click(); seen.push(first()); click(); seen.push(first());
    const field = document.querySelector("#settings .filter input");
    field.value = "-0.7"; field.dispatchEvent(new Event("input"));
    seen.push([...table.tBodies[0].rows].filter((row) => !row.hidden).length);
    const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    document.title = JSON.stringify([...seen, wide]);
    """
    test = tmp_path / "test.html"
    page = path.read_text(encoding="utf-8").replace("</body>", f"<script>{told}</script></body>")
    test.write_text(page, encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/browser",
               "--window-size=500,900", "--dump-dom", test.as_uri()]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    seen = json.loads((re.search(r"<title>(.*?)</title>", shown) or [""] * 2)[1])
    assert seen == ["17", "8", "17", 1, 0]
