"""A study's runs: every combination of its values, each as a config that was resolved and checked.

What is wrong with any of them is known before the first one starts. A run is known by what it does: the hash of its
resolved settings (`Planned.key`), in which neither its folder counts nor how often it is saved or where it is logged.
So a study may be changed: what it asks for again is not run again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.config import Config
from luthier.config.emit import short_yaml
from luthier.config.names import nearest
from luthier.config.schema import FIELDS
from luthier.config.yaml_source import Path_
from luthier.errors import ConfigError
from luthier.experiments.study.axes import MOST_RUNS, OWN, Axis, Option, Placed, Study, ends
from luthier.experiments.study.expressions import ExpressionError, evaluate, follows_itself, is_expression
from luthier.experiments.study.results import KNOWN_FIGURES

log = logging.getLogger("luthier")

# Keys that say where a run is written and who is told of it, and nothing of what it comes to.
_NOT_COUNTED = {*OWN, "save_steps", "saves_per_epoch", "save_total_limit", "report_to"}
_NOT_COUNTED |= {key for key in FIELDS if key.startswith("wandb_")}


@dataclass
class Planned:
    """A run that a study asks for.

    Attributes:
        name: of its folder, unless that is another run's. settings: as a table shows them. changed: keys of the config
            that the study sets, with their values. values: all keys that are written, as the run's own file has them.
        key: hash of what it does.
    """

    name: str
    settings: dict[str, Any]
    seed: int
    changed: dict[str, Any]
    values: dict[str, Any]
    config: Config
    key: str

    def text(self, folder: Path, study: str) -> str:
        """The run's config file, for that run folder."""
        values = {key: value for key, value in self.values.items() if value is not None and key not in OWN}
        values |= {"output_dir": str(folder), "resume_from_checkpoint": "auto"}
        if "wandb" in self.config.logging.report_to and self.config.logging.wandb_name is None:
            values["wandb_name"] = f"{study}-{folder.name}"
        tops = {key.split(".")[0] for key in self.changed}
        head = f"# A run of the study {study}; `luthier sweep` writes this file again.\n"
        return head + short_yaml(values, dict.fromkeys(tops & values.keys(), "set by the study"))


@dataclass
class Expanded:
    """All runs of a study, and what has to be said of them."""

    runs: list[Planned]
    notes: list[str] = field(default_factory=list)


