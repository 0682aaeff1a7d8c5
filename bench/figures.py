"""From the raw rounds of a benchmark to the figures of its table.

A round is one run of every contender, one after the other. Whatever slows the machine down for a while slows
neighbours in a round alike, so a ratio is taken inside each round, and the median of those is reported, not
the ratio of medians.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import Any

OURS = "luthier"

# Forward passes beside the one that is trained through: the reference's; of KTO's mismatched answers, which are about
# as long as the rows, one of each model.
FORWARDS = {"sft": 0, "orpo": 0, "dpo": 1, "kto": 3}

Run = dict[str, Any]
# contender -> its run, for each round
Rounds = list[dict[str, Run]]


@dataclass(frozen=True)
class Figures:
    """One contender's line; speeds in real tokens per second, memory in GiB, None where it is not known.

    Attributes:
        ratio: Luthier's speed over this one's, per round, the median. share: of the multiply peak.
        loss_difference: the largest between a step's loss here and Luthier's. first_loss_difference: of the
            first step alone, before which every adapter is zero and no random number has had a say.
        same_batches: whether its steps had the same tokens as Luthier's, without which losses cannot be compared.
    """

    name: str
    version: str
    speed: float
    slowest: float
    fastest: float
    ratio: float | None
    share: float | None
    memory: float
    first_step: float
    loss_difference: float | None
    first_loss_difference: float | None
    same_batches: bool
    note: str


def kind(result: dict[str, Any]) -> str:
    """What a result measured, beside its shape: the loss of supervised fine-tuning, or another task."""
    return str(result["loss"] if result["task"] == "sft" else result["task"])


def speed(run: Run, warmup: int) -> float:
    """Real tokens per second over the steps after the first `warmup` ones."""
    steps = run["steps"][warmup:]
    if not steps:
        raise ValueError(
            f"of {len(run['steps'])} steps {warmup} are for warming up: nothing is left to measure"
        )
    return float(sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps))


def speed_by_work(run: Run, warmup: int) -> float | None:
    """Real tokens per CPU second over the same steps; None where the work of one is not known, as of the first."""
    steps = run["steps"][warmup:]
    if any("cpu_seconds" not in step for step in steps):
        return None
    return float(sum(step["tokens"] for step in steps) / sum(step["cpu_seconds"] for step in steps))


def ratios_by_work(result: dict[str, Any]) -> dict[str, float]:
    """How many times the tokens of the others Luthier trains in a CPU second: by contender, the median of the rounds.
    Other programs slow it down, but take none of it."""
    warmup, found = result["recipe"]["warmup_steps"], defaultdict(list)
    for entry in result["rounds"]:
        speeds = {name: speed_by_work(run, warmup) for name, run in entry["runs"].items()}
        ours = speeds.pop(OURS, None)
        for name, theirs in speeds.items():
            if ours and theirs:
                found[name].append(ours / theirs)
    return {name: median(ratios) for name, ratios in found.items()}


def loss_differences(ours: Run, theirs: Run) -> list[float]:
    """The difference of each step's loss; empty where a step's tokens differ or a loss is not known."""
    pairs = [(a["loss"], b["loss"]) for a, b in zip(ours["steps"], theirs["steps"], strict=False)]
    if not same_batches(ours, theirs) or any(None in pair for pair in pairs):
        return []
    return [abs(a - b) for a, b in pairs]


def same_batches(ours: Run, theirs: Run) -> bool:
    """Whether every step had as many tokens."""
    return [step["tokens"] for step in ours["steps"]] == [step["tokens"] for step in theirs["steps"]]


def figures(result: dict[str, Any]) -> list[Figures]:
    """The lines of a result's table: Luthier first, then the others from the fastest to the slowest."""
    rounds: Rounds = [entry["runs"] for entry in result["rounds"]]
    peaks = [entry["peak"]["gflops"] * 1e9 for entry in result["rounds"]]
    names = dict.fromkeys(name for runs in rounds for name in runs)
    lines = [_line(name, rounds, peaks, result) for name in names]
    return sorted(lines, key=lambda line: (line.name != OURS, -line.speed))


def _line(name: str, rounds: Rounds, peaks: list[float], result: dict[str, Any]) -> Figures:
    warmup, parameters = result["recipe"]["warmup_steps"], result["multiplied_parameters"]
    mine = [(runs, peak, runs[name]) for runs, peak in zip(rounds, peaks, strict=True) if name in runs]
    speeds = [speed(run, warmup) for _, _, run in mine]
    both = [(runs[OURS], run) for runs, _, run in mine if OURS in runs]
    ratios = [speed(ours, warmup) / speed(run, warmup) for ours, run in both]
    # For each token: forward 2, backward through frozen weights 2.
    flops = (4 + 2 * FORWARDS[result["task"]]) * parameters
    shares = [flops * value / peak for value, (_, peak, _) in zip(speeds, mine, strict=True)]
    differences = [found for ours, run in both if (found := loss_differences(ours, run))]
    last = mine[-1][2]
    return Figures(
        name=name,
        version=str(next(iter(last["versions"].values()))),
        speed=median(speeds),
        slowest=min(speeds),
        fastest=max(speeds),
        ratio=median(ratios) if ratios else None,
        share=median(shares),
        memory=median(run["process_memory_gib"] for _, _, run in mine),
        first_step=median(run["seconds_to_first_step"] for _, _, run in mine),
        loss_difference=max(map(max, differences), default=None),
        first_loss_difference=max((found[0] for found in differences), default=None),
        same_batches=all(same_batches(ours, run) for ours, run in both),
        note=last["note"],
    )
