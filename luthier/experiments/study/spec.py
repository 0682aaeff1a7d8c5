"""study.yml -> `Study`.

All that is wrong with the file is collected and shown at once, with its line; whether the values are those of a config
is seen when the runs are made (`expand`).
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.config.convert import axolotl
from luthier.config.load import raise_problems
from luthier.config.names import nearest, unknown_key
from luthier.config.overrides import COMMAND_LINE, parse_overrides
from luthier.config.schema import FIELDS
from luthier.config.values import accepts
from luthier.config.yaml_source import Path_, Problem, Source, read_file
from luthier.errors import ConfigError
from luthier.experiments.study.axes import (
    KEYS,
    MOST_RUNS,
    OWN,
    PRUNERS,
    SAMPLERS,
    SEARCH_ONLY,
    Axis,
    Option,
    Placed,
    Range,
    Search,
    Study,
    overlap,
    without_relative,
)
from luthier.experiments.study.reading import Reading
from luthier.experiments.study.results import goal_of

_MOST_PARTS = 12


def read(path: str | Path, overrides: Sequence[str] = (), output_dir: Path | None = None) -> Study:
    """Read a study.

    Args:
        overrides: KEY=VALUE, for keys of the base. output_dir: in place of the study's own.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    source = read_file(path)
    if not source.values:
        text = "the file is empty; a study needs at least base, and grid, runs or subsets"
        problems = [
            Problem(each.where, f"{text}." if "the file is empty" in each.message else each.message)
            for each in source.problems
        ]
        raise_problems(source.name, problems or [Problem(source.name, f"{text}.")])
    return _Reader(source, Path(path)).study(overrides, output_dir)


