"""The GPU benchmark without a GPU: its clock, its budget, and whoever crashes, hangs or is not there."""

from __future__ import annotations

import json
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from bench import process
from bench.gpu import __main__ as gpu
from bench.gpu import cases, check, clock, table, wheels
from bench.gpu.cases import CONTENDERS, GPU_SHAPES, Case, Contender
from bench.gpu.clock import FEWEST, PROBE, WARMUP, GpuClock, GpuJob
from bench.gpu.peer_luthier import settings_of

STUB = "tests.bench.gpu_stub"


def job_for(tmp_path: Path, **values: Any) -> GpuJob:
    defaults = dict(model="m", rows="r", scratch=str(tmp_path), result=str(tmp_path / "out.json"), steps=50)
    return GpuJob(**{**defaults, "device": "cpu", "weights": "fp32", **values})


def case_entry(**runs: float) -> dict[str, Any]:
    """A case as it is written, with the seconds that each took for 1,000 tokens."""
    return {
        "name": "micro recipe fp32",
        "task": "sft",
        "what": "a batch",
        "model": {"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16},
        "multiplied_parameters": 1000,
        "rows": {"count": 2, "tokens": 30, "squares": 500},
        "peak": {"tflops": 1e-5},
        "runs": {
            name: [
                {
                    "tokens": 1000,
                    "seconds": seconds,
                    "allocated_gib": 1.0,
                    "reserved_gib": 2.0,
                    "seconds_to_first_step": 3.0,
                    "losses": {"5": 1.5},
                    "versions": {name: "1"},
                    "note": "",
                }
            ]
            for name, seconds in runs.items()
        },
        "failures": {"unsloth": "not done after 9 s"},
    }


def result_of(*entries: dict[str, Any]) -> dict[str, Any]:
    return {
        "date": "2026-01-02T03:04+00:00",
        "commit": "abc",
        "command": "python -m bench.gpu",
        "hardware": {"gpu": "A GPU", "torch": "2"},
        "rows_source": "generated",
        "check": None,
        "cases": list(entries),
        "skipped": {"trl": "trl not installed"},
        "not_reached": ["8b packed bf16: the budget was spent"],
    }


class Stepper:
    """A clock whose time goes on by what each step takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, job: GpuJob, each: float) -> None:
        self.now, self.each, self.stopped = 100.0, each, 0
        monkeypatch.setattr(clock.time, "time", lambda: self.now)
        self.clock = GpuClock(job, stop=self._stop)

    def _stop(self) -> None:
        self.stopped += 1

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.clock.count(7)
            self.clock.count(3)
            self.now += self.each
            self.clock.step_ended()
            if self.stopped:
                break


@pytest.mark.parametrize(("each", "measured"), [(0.5, 12), (100.0, PROBE + FEWEST), (0.01, 50 - WARMUP)])
def test_the_clock_measures_for_its_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each: float, measured: int
) -> None:
    """As many steps as fit, at least a few, and never more than were asked for."""
    stepper = Stepper(monkeypatch, job_for(tmp_path, seconds=6.0), each)
    stepper.run(1000)
    assert stepper.stopped == 1 and stepper.clock.last == WARMUP + measured
    assert stepper.clock.seconds == pytest.approx(measured * each)
    assert stepper.clock.first_step_ended == 100.0 + each
    stepper.clock.report(["torch"])
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert (written["steps"], written["tokens"]) == (measured, 10 * measured)


def test_a_run_that_ends_too_soon_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = Stepper(monkeypatch, job_for(tmp_path), 1.0)
    stepper.run(5)
    with pytest.raises(SystemExit, match="only 5 steps"):
        stepper.clock.report(["torch"])


def test_the_table_counts_work_memory_and_ratios() -> None:
    entry = case_entry(luthier=0.5, trl=1.0)
    # 4 x 1000 + 6 x 2 layers x 64 wide x 500 / 30
    assert table.training_flops(entry) == pytest.approx(16_800)
    # One more forward pass, of 2 x 1000 and 2 x 2 x 64 x 500 / 30.
    assert table.training_flops(entry | {"task": "dpo"}) == pytest.approx(16_800 + 2_000 + 4_266 + 2 / 3)
    ours, theirs = table.lines(entry)
    assert ours[0] == "luthier" and ours[2:4] == ["2,000", "1.00x"] and theirs[3] == "2.00x"
    assert theirs[4] == "168%"  # 16,800 x 1,000 of 1e7
    result = result_of(entry)
    text, page = table.as_text(result), table.section([result])
    for said in ("unsloth failed: not done after 9 s", "2.00x", "A GPU", "of 15 tokens on average"):
        assert said in text and said in page
    assert "skipped: trl: trl not installed" in text and "not reached: 8b packed" in text


def test_the_page_shows_the_newest_result_that_has_luthier() -> None:
    old, new, without = (result_of(case_entry(luthier=0.5)) for _ in range(3))
    new |= {"commit": "new", "date": "2026-01-03"}
    without |= {"commit": "without", "date": "2026-01-04", "cases": [case_entry(trl=1.0)]}
    shown = table.section([new, without, old])
    assert "commit new" in shown and "commit abc" not in shown and "commit without" not in shown
    assert "No GPU has been measured yet" in table.section([])


def test_four_bits_are_measured_as_soon_as_luthier_has_them(tmp_path: Path) -> None:
    benchmark = gpu.Benchmark(gpu.arguments(["--shapes", "8b,4b"]), tmp_path, 0.0)
    benchmark.facts = {"knows_4bit": False}
    assert [case.name for case in benchmark._cases()] == [
        "8b recipe bf16", "8b packed bf16", "4b recipe bf16", "4b packed bf16"
    ]  # fmt: skip
    benchmark.facts = {"knows_4bit": True}
    assert "8b packed nf4" in [case.name for case in benchmark._cases()]
    assert "load_in_4bit" not in settings_of(job_for(tmp_path))
    assert settings_of(job_for(tmp_path, weights="nf4"))["load_in_4bit"] is True


def test_compared_answers_come_in_pairs_and_not_packed(tmp_path: Path) -> None:
    benchmark = gpu.Benchmark(gpu.arguments(["--shapes", "4b", "--task", "orpo"]), tmp_path, 0.0)
    benchmark.facts = {"knows_4bit": False}
    [case] = benchmark._cases()
    assert case.name == "4b recipe bf16 orpo" and case.work().sequence_len == 1024
    assert "--task orpo" in benchmark.result["command"]
    everything = {need for contender in CONTENDERS.values() for need in contender.needs}
    assert [contender.name for contender in benchmark._able(everything)] == ["luthier", "trl", "trl-liger", "trl-tuned"]


def test_shapes_are_those_of_the_models() -> None:
    """Parameters as their makers state them, embeddings left out where they are not multiplied."""
    assert GPU_SHAPES["8b"].multiplied_parameters() == 7_504_658_432  # 8.03B less the embeddings and norms
    assert GPU_SHAPES["4b"].multiplied_parameters() == pytest.approx(4.02e9, rel=0.01)
    for contender in CONTENDERS.values():
        assert set(contender.workloads) <= set(cases.WORKLOADS)
    assert Case("8b", "packed", "bf16").work().micro_batch_size * 2048 == 16_384


@pytest.mark.parametrize(
    "given",
    [
        ["--shapes", "9b"],
        ["--only", "nobody"],
        ["--workloads", "x"],
        ["--device", "tpu"],
        ["--task", "dpo", "--workloads", "packed"],
    ],
)
def test_the_command_line_refuses_what_it_does_not_know(given: list[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.arguments(given)


def test_pytests_words_are_understood() -> None:
    assert check.read("...\n12 passed, 3 skipped in 4.20s\n", False) == {
        "summary": "12 passed, 3 skipped", "failed": [], "right": True
    }  # fmt: skip
    failed = check.read(
        "FAILED tests/a.py::b - assert 0\n=== 1 failed, 2 passed in 9.00s (0:00:09) ===\n", False
    )
    assert failed["failed"] == ["tests/a.py::b - assert 0"] and not failed["right"]
    assert not check.read("12 passed in 4.20s", True)["right"]
    assert not check.read("Segmentation fault", False)["right"]


def test_unused_files_are_taken_out_of_a_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "unsloth-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("unsloth/__init__.py", "a = 1")
        file.writestr("studio/page.js", "x" * 1000)
    wheels.slim(wheel, wheels.UNUSED["unsloth-"])
    with zipfile.ZipFile(wheel) as file:
        assert file.namelist() == ["unsloth/__init__.py"] and file.read("unsloth/__init__.py") == b"a = 1"
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


def test_a_process_whose_time_is_up_is_ended(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])\n",
        encoding="utf-8",
    )
    began = time.time()
    done = process.run("python3", "slow", [], scratch=tmp_path, log=tmp_path / "log", timeout=1.0)
    assert done.timed_out and done.status == -9 and time.time() - began < 10


def test_whoever_crashes_hangs_or_is_missing_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stand-ins for everybody; the result is there after each of them, and the others go on."""
    stubs = {
        "fine": Contender("fine", STUB, "default"),
        "crashing": Contender("crashing", STUB, "crashes"),
        "hanging": Contender("hanging", STUB, "hangs", (), ("recipe",)),
        "absent": Contender("absent", STUB, "default", ("no_such_package",)),
    }
    monkeypatch.setattr(cases, "CONTENDERS", stubs)
    monkeypatch.setattr(gpu, "CONTENDERS", stubs)
    monkeypatch.setattr(gpu.Benchmark, "_prepared", _nothing_made)
    monkeypatch.setattr(
        gpu.check, "check", lambda *_: {"summary": "2 passed", "failed": [], "right": True, "seconds": 1}
    )
    given = ["--device", "cpu", "--shapes", "micro", "--timeout", "3", "--rounds", "2", "--name", "A b"]
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    assert gpu.main([*given, *places]) == 0
    said = capsys.readouterr().out
    assert "skipped: absent: no_such_package not installed" in said
    [path] = (tmp_path / "results").iterdir()
    assert path.name.startswith("gpu-a-b-20")
    text = path.read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    result = json.loads(text)
    recipe, packed = result["cases"]
    assert [len(recipe["runs"]["fine"]), len(packed["runs"]["fine"])] == [2, 2]
    assert recipe["failures"] == {
        "crashing": "status 1: RuntimeError: CUDA out of memory, reading .../model-micro",
        "hanging": recipe["failures"]["hanging"],
    }
    assert recipe["failures"]["hanging"].startswith("not done after 3 s")
    assert "hanging" not in packed["failures"]
    assert result["check"]["right"] and "2 passed" in said
    assert said.strip().splitlines()[-1].startswith("written: gpu-a-b-")
    assert not (tmp_path / "work" / "model-micro").exists()


def test_the_budget_ends_it_and_what_was_not_reached_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu.Benchmark, "_prepared", _nothing_made)
    given = ["--device", "cpu", "--shapes", "micro", "--no-check", "--budget-minutes", "0.3"]
    assert gpu.main([*given, "--work", str(tmp_path), "--results", str(tmp_path / "results")]) == 1
    said = capsys.readouterr().out
    assert "not reached: micro recipe fp32: the budget was spent" in said
    assert "not reached: micro packed fp32: the budget was spent" in said