class Faults:
    """What is wrong with the configs of runs: each message once, with the runs that it is of."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.of: dict[str, list[str]] = {}
        self.runs: set[str] = set()

    def add(self, run: str, error: Exception, place: str = "") -> None:
        first, *rest = str(error).split("\n")
        lines = [line.strip() for line in rest] if rest else [f"{place}: {first}" if place else first]
        self.runs.add(run)
        for line in lines:
            self.of.setdefault(line, []).append(run)

    def raise_for(self, total: int) -> None:
        """Raises ConfigError if there are any, of `total` runs."""
        if not self.of:
            return
        name, bad = self.study.source.name, len(self.runs)
        lines = []
        for line, runs in self.of.items():
            some = len(runs) < total
            shown = ", ".join(runs[:3]) + (", ..." if len(runs) > 3 else "")
            of_base = some and line.startswith(f"{self.study.base.name}:")
            hint = " (`KEY: null` in a run leaves a key of the base out)" if of_base else ""
            lines.append(f"  {line}{hint}" + (f" [{len(runs)} of {total} runs: {shown}]" if some else ""))
        heading = f"{name}: {bad} of {total} runs cannot be started as they are, so none was"
        raise ConfigError("\n".join([heading, *lines]))


def expand(study: Study) -> Expanded:
    """The runs of a study that lists them.

    Raises:
        ConfigError: what is wrong with their configs, of all of them at once.
    """
    seeds: Sequence[int | None] = study.seeds or [None]
    total = len(seeds)
    for axis in study.axes:
        total *= len(axis.options)
    if total > MOST_RUNS:
        raise ConfigError(f"{study.source.name}: these are {total:,} runs; a study has at most {MOST_RUNS:,}")
    shown = [axis for axis in study.axes if len(axis.options) > 1]
    found: list[Planned] = []
    faults = Faults(study)
    # A seed is gone through before the next begins, so that a study that is stopped has seen every setting.
    for seed in seeds:
        for options in itertools.product(*(axis.options for axis in study.axes)):
            visible = [option for axis, option in zip(study.axes, options, strict=True) if axis in shown]
            name = name_of(_merged(option.shown for option in visible), seed)
            try:
                found.append(plan(study, options, visible, seed))
            except ConfigError as error:
                faults.add(name, error)
    faults.raise_for(total)
    check_metric(study, found)
    return _distinct(found)


def check_space(study: Study) -> list[Planned]:
    """Look at the configs of a search before it begins: all choices and the ends of ranges, one at a time; gives them.

    Raises:
        ConfigError: what is wrong with any.
    """
    assert study.search is not None
    axes = study.search.axes
    starts = [next(iter(ends(axis))) for axis in axes]
    looked: list[Planned] = []
    faults, total = Faults(study), 0
    for index, axis in enumerate(axes):
        for option in ends(axis):
            options = [*starts[:index], option, *starts[index + 1 :]]
            total += 1
            name = name_of(_merged(each.shown for each in options), None)
            try:
                looked.append(plan(study, options, options, study.seeds[0] if study.seeds else None))
            except ConfigError as error:
                faults.add(name, error)
    faults.raise_for(total)
    check_metric(study, looked)
    return looked


def plan(study: Study, options: Iterable[Option], visible: Iterable[Option], seed: int | None) -> Planned:
    """One run: its values put into the base, expressions computed, resolved and checked.

    Args:
        visible: the options that its settings show. seed: None: the base's.

    Raises:
        ConfigError: everything that is wrong with its config.
    """
    source = Placed.of(study.base)
    changed: dict[str, Any] = {}
    for option in options:
        changes = _around_base(study.base, option.changes)
        source.put(changes, option.place)
        changed |= changes
    if seed is not None:
        source.put({"seed": seed}, study.source.where(("seeds",)))
        changed["seed"] = seed
    computed = _compute(source, changed)
    if source.problems:
        lines = [f"{each.where}: {each.message}" for each in source.problems]
        raise ConfigError("\n".join([study.source.name, *lines]))
    changed |= {key: value for key, value in computed.items() if key in changed}
    for key in OWN:
        source.values.pop(key, None)
    values = dict(source.values)
    config = Config.from_source(source)
    settings = {name: changed.get(name, value) for name, value in _merged(each.shown for each in visible).items()}
    written = config.training.seed
    return Planned(name_of(settings, seed), settings, written, changed, values, config, key_of(config))


def _around_base(base: Placed, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes, those computed that follow from the base's own value (`learning_rate: "=3*learning_rate"`)."""

    def of_base(key: str) -> Any:
        value = base.values.get(key)
        return FIELDS[key].default if value is None and not FIELDS[key].is_required() else value

    done = dict(changes)
    for key, value in changes.items():
        if follows_itself(key, value):
            try:
                done[key] = evaluate(value, of_base)
            except ExpressionError:
                continue  # said with the other expressions
    return done


def _compute(source: Placed, changed: Mapping[str, Any]) -> dict[str, int | float]:
    """Put the values of expressions in their places; gives them by key."""
    waiting = {key: value for key, value in source.values.items() if is_expression(value)}
    inside = {key: value for key, value in changed.items() if "." in key and is_expression(value)}
    done: dict[str, int | float] = {}
    under_way: list[str] = []

    def lookup(key: str) -> Any:
        if key in done or key not in waiting:
            value = done.get(key, source.values.get(key))
            return FIELDS[key].default if value is None and not FIELDS[key].is_required() else value
        if key in under_way:
            circle = " -> ".join([*under_way[under_way.index(key) :], key])
            raise ExpressionError(f"{waiting[key]}: the value of {key} follows from itself ({circle}).")
        under_way.append(key)
        done[key] = evaluate(waiting[key], lookup)
        under_way.pop()
        return done[key]

    results: dict[str, int | float] = {}
    said: set[str] = set()
    for key, text in {**waiting, **inside}.items():
        path: Path_ = (key,)
        try:
            results[key] = lookup(key) if key in waiting else evaluate(text, lookup)
        except ExpressionError as error:
            under_way.clear()
            place = source.where(path)
            if (message := f"{place}: {key}: {error}") not in said:
                said.add(message)
                source.report(f"{key}: {error}")
                source.problems[-1] = type(source.problems[-1])(place, f"{key}: {error}")
    for key, value in results.items():
        source.put({key: value}, source.where((key,)))
    return results


