"""Studies made up from what is true of them, without a run."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier.experiments.study.findings import findings
from luthier.experiments.study.noise import Comparison
from luthier.experiments.study.results import StudyResult, Trial
from luthier.experiments.study.settings import groups_of

PARTS = [["q_proj"], ["k_proj"], ["v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["lm_head"]]


def study(
    grid: dict[str, list[Any]],
    truth: Callable[..., float] = lambda **_: 1.0,
    *,
    seeds: int = 3,
    noise: float = 0.01,
    of_seed: float = 0.0,
    draw: int = 0,
    **more: Any,
) -> StudyResult:
    """Every combination with every seed, its metric drawn around the truth; a seed may shift all settings alike."""
    luck = random.Random(draw)
    shifts = [luck.gauss(0, of_seed) for _ in range(seeds)]
    trials = []
    for place, values in enumerate(itertools.product(*grid.values())):
        settings = dict(zip(grid, values, strict=True))
        for seed in range(seeds):
            metric = truth(**settings) + shifts[seed] + luck.gauss(0, noise)
            trials.append(
                Trial(f"{place}-s{seed}", settings, seed, status="finished", metric=metric, seconds=60.0 + 10 * place,
                      peak_memory_gib=1 + place / 10, trainable_parameters=1000 * (place + 1),
                      total_parameters=1_000_000, tokens_per_second=900.0)
            )  # fmt: skip
    told = {"name": "a-study", "question": "Which?", "metric": "eval_loss", "goal": "min"} | more
    return StudyResult(varied=list(grid), trials=trials, folder=Path("nowhere"), **told)


def subsets(draw: int, effects: list[float], noise: float = 0.01) -> StudyResult:
    """All non-empty combinations, one run each."""
    luck = random.Random(draw)
    trials = []
    for mask in range(1, 2 ** len(PARTS)):
        members = [place for place in range(len(PARTS)) if mask >> place & 1]
        settings = {"lora_target_modules": [name for place in members for name in PARTS[place]]}
        metric = 1.5 + sum(effects[place] for place in members) + luck.gauss(0, noise)
        trials.append(Trial(f"c{mask}", settings, status="finished", metric=metric, changed=settings))
    return StudyResult("layers", "", "eval_loss", "min", ["lora_target_modules"], trials, Path("nowhere"),
                       subsets={"lora_target_modules": PARTS})  # fmt: skip


def judged(result: StudyResult) -> Comparison:
    (group,) = groups_of(result, {})
    return Comparison(group, result.subsets)


def said(result: StudyResult) -> dict[str, str]:
    return {each.about: each.text for each in findings(result)}
