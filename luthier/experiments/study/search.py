"""A study whose settings Optuna chooses: each finished run is told to the sampler before the next is asked for.

The sampler's history is in the study folder (search.db, SQLite; Optuna's own tools read it), one study of Optuna's for
each form that the search has had. A sampler draws anew for every run, from a seed of the search and the run's number:
what it proposes then depends on the history alone, and a search that was stopped goes on as if it had not been. Runs
that go on at the same time do not know of each other's results, so that their number matters.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from luthier.errors import ConfigError, RunError
from luthier.experiments.run_files import METRICS
from luthier.experiments.study.axes import Axis, Option, Range, Study
from luthier.experiments.study.book import Book, Record
from luthier.experiments.study.expand import Planned, plan
from luthier.experiments.study.results import Trial
from luthier.experiments.study.runner import Child, Runner

log = logging.getLogger("luthier")

DATABASE = "search.db"
# What a trial of Optuna's is marked with: the key of its run; and a second value of a run that had failed.
_RUN, _AGAIN = "run", "again"


class Searched:
    """The runs that a sampler proposes, as `conduct.Work`."""

    def __init__(self, study: Study, book: Book, rerun_failed: bool) -> None:
        assert study.search is not None
        self.study, self.book, self.search = study, book, study.search
        self.optuna = _optuna()
        self.notes: list[str] = []
        self.records: list[Record] = []
        self.varied = _varied(self.search.axes)
        self.combinations = self._combinations() if self.search.sampler == "grid" else None
        self.history = self._history()
        self._planned: dict[str, Planned] = {}
        self._options: dict[int, list[Option]] = {}
        self._waiting: list[int] = []
        self._told: dict[str, int] = {}
        self._trials: dict[str, Any] = {}
        self._twins: dict[str, list[int]] = {}
        self._again: list[str] = []
        for frozen in self.history.get_trials(deepcopy=False):
            self._take_over(frozen, rerun_failed)
        self._say_repeated()

    @property
    def total(self) -> int:
        return max(len(self.records), self.wanted - self._repeated())

    @property
    def wanted(self) -> int:
        """How many runs the sampler is asked for."""
        every = None if self.combinations is None else len(self.combinations)
        return min(each for each in (self.search.trials, every) if each is not None)

    def more(self) -> bool:
        return bool(self._waiting or self._again) or self._asked() < self.wanted

    def take(self, startable: Callable[[Record], bool]) -> tuple[Planned, Record] | None:
        for key in self._again:
            if startable(self.book.by_key[key]):
                self._again.remove(key)
                return self._planned[key], self.book.by_key[key]
        while self._waiting or self._asked() < self.wanted:
            if not self._waiting:
                self._waiting.append(self._ask())
            for number in list(self._waiting):
                planned = self._plan(number)
                record = None if planned is None else self.book.by_key[planned.key]
                if planned is None or record is None:
                    self._waiting.remove(number)
                elif record.key in self._told or record.status == "running":  # the sampler proposes it again
                    self._waiting.remove(number)
                    self._twins.setdefault(record.key, []).append(number)
                    self._tell_twins(record)
                elif startable(record):
                    self._waiting.remove(number)
                    self._told[record.key] = number
                    if record.status in ("finished", "failed"):  # of an earlier form of the study
                        self.done(self.book.trial(record, self.study.metric))
                        continue
                    return planned, record
            if self._waiting:
                return None
        return None

    def watch(self, child: Child, runner: Runner) -> None:
        """Report what a run measured since, and stop it where the pruner has seen enough."""
        number = self._told.get(child.record.key)
        if self.search.pruner == "none" or child.asked or number is None or child.record.key in self._again:
            return
        trial = self._trial(number)
        reported = self.history.get_trials(deepcopy=False)[number].intermediate_values
        for step, value in _values_of(self.book.run_folder(child.record) / METRICS, self.study.metric):
            if step not in reported:
                trial.report(value, step)
                if trial.should_prune():
                    log.info("%s is worse than most at step %d, and stopped", child.record.name, step)
                    runner.ask_to_stop(child, pruned=True)
                    return

    def done(self, trial: Trial) -> None:
        record = self.book.by_key[trial.key]
        number = self._told.get(trial.key)
        if number is None or trial.status == "waiting":
            return
        frozen = self.history.get_trials(deepcopy=False)[number]
        if frozen.state.is_finished():
            if trial.metric is not None and frozen.value is None:  # it had failed
                self.history.add_trial(
                    self.optuna.trial.create_trial(
                        params=frozen.params,
                        distributions=frozen.distributions,
                        value=trial.metric,
                        user_attrs={_RUN: trial.key, _AGAIN: True},
                    )
                )
        else:
            self._tell(number, trial.status, trial.metric)
        self._tell_twins(record)

    # --- Optuna's side ----------------------------------------------------------------------------------------------

    def _history(self) -> Any:
        optuna, search = self.optuna, self.search
        form = {
            "space": self.study.told.get("space"),
            "metric": [self.study.metric, self.study.goal],
            "sampler": [search.sampler, search.seed],
            "seeds": self.study.seeds,
            "base": json.dumps(self.study.base.values, sort_keys=True, default=str),
        }
        digest = hashlib.sha256(json.dumps(form, sort_keys=True, default=str).encode()).hexdigest()[:8]
        pruner = optuna.pruners.MedianPruner() if search.pruner == "median" else optuna.pruners.NopPruner()
        path = (self.book.folder / DATABASE).resolve()
        try:
            history = optuna.create_study(
                storage=f"sqlite:///{path}",
                study_name=f"{self.study.name}-{digest}",
                direction="minimize" if self.study.goal == "min" else "maximize",
                sampler=self._sampler(0),
                pruner=pruner,
                load_if_exists=True,
            )
            others = [name for name in optuna.get_all_study_names(f"sqlite:///{path}") if name != history.study_name]
        except Exception as error:  # sqlalchemy's and alembic's own, of which there are many
            raise RunError(
                f"{path}: the search's history cannot be read or written: {type(error).__name__}: {error}. Without "
                "that file the search begins anew, and takes over finished runs that it proposes again"
            ) from error
        if others:
            self.notes.append(
                "The search had another form before (base, space, metric, sampler, seed) and began anew."
            )
        return history

    def _sampler(self, number: int) -> Any:
        seed = self.search.seed * 1_000_003 + number
        samplers = self.optuna.samplers
        return samplers.TPESampler(seed=seed) if self.search.sampler == "tpe" else samplers.RandomSampler(seed=seed)

    def _asked(self) -> int:
        waiting = self.optuna.trial.TrialState.WAITING
        trials = self.history.get_trials(deepcopy=False)
        return sum(_AGAIN not in each.user_attrs and each.state != waiting for each in trials)

    def _ask(self) -> int:
        number = len(self.history.get_trials(deepcopy=False))
        self.history.sampler = self._sampler(number)
        if self.combinations is not None:
            # One that was killed between these two lines is still in the queue.
            names, waiting = [_name(axis) for axis in self.search.axes], self.optuna.trial.TrialState.WAITING
            if not self.history.get_trials(deepcopy=False, states=[waiting]):
                chosen = self.combinations[self._asked()]
                self.history.enqueue_trial(dict(zip(names, chosen, strict=True)))
        trial = self.history.ask()
        self._choose(trial)
        return int(trial.number)

    def _choose(self, trial: Any) -> list[Option]:
        """What a trial sets; asks for what it does not know yet."""
        options = []
        for axis in self.search.axes:
            if isinstance(axis, Axis):
                labels = [_label(option) for option in axis.options]
                label = trial.suggest_categorical(_name(axis), labels) if len(labels) > 1 else labels[0]
                options.append(axis.options[labels.index(label)])
                continue
            if axis.whole:
                low, high, step = int(axis.low), int(axis.high), int(axis.step or 1)
                value = trial.suggest_int(axis.key, low, high, step=step, log=axis.log)
            else:
                value = trial.suggest_float(axis.key, axis.low, axis.high, step=axis.step, log=axis.log)
            options.append(Option({axis.key: value}, {axis.key: value}, axis.place))
        return options

    def _trial(self, number: int) -> Any:
        """A trial under way, as Optuna's own object."""
        key = str(number)
        if key not in self._trials:
            self.history.sampler = self._sampler(number)
            frozen = self.history.get_trials(deepcopy=False)[number]
            self._trials[key] = self.optuna.trial.Trial(self.history, frozen._trial_id)
        return self._trials[key]

    def _tell(self, number: int, status: str, value: float | None) -> None:
        state = self.optuna.trial.TrialState
        if status == "finished" and value is not None:
            self.history.tell(number, value)
        elif status == "pruned":
            self.history.tell(number, state=state.PRUNED)
        else:
            self.history.tell(number, state=state.FAIL)

    # --- what is there ----------------------------------------------------------------------------------------------

    def _take_over(self, frozen: Any, rerun_failed: bool) -> None:
        """A trial of an earlier start."""
        state = self.optuna.trial.TrialState
        if _AGAIN in frozen.user_attrs:
            return
        if frozen.state in (state.RUNNING, state.WAITING):
            if frozen.state == state.RUNNING:
                self._choose(self._trial(frozen.number))
                self._waiting.append(frozen.number)
                self._plan(frozen.number)
            return
        planned = self._plan(frozen.number)
        if planned is None or planned.key in self._told:
            return
        self._told[planned.key] = frozen.number
        record = self.book.by_key[planned.key]
        if record.status == "failed" and rerun_failed:
            self._again.append(planned.key)

    def _plan(self, number: int) -> Planned | None:
        """The run of a trial; None where its config is not valid, which is told."""
        frozen = self.history.get_trials(deepcopy=False)[number]
        options = self._choose(self.optuna.trial.FixedTrial(frozen.params, number=number))
        visible = [option for axis, option in zip(self.search.axes, options, strict=True) if _varies(axis)]
        seed = self.study.seeds[0] if self.study.seeds else None
        try:
            planned = plan(self.study, options, visible, seed)
        except ConfigError as error:
            self._note_invalid(number, visible, str(error))
            if not frozen.state.is_finished():
                self._tell(number, "failed", None)
            return None
        if planned.key not in self._planned:
            planned.name = f"t{number:03d}"
            self._planned[planned.key] = planned
            record = self.book.enter(planned)
            if record not in self.records:
                self.records.append(record)
        return self._planned[planned.key]

    def _note_invalid(self, number: int, options: list[Option], error: str) -> None:
        key = f"invalid-{number}"
        if key not in self.book.by_key:
            shown = {name: value for option in options for name, value in option.shown.items()}
            seed = self.study.seeds[0] if self.study.seeds else None
            self.book.by_key[key] = Record(f"t{number:03d}", key, shown, seed, status="failed", error=error)
        if self.book.by_key[key] not in self.records:
            self.records.append(self.book.by_key[key])

    def _tell_twins(self, record: Record) -> None:
        """Trials that propose what has been run: its value is theirs too."""
        if record.status in ("waiting", "running"):
            return
        trial = self.book.trial(record, self.study.metric)
        for number in self._twins.pop(record.key, []):
            self._tell(number, trial.status, trial.metric)
            log.info("trial %d has the settings of %s, whose result it takes", number, record.name)
        self._say_repeated()

    def _repeated(self) -> int:
        return max(0, self._asked() - len(self.records))

    def _say_repeated(self) -> None:
        repeated = self._repeated()
        self.notes = [note for note in self.notes if "proposed again" not in note]
        if repeated:
            self.notes.append(f"{repeated} of {self._asked()} settings were proposed again, and not run again.")

    def _combinations(self) -> list[tuple[Any, ...]]:
        """All settings of the grid sampler, in an order drawn by its seed."""
        every = list(itertools.product(*(list(_grid_values(axis)) for axis in self.search.axes)))
        random.Random(self.search.seed).shuffle(every)
        return every


