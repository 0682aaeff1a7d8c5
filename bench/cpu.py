"""Luthier beside its neighbours on a CPU: the same rows, the same model, the same recipe, in turn.

    python -m bench.cpu --setup all                      # environments of the contenders, once; minutes each
    python -m bench.cpu --shape 135m --rounds 3          # measure what is set up
    python -m bench.cpu --shape tiny --only luthier,trl  # some of them
    python -m bench.cpu --task dpo --shape tiny          # preference tuning beside TRL's trainer

Every contender trains in its own process and environment, from a cold start, and reports when each step ended
and how many real tokens were in it. A round runs all of them once; ratios are taken within rounds. The result
goes to bench/results/ and its table is printed last.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import environments, machine, process, table
from bench.contenders import CONTENDERS, Contender
from bench.figures import OURS, Run, kind, speed
from bench.peers.common import Job
from bench.rows import TASKS, source_name
from bench.shapes import SHAPES

RESULTS = Path(__file__).resolve().parent / "results"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--task", choices=TASKS, default="sft", help="supervised, or a method of comparing answers")
    parser.add_argument(
        "--loss",
        choices=["whole", "answers"],
        help="of sft: over prompt and answer (as it is unless said), or the answer alone",
    )
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of each run, warm-up included")
    parser.add_argument("--warmup-steps", type=int, default=2, help="first steps that are not timed")
    parser.add_argument("--rounds", type=int, default=3, help="how often everybody has a turn")
    parser.add_argument(
        "--only", default="", metavar="A,B", help="these contenders: " + ", ".join(CONTENDERS)
    )
    parser.add_argument("--budget-minutes", type=float, help="begin no round that would end later than this")
    parser.add_argument(
        "--work", type=Path, default=Path.home() / ".cache" / "luthier-bench", metavar="FOLDER"
    )
    parser.add_argument(
        "--setup", nargs="+", default=[], metavar="NAME", help="make these environments (or `all`), then end"
    )
    parser.add_argument(
        "--python", action="append", default=[], metavar="NAME=PATH", help="another Python for an environment"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the result goes"
    )
    chosen = parser.parse_args(given)
    unknown = set(filter(None, chosen.only.split(","))) - set(CONTENDERS)
    unknown |= set(chosen.setup) - {"all", *environments.ENVIRONMENTS}
    if unknown:
        parser.error(f"no such contender: {', '.join(sorted(unknown))}")
    if chosen.loss and chosen.task != "sft":
        parser.error(f"--loss goes with `--task sft`: {chosen.task} has a loss of its own")
    chosen.loss = chosen.loss or ("whole" if chosen.task == "sft" else None)
    if chosen.steps <= chosen.warmup_steps:
        parser.error("--steps must be more than --warmup-steps, or nothing is left to time")
    return chosen


def main(given: list[str] | None = None) -> int:
    """Set up or measure; the exit status is 1 if anything failed."""
    chosen = arguments(given)
    work: Path = chosen.work.expanduser().resolve()
    if chosen.setup:
        return set_up(work, list(environments.ENVIRONMENTS) if "all" in chosen.setup else chosen.setup)
    pythons = found_pythons(chosen, work)
    names = [name for name in chosen.only.split(",") if name]
    names = names or [n for n, c in CONTENDERS.items() if not c.by_name and chosen.task in c.tasks]
    family = SHAPES[chosen.shape].family
    contenders = []
    for contender in (CONTENDERS[name] for name in names):
        if family not in contender.families:
            say(f"skipped: {contender.name} has no {family} models")
        elif chosen.task not in contender.tasks:
            say(f"skipped: {contender.name} takes no part in {chosen.task}")
        elif contender.environment not in pythons:
            say(
                f"skipped: {contender.name} is not set up; `python -m bench.cpu --setup {contender.environment}`"
            )
        else:
            contenders.append(contender)
    if not contenders:
        return 1
    result = Benchmark(chosen, work, pythons).measure(contenders)
    if not any(entry["runs"] for entry in result["rounds"]):
        say("nothing was measured")
        return 1
    kept = save(result, chosen.results)
    say(f"\n{table.as_text(result)}\n\nwritten: {kept.name}")
    return 1 if result["failures"] else 0


def set_up(work: Path, names: list[str]) -> int:
    """Make environments; goes on to the next if one fails."""
    failed = 0
    for name in names:
        say(f"setting up {name} ...")
        try:
            environments.set_up(work, name)
        except environments.SetupError as error:
            say(f"error: {error}")
            failed = 1
    return failed


def found_pythons(chosen: argparse.Namespace, work: Path) -> dict[str, str]:
    """Environment -> its Python. Luthier's own is this one, unless another was set up or named."""
    found = {OURS: sys.executable}
    for name in environments.ENVIRONMENTS:
        if (work / "environments" / name / "finished").exists():
            found[name] = str(environments.interpreter(work, name))
    return found | dict(pair.split("=", 1) for pair in chosen.python)