def check_metric(study: Study, runs: Sequence[Planned]) -> None:
    """Raises ConfigError where the metric has to be measured on held-out data, and a run does not.

    Which figures a run leaves is known when the first one ends. A name that looks like a slip is said before.
    """
    from luthier.config.needs import without_eval_loss

    if study.metric not in KNOWN_FIGURES and (near := nearest(study.metric, KNOWN_FIGURES)):
        place = study.source.where(("metric",))
        log.warning("%s: metric: %s is looked for when the first run ends.%s", place, study.metric, near)
    if not study.metric.startswith("eval_"):
        return
    found = [why for run in runs if (why := without_eval_loss(run.config.flat())) is not None]
    if found:
        some = "" if len(found) == len(runs) else f" [{len(found)} of {len(runs)} runs]"
        place = study.source.where(("metric",))
        raise ConfigError(f"{place}: {study.metric} has to be measured, and {found[0]}, or write `metric: loss`{some}")


def key_of(config: Config) -> str:
    """What a run does, as a hash: keys with other values than their defaults, so that it stays when a key is added."""
    flat = config.flat()
    told = {
        key: value
        for key, value in flat.items()
        if key not in _NOT_COUNTED and value != FIELDS[key].default
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in parts:
        merged |= part
    return merged


def _distinct(runs: list[Planned]) -> Expanded:
    """Runs that do the same are one; names that are the same are made different."""
    first: dict[str, Planned] = {}
    same: list[str] = []
    for run in runs:
        if run.key in first:
            other = first[run.key].name
            same.append(run.name if run.name == other else f"{run.name} is {other}")
        else:
            first[run.key] = run
    kept = list(first.values())
    names = [run.name.lower() for run in kept]
    for run in kept:
        if names.count(run.name.lower()) > 1:
            run.name = f"{run.name}-{run.key[:6]}"
    notes = []
    if same:
        shown = "; ".join(same[:5]) + ("; ..." if len(same) > 5 else "")
        notes.append(f"{len(same)} of {len(runs)} runs have the settings of another and are not repeated: {shown}.")
    return Expanded(kept, notes)


def varied_in(axes: Iterable[Axis], runs: Iterable[Planned]) -> list[str]:
    """The names in the settings of runs, in the order of the study's axes."""
    order = [name for axis in axes for option in axis.options for name in option.shown]
    there = {name for run in runs for name in run.settings}
    return [name for name in dict.fromkeys(order) if name in there]


# --- names ----------------------------------------------------------------------------------------------------------

_SHORT = {
    "lora_r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "learning_rate": "lr", "num_epochs": "epochs",
    "weight_decay": "wd", "sequence_len": "len", "micro_batch_size": "batch", "max_steps": "steps",
    "gradient_accumulation_steps": "accumulate", "warmup_ratio": "warmup", "warmup_steps": "warmup",
}  # fmt: skip
# Whose values speak for themselves.
_BARE = frozenset(("adapter", "optimizer", "lr_scheduler", "lora_target_modules", "run", "base_model"))
_LONGEST = 60


def name_of(settings: Mapping[str, Any], seed: int | None) -> str:
    """A folder's name for settings: short, and the same whenever they are."""
    parts = [_part(key, value) for key, value in settings.items()]
    name = "-".join(part for part in parts if part)
    if len(name) > _LONGEST:
        digest = hashlib.sha256(name.encode()).hexdigest()[:6]
        name = f"{name[: _LONGEST - 7].rstrip('-+._')}-{digest}"
    seeded = [] if seed is None else [f"s{seed}"]
    return "-".join([*([name] if name else []), *seeded]) or "run"


def _part(key: str, value: Any) -> str:
    if isinstance(value, list | tuple):
        said = "+".join(_plain(str(each)).removesuffix("_proj") for each in value) or "none"
    elif isinstance(value, dict):
        said = "-".join(_part(str(inner), each) for inner, each in value.items())
    elif value is None:
        said = "none"
    elif isinstance(value, float):
        said = f"{value:.6g}".replace("e-0", "e-").replace("e+0", "e")
    else:
        said = str(value).lower() if isinstance(value, bool) else str(value)
    said = _plain(said)
    if isinstance(value, bool):
        return f"{'' if value else 'no-'}{_plain(_SHORT.get(key, key))}"
    if key in _BARE or key not in FIELDS:
        if not isinstance(value, int | float) and "." not in key:
            return said
        key = key.rsplit(".", 1)[-1]
    return f"{_plain(_SHORT.get(key, key))}{'' if said[:1].isdigit() else '-'}{said}"


def _plain(text: str) -> str:
    """Of a text what may stand in a file's name; of a path its end."""
    text = text.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^\w.+-]+", "_", text).strip("._-")
