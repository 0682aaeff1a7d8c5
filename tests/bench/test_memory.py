"""The memory benchmark on a toy shape: real training is measured, and the plan meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import machine, memory


@pytest.mark.slow
def test_predicted_and_measured_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--device", "cpu", "--shape", "tiny", "--only", "lora,full-layer", "--tokens", "256", "--length", "128"]
    assert memory.main([*given, "--results", str(tmp_path)]) == 0
    (written,) = tmp_path.iterdir()
    text = written.read_text()
    lines = [memory.Line(**entry) for entry in json.loads(text)["lines"]]
    assert [line.case for line in lines] == ["lora", "full-layer"]
    assert all(abs(line.off) < 0.1 for line in lines)
    assert machine.without_places(text) == text
    assert "predicted" in capsys.readouterr().out


def test_an_unknown_case_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        memory.main(["--only", "lora,nonsense"])
    assert "no such case: nonsense" in capsys.readouterr().err