class _Reader(Reading):
    def __init__(self, source: Source, path: Path) -> None:
        super().__init__(source)
        self.path = path

    def study(self, overrides: Sequence[str], output_dir: Path | None) -> Study:
        for key in self.values:
            if key not in KEYS:
                self.unknown(key)
        searches = self.one_of("search", ("optuna",), None) is not None
        for key in self.values:
            if key in SEARCH_ONLY and not searches and self.values[key] is not None:
                self.report((key,), f"{key} is for a search: write `search: optuna`, or leave {key} out.")
        name = self.text("name") or self.path.stem
        base = self._base()
        axes, parts = ([], {}) if searches else self._axes()
        search = self._search() if searches else None
        seeds = self._seeds(searches)
        metric = self.text("metric") or "eval_loss"
        goal = self.one_of("goal", ("min", "max"), goal_of(metric))
        if goal is None and not self.wrong("goal"):
            self.report(("metric",), f"metric: whether {metric} is better small or large is not known: write goal.")
        jobs = self.count("jobs")
        keep = self.one_of("keep", ("all", "results", "figures"), "results")
        varied = self._check_varied(axes if search is None else search.axes, seeds)
        if base is not None:
            self._override(base, overrides, without_relative(varied, axes))
        said = self.text("output_dir")
        study = Study(
            name=name,
            question=self.text("question") or "",
            base=base or Placed(self.source.name),
            output_dir=(output_dir or Path(said or f"./{name}")).expanduser(),
            axes=axes,
            seeds=seeds,
            metric=metric,
            goal=goal,  # type: ignore[arg-type]
            search=search,
            keep=keep,  # type: ignore[arg-type]
            jobs=jobs,
            gpus=self.count("gpus") or 1,
            plots=self.texts("plots"),
            subsets=parts,
            told=copy.deepcopy(self.values),
            overrides=list(overrides),
            source=self.source,
        )
        raise_problems(self.source.name, self.problems)
        return study

    def _seeds(self, searches: bool) -> list[int]:
        value = self.values.get("seeds")
        if value is None:
            return []
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            value = list(range(value))
        elif not isinstance(value, list) or not value or not all(type(each) is int and each >= 0 for each in value):
            self.report(("seeds",), "seeds: expected how many there are (3), or a list of them ([0, 1, 2]).")
            return []
        if len(set(value)) < len(value):
            self.report(("seeds",), "seeds: one of them is there twice.")
        if searches and len(value) > 1:
            self.report(
                ("seeds",),
                "seeds: a search runs each setting with one seed; run the best settings with several afterwards, "
                "listed under `runs`.",
            )
        return value

    # --- the base ---------------------------------------------------------------------------------------------------

    def _base(self) -> Placed | None:
        base = self.values.get("base")
        if isinstance(base, dict) and base:
            lines = {path[1:]: line for path, line in self.source.lines.items() if path[:1] == ("base",)}
            return Placed(self.source.name, copy.deepcopy(base), lines)
        if not isinstance(base, str) or not base:
            self.report(
                ("base",) if "base" in self.values else (),
                "base is missing: the config that all runs share, as a file's name or as keys."
                if base is None or base in ("", {})
                else f"base: expected a file's name or keys of a config, found {base!r}.",
            )
            return None
        path = Path(base).expanduser()
        path = path if path.is_absolute() else Path(os.path.normpath(self.path.parent / path))
        source = read_file(path)
        if source.problems:
            place = self.source.where(("base",))
            for each in source.problems:
                self.problems.append(Problem(place, f"base: {each.where}: {each.message}"))
            return None
        if axolotl.is_theirs(source):
            try:
                found = axolotl.convert(source)
                found.report.raise_for(allow_unsupported=False)
            except ConfigError as error:
                self.report(("base",), f"base: {error}")
                return None
            return Placed.of(found.result())
        return Placed.of(source)

    def _override(self, base: Placed, arguments: Sequence[str], varied: dict[str, str]) -> None:
        overrides = parse_overrides(arguments)
        for key in list(overrides.values):
            top = key.split(".")[0]
            clash = next((each for each in varied if overlap(each, key)), None)
            if clash is not None:
                overrides.report(f"{key} is what the study varies ({varied[clash]}); change it there, or leave it out.")
            elif top in OWN:
                overrides.report(
                    f"{key} is set by the study in each run"
                    + (": the study's folder is `--output-dir`." if top == "output_dir" else "; leave it out.")
                )
            else:
                continue
            del overrides.values[key]
        base.put(overrides.values, COMMAND_LINE)
        self.problems += overrides.problems + base.problems
        base.problems.clear()

    # --- axes -------------------------------------------------------------------------------------------------------

    def _axes(self) -> tuple[list[Axis], dict[str, list[list[Any]]]]:
        axes = []
        if (runs := self._runs()) is not None:
            axes.append(runs)
        for key, value in self.mapping("grid").items():
            values = value if isinstance(value, list) else [value]
            if (axis := self._axis(key, values, ("grid", key), listed=isinstance(value, list))) is not None:
                axes.append(axis)
        parts: dict[str, list[list[Any]]] = {}
        for key, value in self.mapping("subsets").items():
            if (found := self._subset(key, value)) is not None:
                axis, parts[key] = found
                axes.append(axis)
        total = 1
        for axis in axes:
            total *= len(axis.options)
        if total > MOST_RUNS:
            self.report((), f"these are {total:,} settings, and a study has at most {MOST_RUNS:,} runs.")
        return axes, parts

    def _runs(self) -> Axis | None:
        runs = self.values.get("runs")
        if runs is None:
            return None
        if not isinstance(runs, list) or not runs or not all(isinstance(each, dict) for each in runs):
            self.report(("runs",), "runs: expected a list of settings, such as `- {name: lora, adapter: lora}`.")
            return None
        options = [self._together("run", each, ("runs", index)) for index, each in enumerate(runs)]
        self._distinct(options, "runs")
        return Axis("run", [option for option in options if option is not None])

    def _axis(self, key: str, values: list[Any], path: Path_, listed: bool = True) -> Axis | None:
        """The values of one key; or, under a name that is none of the config's, mappings of several keys."""
        if not values:
            self.report(path, f"{'.'.join(map(str, path))}: the list is empty.")
            return None
        together = key.split(".")[0] not in FIELDS and all(isinstance(each, dict) for each in values)
        options: list[Option | None] = []
        for index, value in enumerate(values):
            place = (*path, index) if listed else path
            if together:
                options.append(self._together(key, value, place))
            elif self._is_key(key, value, path):
                options.append(Option({key: value}, {key: value}, self.source.where(place)))
            else:
                return None
        self._distinct(options, ".".join(map(str, path)))
        return Axis(key, [option for option in options if option is not None])

    def _together(self, axis: str, entry: dict[str, Any], path: Path_) -> Option | None:
        changes = {key: value for key, value in entry.items() if key != "name"}
        name = entry.get("name")
        if name is not None and not isinstance(name, str | int | float):
            self.report((*path, "name"), f"{_shown(path)}: the name is no text.")
            return None
        good = [self._is_key(key, value, (*path, key)) for key, value in changes.items()]
        if not all(good):
            return None
        if not changes and name is None:
            self.report(path, f"{_shown(path)}: nothing is set here; write a name for the base as it is.")
            return None
        shown = {axis: str(name)} if name is not None else dict(changes)
        return Option(changes, shown, self.source.where(path))

    def _distinct(self, options: Sequence[Option | None], name: str) -> None:
        names = [next(iter(each.shown.values())) for each in options if each and each.shown != each.changes]
        for each in {each for each in names if names.count(each) > 1}:
            self.problems.append(Problem(self.source.where(tuple(name.split("."))), f"{name}: two are called {each}."))

    def _is_key(self, key: str, value: Any, path: Path_) -> bool:
        top = key.split(".")[0]
        if top in OWN:
            self.report(path, f"{key} is set by the study in each run; it cannot be varied.")
            return False
        if top not in FIELDS:
            more = "" if isinstance(value, dict) else " A name of your own takes mappings of keys."
            said = unknown_key(top, value)
            self.report(path, said + (more if said.endswith("config.") else ""))
            return False
        return True

    def _subset(self, key: str, value: Any) -> tuple[Axis, list[list[Any]]] | None:
        path: Path_ = ("subsets", key)
        if not isinstance(value, list) or not value:
            self.report(path, f"subsets.{key}: expected a list of parts, each a value or a list of values.")
            return None
        if not self._is_key(key, value, path):
            return None
        if len(value) > _MOST_PARTS:
            self.report(path, f"subsets.{key}: {len(value)} parts have {2 ** len(value) - 1:,} combinations; "
                        f"{_MOST_PARTS} parts are the most.")  # fmt: skip
            return None
        parts = [each if isinstance(each, list) else [each] for each in value]
        if any(not part for part in parts) or len({str(part) for part in parts}) < len(parts):
            self.report(path, f"subsets.{key}: a part is empty, or there twice.")
            return None
        options = [
            Option({key: chosen}, {key: chosen}, self.source.where(path))
            for size in range(1, len(parts) + 1)
            for taken in itertools.combinations(parts, size)
            for chosen in [[item for part in taken for item in part]]
        ]
        return Axis(key, options), parts

    def _check_varied(self, axes: Sequence[Axis | Range], seeds: list[int]) -> dict[str, str]:
        """Keys that are varied, and by what; a key has one axis only."""
        varied: dict[str, str] = {"seed": "seeds"} if seeds else {}
        for axis in axes:
            own = [axis.key] if isinstance(axis, Range) else [key for each in axis.options for key in each.changes]
            for key in dict.fromkeys(own):
                by = axis.key if isinstance(axis, Range) else axis.name
                clash = next((each for each in varied if overlap(each, key)), None)
                if clash is not None:
                    self.report((), f"{key} is set by {by} and by {varied[clash]}; one of them has to go.")
            varied |= dict.fromkeys(own, axis.key if isinstance(axis, Range) else axis.name)
        if not axes and not seeds and not self.problems:
            self.report((), "nothing is varied: write grid, runs, subsets or seeds, or `search: optuna` with a space.")
        return varied

    # --- search -----------------------------------------------------------------------------------------------------

    def _search(self) -> Search:
        for key in ("grid", "runs", "subsets"):
            if self.values.get(key) is not None:
                self.report((key,), f"{key} lists settings, and a search chooses them: write its values into space.")
        axes: list[Axis | Range] = []
        space = self.mapping("space")
        if not space and not self.wrong("space"):
            self.report(("space",) if "space" in self.values else (), "space is missing: what a search chooses from.")
        for key, value in space.items():
            if (axis := self._chosen(key, value)) is not None:
                axes.append(axis)
        sampler = self.one_of("sampler", SAMPLERS, "tpe") or "tpe"
        trials = self.count("trials")
        if sampler == "grid":
            for axis in axes:
                if isinstance(axis, Range) and axis.step is None:
                    self.report(
                        ("space", axis.key),
                        f"space.{axis.key}: the grid sampler needs choices, or a step in the range.",
                    )
        elif trials is None and not self.wrong("trials"):
            self.report((), "trials is missing: how many runs the search makes.")
        pruner = self.one_of("pruner", PRUNERS, "none") or "none"
        seed = self.count("search_seed", least=0) or 0
        return Search(trials, axes, sampler, pruner, seed)

    def _chosen(self, key: str, value: Any) -> Axis | Range | None:
        path: Path_ = ("space", key)
        if isinstance(value, list):
            return self._axis(key, value, path)
        if not isinstance(value, dict):
            return self._axis(key, [value], path, listed=False)
        allowed = ("low", "high", "log", "step", "choices")
        if unknown := next((each for each in value if each not in allowed), None):
            self.report((*path, unknown), f"space.{key}: {unknown} is none of {', '.join(allowed)}."
                        f"{nearest(unknown, allowed)}")  # fmt: skip
            return None
        if "choices" in value:
            if len(value) > 1 or not isinstance(value["choices"], list):
                self.report(path, f"space.{key}: choices is a list, and stands alone.")
                return None
            return self._axis(key, value["choices"], (*path, "choices"))
        if not self._is_key(key, 0, path):
            return None
        return self._range(key, value, path)

    def _range(self, key: str, value: dict[str, Any], path: Path_) -> Range | None:
        low: Any
        high: Any
        low, high, step, log = (value.get(each) for each in ("low", "high", "step", "log"))
        if not _is_number(low) or not _is_number(high):
            self.report(path, f"space.{key}: low and high have to be numbers, found {low!r} and {high!r}.")
        elif low >= high:
            self.report(path, f"space.{key}: low ({low}) has to be below high ({high}).")
        elif log not in (None, True, False):
            self.report(path, f"space.{key}: log is true or false, found {log!r}.")
        elif log and (low <= 0 or step is not None):
            self.report(path, f"space.{key}: with `log: true` low has to be above 0, and there is no step.")
        elif step is not None and (not _is_number(step) or not 0 < step <= high - low):
            self.report(path, f"space.{key}: step has to be a number between 0 and {high - low}, found {step!r}.")
        else:
            info = FIELDS.get(key)
            ints = all(isinstance(each, int) for each in (low, high, step) if each is not None)
            only = info is not None and accepts(info.annotation, int) and not accepts(info.annotation, float)
            if only and not ints:
                self.report(path, f"space.{key}: {key} is a whole number; low, high and step have to be such.")
                return None
            whole = ints and (only or info is None)
            return Range(key, low, high, bool(log), step, whole, self.source.where(path))
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _shown(path: Path_) -> str:
    return ".".join(map(str, path))
