"""The parts of `luthier demo`: its folder, its config, its table of answers; a short form of it, and the whole."""

from __future__ import annotations

import json
from importlib import resources
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from luthier.demo import command, tasks

HOME = Path(str(resources.files("luthier.demo")))


def test_a_folder_that_exists_is_left_alone(tmp_path: Path):
    wanted = tmp_path / "luthier-demo"
    assert command.unused(wanted) == wanted
    wanted.mkdir()
    (tmp_path / "luthier-demo-2").mkdir()
    assert command.unused(wanted) == tmp_path / "luthier-demo-3"


def test_the_config_is_the_shipped_yaml_with_the_packages_paths(tmp_path: Path):
    folder = tmp_path / "a: folder # of mine"
    config = command.demo_config(HOME, folder, overwrite=False, seed=3)
    assert config.output.output_dir == str(folder)
    assert Path(config.model.base_model) == HOME / "base_model"
    assert Path(config.data.datasets[0].path).is_file()
    assert (config.training.seed, config.output.overwrite_output_dir) == (3, False)
    assert "demo.yml" in config.origins["learning_rate"]


def test_one_question_of_each_kind_is_shown_with_both_answers():
    def row(task: str, asked: str, base: str, tuned: str) -> dict[str, Any]:
        sides = {"compare": {"answer": base, "exact": False}, "target": {"answer": tuned, "exact": True}}
        head = "Below is an instruction.\n\n### Instruction:\n"
        return {"by": {"task": task}, "prompt": f"{head}{asked}\n\n### Response:\n", **sides}

    rows = [
        row("plurals", "What is the plural?\n\n### Input:\nfox", "fox\nfox", "foxes"),
        row("plurals", "The plural of cat?", "cat", "cats"),
        row("counting", "How many: [a], b?", "[red]3", "2"),
    ]
    console = Console(width=100, file=StringIO())
    console.print(command.samples_table(rows))
    text = console.file.getvalue()
    for shown in ("What is the plural?", "fox fox", "foxes", "How many: [a], b?", "[red]3"):
        assert shown in text, shown
    for hidden in ("cats", "###", "Below"):
        assert hidden not in text, hidden


def run_demo(folder: Path, seed: int = 42) -> dict[str, Any]:
    """The result that the command leaves in the run's folder."""
    command.demo(output_dir=folder, overwrite=False, seed=seed)
    return json.loads((folder / "evaluation" / "validation.json").read_text(encoding="utf-8"))


def test_a_run_in_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    whole = command.demo_config
    lines = (HOME / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    one_of_each = {json.loads(line)["task"]: line for line in lines}.values()
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(one_of_each), encoding="utf-8")
    short = {"max_steps": 2, "test_datasets": [{"path": str(few), "type": "alpaca"}], "evals_per_epoch": None}
    monkeypatch.setattr(command, "demo_config", lambda *each: whole(*each).replace("a short test", **short))
    folder = tmp_path / "run"
    result = run_demo(folder)
    assert result["figures"]["by"]["task"].keys() == set(tasks.TASKS)
    assert result["compare"] == str(HOME / "base_model")
    assert (folder / "adapter_model.safetensors").is_file()
    assert "Better than its base?" in (folder / "report.html").read_text(encoding="utf-8")
    printed = capfd.readouterr().out
    for text in ("1/2", "2/2", "exact match, by task", "One question of each kind", "[ ] 95% interval"):
        assert text in printed, text
    shown = [line for line in printed.splitlines() if line.startswith("    luthier ")]
    assert [line.split()[1] for line in shown] == ["generate", "evaluate", "train", "report", "preview"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [42, 1])
def test_it_learns_what_it_did_not_know(tmp_path: Path, seed: int):
    """Under a tenth of the held-out answers are right before, and nearly all after."""
    figures = run_demo(tmp_path / "run", seed)["figures"]

    def right(group: dict[str, Any], side: str) -> float:
        return group[side]["exact_match"]["value"]

    assert right(figures["all"], "compare") < 0.1
    assert right(figures["all"], "target") > 0.95
    assert min(right(group, "target") for group in figures["by"]["task"].values()) > 0.8