class Benchmark:
    """Everything of one call: what is prepared once, then the rounds."""

    def __init__(self, chosen: argparse.Namespace, work: Path, pythons: dict[str, str]) -> None:
        self.chosen, self.work, self.pythons = chosen, work, pythons
        self.run_folder = work / "runs" / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        self.run_folder.mkdir(parents=True)
        self.model = work / "models" / chosen.shape
        self.rows = self.run_folder / "rows.jsonl"
        self.failures: dict[str, str] = {}

    def measure(self, contenders: list[Contender]) -> dict[str, Any]:
        """Run the rounds; what failed is reported and not tried again."""
        job = self._job(self.run_folder, "default")
        lengths = self._prepare(job)
        rounds: list[dict[str, Any]] = []
        began, longest, ended_early = time.time(), 0.0, False
        tokens = round(sum(lengths) / self.chosen.steps)
        for number in range(1, self.chosen.rounds + 1):
            round_began = time.time()
            budget = self.chosen.budget_minutes
            if rounds and budget and round_began - began + longest > 60 * budget:
                say(
                    f"stopped after {len(rounds)} of {self.chosen.rounds} rounds: {budget:g} minutes are spent"
                )
                ended_early = True
                break
            peak = self._peak(tokens)
            say(f"round {number} of {self.chosen.rounds}: multiply peak {peak['gflops']:.1f} GFLOP/s")
            runs = {
                contender.name: run
                for contender in contenders
                if contender.name not in self.failures and (run := self._run(contender, number)) is not None
            }
            rounds.append({"peak": peak, "runs": runs})
            longest = max(longest, time.time() - round_began)
        return {
            "benchmark": "cpu",
            "task": self.chosen.task,
            "shape": self.chosen.shape,
            "loss": self.chosen.loss,
            "date": datetime.now(UTC).isoformat(timespec="minutes"),
            "commit": machine.commit(),
            "command": self._command(),
            "hardware": machine.hardware(),
            "model": asdict(SHAPES[self.chosen.shape]),
            "multiplied_parameters": SHAPES[self.chosen.shape].multiplied_parameters(),
            "rows": {"source": source_name(self.chosen.task), "count": len(lengths), "tokens": sum(lengths)},
            "recipe": self._recipe(job),
            "rounds_asked": self.chosen.rounds,
            "ended_early": ended_early,
            "failures": self.failures,
            "rounds": rounds,
        }

    def _job(self, folder: Path, variant: str) -> Job:
        return Job(
            model=str(self.model),
            rows=str(self.rows),
            scratch=str(folder / "scratch"),
            result=str(folder / "result.json"),
            steps=self.chosen.steps,
            whole=self.chosen.loss == "whole",
            variant=variant,
            task=self.chosen.task,
        )

    def _recipe(self, job: Job) -> dict[str, Any]:
        places = ("model", "rows", "scratch", "result", "variant", "task")
        kept = {name: value for name, value in asdict(job).items() if name not in places}
        return kept | {"warmup_steps": self.chosen.warmup_steps}

    def _prepare(self, job: Job) -> list[int]:
        """The model folder and the rows; returns the rows' lengths in tokens."""
        self.model.parent.mkdir(parents=True, exist_ok=True)
        report, log = self.run_folder / "prepared.json", self.run_folder / "prepare.log"
        count = job.steps * job.micro_batch_size * job.gradient_accumulation_steps
        given = [self.chosen.shape, job.task, count, job.sequence_len, self.model, self.rows, report]
        self._own("bench.prepare", [str(value) for value in given], log)
        lengths: list[int] = json.loads(report.read_text(encoding="utf-8"))["lengths"]
        return lengths

    def _peak(self, tokens: int) -> dict[str, Any]:
        report = self.run_folder / "peak.json"
        self._own("bench.peak", [self.chosen.shape, str(tokens), str(report)], self.run_folder / "peak.log")
        measured: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return measured

    def _own(self, module: str, given: list[str], log: Path) -> None:
        done = process.run(self.pythons[OURS], module, given, scratch=self.run_folder / "own", log=log)
        if done.status:
            raise SystemExit(f"error: {module} ended with status {done.status}: {process.tail(log)}")

    def _run(self, contender: Contender, number: int) -> Run | None:
        """One contender's turn; its scratch folder is removed, its log kept."""
        folder = self.run_folder / f"{number}-{contender.name}"
        folder.mkdir()
        job = self._job(folder, contender.variant)
        if contender.checkpoint:
            job = replace(job, model=str(self._own_format(contender, contender.checkpoint)))
        job.save(folder / "job.json")
        done = process.run(
            self.pythons[contender.environment],
            f"bench.peers.{contender.module}",
            [str(folder / "job.json")],
            scratch=Path(job.scratch),
            log=folder / "log.txt",
            extra=environments.ENVIRONMENTS[contender.environment].variables,
        )
        shutil.rmtree(job.scratch, ignore_errors=True)
        if done.status or not Path(job.result).exists():
            said = machine.without_places(process.tail(folder / "log.txt"), self.work)
            self.failures[contender.name] = f"status {done.status}: {said}"
            say(f"  {contender.name}: failed, {self.failures[contender.name]}")
            return None
        run: Run = json.loads(Path(job.result).read_text(encoding="utf-8"))
        run["process_seconds"], run["process_memory_gib"] = done.seconds, done.peak_memory_gib
        run["cpu_taken_by_others"] = done.elsewhere
        run["seconds_to_first_step"] = run.pop("first_step_ended") - done.started
        began = run.pop("first_step_began")
        run["seconds_to_begin_of_first_step"] = None if began is None else began - done.started
        say(
            f"  {contender.name}: {speed(run, self.chosen.warmup_steps):,.0f} tokens/s, {done.seconds:.0f} s in all"
        )
        return run

    def _own_format(self, contender: Contender, module: str) -> Path:
        """The model in a contender's own format, made if it is not there yet."""
        target = self.model.with_name(f"{self.model.name}-{contender.name}")
        if not target.exists():
            process.run(
                self.pythons[contender.environment],
                f"bench.peers.{module}",
                [str(self.model), str(target)],
                scratch=self.run_folder / "own",
                log=self.run_folder / f"{module}.log",
            )
        return target

    def _command(self) -> str:
        """The command that measures this again, without the folders of this machine."""
        chosen = self.chosen
        task = f"--loss {chosen.loss}" if chosen.task == "sft" else f"--task {chosen.task}"
        parts = [f"python -m bench.cpu --shape {chosen.shape} {task} --steps {chosen.steps}"]
        parts += [f"--warmup-steps {chosen.warmup_steps} --rounds {chosen.rounds}"]
        parts += [f"--only {chosen.only}"] if chosen.only else []
        parts += [f"--budget-minutes {chosen.budget_minutes:g}"] if chosen.budget_minutes else []
        return " ".join(parts)


def save(result: dict[str, Any], folder: Path) -> Path:
    """Write a result under the name of its day, with a number behind it if that one is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"cpu-{result['shape']}-{kind(result)}-{result['date'][:10]}"
    path, number = folder / f"{name}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def say(line: str) -> None:
    """To the user, at once."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
