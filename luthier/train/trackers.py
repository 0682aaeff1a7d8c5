"""Metrics and samples to TensorBoard, Weights & Biases, trackio and MLflow, through accelerate's tracker
classes.

A tracker that cannot start is the user's to mend, and is said before anything else is done. One that fails
later costs its own rows only: it warns once and is left alone, for no dashboard is worth a run. What
TensorBoard, wandb and MLflow keep on the disk goes into the run folder, under `trackers/`, unless their own
environment variables say otherwise; trackio has one place for all projects, where `trackio show` finds them.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.config import Config, LoggingConfig
from luthier.errors import ConfigError
from luthier.train.distributed import Processes

log = logging.getLogger("luthier")

FOLDER = "trackers"
PROJECT = "luthier"
# Columns of a sample that a table shows; everything else is the same for all rows, or in samples.jsonl.
COLUMNS = ("step", "prompt", "text", "expected", "stopped", "max_new_tokens", "temperature", "top_p")


class Trackers:
    """All trackers of a run; none if the config names none.

    `output_dir`: the run folder. `config_flat`: the run's settings, stored with it.

    ConfigError: a tracker's package is missing, or it cannot start.
    """

    def __init__(
        self, logging: LoggingConfig, output_dir: str | Path, config_flat: Mapping[str, Any]
    ) -> None:
        self._trackers: dict[str, Any] = {}
        self._samples: list[dict[str, Any]] = []
        folder = Path(output_dir) / FOLDER
        settings = {key: _plain(value) for key, value in config_flat.items() if value is not None}
        for name in tracker_names(logging):
            self._trackers[name] = self._start(name, logging, folder, settings)

    def _start(self, name: str, section: LoggingConfig, folder: Path, settings: dict[str, Any]) -> Any:
        _check_installed(name)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with _accelerate_state():
                tracker = _BUILD[name](section, folder)
                tracker.main_process_only = False  # whoever makes Trackers is the process that reports
                tracker.start()
                tracker.store_init_configuration(settings)
        except Exception as error:
            remedy = _REMEDY.get(name, "")
            raise ConfigError(f"report_to: {name} cannot start: {_first_line(error)}{remedy}") from error
        return tracker

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Send one row of figures; `step` itself is the axis."""
        figures = {
            name: float(value)
            for name, value in metrics.items()
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if figures:
            self._each(lambda name, tracker: tracker.log(figures, step=step))

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Send samples as a table (as text to TensorBoard, which has none)."""
        if rows:
            self._samples.extend(dict(row) for row in rows)
            self._each(lambda name, tracker: _TABLE[name](tracker, rows, self._samples, step))

    @property
    def wandb_run(self) -> Any:
        """The run on Weights & Biases; None without that tracker, or after it failed."""
        tracker = self._trackers.get("wandb")
        return None if tracker is None else tracker.run

    def finish(self) -> None:
        """Close all of them; later calls do nothing."""
        self._each(lambda name, tracker: tracker.finish())
        self._trackers.clear()

    def _each(self, call: Callable[[str, Any], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                with _accelerate_state():
                    call(name, tracker)
            except Exception as error:
                # Whatever it is (a full disk, a network that went away): the run goes on without this one.
                del self._trackers[name]
                log.warning(
                    "%s failed and gets nothing more from this run: %s: %s. Nothing is lost: every row is in "
                    "metrics.jsonl and samples.jsonl",
                    name,
                    type(error).__name__,
                    _first_line(error),
                )


@contextmanager
def trackers_of(config: Config, folder: Path, processes: Processes) -> Iterator[Trackers]:
    """The trackers of a run, for as long as it lasts; none in any process but the first."""
    section = config.logging if processes.main else LoggingConfig()
    trackers = Trackers(section, folder, config.flat())
    try:
        yield trackers
    finally:
        trackers.finish()


def tracker_names(section: LoggingConfig) -> list[str]:
    """Trackers that the config turns on; `wandb_project` alone turns wandb on."""
    asked = [section.report_to] if isinstance(section.report_to, str) else list(section.report_to)
    if section.wandb_project and "wandb" not in asked:
        asked.append("wandb")
    return list(dict.fromkeys(asked))


def _check_installed(name: str) -> None:
    """ConfigError if the package of a tracker cannot be imported."""
    try:
        importlib.import_module(_PACKAGE.get(name, name))
    except ImportError as error:
        raise ConfigError(
            f"report_to: {name} is not installed ({_first_line(error)}): pip install 'luthier[{name}]', "
            "or take it out of report_to"
        ) from error


def _build_tensorboard(section: LoggingConfig, folder: Path) -> Any:
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker("tensorboard", logging_dir=str(folder))


def _build_wandb(section: LoggingConfig, folder: Path) -> Any:
    from accelerate.tracking import WandBTracker

    values = {
        "entity": section.wandb_entity,
        "name": section.wandb_name,
        "tags": section.wandb_tags or None,
        "job_type": section.wandb_job_type,
        "mode": section.wandb_mode,
        "dir": os.environ.get("WANDB_DIR", str(folder)),
    }
    project = section.wandb_project or os.environ.get("WANDB_PROJECT") or PROJECT
    return WandBTracker(project, **{name: value for name, value in values.items() if value is not None})


def _build_trackio(section: LoggingConfig, folder: Path) -> Any:
    from accelerate.tracking import TrackioTracker

    return TrackioTracker(section.wandb_project or PROJECT, name=section.wandb_name)


def _build_mlflow(section: LoggingConfig, folder: Path) -> Any:
    import mlflow
    from accelerate.tracking import MLflowTracker

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(f"sqlite:///{folder.resolve() / 'mlflow.db'}")
    tags = dict.fromkeys(section.wandb_tags, "true") or None
    return MLflowTracker(
        section.wandb_project or PROJECT,
        logging_dir=(folder / "mlflow-artifacts").resolve().as_uri(),
        run_name=section.wandb_name,
        tags=tags,
    )


def _table_tensorboard(tracker: Any, rows: Sequence[Any], everything: Sequence[Any], step: int) -> None:
    def cell(value: Any) -> str:
        return str(value).replace("|", "\\|").replace("\n", "<br>")

    names = _columns(rows)
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(cell(row.get(name, "")) for name in names) for row in rows]
    tracker.log({"samples": "\n".join(f"| {line} |" for line in lines)}, step=step)


def _table_wandb(tracker: Any, rows: Sequence[Any], everything: Sequence[Any], step: int) -> None:
    # The whole table each time: a run's page shows the last one only.
    names = _columns(everything)
    tracker.log_table(
        "samples", columns=names, data=[[row.get(name) for name in names] for row in everything], step=step
    )


def _table_trackio(tracker: Any, rows: Sequence[Any], everything: Sequence[Any], step: int) -> None:
    import pandas
    import trackio

    names = _columns(everything)
    frame = pandas.DataFrame([[row.get(name) for name in names] for row in everything], columns=names)
    tracker.log({"samples": trackio.Table(dataframe=frame)}, step=step)


def _table_mlflow(tracker: Any, rows: Sequence[Any], everything: Sequence[Any], step: int) -> None:
    import mlflow

    # Appended to what is there. All columns: the later rows of a table cannot have more than the first.
    mlflow.log_table({name: [row.get(name) for row in rows] for name in COLUMNS}, "samples.json")


_BUILD: dict[str, Callable[[LoggingConfig, Path], Any]] = {
    "tensorboard": _build_tensorboard,
    "wandb": _build_wandb,
    "trackio": _build_trackio,
    "mlflow": _build_mlflow,
}
_TABLE: dict[str, Callable[[Any, Sequence[Any], Sequence[Any], int], None]] = {
    "tensorboard": _table_tensorboard,
    "wandb": _table_wandb,
    "trackio": _table_trackio,
    "mlflow": _table_mlflow,
}
_PACKAGE = {"tensorboard": "torch.utils.tensorboard"}
_REMEDY = {"wandb": ". Without an account or network: wandb_mode: offline"}


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]


def _plain(value: Any) -> Any:
    """A setting as trackers take it: numbers and text as they are, anything else as JSON."""
    if isinstance(value, (bool, int, float, str)):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _accelerate_state() -> Iterator[None]:
    """accelerate's trackers log through a logger that wants its process state. Where there is none, it is
    lent a plain one and gets rid of it afterwards: nobody who makes an Accelerator later finds a device
    chosen here.
    """
    from accelerate import PartialState

    if PartialState._shared_state != {}:
        yield
        return
    # Inside of a launcher it would open a process group of its own, and wait for processes that have no trackers.
    launched = {name: os.environ.pop(name) for name in ("LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
    try:
        PartialState(cpu=True)
    finally:
        os.environ.update(launched)
    try:
        yield
    finally:
        PartialState._reset_state()
