"""The shipped studies: each is read, has the runs that its head says, and would start at full size as its head says.

The rows beside them are what the script beside them writes.
"""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from luthier.errors import ConfigError
from luthier.experiments.study import spec
from luthier.experiments.study.expand import expand

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "examples" / "studies"
STUDIES = sorted(path for path in FOLDER.glob("*.yml") if path.name != "base.yml")


def head_of(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)


def full_size(path: Path) -> list[str] | None:
    """The arguments of the indented command in a study's head."""
    found = re.search(r"^    (luthier sweep .*(?:\n        .*)*)", head_of(path), re.MULTILINE)
    return shlex.split(found[1].replace("\\\n", " ")) if found else None


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_has_the_runs_that_it_says(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = spec.read(path)
    head = head_of(path)
    assert shlex.split(head.splitlines()[0]) == ["luthier", "sweep", str(path.relative_to(ROOT))]
    assert study.name == path.stem
    assert study.question.endswith("?")
    assert str(study.output_dir) == f"outputs/studies/{path.stem}"
    found = expand(study)
    said = re.search(r"^(\d+) runs\.", head, re.MULTILINE)
    assert said is not None
    assert len(found.runs) == int(said[1])
    assert not found.notes  # of runs that are the same
    for run in found.runs:
        for entry in (*run.config.data.datasets, *run.config.data.test_datasets):
            assert Path(entry.path.split("#")[0]).is_file()
        assert (Path(run.config.model.base_model) / "config.json").is_file()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_command_for_full_size_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = full_size(path)
    if command is None:
        assert "copy this file" in head_of(path)
        return
    assert command[:3] == ["luthier", "sweep", str(path.relative_to(ROOT))]
    toy, full = (spec.read(path, overrides) for overrides in ([], command[3:]))
    full.seeds = full.seeds[:1]  # the others differ in the seed alone
    found = expand(full).runs
    assert len(found) * len(toy.seeds) == len(expand(toy).runs)
    for run in found:
        assert run.config.model.base_model == "meta-llama/Llama-3.2-1B"
        assert run.config.data.test_datasets == []


def test_rates_follow_the_rate_of_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """`learning_rate: "=3*learning_rate"` is three times the base's, which may be overridden; other varied keys not."""
    monkeypatch.chdir(ROOT)
    study = spec.read(FOLDER / "sophia.yml", ["learning_rate=2e-4"])
    found = sorted({run.config.training.learning_rate or 0.0 for run in expand(study).runs})
    assert found == pytest.approx([6e-5, 2e-4, 6e-4])
    with pytest.raises(ConfigError, match="lora_r is what the study varies"):
        spec.read(FOLDER / "rank-and-alpha.yml", ["lora_r=4"])


def test_every_question_of_the_page_has_a_study() -> None:
    page = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    assert set(re.findall(r"examples/studies/([a-z-]+)\.yml", page)) - {"base"} == {path.stem for path in STUDIES}


def test_a_study_has_a_section_on_the_page_with_its_question() -> None:
    """And its command, its number of runs and what its own page found."""
    page = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    sections = {part.split("\n")[0]: part for part in page.split("\n### ")[1:]}
    for path in STUDIES:
        section = next(text for text in sections.values() if f"luthier sweep {path.relative_to(ROOT)}\n" in text)
        runs = re.search(r"^(\d+) runs\.", head_of(path), re.MULTILINE)
        assert runs is not None
        assert f"{runs[1]} runs" in section
        assert "- **" in section


def written_by_the_script() -> dict[str, list[dict[str, str]]]:
    described = importlib.util.spec_from_file_location("studies_data", FOLDER / "data" / "write.py")
    assert described is not None
    assert described.loader is not None
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return module.make()


def test_the_rows_are_what_the_script_writes() -> None:
    made = written_by_the_script()
    assert {f"{name}.jsonl" for name in made} == {path.name for path in (FOLDER / "data").glob("*.jsonl")}
    for name, rows in made.items():
        lines = (FOLDER / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows


def test_nothing_held_out_is_trained_and_two_answers_in_five_are_wrong() -> None:
    def rows(path: Path) -> list[dict[str, str]]:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    train, test, noisy, long, long_test = (
        rows(FOLDER / "data" / f"{name}.jsonl") for name in ("train", "test", "noisy", "long", "long-test")
    )
    asked = [(row["instruction"], row["input"]) for row in [*train, *test]]
    assert len(set(asked)) == len(asked)
    good = rows(ROOT / "luthier" / "demo" / "data" / "train.jsonl")[: len(noisy)]
    wrong = [bad for right, bad in zip(good, noisy, strict=True) if right != bad]
    assert len(wrong) == 0.4 * len(noisy)
    assert {bad["instruction"] + bad["input"] for bad in noisy} == {row["instruction"] + row["input"] for row in good}
    assert not {row["text"] for row in long} & {row["text"] for row in long_test}