def test_without_a_gpu_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu.Benchmark, "_prepared", _nothing_made)
    assert gpu.main(["--work", str(tmp_path), "--results", str(tmp_path / "results")]) == 1
    assert "torch sees no CUDA device" in capsys.readouterr().out


def _nothing_made(self: gpu.Benchmark, what: str, *given: str) -> str:
    """Facts of a machine without a GPU, and a model that is an empty folder."""
    if what == "shared":
        facts = {"installed": ["pydantic", "datasets"], "torch": "2", "gpu": None, "knows_4bit": False}
        (self.work / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        for workload in cases.WORKLOADS:
            (self.work / f"rows-micro-{workload}.lengths").write_text("[[10], [20]]", encoding="utf-8")
    else:
        Path(given[1]).mkdir()
        (self.work / "peak-micro.json").write_text('{"tflops": 0.1}', encoding="utf-8")
    return ""


@pytest.mark.slow  # half a minute: it is a whole run of the benchmark
def test_luthier_trains_through_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--device", "cpu", "--shapes", "micro", "--no-check", "--only", "luthier", "--seconds", "0.3"]
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    assert gpu.main([*given, "--workloads", "packed", *places]) == 0, capsys.readouterr().out
    [path] = (tmp_path / "results").iterdir()
    entries = json.loads(path.read_text(encoding="utf-8"))["cases"]
    assert len(entries) == 2  # as it is, and in NF4
    for entry in entries:
        [run] = entry["runs"]["luthier"]
        assert run["steps"] >= PROBE + FEWEST and run["tokens"] > 300 * run["steps"]
        assert 0 < run["seconds_to_first_step"] < run["process_seconds"]
        assert 0 < run["losses"]["5"] < 10 and entry["peak"]["tflops"] > 0
