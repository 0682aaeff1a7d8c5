"""The parts of `luthier demo`: its folder, its config, its tables."""

from __future__ import annotations

from importlib import resources
from io import StringIO
from pathlib import Path

from rich.console import Console

from luthier.demo import command

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
