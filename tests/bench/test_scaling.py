"""The benchmark of communication on a toy shape: what two real processes send is what the plan says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import machine, scaling


def test_figures_of_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Planned:
        share, sent = 0.25, 7.0

    seen: list[Any] = []

    def prediction(*arguments: Any) -> type[Planned]:
        seen.append(arguments)
        return Planned

    monkeypatch.setattr(scaling, "prediction", prediction)
    alone = {"step": [9.0, 9.0, 2.0, 2.0, 2.0]}
    both = {
        "step": [9.0, 9.0, 4.0, 4.0, 4.0],
        "collectives": [9.0, 9.0, 1.0, 1.0, 1.0],
        "waiting": [0.0, 0.0, 0.5, 0.5, 0.5],
        "sent": [0.0, 0.0, 3e6, 3e6, 3e6],
        "number": [0.0, 0.0, 3, 3, 3],
    }
    links = {"all_reduce": {"1000000": 5.0, "64000000": 50.0}}
    line = scaling.line_of("lora", tmp_path, {1: alone, 2: both}, links)
    assert (line.measured, line.waiting, line.by_clock, line.sent) == (0.25, 0.125, 0.5, 3e6)
    assert (line.predicted, line.sent_predicted, line.bandwidth) == (0.25, 7.0, 5.0)
    assert seen == [(tmp_path, scaling.ROWS * scaling.LENGTH / 2.0, 5.0)]


def test_an_unknown_case_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scaling.main(["--only", "lora,nonsense"])
    assert "no such case: nonsense" in capsys.readouterr().err


@pytest.mark.slow
def test_bytes_of_real_runs_are_those_of_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(["--shape", "micro", "--steps", "2", "--results", str(tmp_path)]) == 0
    (written,) = tmp_path.iterdir()
    text = written.read_text()
    lines = [scaling.Line(**entry) for entry in json.loads(text)["lines"]]
    assert [line.case for line in lines] == list(scaling.CASES)
    for line in lines:
        # beside gradients and weights the loss and a norm are added up
        assert line.sent == pytest.approx(line.sent_predicted, rel=0.02, abs=100)
        assert 0 < line.predicted < 1 and 0 < line.measured < 1
    assert machine.without_places(text) == text
    assert "predicted share" in capsys.readouterr().out
