"""The benchmark's own figures, rows and tables; and one short run of Luthier through all of it."""

from __future__ import annotations

import json
import os
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from bench import cpu, machine, process, rows, table
from bench.contenders import CONTENDERS
from bench.environments import ENVIRONMENTS, ROOT, SetupError, interpreter, set_up
from bench.figures import figures, loss_differences, speed
from bench.peers.common import Clock, Job, real_tokens
from bench.peers.luthier import config_of
from bench.shapes import SHAPES
from luthier import Config


def run_of(seconds: float, *, losses: list[float] | None = None, tokens: int = 100) -> dict[str, Any]:
    """Three steps of which the first is slow."""
    losses = losses or [3.0, 2.0, 1.0]
    steps = [{"tokens": tokens, "seconds": seconds, "loss": loss} for loss in losses]
    steps[0]["seconds"] = 50.0
    return {
        "steps": steps,
        "versions": {"it": "1.2", "torch": "2"},
        "note": "",
        "process_memory_gib": 1.5,
        "seconds_to_first_step": 9.0,
    }


def result_of(rounds: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A result as the benchmark writes it."""
    return {
        "task": "sft",
        "shape": "tiny",
        "loss": "whole",
        "date": "2026-01-02T03:04+00:00",
        "commit": "abc",
        "command": "python -m bench.cpu",
        "hardware": {"cpu": "A CPU", "cores": 2, "memory_gib": 8.0},
        "multiplied_parameters": 1_000_000,
        "rows": {"source": "generated", "count": 24, "tokens": 300},
        "recipe": {"steps": 3, "warmup_steps": 1},
        "rounds_asked": len(rounds),
        "ended_early": False,
        "failures": {},
        "rounds": [{"peak": {"gflops": 8.0}, "runs": runs} for runs in rounds],
    } | changes


def test_speed_leaves_out_the_warm_up() -> None:
    assert speed(run_of(0.5), 1) == pytest.approx(200)
    assert speed(run_of(0.5), 0) == pytest.approx(300 / 51)
    with pytest.raises(ValueError, match="nothing is left"):
        speed(run_of(0.5), 3)


def test_ratios_are_taken_within_rounds() -> None:
    """The second round ran on a busy machine: speeds fall, the ratio of neighbours does not."""
    rounds = [
        {"luthier": run_of(0.1), "trl": run_of(0.2)},
        {"luthier": run_of(1.0), "trl": run_of(2.0)},
        {"luthier": run_of(0.1), "trl": run_of(0.3)},
    ]
    ours, theirs = figures(result_of(rounds))
    assert (ours.name, theirs.name) == ("luthier", "trl")
    assert ours.ratio == pytest.approx(1.0) and theirs.ratio == pytest.approx(2.0)
    assert (theirs.slowest, theirs.speed, theirs.fastest) == pytest.approx((50, 1000 / 3, 500))
    # 4 x 1e6 parameters x 1000 tokens/s of 8e9.
    assert ours.share == pytest.approx(0.5)


def test_a_contender_that_failed_in_a_later_round_keeps_its_rounds() -> None:
    rounds = [{"luthier": run_of(0.1), "trl": run_of(0.2)}, {"luthier": run_of(0.5)}]
    ours, theirs = figures(result_of(rounds))
    assert theirs.ratio == pytest.approx(2.0)
    assert (ours.slowest, ours.fastest) == pytest.approx((200, 1000))


def test_losses_are_compared_only_where_the_steps_have_the_same_tokens() -> None:
    ours = run_of(1, losses=[3.0, 2.0, 1.0])
    assert loss_differences(ours, run_of(1, losses=[3.1, 2.5, 1.0])) == pytest.approx([0.1, 0.5, 0.0])
    assert loss_differences(ours, run_of(1, tokens=99)) == []
    line = figures(result_of([{"luthier": ours, "trl": run_of(1, losses=[3.1, 2.5, 1.0])}]))[1]
    assert table.cells(line)[-1] == "0.1000 / 0.5000"
    line = figures(result_of([{"luthier": ours, "trl": run_of(1, tokens=99)}]))[1]
    assert table.cells(line)[-1] == "other batches"


def test_the_reference_counts_as_work() -> None:
    rounds = [{"luthier": run_of(0.1)}]
    shares = {task: figures(result_of(rounds, task=task))[0].share for task in rows.TASKS}
    assert shares == pytest.approx({"sft": 0.5, "orpo": 0.5, "dpo": 0.75, "kto": 1.25})


def test_tables_hold_every_line_and_note() -> None:
    rounds = [{"luthier": run_of(0.1), "trl": run_of(0.2) | {"note": "a note"}}]
    result = result_of(rounds, failures={"unsloth": "status 1: it fell"})
    for text in (table.as_text(result), table.as_markdown(result)):
        assert "2.00x" in text and "1,000 (1,000-1,000)" in text and "50%" in text
        assert "trl: a note" in text and "unsloth failed: status 1: it fell" in text
    text_lines = table.as_markdown(result).splitlines()
    assert len({line.count("|") for line in text_lines if line.startswith("|")}) == 1


def test_a_table_says_that_the_machine_was_busy() -> None:
    busy = result_of([{"luthier": run_of(0.1) | {"cpu_taken_by_others": 0.4}}])
    assert "took up to 40%" in table.as_text(busy) and "CPU second" not in table.as_text(busy)
    worked = {"luthier": run_of(0.1) | {"cpu_taken_by_others": 0.4}, "trl": run_of(0.1)}
    for step in worked["luthier"]["steps"][1:]:
        step["cpu_seconds"] = 0.2
    for step in worked["trl"]["steps"][1:]:
        step["cpu_seconds"] = 0.5
    assert "in tokens per CPU second, of which others take none, Luthier is 2.50x of trl" in table.as_text(
        result_of([worked])
    )
    assert "took up to" not in table.as_text(
        result_of([{"luthier": run_of(0.1) | {"cpu_taken_by_others": 0.02}}])
    )


def test_the_page_shows_the_newest_result_of_each_kind() -> None:
    old = result_of([{"luthier": run_of(0.1)}], commit="old")
    new = result_of([{"luthier": run_of(0.1)}], commit="new", date="2026-01-03T00:00+00:00")
    other = result_of([{"luthier": run_of(0.1)}], commit="other", loss="answers")
    task = result_of([{"luthier": run_of(0.1)}], commit="task", task="dpo", loss=None)
    shown = table.page([new, old, other, task])
    assert "commit new" in shown and "commit other" in shown and "commit old" not in shown
    assert "### tiny, DPO\n" in shown and "commit task" in shown


def test_the_page_in_the_docs_is_made_from_the_results() -> None:
    assert table.PAGE.read_text(encoding="utf-8") == table.page(table.load()), "run `python -m bench.table`"


def test_results_name_no_place_of_the_machine_that_made_them() -> None:
    for path in (ROOT / "bench" / "results").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert str(Path.home()) not in text and str(ROOT) not in text and "/home/" not in text, path.name
    assert (
        machine.without_places(f"{ROOT}/luthier/x.py and /tmp/w/y", Path("/tmp/w"))
        == ".../luthier/x.py and .../y"
    )


def test_rows_are_whole_texts_and_the_same_every_time() -> None:
    first = list(islice(rows.generated(), 300))
    assert first == list(islice(rows.generated(), 300))
    assert 0.3 < sum(bool(row["input"]) for row in first) / 300 < 0.5
    row = rows.rendered({"instruction": "Do it.", "input": "with this", "output": "Done."})
    assert row["text"] == row["prompt"] + "Done." and row["prompt"].endswith("### Response:\n")
    assert "### Input:\nwith this\n" in row["prompt"]
    assert "### Input" not in rows.rendered({"instruction": "Do it.", "input": "", "output": "x"})["prompt"]


def test_rows_that_do_not_fit_are_left_out() -> None:
    texts = [rows.rendered({"instruction": "I", "input": "", "output": "x" * n}) for n in (5, 500, 6)]
    assert rows.fitting(iter(texts), 2, len, 300) == [texts[0], texts[2]]
    with pytest.raises(ValueError, match="only 2 rows"):
        rows.fitting(iter(texts), 3, len, 300)
    pairs = [{"prompt": "p" * 10, "chosen": "c" * n, "rejected": "r" * m} for n, m in ((5, 5), (289, 290), (289, 289))]
    assert rows.fitting(iter(pairs), 2, len, 300) == [pairs[0], pairs[2]]  # at most 299, and an end


@pytest.mark.parametrize("real", [True, False])
def test_compared_answers_follow_one_prompt(real: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not real:
        monkeypatch.setattr(rows, "PREFERENCES", tmp_path / "nothing.jsonl")
        assert rows.source_name("dpo") == "generated"
    elif not rows.PREFERENCES.exists():
        pytest.skip("the preference data are not here")
    pairs, single = (list(islice(rows.all_rows(task), 40)) for task in ("orpo", "kto"))
    for pair in pairs:
        assert pair["prompt"].startswith("### ") and pair["prompt"].endswith("\n\n### Assistant:\n")
        assert pair["chosen"] != pair["rejected"] and pair["chosen"].strip() == pair["chosen"] != ""
        assert rows.texts(pair) == [pair["prompt"] + pair["chosen"], pair["prompt"] + pair["rejected"]]
    # KTO has one answer of each pair, in turn the one and the other.
    for index, (pair, row) in enumerate(zip(pairs, single, strict=True)):
        assert row["label"] is (index % 2 == 0)
        assert rows.texts(row) == [rows.texts(pair)[index % 2]]


def test_answers_that_contenders_treat_unlike_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi?"}]
    answers = [("a", "b"), ("a", "a"), ("", "b"), ("a ", "b"), ("a", "\nb"), ("c", "d")]
    lines = [
        {"prompt": asked, "chosen": [{"content": chosen}], "rejected": [{"content": rejected}]}
        for chosen, rejected in answers
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    monkeypatch.setattr(rows, "PREFERENCES", path)
    found = list(rows.all_rows("dpo"))
    assert [(row["chosen"], row["rejected"]) for row in found] == [("a", "b"), ("c", "d")]
    assert found[0]["prompt"] == "### System:\nBe kind.\n\n### User:\nHi?\n\n### Assistant:\n"


def test_multiplied_parameters_are_those_of_the_model() -> None:
    torch = pytest.importorskip("torch")
    from dataclasses import asdict

    from transformers import AutoConfig, AutoModelForCausalLM

    for shape in SHAPES.values():
        values = asdict(shape)
        config = AutoConfig.for_model(values.pop("family"), **values)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        matrices = [
            m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m.bias is None
        ]
        assert sum(matrices) == shape.multiplied_parameters()


def test_the_clock_counts_everything_between_two_ends(tmp_path: Path) -> None:
    clock = Clock(began=10.0)
    clock.tokens += 7
    clock.end(at=12.0, worked=4.0)
    clock.end(tokens=5, at=15.0, worked=5.5)
    clock.loss(2, 1.25)
    job = Job(model="m", rows="r", scratch="s", result=str(tmp_path / "result.json"), steps=2)
    clock.report(job, ["torch"])
    steps = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["steps"]
    assert steps == [
        {"tokens": 7, "seconds": 2.0, "loss": None},
        {"tokens": 5, "seconds": 3.0, "loss": 1.25, "cpu_seconds": 1.5},
    ]


def test_padding_is_not_counted() -> None:
    torch = pytest.importorskip("torch")
    padded = {
        "input_ids": torch.ones(2, 4, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]),
    }
    assert real_tokens(padded) == 5
    assert real_tokens({"input_ids": torch.ones(1, 9)}) == 9
    mask = padded["attention_mask"]
    pairs = {"prompt_attention_mask": mask, "chosen_attention_mask": mask, "rejected_attention_mask": mask[:, :2]}
    assert real_tokens(pairs) == 8
    assert real_tokens(padded | {"KL_attention_mask": mask}) == 5


def test_every_contender_has_an_environment_and_a_script() -> None:
    for contender in CONTENDERS.values():
        assert contender.environment in ENVIRONMENTS
        assert (ROOT / "bench" / "peers" / f"{contender.module}.py").is_file()
        assert contender.tasks and set(contender.tasks) <= set(rows.TASKS)


OURS = [contender for contender in CONTENDERS.values() if contender.module == "luthier"]


@pytest.mark.parametrize(("task", "variant"), [(task, c.variant) for c in OURS for task in c.tasks])
def test_luthiers_yaml_is_one_that_it_reads(task: str, variant: str, tmp_path: Path) -> None:
    job = Job(model="m", rows="r", scratch=str(tmp_path), result="r", steps=2, task=task, variant=variant)
    config = Config.from_flat(config_of(job))
    assert config.preference.rl == (None if task == "sft" else task)


def test_a_setup_that_fails_says_where_its_log_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.environments.sys.executable", sys.executable + "-that-is-not-there")
    with pytest.raises((SetupError, OSError)):
        set_up(tmp_path, "trl")
    assert not interpreter(tmp_path, "trl").exists()


def test_the_command_line_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    for given, said in (
        (["--only", "trl,nobody"], "nobody"),
        (["--setup", "nothing"], "nothing"),
        (["--steps", "2"], "nothing is left"),
        (["--task", "dpo", "--loss", "answers"], "a loss of its own"),
    ):
        with pytest.raises(SystemExit):
            cpu.arguments(given)
        assert said in capsys.readouterr().err


def test_memory_and_status_of_a_process_are_seen_from_outside(tmp_path: Path) -> None:
    (tmp_path / "hungry.py").write_text(
        "held = bytearray(200 << 20); raise SystemExit(3)\n", encoding="utf-8"
    )
    done = process.run(sys.executable, "hungry", [], scratch=tmp_path, log=tmp_path / "log")
    assert done.status == 3 and done.peak_memory_gib > 0.19
    assert done.elsewhere is None or 0 <= done.elsewhere <= 1
    assert process.tail(tmp_path / "log") == ""


@pytest.mark.slow
@pytest.mark.parametrize(("task", "kind"), [("sft", "whole"), *((task, task) for task in rows.TASKS[1:])])
def test_a_whole_run_writes_a_result(
    task: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Luthier alone at a shape that is nothing, with generated rows; what is skipped is named."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    given = [
        "--task",
        task,
        "--shape",
        "micro",
        "--steps",
        "2",
        "--warmup-steps",
        "1",
        "--rounds",
        "1",
        "--only",
        "luthier,trl",
    ]
    assert cpu.main([*given, "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]) == 0
    said = capsys.readouterr().out
    assert "skipped: trl" in said
    [path] = (tmp_path / "results").glob(f"cpu-micro-{kind}-*.json")
    text = path.read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    result = json.loads(text)
    run = result["rounds"][0]["runs"]["luthier"]
    assert [step["tokens"] > 100 and step["seconds"] > 0 for step in run["steps"]] == [True, True]
    assert sum(step["tokens"] for step in run["steps"]) == result["rows"]["tokens"]
    assert 0 < run["seconds_to_begin_of_first_step"] < run["seconds_to_first_step"] < run["process_seconds"]
    [line] = figures(result)
    assert line.name == "luthier" and line.ratio == 1.0 and 0 < (line.share or 0) < 1
    assert table.as_text(result).splitlines()[2].startswith("contender")
