"""The parts of `luthier demo`: its folder, its config, its tables; a short form of it, and the whole."""

from __future__ import annotations

import json
from importlib import resources
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from luthier.demo import command, tasks
from luthier.evaluate.exact_match import exact_match

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


def test_the_tables_count_only_what_is_right_to_the_letter():
    questions = [
        command.Question("plurals", "What is the plural?", "fox", "foxes"),
        command.Question("plurals", "What is the plural?", "cat", "cats"),
        command.Question("counting", "How many?", "[a], b", "2"),
    ]
    console = Console(width=100, file=StringIO())
    before, after = ["foxes.", "cats ...", "3"], ["foxes", "cats", "3"]
    console.print(command.accuracy_table(questions, before, after))
    console.print(command.samples_table(questions, before, after))
    text = console.file.getvalue()
    for row in (("plurals", "2", "0.0%", "100.0%"), ("counting", "1", "0.0%", "0.0%"), ("all", "66.7%")):
        assert any(all(cell in line for cell in row) for line in text.splitlines()), row
    assert "[a], b" in text


def run_demo(folder: Path, capfd: pytest.CaptureFixture[str], seed: int = 42) -> tuple[str, list[dict[str, str]]]:
    """What the command prints, and every question with both answers."""
    command.demo(output_dir=folder, overwrite=False, seed=seed)
    lines = (folder / command.ANSWERS).read_text(encoding="utf-8").splitlines()
    return capfd.readouterr().out, [json.loads(line) for line in lines]


def test_a_run_in_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    whole_config, all_questions = command.demo_config, command.held_out
    monkeypatch.setattr(
        command, "demo_config", lambda *each: whole_config(*each).replace("a short test", max_steps=2)
    )
    # One question of each kind.
    monkeypatch.setattr(
        command, "held_out", lambda path: list({each.task: each for each in all_questions(path)}.values())
    )
    printed, answers = run_demo(tmp_path / "run", capfd)
    assert {row["task"] for row in answers} == set(tasks.TASKS)
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    for text in ("1/3", "3/3", "before", "after", "luthier generate", "luthier preview", "luthier train"):
        assert text in printed, text


@pytest.mark.slow
@pytest.mark.parametrize("seed", [42, 1])
def test_it_learns_what_it_did_not_know(tmp_path: Path, capfd: pytest.CaptureFixture[str], seed: int):
    """Under a tenth of the held-out answers are right before, and nearly all after."""
    _, answers = run_demo(tmp_path / "run", capfd, seed)
    expected, kinds = [row["output"] for row in answers], [row["task"] for row in answers]
    before = exact_match([row["before"] for row in answers], expected, kinds)
    after = exact_match([row["after"] for row in answers], expected, kinds)
    assert before.overall.accuracy < 0.1
    assert after.overall.accuracy > 0.95
    assert min(score.accuracy for score in after.groups.values()) > 0.8
