"""Luthier beside its neighbours on one NVIDIA GPU: the same rows, weights and recipe, in turn, inside a time budget.

    python -m bench.gpu                              # check, then as many cases as nine minutes hold
    python -m bench.gpu --shapes 4b,0.6b --no-check  # some of them
    python -m bench.gpu --task dpo                   # preference tuning, of those who have it
    python -m bench.gpu --wheels FOLDER              # install what that folder holds for the contenders first
    python -m bench.gpu --device cpu --shapes micro  # the whole path without a GPU, on nothing of a model

Every contender trains in its own process, so that one that falls over, runs out of memory or hangs is a line
with its reason. The result is written after each of them, and its table is printed last. What the budget did
not reach is said.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import machine, process
from bench.environments import ROOT
from bench.gpu import check, prepare, table
from bench.gpu.cases import CONTENDERS, GPU_SHAPES, WORKLOADS, Case, Contender
from bench.gpu.clock import GpuJob
from bench.rows import TASKS, source_name

RESULTS = ROOT / "bench" / "results"
CLOSING = 12  # seconds that are kept for the table, and for a child to go
FEWEST = 25  # seconds with fewer of which nobody begins
CHECK_SECONDS = 90
STEPS = 1000  # more than the clock lets anybody do


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--shapes", default="8b,0.6b,4b", metavar="A,B", help=f"of {', '.join(GPU_SHAPES)}; in this order"
    )
    parser.add_argument("--task", choices=TASKS, default="sft", help="supervised, or a method of comparing answers")
    parser.add_argument(
        "--workloads", default="", metavar="A,B", help=f"of {', '.join(WORKLOADS)}; compared answers are not packed"
    )
    parser.add_argument("--only", default="", metavar="A,B", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--rounds", type=int, default=1, help="how often everybody has a turn at a case")
    parser.add_argument("--seconds", type=float, default=6.0, help="of measured steps in a turn")
    parser.add_argument("--budget-minutes", type=float, default=9.0, help="of everything")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds of one contender's process")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="test first")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="of wheels to install for this run")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--name", help="of the result; the GPU's by default")
    parser.add_argument("--commit", help="of this checkout, where it is a copy without git")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="for models and logs; removed at the end")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    chosen = parser.parse_args(given)
    for option, known in (("shapes", GPU_SHAPES), ("workloads", WORKLOADS), ("only", CONTENDERS)):
        names = [name for name in getattr(chosen, option).split(",") if name]
        if unknown := set(names) - set(known):
            parser.error(f"--{option}: there is no {', '.join(sorted(unknown))}")
        setattr(chosen, option, names)
    chosen.only = chosen.only or [name for name, who in CONTENDERS.items() if chosen.task in who.tasks]
    if chosen.task != "sft" and "packed" in chosen.workloads:
        parser.error(f"--workloads: the rows of {chosen.task} are not packed")
    chosen.workloads = chosen.workloads or (list(WORKLOADS) if chosen.task == "sft" else ["recipe"])
    return chosen


def main(given: list[str] | None = None) -> int:
    """Check and measure; 1 if nothing could be measured or a check failed."""
    chosen = arguments(given)
    work = (chosen.work or Path(tempfile.mkdtemp(prefix="luthier-bench-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(chosen, work, time.time())
    try:
        problem = benchmark.measure()
    finally:
        benchmark.tidy()
    say("\n" + table.as_text(benchmark.result))
    if problem:
        say(f"error: {problem}")
    elif benchmark.path:
        say(f"\nwritten: {benchmark.path.name}, {time.time() - benchmark.began:.0f} s in all")
    measured = any(runs for case in benchmark.result["cases"] for runs in case["runs"].values())
    wrong = benchmark.result["check"] is not None and not benchmark.result["check"]["right"]
    return 1 if problem or wrong or not measured else 0


class Benchmark:
    """One call: facts, checks, then case by case; `result` is what is known so far.

    Args:
        began: when the budget began to run, in seconds since the epoch.
    """

    def __init__(self, chosen: argparse.Namespace, work: Path, began: float) -> None:
        self.chosen, self.work, self.began = chosen, work, began
        self.end = began + 60 * chosen.budget_minutes - CLOSING
        self.environment = {"UNSLOTH_DISABLE_STATISTICS": "1"}
        if chosen.device == "cuda":
            self.environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        self.models: list[Path] = []
        self.path: Path | None = None
        self.facts: dict[str, Any] = {}
        self.result: dict[str, Any] = {
            "benchmark": "gpu",
            "task": chosen.task,
            "date": datetime.now(UTC).isoformat(timespec="minutes"),
            "commit": chosen.commit or machine.commit(),
            "command": self._command(),
            "hardware": machine.hardware() | {"torch": "unknown"},
            "rows_source": source_name(chosen.task),
            "check": None,
            "cases": [],
            "skipped": {},
            "not_reached": [],
        }

    def measure(self) -> str:
        """Everything that the budget holds; returns why there is nothing, if so."""
        if self.chosen.wheels and (problem := self._install()):
            return problem
        task = self.chosen.task
        names = [f"{shape}:{work}:{task}" for shape in self.chosen.shapes for work in self.chosen.workloads]
        if problem := self._prepared("shared", self._vocabulary(), *names):
            return problem
        self.facts = json.loads((self.work / "facts.json").read_text(encoding="utf-8"))
        installed = self.facts.pop("installed")
        self.result["hardware"] |= self.facts
        if self.chosen.device == "cuda" and not self.facts["gpu"]:
            return "torch sees no CUDA device here; `--device cpu --shapes micro` tries the script itself"
        contenders = self._able(set(installed))
        if self.chosen.check:
            self._check()
        planned = [(case, number) for case in self._cases() for number in range(1, self.chosen.rounds + 1)]
        for index, (case, number) in enumerate(planned):
            if self._left() < FEWEST:
                rest = dict.fromkeys(case.name for case, _ in planned[index:])
                self.result["not_reached"] += [f"{name}: the budget was spent" for name in rest]
                break
            self._measure(case, number, contenders)
            if index + 1 == len(planned) or planned[index + 1][0].shape != case.shape:
                self._remove_models()
        return ""

    def tidy(self) -> None:
        """Remove what is large; the logs too, unless their place was asked for."""
        self._remove_models()
        if self.chosen.work is None:
            shutil.rmtree(self.work, ignore_errors=True)

    def _left(self) -> float:
        return self.end - time.time()

    def _vocabulary(self) -> str:
        sizes = [GPU_SHAPES[name].vocab_size for name in self.chosen.shapes]
        return str(min([32_000, *sizes]))

    def _cases(self) -> list[Case]:
        """Shape by shape, each of its workloads in bf16; in 4 bits as well once Luthier has them."""
        plain = "bf16" if self.chosen.device == "cuda" else "fp32"
        formats = [plain, "nf4"] if self.facts["knows_4bit"] else [plain]
        return [
            Case(shape, workload, weights, self.chosen.task)
            for shape in self.chosen.shapes
            for weights in formats
            for workload in self.chosen.workloads
        ]

    def _able(self, installed: set[str]) -> list[Contender]:
        """Those whose packages are there; the others are skipped by name."""
        able = []
        for contender in (CONTENDERS[name] for name in self.chosen.only):
            missing = [name for name in contender.needs if name not in installed]
            if missing or self.chosen.task not in contender.tasks:
                why_not = f"{', '.join(missing)} not installed" if missing else f"takes no part in {self.chosen.task}"
                self.result["skipped"][contender.name] = why_not
                say(f"skipped: {contender.name}: {self.result['skipped'][contender.name]}")
            else:
                able.append(contender)
        return able

    def _install(self) -> str:
        """The wheels, into a folder that all processes of this run see; returns pip's words if it fails."""
        wheels = sorted(map(str, self.chosen.wheels.glob("*.whl")))
        site = self.work / "site"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-cache-dir"]
        options = ["--no-deps", "--no-index", "--no-compile", "--upgrade", "--target", str(site)]
        done = subprocess.run([*pip, *options, *wheels], capture_output=True, text=True, check=False)
        if done.returncode:
            return f"the wheels cannot be installed: {done.stderr.strip()[-600:]}"
        self.environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(site)])
        return ""

    def _check(self) -> None:
        say("checking ...")
        timeout = min(CHECK_SECONDS, self._left())
        found = check.check(sys.executable, self.work, self.environment, timeout)
        found["failed"] = [self._clean(name) for name in found["failed"]]
        self.result["check"] = found
        for name in found["failed"][:20]:
            say(f"  failed: {name}")
        say(f"  {found['summary']}, {found['seconds']:.0f} s")

    def _measure(self, case: Case, number: int, contenders: list[Contender]) -> None:
        """One round of a case."""
        entry = next((entry for entry in self.result["cases"] if entry["name"] == case.name), None)
        if entry is None:
            entry = self._prepare(case)
            if isinstance(entry, str):
                self.result["not_reached"].append(f"{case.name}: {entry}")
                say(f"{case.name}: {entry}")
                return
            self.result["cases"].append(entry)
        say(f"{case.name}, round {number}, {self._left():.0f} s left")
        for contender in contenders:
            if case.workload not in contender.workloads or contender.name in entry["failures"]:
                continue
            if self._left() < FEWEST:
                self.result["not_reached"].append(
                    f"{case.name}, round {number}: {contender.name}: the budget was spent"
                )
                continue
            self._run(case, number, contender, entry)
            self._save()

    def _prepare(self, case: Case) -> dict[str, Any] | str:
        """Model and peak of a case, whose rows are there; why not, if that fails."""
        shape, folder = GPU_SHAPES[case.shape], self._model(case.shape)
        if not folder.exists():
            self.models.append(folder)
            if problem := self._prepared("model", case.shape, str(folder)):
                return problem
            say(f"{case.shape}: model and multiply peak are there, {self._left():.0f} s left")
        peak = self.work / f"peak-{case.shape}.json"
        path = prepare.rows_of(self.work, case).with_suffix(".lengths")
        rows = json.loads(path.read_text(encoding="utf-8"))
        lengths = [length for row in rows for length in row]
        return {
            "name": case.name,
            "shape": case.shape,
            "workload": case.workload,
            "task": case.task,
            "weights": case.weights,
            "what": case.work().what,
            "model": asdict(shape),
            "multiplied_parameters": shape.multiplied_parameters(),
            "rows": {
                "count": len(rows),
                "tokens": sum(lengths),
                "squares": sum(length * length for length in lengths),
            },
            "peak": json.loads(peak.read_text(encoding="utf-8")),
            "runs": {},
            "failures": {},
        }

    def _run(self, case: Case, number: int, contender: Contender, entry: dict[str, Any]) -> None:
        """One contender's turn."""
        work = case.work()
        folder = self.work / f"{case.name.replace(' ', '-')}-{number}-{contender.name}"
        folder.mkdir()
        job = GpuJob(
            model=str(self._model(case.shape)),
            rows=str(prepare.rows_of(self.work, case)),
            scratch=str(folder / "scratch"),
            result=str(folder / "result.json"),
            steps=STEPS,
            variant=contender.variant,
            task=case.task,
            micro_batch_size=work.micro_batch_size,
            gradient_accumulation_steps=work.gradient_accumulation_steps,
            sequence_len=work.sequence_len,
            packing=work.packing,
            device=self.chosen.device,
            weights=case.weights,
            seconds=self.chosen.seconds,
        )
        job.save(folder / "job.json")
        done = process.run(
            sys.executable,
            contender.module,
            [str(folder / "job.json")],
            scratch=Path(job.scratch),
            log=folder / "log.txt",
            extra=self.environment,
            timeout=min(self.chosen.timeout, self._left()),
        )
        shutil.rmtree(job.scratch, ignore_errors=True)
        if done.timed_out or done.status or not Path(job.result).exists():
            said = f"not done after {done.seconds:.0f} s" if done.timed_out else f"status {done.status}"
            reason = self._clean(f"{said}: {why(folder / 'log.txt')}")
            entry["failures"][contender.name] = reason
            say(f"  {contender.name}: failed, {reason}\n{self._clean(process.tail(folder / 'log.txt', 15))}")
            return
        run = json.loads(Path(job.result).read_text(encoding="utf-8"))
        run["seconds_to_first_step"] = run.pop("first_step_ended") - done.started
        run["process_seconds"] = done.seconds
        entry["runs"].setdefault(contender.name, []).append(run)
        say(
            f"  {contender.name}: {run['tokens'] / run['seconds']:,.0f} tokens/s in {run['steps']} steps, "
            f"{run['allocated_gib']:.1f} GiB, {done.seconds:.0f} s in all"
        )

    def _model(self, shape: str) -> Path:
        """Where a model's folder is or will be: in memory if there is plenty, so that no disk is measured."""
        for folder in self.models:
            if folder.name == f"model-{shape}":
                return folder
        needed = 2 * (GPU_SHAPES[shape].multiplied_parameters() + 2**30) * 2
        shared = Path("/dev/shm")
        if self.chosen.device == "cuda" and shared.exists() and shutil.disk_usage(shared).free > needed:
            return Path(tempfile.mkdtemp(prefix="luthier-bench-", dir=shared)) / f"model-{shape}"
        return self.work / f"model-{shape}"

    def _remove_models(self) -> None:
        for folder in self.models:
            shutil.rmtree(folder if folder.parent == self.work else folder.parent, ignore_errors=True)
        self.models = []

    def _prepared(self, what: str, *given: str) -> str:
        """One of `prepare`'s tasks; returns what went wrong."""
        log = self.work / f"{what}.log"
        done = process.run(
            sys.executable,
            "bench.gpu.prepare",
            [what, self.chosen.device, str(self.work), *given],
            scratch=self.work / "own",
            log=log,
            extra=self.environment,
            timeout=max(1.0, self._left()),
        )
        if not done.status:
            return ""
        said = "the budget was spent" if done.timed_out else why(log)
        return self._clean(f"its preparation failed: {said}")

    def _clean(self, text: str) -> str:
        return machine.without_places(text, self.work)

    def _save(self) -> None:
        """Under the GPU's name and the day, with a number behind it if that one is taken."""
        if self.path is None:
            name = self.chosen.name or self.facts["gpu"] or "cpu"
            stem = f"gpu-{re.sub('[^a-z0-9]+', '-', name.lower())}-{self.result['date'][:10]}"
            self.chosen.results.mkdir(parents=True, exist_ok=True)
            self.path, number = self.chosen.results / f"{stem}.json", 1
            while self.path.exists():
                number += 1
                self.path = self.chosen.results / f"{stem}-{number}.json"
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)

    def _command(self) -> str:
        """The command that measures this again."""
        chosen = self.chosen
        return (
            f"python -m bench.gpu{'' if chosen.task == 'sft' else f' --task {chosen.task}'} "
            f"--shapes {','.join(chosen.shapes)} --workloads {','.join(chosen.workloads)} "
            f"--only {','.join(chosen.only)} --rounds {chosen.rounds} --seconds {chosen.seconds:g} "
            f"--budget-minutes {chosen.budget_minutes:g}"
        )


def why(log: Path) -> str:
    """What a log ends with that says why: the error's own line, or else the last ones."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    told = [index for index, line in enumerate(lines) if re.match(r"\S*(Error|Exception)\b", line)]
    return " ".join(line.strip() for line in (lines[told[-1] :] if told else lines[-3:]))[:400]


def say(line: str) -> None:
    """To the user, at once."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
