"""transformers' callbacks, told of a run that is not transformers'.

Supported are the events of `EVENTS` and `control.should_training_stop`; a callback that overrides another event is
refused by name, since it would wait for it in vain. `EarlyStoppingCallback` becomes the config's
`early_stopping_patience`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState

from luthier.api.said import say_once
from luthier.errors import ConfigError
from luthier.train.run import Follower

EVENTS = (
    "on_init_end",
    "on_train_begin",
    "on_step_end",
    "on_epoch_end",
    "on_log",
    "on_evaluate",
    "on_save",
    "on_train_end",
)
_FLAGS = ("should_epoch_stop", "should_save", "should_evaluate", "should_log")


def checked(callback: Any) -> TrainerCallback:
    """A callback whose events all come; a class is made an instance, as in transformers.

    Raises:
        ConfigError: it waits for an event that does not come.
    """
    made = callback() if isinstance(callback, type) else callback
    if not isinstance(made, TrainerCallback):
        raise ConfigError(f"callbacks: {type(made).__name__} is no TrainerCallback of transformers")
    known = [name for name in vars(TrainerCallback) if name.startswith("on_")]
    own = [name for name in known if getattr(type(made), name) is not getattr(TrainerCallback, name)]
    waits = [name for name in own if name not in EVENTS]
    if waits:
        raise ConfigError(
            f"callbacks: {type(made).__name__} waits for {', '.join(waits)}, which is not called here; called are "
            f"{', '.join(EVENTS)}"
        )
    return made


def early_stopping(callbacks: Sequence[TrainerCallback]) -> tuple[list[TrainerCallback], dict[str, Any]]:
    """The other callbacks, and the key that says of early stopping what transformers' callback says."""
    others = [one for one in callbacks if not isinstance(one, EarlyStoppingCallback)]
    found = [one for one in callbacks if isinstance(one, EarlyStoppingCallback)]
    if not found:
        return others, {}
    if found[-1].early_stopping_threshold:
        raise ConfigError(
            f"EarlyStoppingCallback: early_stopping_threshold={found[-1].early_stopping_threshold}: any lower "
            "eval_loss counts as better here; leave it out"
        )
    return others, {"early_stopping_patience": int(found[-1].early_stopping_patience)}


class Reporter(Follower):
    """Keeps transformers' TrainerState of a run, and tells callbacks what happens.

    Args:
        handed: what callbacks get by keyword beside arguments, state and control (`model`, `processing_class`).
    """

    def __init__(self, args: Any, callbacks: Sequence[TrainerCallback], handed: dict[str, Any]) -> None:
        self.args, self.callbacks, self.handed = args, list(callbacks), handed
        self.state = TrainerState()
        self.control = TrainerControl()
        self._stopper = ""
        self._per_epoch: float = 1
        self._folder: Path | None = None

    def restart(self, folder: Path) -> None:
        """A run in this folder is about to begin, or to go on."""
        self._folder = folder

    def begins(self, total_steps: int, steps_per_epoch: float, from_step: int) -> None:
        self._per_epoch = steps_per_epoch
        self.state = TrainerState()
        self._take_over(from_step)
        self.state.max_steps, self.state.global_step = total_steps, from_step
        self.state.num_train_epochs = ceil(total_steps / steps_per_epoch - 1e-6)
        self.state.epoch = from_step / steps_per_epoch
        self.control = TrainerControl()
        self._stopper = ""
        self.state.is_world_process_zero = self.state.is_local_process_zero = True
        self.tell("on_train_begin")

    def step(self, step: int) -> None:
        self.state.global_step, self.state.epoch = step, step / self._per_epoch
        self.tell("on_step_end")
        if step // self._per_epoch > (step - 1) // self._per_epoch:
            self.tell("on_epoch_end")

    def row(self, row: dict[str, Any], step: int) -> None:
        logged = {"epoch": step / self._per_epoch, **row}
        self.state.log_history.append(logged)
        if "eval_loss" in row:
            loss = row["eval_loss"]
            if self.state.best_metric is None or loss < self.state.best_metric:
                self.state.best_metric, self.state.best_global_step = loss, step
            self.tell("on_evaluate", metrics=dict(logged))
        self.tell("on_log", logs={name: value for name, value in logged.items() if name != "step"})

    def _take_over(self, from_step: int) -> None:
        """What the run had logged up to the checkpoint that it goes on from."""
        path = None if self._folder is None else self._folder / "metrics.jsonl"
        if path is None or not from_step:
            return
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            self.state.log_history.append({"epoch": row["step"] / self._per_epoch, **row})

    def saved(self, checkpoint: Path) -> None:
        if self.state.best_global_step and checkpoint.name == f"checkpoint-{self.state.best_global_step}":
            self.state.best_model_checkpoint = str(checkpoint)
        self.tell("on_save")

    def ended(self) -> str:
        return f"{self._stopper} set should_training_stop" if self._stopper else ""

    def tell(self, event: str, **more: Any) -> None:
        for callback in self.callbacks:
            result = getattr(callback, event)(self.args, self.state, self.control, **self.handed, **more)
            self.control = result if isinstance(result, TrainerControl) else self.control
            name = type(callback).__name__
            for flag in _FLAGS:
                if getattr(self.control, flag):
                    setattr(self.control, flag, False)
                    say_once(f"callbacks: {name} sets {flag}, which has no effect here: the arguments say when")
            if self.control.should_training_stop and not self._stopper:
                self._stopper = name
