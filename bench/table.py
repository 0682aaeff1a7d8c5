"""Tables of results: printed after a run, and docs/benchmarks.md from everything in bench/results/.

python -m bench.table        writes docs/benchmarks.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import generate
from bench.environments import ROOT
from bench.figures import Figures, figures, kind, ratios_by_work
from bench.gpu import table as gpu_table

RESULTS, PAGE = ROOT / "bench" / "results", ROOT / "docs" / "benchmarks.md"
BUSY = 0.1  # of the machine; from there on a table says so

HEADER = [
    "contender", "version", "real tokens/s", "Luthier is", "of peak", "memory GiB", "s to 1st step", "loss differs"
]  # fmt: skip

KINDS = {
    "whole": "loss on prompt and answer",
    "answers": "loss on the answer only",
    "dpo": "DPO",
    "orpo": "ORPO",
    "kto": "KTO",
}

INTRODUCTION = """# Benchmarks

Made by `python -m bench.table` from the files in [bench/results](../bench/results), which only the benchmarks
write. [CONTRIBUTING.md](../CONTRIBUTING.md#benchmarks) says how to run them.
"""

HOW_TO_READ = """## CPU: how to read the tables

Everybody trains the same rows in the same order on the same random weights: LoRA of rank 16 on all linear maps
(alpha 32, no dropout), batches of 2 with 4 accumulated, at most 1024 tokens a row, AdamW at 2e-4, fp32; each in
a process and an environment of its own, from cold caches, one after the other, round after round.

- *Real tokens/s*: tokens that are no padding, over the time from the end of the warm-up steps to the end of the
  last step; the median of the rounds, and the slowest and fastest round.
- *Luthier is*: Luthier's speed over this one's in the same round, the median of the rounds.
- *Of peak*: 4 x multiplied parameters (all linear maps and the head; no embedding) x real tokens/s, over the
  fastest fp32 matrix multiply at this model's shapes in the same round. Four, since a frozen weight is multiplied
  with twice for each token and a multiply-add counts as two. Work that is saved (a head that sees only labelled
  positions, a shared prefix) counts as if it had been done. DPO has 6, with the reference's forward pass, KTO 10,
  with those of its mismatched answers.
- *Memory*: the most that the process had resident, code and weights included.
- *s to 1st step*: from the command to the end of the first optimizer step.
- *Loss differs*: from Luthier's, at the first step and at most. Before the first step every adapter is zero, so
  only another way of taking the mean shows there; later the adapters' random beginnings do, too.

In preference tuning (DPO, ORPO, KTO; beta 0.1) the tokens of a pair are those of prompt and chosen answer and those
of prompt and rejected answer, for everybody: the prompt counts twice, and whoever computes it once has saved work.
KTO's rows are single answers, and the mismatched ones that it makes of them are not counted. Before its first step
DPO's loss is log 2 whatever the data are; the difference at most is what tells.
"""


def cells(line: Figures) -> list[str]:
    """A line of the table, as texts."""
    spread = f"{line.speed:,.0f} ({line.slowest:,.0f}-{line.fastest:,.0f})"
    if not line.same_batches:
        loss = "other batches"
    else:
        first, largest = line.first_loss_difference, line.loss_difference
        loss = "-" if first is None or largest is None else f"{first:.4f} / {largest:.4f}"
    return [
        line.name,
        line.version,
        spread,
        "-" if line.ratio is None else f"{line.ratio:.2f}x",
        "-" if line.share is None else f"{line.share:.0%}",
        f"{line.memory:.2f}",
        f"{line.first_step:.1f}",
        loss,
    ]


def caption(result: dict[str, Any]) -> str:
    """What was measured, where, and from what."""
    hardware, rows, recipe = result["hardware"], result["rows"], result["recipe"]
    peaks = [entry["peak"]["gflops"] for entry in result["rounds"]]
    memory = f", {hardware['memory_gib']:.0f} GiB" if "memory_gib" in hardware else ""
    early = f" of {result['rounds_asked']} (ended early)" if result["ended_early"] else ""
    return (
        f"{hardware['cpu']}, {hardware['cores']} cores{memory}; {result['date'][:10]}, commit {result['commit']}; "
        f"{len(result['rounds'])} rounds{early} of {recipe['steps']} steps, of which {recipe['warmup_steps']} are "
        f"not timed; {rows['count']} rows ({rows['source']}), {rows['tokens']:,} tokens; multiply peak "
        f"{min(peaks):.0f}-{max(peaks):.0f} GFLOP/s."
    )


def notes(result: dict[str, Any]) -> list[str]:
    """What must be known of single contenders, and who failed."""
    lines = [f"{line.name}: {line.note}" for line in figures(result) if line.note]
    runs = [run for entry in result["rounds"] for run in entry["runs"].values()]
    others = max((run.get("cpu_taken_by_others") or 0 for run in runs), default=0)
    if others > BUSY:
        lines.append(f"the machine was not quiet: other programs took up to {others:.0%} of it during a run")
        if ratios := ratios_by_work(result):
            told = ", ".join(f"{ratio:.2f}x of {name}" for name, ratio in ratios.items())
            lines.append(f"in tokens per CPU second, of which others take none, Luthier is {told}")
    return lines + [f"{name} failed: {reason}" for name, reason in result["failures"].items()]


def as_text(result: dict[str, Any]) -> str:
    """The table for a terminal."""
    rows = [HEADER, *map(cells, figures(result))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    title = f"{result['shape']}, {KINDS[kind(result)]}. {caption(result)}"
    return "\n".join([title, "", *lines, *(["", *notes(result)] if notes(result) else [])])


def as_markdown(result: dict[str, Any]) -> str:
    """The table for the page."""
    rows = [HEADER, ["---"] * len(HEADER), *map(cells, figures(result))]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    parts = [f"### {result['shape']}, {KINDS[kind(result)]}", caption(result), "\n".join(lines)]
    if notes(result):
        parts.append("\n".join(f"- {line}" for line in notes(result)))
    return "\n\n".join([*parts, f"`{result['command']}`"])


def page(results: list[dict[str, Any]]) -> str:
    """The whole page: the newest result of each shape and loss."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for result in sorted(results, key=lambda result: result["date"]):
        newest[result["shape"], kind(result)] = result
    tables = [as_markdown(result) for _, result in sorted(newest.items())]
    writing = generate.section(generate.load())
    gpu = gpu_table.section(gpu_table.load())
    return "\n".join([INTRODUCTION, HOW_TO_READ, "\n\n".join(tables), "", *filter(None, [writing]), gpu])


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The CPU results that are there."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("cpu-*.json"))]


if __name__ == "__main__":
    PAGE.write_text(page(load()), encoding="utf-8")
