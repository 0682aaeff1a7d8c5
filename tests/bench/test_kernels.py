"""The ops' benchmark on toy sizes: everybody computes the same, and what is written tells no places."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import kernels, machine

TOY = replace(kernels.SMOL, T=6, N=3, D=16, I=24, V=50, heads=2, key_heads=1, head=8, rank=2)


def test_all_ops_are_measured_and_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "SMOL", TOY)
    given = ["--device", "cpu", "--seconds", "0.01", "--results", str(tmp_path)]
    assert kernels.main(given) == 0

    (written,) = tmp_path.iterdir()
    text = written.read_text()
    result = json.loads(text)
    lines = [kernels.Line(**entry) for entry in result["lines"]]
    assert {line.op for line in lines} == set(kernels.CASES)
    for op in kernels.CASES:
        contenders = [line.contender for line in lines if line.op == op]
        assert contenders[:2] == [kernels.OURS, kernels.REFERENCE]
    assert all(line.difference < 1e-4 and line.microseconds > 0 for line in lines)
    assert all(line.ratio == 1 for line in lines if line.contender == kernels.OURS)
    assert machine.without_places(text) == text
    assert "F.cross_entropy" in capsys.readouterr().out


def test_an_unknown_op_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.main(["--only", "rms_norm,nonsense"])
    assert "no such op: nonsense" in capsys.readouterr().err