def _values_of(path: Path, metric: str) -> Iterator[tuple[int, float]]:
    """What a run measured of the metric so far, by step."""
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                row = json.loads(line)
                if row.get(metric) is not None:
                    yield int(row["step"]), float(row[metric])


def _grid_values(axis: Axis | Range) -> Iterator[Any]:
    if isinstance(axis, Axis):
        yield from (_label(option) for option in axis.options)
        return
    assert axis.step is not None
    for index in range(int((axis.high - axis.low) / axis.step + 1e-9) + 1):
        value = axis.low + index * axis.step
        yield int(value) if axis.whole else float(value)


def _varies(axis: Axis | Range) -> bool:
    return isinstance(axis, Range) or len(axis.options) > 1


def _varied(axes: list[Axis | Range]) -> list[str]:
    names: list[str] = []
    for axis in axes:
        if _varies(axis):
            names += [axis.key] if isinstance(axis, Range) else [name for each in axis.options for name in each.shown]
    return list(dict.fromkeys(names))


def _name(axis: Axis | Range) -> str:
    return axis.key if isinstance(axis, Range) else axis.name


def _label(option: Option) -> Any:
    """A choice as Optuna stores it: a plain value, or the text of one."""
    value = next(iter(option.shown.values())) if len(option.shown) == 1 else option.shown
    return value if isinstance(value, str | int | float | bool) else json.dumps(value, sort_keys=True, default=str)


def _optuna() -> ModuleType:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "search: optuna needs Optuna, which is not installed: pip install 'luthier[studies]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna
