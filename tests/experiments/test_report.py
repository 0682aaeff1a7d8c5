"""The page of a run and of several: what is on it, what is not, and that it needs nothing else."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from luthier.cli import main
from luthier.evaluate.page import draw_again
from luthier.experiments.beside import evaluation_tables
from luthier.experiments.compare import best_in_words, measures_differ
from luthier.experiments.evaluations import NAMES
from luthier.experiments.report import write_report
from luthier.experiments.run_files import Run, read_run
from luthier.experiments.sections import without_template
from luthier.train.checkpoint import State
from luthier.train.metrics import Recorder
from tests.experiments.conftest import FALLS, RISES, TRAIN, MakeRun, Page, curve, write_rows

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&"
SOURCE = {
    "path": "/secret/place/rows.jsonl", "type": "alpaca", "fingerprint": "abc123", "rows": 100, "kept": 90,
    "tokens": 5000, "trained_tokens": 700, "longest": 120, "unit": "documents", "unused_columns": ["task"],
    "dropped": {"longer than sequence_len": {"count": 10, "first": [["/secret/place/rows.jsonl:17", "3,105 tokens"]]}},
    "notes": {},
}  # fmt: skip
ENVIRONMENT = {
    "versions": {"torch": "2.13.0"}, "hardware": {"cpu": "A CPU", "cpu_cores": 2, "memory_gib": 24.0},
    "system": "Linux", "command": ["luthier", "train", "cfg.yml"], "device": "cpu", "dtype": "float32",
    "total_steps": 60,
    "data": {"sources": [SOURCE], "test_sources": [], "train_documents": 80, "validation_documents": 10,
             "unit": "documents", "duplicates": 3, "overlap": 2, "histogram": [[1, 60, 50], [61, 120, 30]]},
}  # fmt: skip
SUMMARY = {"steps": 60, "kept_step": 60, "seconds": 30.0, "measured_peak_gib": 1.5, "predicted_peak_gib": 1.4,
           "finished": "2026-01-01T00:00:00+00:00"}  # fmt: skip


def sample(step: int, text: str, stopped: bool = True, prompt: str = "Add 1 and 2.") -> dict[str, Any]:
    return {"step": step, "prompt": prompt, "text": text, "expected": "3", "stopped": stopped}


def figure(value: float, spread: float = 0.01) -> dict[str, float]:
    return {"value": value, "low": value - spread, "high": value + spread}


def compared(exact: tuple[float, float], *, worse: bool = False) -> dict[str, Any]:
    """Figures as `luthier evaluate --compare base` writes them."""
    loss, after = (1.0, 1.5) if worse else (1.5, 1.0)
    difference = {
        "loss": figure(after - loss) | {"beyond_chance": True, "better": not worse},
        "exact_match": figure(exact[1] - exact[0]) | {"beyond_chance": True, "better": exact[1] > exact[0]},
    }
    whole = {
        "rows": 50, "asked": 50, "tokens": 400, "difference": difference,
        "compare": {"loss": figure(loss), "exact_match": figure(exact[0]), "stopped": figure(0.1)},
        "target": {"loss": figure(after), "exact_match": figure(exact[1]), "stopped": figure(0.9)},
    }  # fmt: skip
    return {"all": whole, "by": {"task": {"adding": whole, "counting": whole}}}


def evaluation(kind: str, figures: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"kind": kind, "target": "run", "compare": "org/base", "created": "2026-01-02T00:00:00+00:00",
            "figures": figures, "rows": None, **more}  # fmt: skip


def whole_run(make_run: MakeRun, name: str = "run", **keys: Any) -> Path:
    """A run with all that a run folder can hold."""
    metrics = curve(TRAIN, RISES, token_accuracy=[0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
    metrics += [{"step": step, "samples_stopped": share} for step, share in ((10, 0.0), (60, 1.0))]
    judged = {"pairs": 10, "wins": {"count": 6, "share": 0.75, "interval": [0.4, 0.9]},
              "ties": {"count": 0, "share": 0.0, "interval": [0.0, 0.3]},
              "losses": {"count": 2, "share": 0.25, "interval": [0.1, 0.6]}, "score": 0.75, "winner": "a",
              "score_interval": [0.55, 0.9], "flips": {"count": 2}, "complete": True}  # fmt: skip
    right = {"rows": 20, "target": {"accuracy": {"value": 0.25, "low": 0.1, "high": 0.4}}}
    benchmark = {"all": right, "by": {"category": {"math": right}}}
    tasks = {"gsm8k": {"questions": 90, "target": {"exact_match": {"value": 0.25, "low": 0.15, "high": 0.35}}}}
    answers = [{"prompt": "Add 1 and 2.", "expected": "3", "compare": {"answer": "12"}, "target": {"answer": "3"}}]
    return make_run(
        name,
        metrics,
        {
            "samples.jsonl": [sample(10, "12", False), sample(60, "3")],
            "notes.jsonl": [{"step": 40, "note": "step 40: see in `luthier preview` what is there"}],
            "summary.json": SUMMARY,
            "environment.json": ENVIRONMENT,
            "evaluation/validation.json": evaluation("data", compared((0.1, 0.8)), rows="validation.jsonl"),
            "evaluation/validation.jsonl": answers,
            "evaluation/judged.json": evaluation("judge", judged, judge="openai:judge-1"),
            "evaluation/mmlu.json": evaluation("mmlu_pro", benchmark, compare=None),
            "evaluation/arc.json": evaluation("another", {"arc_easy": {"acc": 0.61, "acc_norm": 0.58}}),
            "evaluation/gsm8k.json": evaluation("harness", {"tasks": tasks}, compare=None),
        },
        **keys,
    )


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_all_that_a_run_holds_is_on_its_page(make_run: MakeRun):
    page = page_of(whole_run(make_run, val_set_size=0.1, lora_r=8))
    text = " ".join(page.text.split())
    assert page.headings() == {"curves", "evaluations", "beyond", "samples", "data", "config", "environment"}
    for piece in (
        "It learned, got better than its base and is preferred to its base, but overfitted from step 30 on.",
        "A LoRA adapter of rank 8 for org/base, trained on 80 documents of rows.jsonl, for 60 steps (3 epochs)",
        "On validation: exactly right answers 10.0% → 80.0%",
        "On validation: 10% of the answers of its base, 90% of this run's.",
        "by openai:judge-1, 6 wins, 0 ties and 2 losses, a score of 75% (95% interval 55% to 90%)",
        "1.50 GiB 1.40 predicted (+7.1%)",
        "step 40: see in luthier preview what is there",
        "left out: longer than sequence_len 10 10.0% rows.jsonl:17 (3,105 tokens)",
        "3 training documents repeat others",
        "2 of the held-out documents are in the training data too",
        "val_set_size: 0.1 cfg.yml:3",
        "torch 2.13.0",
        "abc123",
        "math 20 25.0% [10.0%, 40.0%]",
        "arc_easy 0.6100 0.5800",
        "Benchmarks: gsm8k",
        "gsm8k (90 questions) exact match 25.0% [15.0%, 35.0%]",
        "12 [cut off]",
        "100% at step 60",
    ):
        assert piece in text, piece
    charts = " ".join(page.charts())
    for title in ("Loss.", "Tokens predicted right", "Learning rate", "Gradient norm", "Peak memory", "Lengths"):
        assert title in charts, title
    assert "/secret/place" not in text.replace("luthier train", "")


def test_defaults_are_folded_away(make_run: MakeRun):
    page = write_report(make_run(metrics=curve(), learning_rate=5e-5)).read_text(encoding="utf-8")
    shown, folded = page.split("All other settings", 1)
    assert "learning_rate: 5.0e-05" in shown and "weight_decay" not in shown
    assert "weight_decay: 0.0" in folded and "learning_rate" not in folded


def test_what_is_not_there_leaves_nothing_behind(make_run: MakeRun):
    page = page_of(make_run())
    assert page.headings() == {"config"}
    assert not page.charts()
    assert "Nothing has been logged yet." in page.text
    tables = [attrs for tag, attrs in page.tags if tag == "dl" and attrs.get("class") == "figures"]
    assert not tables


@pytest.mark.parametrize("broken", ["metrics.jsonl", "samples.jsonl", "environment.json", "evaluation/x.json"])
def test_half_a_file_costs_its_own_part_only(make_run: MakeRun, broken: str):
    folder = whole_run(make_run)
    good = (folder / broken).read_text() if (folder / broken).exists() else '{"figures": {}}'
    (folder / broken).write_text(good[: len(good) // 2] + "\nnull\n[1]\n")
    page = page_of(folder)
    assert {"evaluations", "config"} <= page.headings()
    assert ("data" in page.headings()) == (broken != "environment.json")
    text = " ".join(page.text.split())
    assert ("step 10 step 60" in text) == (broken != "samples.jsonl")  # of which the second line is torn


def test_text_of_data_and_models_is_text(make_run: MakeRun):
    folder = make_run(
        f"run{EVIL.replace('/', '')}",
        curve(TRAIN, RISES),
        {
            "samples.jsonl": [sample(10, EVIL, prompt=EVIL), sample(20, "\ud800 half a pair")],
            "notes.jsonl": [{"step": 1, "note": f"`{EVIL}` {EVIL}"}],
            "environment.json": {**ENVIRONMENT, "command": [EVIL], "system": EVIL},
            "evaluation/x.json": evaluation(EVIL, {EVIL: 1.0, "group": {EVIL: {EVIL: 2.0}}}, compare=EVIL),
        },
        datasets=[{"path": f"{EVIL}.jsonl", "type": "alpaca"}],
    )
    page = page_of(folder)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count("<script>alert('x')</script>") >= 4


def test_nothing_is_loaded_from_anywhere(make_run: MakeRun):
    one = write_report(whole_run(make_run)).read_text(encoding="utf-8")
    found = Page(one)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in found.tags}
    assert not re.search(r"https?://|//\w|url\(|@import|\bsrc=", one)
    assert all((attrs.get("href") or "#").startswith("#") for _, attrs in found.tags)
    ids = {attrs["id"] for _, attrs in found.tags if "id" in attrs}
    assert {(attrs["href"] or "")[1:] for tag, attrs in found.tags if tag == "a"} == ids


def test_a_long_run_stays_small(make_run: MakeRun):
    rows = []
    for step in range(1, 40_001):
        row = {"step": step, "loss": 2 / step + 0.1 * (step % 7), "learning_rate": 1e-4, "grad_norm": step % 5 + 0.1}
        rows += [row] if step % 100 else [row, {"step": step, "eval_loss": 1 + step % 300 / 1000}]
    samples = [sample(step, "word " * 1000, prompt=f"{n} {'prompt ' * 500}") for n in range(20) for step in range(50)]
    path = write_report(make_run(metrics=rows, files={"samples.jsonl": samples}))
    assert path.stat().st_size < 1_000_000
    text = Page(path.read_text(encoding="utf-8")).text
    assert "7 of 50 steps are shown; all are in samples.jsonl." in text
    assert "12 of 20 prompts are shown" in text
    assert "60 of 400 evaluations are shown" in text


def test_a_preference_run(make_run: MakeRun):
    names = ("rewards__chosen", "rewards__rejected", "rewards__margins", "rewards__accuracies")
    rising = {name: [0.1 * n for n in range(6)] for name in (*names, *(f"eval_{name}" for name in names))}
    page = page_of(make_run(metrics=curve(TRAIN, FALLS, **rising, kl=[1.0] * 6), rl="dpo"))
    charts = page.charts()
    for title in ("Rewards, training", "Rewards, held-out", "Margin of rewards", "Preferred as labelled", "KL to"):
        assert any(about.startswith(title) for about in charts), title
    assert "trained by DPO on" in page.text


def test_a_result_from_before_the_training_went_on_is_no_verdict(make_run: MakeRun):
    old = evaluation("data", compared((0.1, 0.8)), created="2025-12-31T00:00:00+00:00")
    files = {"summary.json": SUMMARY, "evaluation/validation.json": old}
    page = page_of(make_run(metrics=curve(), files=files))
    assert "Measured before training went on" in page.text
    assert "Not measured." in page.text


def test_what_got_worse_is_said(make_run: MakeRun):
    files = {
        "evaluation/general.json": evaluation("data", compared((0.6, 0.4), worse=True)),
        "evaluation/validation.json": evaluation("data", compared((0.1, 0.8))),
    }
    text = " ".join(page_of(make_run(metrics=curve(), files=files)).text.split())
    assert "In part." in text
    assert "Worse on general: exactly right answers 60.0% → 40.0%, loss 1.0000 → 1.5000." in text
    assert "got better than its base in part" in text


def test_a_resumed_run_shows_each_step_and_note_once(make_run: MakeRun, capsys: pytest.CaptureFixture[str]):
    folder = make_run(metrics=curve(TRAIN, FALLS))
    notes = [{"step": 20, "note": "kept"}, {"step": 50, "note": "of steps that are done again"}]
    write_rows(folder / "notes.jsonl", notes)
    row = {"step": 45, "loss": 0.5, "tokens_per_second": 1.0, "eta_seconds": 1.0, "peak_memory_gib": 1.0,
           "epoch": 1.0, "learning_rate": 0.1}  # fmt: skip
    with Recorder(folder, 60, from_step=State(step=40).step, notice=lambda row: ["said again"]) as recorder:
        recorder.row(row)
    assert [json.loads(line)["note"] for line in (folder / "notes.jsonl").read_text().splitlines()] == [
        "kept",
        "said again",
    ]
    text = page_of(folder).text
    assert "said again" in text and "done again" not in text
    assert "Unfinished: step 45." in text
    assert "warning: said again" in capsys.readouterr().err


def test_several_runs_in_one_page(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one = whole_run(make_run, "one/run", lora_r=4)
    files = {"environment.json": ENVIRONMENT, "evaluation/validation.json": evaluation("data", compared((0.1, 0.9)))}
    other = make_run("other/run", curve(TRAIN, FALLS), files, lora_r=16)
    output = tmp_path / "both.html"
    assert main(["report", str(one), str(other), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert str(output) in printed and "other/run has the lowest eval loss" in printed
    page = Page(output.read_text(encoding="utf-8"))
    text = " ".join(page.text.split())
    assert "other/run has the lowest eval loss: 0.9000 at step 60; the next has 1.2000." in text
    assert "lora_r 4 16" in text and "output_dir" not in text
    assert "Not finished: other/run." in text
    assert any("one/run from" in about and "other/run from" in about for about in page.charts())
    base, own, others = "10.0% [9.0%, 11.0%]", "80.0% [79.0%, 81.0%]", "90.0% [89.0%, 91.0%]"
    assert "Held-out data: validation their base one/run other/run" in text
    assert f"exactly right answers {base} {own} {others}" in text
    assert f"exactly right answers, by task their base one/run other/run adding {base} {own} {others}" in text


def test_of_a_prompt_its_template_is_not_shown():
    head = "Below is an instruction that describes a task. Write a response that completes it.\n\n### Instruction:\n"
    more = "Below is an instruction that describes a task, with an input. Write a response that completes it.\n\n"
    prompts = [
        f"{head * 2}Name a city.\n\n### Response:\n",
        f"{head * 2}Name a citrus fruit.\n\n### Response:\n",
        f"{more * 2}### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n",
        f"{more * 2}### Instruction:\nSort.\n\n### Input:\n2, 1\n\n### Response:\n",
        "What is a\nfish?",
        "What is no\nfish?",
    ]
    assert without_template(prompts) == [
        "… Name a city.",
        "… Name a citrus fruit.",
        "… Add.\n\n### Input:\n1, 2",
        "… Sort.\n\n### Input:\n2, 1",
        *prompts[4:],
    ]
    (long,) = without_template(["word " * 1000])
    assert len(long) <= 302 and long.startswith("… ")


def test_what_is_measured_by_the_same_name_is_set_side_by_side_whatever_kind_it_is(make_run: MakeRun):
    def results(share: float, wins: int) -> dict[str, Any]:
        model = {"accuracy": {"value": share, "low": share / 2, "high": share * 1.2}}
        whole = {"rows": 20, "target": model}
        judged = {"wins": {"count": wins}, "ties": {"count": 1}, "losses": {"count": 2}, "score": 0.5}
        harness = {"gsm8k": {"questions": 9, "target": {"flexible_match": {"value": share, "low": None, "high": None}}}}
        benchmark = {"all": whole, "by": {"category": {"math": whole, "law": whole}}}
        return {
            "evaluation/mmlu_pro.json": evaluation("mmlu_pro", benchmark, compare=None),
            "evaluation/tasks.json": evaluation("harness", {"tasks": harness}, compare=None),
            f"evaluation/judge-{wins}.json": evaluation("judge", judged, judge="judge-1", prompts="p.jsonl"),
            "evaluation/own.json": evaluation("another", {"speed": {"tokens": wins * 100}}, compare=None),
            f"evaluation/alone-{wins}.json": evaluation("another", {"speed": {"seen": 1}}, compare=None),
        }

    runs = [read_run(make_run(f"run-{wins}", curve(), results(0.25 * wins, wins))) for wins in (1, 3)]
    rows = {row[0]: row[1:] for table in evaluation_tables(runs) for row in table.rows}
    assert rows[NAMES.get("accuracy", "accuracy")] == ["25.0% [12.5%, 30.0%]", "75.0% [37.5%, 90.0%]"]
    assert rows["law"] == ["25.0% [12.5%, 30.0%]", "75.0% [37.5%, 90.0%]"]
    assert rows["gsm8k, flexible match"] == ["25.0%", "75.0%"]
    assert rows["wins"] == ["1", "3"] and rows["score"] == ["50.0%", "50.0%"]
    assert rows["speed · tokens"] == ["100", "300"]
    assert "speed · seen" not in rows


def test_an_evaluation_is_on_the_page_of_its_run_at_once(make_run: MakeRun, caplog: pytest.LogCaptureFixture):
    """Where there is a page, and where the result is one of the run itself and lies in its folder."""
    caplog.set_level("INFO", "luthier")
    folder = make_run(metrics=curve())
    page, result = folder / "report.html", folder / "evaluation" / "x.json"
    draw_again(str(folder))
    assert not page.exists()
    write_report(folder)
    result.parent.mkdir()
    result.write_text(json.dumps(evaluation("data", compared((0.1, 0.8)))), encoding="utf-8")
    draw_again(str(folder), folder.parent / "elsewhere")
    draw_again("org/base")
    assert "Not measured." in page.read_text(encoding="utf-8") and not caplog.messages
    draw_again(f"{folder}/")
    assert "Yes. On x: exactly right answers" in page.read_text(encoding="utf-8")
    assert caplog.messages == [f"{page} holds this result now"]
    page.write_text("mine", encoding="utf-8")
    draw_again(str(folder))
    assert page.read_text(encoding="utf-8") == "mine" and "no report was made" in caplog.messages[-1]


def test_losses_of_other_data_are_not_ranked(make_run: MakeRun, tmp_path: Path):
    changed = json.loads(json.dumps(ENVIRONMENT))
    changed["data"]["sources"][0]["fingerprint"] = "another"
    runs = [
        make_run("a", curve(TRAIN, FALLS), {"environment.json": ENVIRONMENT}),
        make_run("b", curve(TRAIN, RISES), {"environment.json": changed}, rl="orpo"),
    ]
    output = tmp_path / "both.html"
    assert main(["report", *map(str, runs), "--output", str(output)]) == 0
    text = " ".join(Page(output.read_text(encoding="utf-8")).text.split())
    assert "cannot be compared" in text and "the runs differ in rl" in text and "the data" in text


def test_runs_on_other_rows_are_ranked_on_test_data_of_their_own(make_run: MakeRun):
    def run(name: str, evaluated: list[float], **sources: str) -> Run:
        environment = json.loads(json.dumps(ENVIRONMENT))
        for key in ("sources", "test_sources"):
            environment["data"][key] = [{"fingerprint": sources[key]}]
        test = [{"path": "test.jsonl", "type": "alpaca"}]
        return read_run(make_run(name, curve(TRAIN, evaluated), {"environment.json": environment}, test_datasets=test))

    a, b = run("a", FALLS, sources="one", test_sources="t"), run("b", RISES, sources="two", test_sources="t")
    assert measures_differ([a, b]) == [] and "a has the lowest eval loss" in best_in_words([a, b])
    assert measures_differ([a, run("c", RISES, sources="one", test_sources="u")]) == ["the data"]


@pytest.mark.parametrize(
    ("prepare", "arguments", "status", "message"),
    [
        ("", ["nowhere"], 1, "there is no such run folder"),
        ("file", ["file"], 1, "is a file"),
        ("empty", ["empty"], 1, "is no run folder: it has no config.yaml"),
        ("broken", ["broken"], 1, "config.yaml cannot be read"),
        ("", ["run", "run/"], 2, "the same run is named twice"),
        ("", ["run", "--output", "run"], 2, "is a folder"),
        ("page", ["run", "--output", "mine.html"], 2, "nothing is overwritten unasked"),
        ("", ["run", "--output", "no/such/folder.html"], 1, "cannot be written"),
        ("", [], 2, "Missing argument"),
    ],
)
def test_bad_input(
    make_run: MakeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    prepare: str,
    arguments: list[str],
    status: int,
    message: str,
):
    monkeypatch.chdir(tmp_path)
    make_run("run", curve())
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("a: [")
    assert main(["report", *arguments]) == status
    assert message in capsys.readouterr().err
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"
    assert not list(tmp_path.rglob(".partial*"))


def test_made_again_it_replaces_itself(make_run: MakeRun, capsys: pytest.CaptureFixture[str]):
    folder = make_run(metrics=curve(TRAIN, FALLS))
    for _ in range(2):
        assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "It learned. Unfinished: step 60."
    assert Page((folder / "report.html").read_text(encoding="utf-8")).charts()
