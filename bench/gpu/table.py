"""Tables of GPU results: for the terminal, and the part of docs/benchmarks.md about GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from bench.environments import ROOT
from bench.figures import FORWARDS, OURS

RESULTS = ROOT / "bench" / "results"

HEADER = [
    "contender", "version", "real tokens/s", "Luthier is", "of peak", "tensors GiB", "taken GiB",
    "s to 1st step", "loss at step 5",
]  # fmt: skip

HOW_TO_READ = """## GPU: how to read the tables

`python -m bench.gpu` on one NVIDIA GPU: LoRA of rank 16 on all linear maps in bf16, loss over prompt and answer,
AdamW at 2e-4, random weights that everybody loads from the same files, each contender in a process of its own
from cold caches, one after the other. *recipe* is batches of 2 rows with 4 accumulated, as long as they come;
*packed* is 8 rows of 2,048 tokens, packed by each contender in its own way.

- *Real tokens/s*: tokens that are no padding, from the end of the fourth step on, for about six seconds; with
  several rounds the median.
- *Of peak*: (4 x multiplied parameters + 6 x layers x query width x mean squared length / mean length) x real
  tokens/s, over the fastest bf16 multiply at this model's shapes in the same run. Four, since a frozen weight is
  multiplied with twice for each token and a multiply-add counts as two; the second term is causal attention,
  forward and backward. Recomputation, padding and the adapters themselves count as nothing. DPO has 6 and 8, with
  the reference's forward pass, KTO 10 and 12, with those of its mismatched answers.
- *Tensors*, *taken*: the most memory that tensors held, and that was taken from the GPU for them.
- *s to 1st step*: from the command to the end of the first optimizer step, loading of the weights included.
- *Loss at step 5*: the mean of the first five steps. Packed rows differ between contenders.

With `--task dpo` (or orpo, kto) batches are 2 pairs of at most 1,024 tokens an answer; a pair's tokens are those of the
prompt with the one answer and with the other, for everybody.

It runs its checks first (the kernels against plain torch on the GPU, and whole runs), and skips who is not
installed. Where nothing can be downloaded, `python -m bench.gpu.wheels FOLDER` on another machine collects what
is missing beside torch and transformers, and `python -m bench.gpu --wheels FOLDER` puts it to use.
"""


def training_flops(case: dict[str, Any]) -> float:
    """FLOPs that LoRA training needs for a token of a case, on average."""
    model, lengths = case["model"], case["rows"]
    width = model["num_hidden_layers"] * model["num_attention_heads"] * model["head_dim"]
    attention = width * lengths["squares"] / lengths["tokens"]
    more = 2 * FORWARDS[case["task"]]
    return float((4 + more) * case["multiplied_parameters"] + (6 + more) * attention)


def lines(case: dict[str, Any]) -> list[list[str]]:
    """A case's rows: Luthier first, then from the fastest to the slowest, then those without a figure."""
    speeds = {
        name: median(run["tokens"] / run["seconds"] for run in runs)
        for name, runs in case["runs"].items()
        if runs
    }
    peak = case["peak"]["tflops"] * 1e12
    table = []
    for name in sorted(speeds, key=lambda name: (name != OURS, -speeds[name])):
        runs, last = case["runs"][name], case["runs"][name][-1]
        ratio = f"{speeds[OURS] / speeds[name]:.2f}x" if OURS in speeds else "-"
        share = f"{training_flops(case) * speeds[name] / peak:.0%}"
        table.append(
            [
                name,
                str(next(iter(last["versions"].values()))),
                f"{speeds[name]:,.0f}",
                ratio,
                share,
                f"{max(run['allocated_gib'] for run in runs):.1f}",
                f"{max(run['reserved_gib'] for run in runs):.1f}",
                f"{min(run['seconds_to_first_step'] for run in runs):.1f}",
                f"{last['losses']['5']:.4f}" if "5" in last["losses"] else "-",
            ]
        )
    return table


def notes(case: dict[str, Any]) -> list[str]:
    """What must be known of single contenders, and who failed."""
    said = [f"{name}: {runs[-1]['note']}" for name, runs in case["runs"].items() if runs and runs[-1]["note"]]
    return said + [f"{name} failed: {reason}" for name, reason in case["failures"].items()]


def caption(result: dict[str, Any], case: dict[str, Any]) -> str:
    """What was measured, where, and from what."""
    hardware, lengths = result["hardware"], case["rows"]
    device = hardware.get("gpu") or hardware["cpu"]
    mean = lengths["tokens"] / max(1, lengths["count"])
    return (
        f"{device}, torch {hardware['torch']}; {result['date'][:10]}, commit {result['commit']}; {case['what']}; "
        f"rows ({result['rows_source']}) of {mean:.0f} tokens on average; "
        f"multiply peak {case['peak']['tflops']:.3g} TFLOP/s."
    )


def as_text(result: dict[str, Any]) -> str:
    """Everything of a result, for a terminal."""
    parts = []
    for case in result["cases"]:
        rows = [HEADER, *lines(case)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        parts.append("\n".join([f"{case['name']}. {caption(result, case)}", "", *text, *notes(case)]))
    if result["check"]:
        parts.append("checks: " + result["check"]["summary"])
    parts += [f"skipped: {name}: {why}" for name, why in result["skipped"].items()]
    parts += [f"not reached: {what}" for what in result["not_reached"]]
    return "\n\n".join(parts)


def as_markdown(result: dict[str, Any], case: dict[str, Any]) -> str:
    """One case, for the page."""
    rows = [HEADER, ["---"] * len(HEADER), *lines(case)]
    parts = [
        f"### {case['name']}",
        caption(result, case),
        "\n".join(f"| {' | '.join(row)} |" for row in rows),
    ]
    if notes(case):
        parts.append("\n".join(f"- {line}" for line in notes(case)))
    return "\n\n".join([*parts, f"`{result['command']}`"])


def section(results: list[dict[str, Any]]) -> str:
    """The part of the page: the newest result of each case that has Luthier's figure in it."""
    newest: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for result in sorted(results, key=lambda result: result["date"]):
        for case in result["cases"]:
            if case["runs"].get(OURS):
                newest[case["name"]] = result, case
    shown = [as_markdown(*newest[name]) for name in sorted(newest)]
    return "\n".join([HOW_TO_READ, "\n\n".join(shown) or "No GPU has been measured yet.", ""])


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The GPU results that are there."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("gpu-*.json"))]
