"""The runs of a study put together: the seeds of one setting, and the settings that were measured alike."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median, stdev
from typing import Any

from luthier.errors import RunError
from luthier.experiments.compare import measures_differ
from luthier.experiments.run_files import Run
from luthier.experiments.study.results import StudyResult, Trial

# What figures of held-out data begin with; what a run cost, for instance, is the same measure on any data.
_HELD_OUT = ("eval_",)
# The key that a study's own names of runs stand under.
NAMED = "run"
_RANK, _ALPHA, _RATIO = "lora_r", "lora_alpha", "lora_alpha / lora_r"


@dataclass
class Setting:
    """One setting and its runs, a run for each seed. All of them have a finite metric."""

    values: dict[str, Any]
    trials: list[Trial]

    @cached_property
    def numbers(self) -> list[float]:
        return [trial.metric for trial in self.trials if trial.metric is not None]

    @cached_property
    def mean(self) -> float:
        return fmean(self.numbers)

    @cached_property
    def spread(self) -> float | None:
        """Standard deviation over seeds (n - 1); None of one run."""
        return stdev(self.numbers) if len(self.trials) > 1 else None

    def cost(self, figure: str) -> float | None:
        """The mean over the runs of `seconds`, `trainable_parameters` and the like; of peak memory the largest."""
        found = [value for trial in self.trials if (value := getattr(trial, figure)) is not None]
        if not found:
            return None
        return float(max(found) if figure == "peak_memory_gib" else fmean(found))


@dataclass
class Group:
    """Settings that may be ranked: their metric was measured alike.

    Attributes:
        settings: best first. keys: what they differ in, in the order of the study. why: what tells this group from the
            other ones; empty where there is one only. by_seed: seeds that have held-out data of their own.
    """

    settings: list[Setting]
    keys: list[str]
    goal: str
    why: str = ""
    by_seed: bool = False

    @cached_property
    def dials(self) -> list[str]:
        """The keys as effects and plots have them: where rank and alpha both vary and alpha follows the rank, it is
        their ratio that was turned."""
        if not {_RANK, _ALPHA} <= set(self.keys):
            return self.keys
        for setting in self.settings:
            rank, alpha = setting.values.get(_RANK), setting.values.get(_ALPHA)
            if not isinstance(rank, int | float) or not isinstance(alpha, int | float) or not rank:
                return self.keys
            setting.values[_RATIO] = round(alpha / rank, 6)
        if len(levels(_RATIO, self.settings)) >= len(levels(_ALPHA, self.settings)):
            return self.keys
        return [_RATIO if key == _ALPHA else key for key in self.keys]

    @cached_property
    def form(self) -> Callable[[float], str]:
        """How the metric is written."""
        return form_of(self.settings)

    def name_of(self, setting: Setting) -> str:
        """`lora_r 8, lora_alpha 16`."""
        return named(setting.values, self.keys)

    def is_better(self, one: float, other: float) -> bool:
        return one > other if self.goal == "max" else one < other


def has_figure(trial: Trial) -> bool:
    return trial.status == "finished" and trial.metric is not None and math.isfinite(trial.metric)


def groups_of(result: StudyResult, runs: Mapping[str, Run]) -> list[Group]:
    """The settings that have a figure, in groups that were measured alike, the largest first."""
    trials = [trial for trial in result.trials if has_figure(trial)]
    parts = measured_alike(result.metric, trials, runs)
    keys = varying(result.varied, trials)
    found = []
    for why, members in parts:
        settings = together(members, result.varied)
        settings.sort(key=lambda setting: setting.mean, reverse=result.goal == "max")
        by_seed = "seed" in _differences(result.metric, members, runs)
        # In the name of a setting each key that varies in the study: the groups stay apart.
        found.append(Group(settings, keys, result.goal, why, by_seed))
    return sorted(found, key=lambda group: -len(group.settings))


def together(trials: Sequence[Trial], varied: Sequence[str]) -> list[Setting]:
    found: dict[str, Setting] = {}
    for trial in trials:
        values = {name: trial.settings.get(name) for name in varied}
        found.setdefault(plain(values), Setting(values, [])).trials.append(trial)
    return list(found.values())


def varying(varied: Sequence[str], trials: Sequence[Trial]) -> list[str]:
    """The keys that have more than one value."""
    return [name for name in varied if len({plain(trial.settings.get(name)) for trial in trials}) > 1]


def measured_alike(
    metric: str, trials: Sequence[Trial], runs: Mapping[str, Run]
) -> list[tuple[str, list[Trial]]]:
    """Trials whose metric is of the same held-out data and loss, with what tells them from the others.

    Seeds may draw held-out data of their own: they are compared seed by seed then. Only figures of held-out data
    depend on it; a run that cannot be read is taken as one like the first.
    """
    parts: list[list[Trial]] = []
    for trial in trials:
        for part in parts:
            if not set(_differences(metric, [part[0], trial], runs)) - {"seed"}:
                part.append(trial)
                break
        else:
            parts.append([trial])
    if len(parts) < 2:
        return [("", part) for part in parts]
    names = [name for name in _differences(metric, [part[0] for part in parts], runs) if name != "seed"]
    found = []
    for part in parts:
        run = runs.get(part[0].name)
        said = [f"{name} {value(run.config.get(name))}" for name in names if run and name in run.config]
        if len(said) < len(names):
            said.append(f"data as in {part[0].name}")
        found.append((", ".join(said), part))
    return found


def _differences(metric: str, trials: Sequence[Trial], runs: Mapping[str, Run]) -> list[str]:
    if not metric.startswith(_HELD_OUT):
        return []
    known = [run for trial in trials if (run := runs.get(trial.name)) is not None]
    found = measures_differ(known)
    if "sequence_len" in found and len({plain(_read_of(run)) for run in known}) == 1:
        found.remove("sequence_len")  # whatever was cut or left out, it was the same: no row reached the limit
    return found


def _read_of(run: Run) -> list[Any]:
    """What was read of each data set: counts that would be others if rows were cut or left out."""
    names = ("kept", "tokens", "trained_tokens", "dropped")
    sources = [*(run.data.get("sources") or []), *(run.data.get("test_sources") or [])]
    told: list[Any] = [[source.get(name) for name in names] for source in sources]
    return told or [run.config.get("sequence_len")]


def read_runs(result: StudyResult) -> dict[str, Run]:
    """The run folders that can be read, by the name of their trial."""
    found = {}
    for trial in result.trials:
        if trial.folder:
            try:
                found[trial.name] = result.run_of(trial)
            except RunError:
                continue  # not begun, or taken away: its row says all that is known
    return found


def named(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    """`lora_r 8, lora_alpha 16`; a run that the study gave a name goes by it, and a list by what is in it."""
    shown = []
    for key in keys:
        bare = key == NAMED or isinstance(values.get(key), list)
        shown.append(value(values.get(key)) if bare else f"{key} {value(values.get(key))}")
    return ", ".join(shown) or "the only setting"


def value(given: Any) -> str:
    """A value of a key as it is shown."""
    if given is None:
        return "none"
    if isinstance(given, bool):
        return "true" if given else "false"
    if isinstance(given, float):
        return f"{given:.4g}"
    if isinstance(given, list):
        return " + ".join(value(each) for each in given) or "nothing"
    return given if isinstance(given, str) else plain(given)


def is_numeric(key: str, settings: Sequence[Setting]) -> bool:
    found = [setting.values.get(key) for setting in settings]
    return all(isinstance(each, int | float) and not isinstance(each, bool) for each in found)


def levels(key: str, settings: Sequence[Setting]) -> list[Any]:
    """The values of a key: numbers by size, others as they come in the study."""
    found = {plain(setting.values.get(key)): setting.values.get(key) for setting in settings}
    if is_numeric(key, settings):
        return sorted(found.values())
    first = {plain(s.values.get(key)): place for place, s in reversed(list(enumerate(settings)))}
    return [found[name] for name in sorted(found, key=lambda name: first[name])]


def contains(setting: Setting, key: str, part: Sequence[Any]) -> bool:
    """Whether a subset has this part."""
    chosen = setting.trials[0].changed.get(key, setting.values.get(key))
    if isinstance(chosen, str):
        chosen = [each.strip() for each in chosen.replace("+", ",").split(",")]
    return isinstance(chosen, list) and all(each in chosen for each in part)


def form_of(settings: Sequence[Setting]) -> Callable[[float], str]:
    """How a metric is written: two digits of its usual spread, or of the range of the settings, are seen."""
    spreads = [setting.spread for setting in settings if setting.spread]
    means = [setting.mean for setting in settings]
    usual = median(spreads) if spreads else (max(means) - min(means)) / 4 if means else 0.0
    places = min(6, max(0, 1 - math.floor(math.log10(usual)))) if usual > 0 else 4
    return lambda number: f"{number:.{places}f}"


def plain(given: Any) -> str:
    return json.dumps(given, ensure_ascii=False, default=str, sort_keys=True)
