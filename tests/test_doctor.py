"""The report of the machine: complete, quick, and also there when something is missing."""

from __future__ import annotations

import importlib.metadata
import json
import time

import pytest
import torch

from luthier import doctor


def test_report(capsys):
    report = doctor.examine()
    text = doctor.as_text(report)
    assert f"torch            {torch.__version__}" in text
    assert "cpu" in text
    assert "`bf16: auto` computes in" in text
    for name, extra in (("mlflow", "mlflow"), ("bitsandbytes", "bitsandbytes"), ("lm-eval", "harness")):
        assert f"luthier[{extra}]" in text or report["optional"][name]["version"]
    doctor.command(as_json=True)
    assert json.loads(capsys.readouterr().out)["luthier"] == report["luthier"]


def test_speed_is_measured_quickly_in_every_dtype():
    began = time.perf_counter()
    speeds = {
        dtype: doctor.measure_tflops(torch.device("cpu"), dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    assert time.perf_counter() - began < 20
    assert all(speed is not None and speed > 0 for speed in speeds.values())


def test_a_dtype_that_the_device_cannot_do(monkeypatch):
    def refuses(*_: object) -> None:
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(doctor, "_three_products", refuses)
    assert doctor.measure_tflops(torch.device("cpu"), torch.float16) is None
    assert doctor._speeds({"fp32": 2.0, "bf16": 0.02, "fp16": None}) == (
        "fp32 2 TFLOP/s, bf16 20 GFLOP/s (100 times slower), fp16 not supported"
    )


@pytest.mark.parametrize(
    ("version", "problem"),
    [(None, "torch is missing: pip install 'torch>=2.11'"), ("2.3", "torch 2.3 is outside of >=2.11")],
)
def test_wrong_packages_are_problems(monkeypatch, version, problem):
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda _: ["torch>=2.11", "mlflow>=3; extra == 'mlflow'"]
    )
    monkeypatch.setattr(doctor, "_version", lambda _: version)
    problems: list[str] = []
    assert doctor._packages(problems) == {"torch": version}
    assert problems[0].startswith(problem)
    report = {**doctor.examine(), "problems": problems}
    assert problem in doctor.as_text(report)


def test_cache_counts_what_is_there(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"x" * 2**20)
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    assert doctor._cache() == {"folder": str(tmp_path), "mib": 1.0}
