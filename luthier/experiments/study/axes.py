"""What a study asks, on which base, and what is varied.

A study varies along axes. Each value of an axis sets one key of the config, or several together, and a run takes one
value from each. `grid` and `subsets` are axes by name, `runs` is one axis whose values the study lists, seeds are the
last. In a search an axis may be a range instead, and a sampler chooses (`search`).

`spec` reads it from study.yml.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from luthier.config.overrides import apply_overrides
from luthier.config.yaml_source import Path_, Source
from luthier.experiments.study.expressions import follows_itself
from luthier.experiments.study.results import Goal

Keep = Literal["all", "results", "figures"]

# Keys of a study and what each is.
KEYS: dict[str, str] = {
    "name": "What the study is called. Default: the file's name.",
    "question": "What it is to answer, as a sentence.",
    "base": "The config that all runs share: a file, beside the study, or its keys.",
    "output_dir": "The study's folder. Default: ./NAME.",
    "grid": "Lists of values by key of the config; all combinations are run.",
    "runs": "A list of settings, each with a name; crossed with the grid.",
    "subsets": "Lists of parts by key; every combination of one part or more is run.",
    "seeds": "How many seeds (from 0), or a list of them; each setting is run with each.",
    "metric": "The figure that decides. Default: eval_loss.",
    "goal": "min or max. Default: what the metric is known for.",
    "search": "optuna: a sampler chooses settings out of `space`.",
    "trials": "How many runs a search makes.",
    "space": "Ranges ({low, high, log, step}) and choices by key of the config.",
    "sampler": "tpe, random or grid. Default: tpe.",
    "pruner": "median: a run that is worse than the others were at its step is stopped. Default: none.",
    "search_seed": "Seed of the sampler. Default: 0.",
    "keep": "all, results (no checkpoints of finished runs) or figures (no weights either). Default: results.",
    "jobs": "Runs at a time. Default: one on each visible GPU, one on a CPU.",
    "gpus": "GPUs of each run. Default: 1.",
    "plots": "Keys that a figure is drawn against. Default: whatever is varied.",
}
SEARCH_ONLY = ("trials", "space", "sampler", "pruner", "search_seed")
SAMPLERS, PRUNERS = ("tpe", "random", "grid"), ("none", "median")
# What the study sets itself in each run.
OWN = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")
# More would be a slip; each is a process.
MOST_RUNS = 10_000


@dataclass(slots=True)
class Placed(Source):
    """Keys of a config of which some are from elsewhere: `places` says of each (by its path) from where."""

    places: dict[Path_, str] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Source) -> Placed:
        """A copy that can be changed."""
        places = dict(source.places) if isinstance(source, Placed) else {}
        return cls(source.name, copy.deepcopy(source.values), dict(source.lines), list(source.problems), places)

    def where(self, path: Path_) -> str:
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
            if path[:length] in self.lines:
                return f"{self.name}:{self.lines[path[:length]]}"
        return self.name

    def put(self, values: Mapping[str, Any], place: str) -> None:
        """Write values by dotted key; what cannot be written is added to the problems."""
        given = Source(place, dict(values))
        for path in apply_overrides(self.values, given):
            for inside in [each for each in self.lines if each[: len(path)] == path]:
                del self.lines[inside]
            self.places = {each: said for each, said in self.places.items() if each[: len(path)] != path}
            self.lines[path], self.places[path] = 0, place
        self.problems += given.problems


@dataclass(frozen=True)
class Option:
    """One value of an axis.

    Attributes:
        changes: dotted keys of the config and their values, some of them expressions. shown: what the run's settings
            have for it; the same, or the name that stands for several keys. place: where it is written.
    """

    changes: dict[str, Any]
    shown: dict[str, Any]
    place: str


@dataclass(frozen=True)
class Axis:
    """What is varied: a key of the config, or a name for several."""

    name: str
    options: list[Option]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included, that a search chooses from."""

    key: str
    low: float
    high: float
    log: bool
    step: float | None
    whole: bool
    place: str


@dataclass(frozen=True)
class Search:
    """What chooses the runs in place of lists."""

    trials: int | None
    axes: list[Axis | Range]
    sampler: str
    pruner: str
    seed: int


@dataclass
class Study:
    """A study as it is written, its base read.

    Attributes:
        base: keys of the config that all runs share. told: the file's own keys and values, to be kept with the results.
        subsets: the parts of each key that is varied as a subset. place: where to look for what is wrong with it.
    """

    name: str
    question: str
    base: Placed
    output_dir: Path
    axes: list[Axis]
    seeds: list[int]
    metric: str
    goal: Goal
    search: Search | None
    keep: Keep
    jobs: int | None
    gpus: int
    plots: list[str]
    subsets: dict[str, list[list[Any]]]
    told: dict[str, Any]
    overrides: list[str]
    source: Source


def ends(axis: Axis | Range) -> Iterator[Option]:
    """The values of an axis whose configs are looked at before a search begins: all choices, or a range's ends."""
    if isinstance(axis, Axis):
        yield from axis.options
        return
    for value in (axis.low, axis.high):
        yield Option({axis.key: value}, {axis.key: value}, axis.place)


def without_relative(varied: Mapping[str, str], axes: Sequence[Axis]) -> dict[str, str]:
    """`varied` without the keys whose every value follows from the base's: the base's may be overridden."""
    fixed = {
        key
        for axis in axes
        for option in axis.options
        for key, value in option.changes.items()
        if not follows_itself(key, value)
    }
    listed = {key for axis in axes for option in axis.options for key in option.changes}
    return {key: by for key, by in varied.items() if key in fixed or key not in listed}


def overlap(one: str, other: str) -> bool:
    """Whether two dotted keys are the same, or one lies inside of the other."""
    first, second = one.replace("-", "_").split("."), other.replace("-", "_").split(".")
    shorter = min(len(first), len(second))
    return first[:shorter] == second[:shorter]
