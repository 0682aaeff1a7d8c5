"""Every example goes through the real parser, and begins with the command that runs it."""

import json
import shlex
from pathlib import Path

import pytest

from luthier.config import Config
from luthier.data.examples import ChatExample
from luthier.data.formats import example_of

ROOT = Path(__file__).resolve().parents[1]
STUDIES = "studies"  # of which only the base is a run; the others have tests of their own
EXAMPLES = sorted(
    path
    for path in (ROOT / "examples").rglob("*.yml")
    if path.parent.name != STUDIES or path.name == "base.yml"
)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT / "examples")))
def test_an_example_is_a_config_and_says_how_it_is_run(path: Path) -> None:
    command = shlex.split(path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "))
    assert command[:3] == ["luthier", "train", str(path.relative_to(ROOT))]
    config = Config.load(path, command[3:])
    assert config.output.output_dir.startswith("./outputs/")


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 11


def test_the_rows_beside_the_chat_example_are_what_it_says() -> None:
    entry = Config.load(ROOT / "examples" / "chat" / "custom-roles.yml").data.datasets[0]
    rows = (ROOT / entry.path).read_text(encoding="utf-8").splitlines()
    assert len(rows) >= 8
    for row in rows:
        example = example_of(json.loads(row), entry, train_on_inputs=False)
        assert isinstance(example, ChatExample)
        assert {message["role"] for message in example.messages} <= {"system", "user", "assistant"}
        assert example.messages[-1]["role"] == "assistant"
