"""What a study knows of its runs beside what lies in their folders: one small file for each, runs/NAME.json.

A run is found by its key, whatever it was called when it was first asked for. `running` in a file whose process is gone
is what a killed study leaves: whether the run ended is then seen by its folder.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from luthier.errors import RunError
from luthier.experiments.run_files import SUMMARY, read_run
from luthier.experiments.study.expand import Planned
from luthier.experiments.study.results import RUNS, Trial, fill, write_whole

_LOG_LINES, _LOG_BYTES = 8, 20_000
_LONGEST_ERROR = 1_200


@dataclass
class Record:
    """A run of the study. `began`: when its process was started last (Unix time); `seconds`: of its earlier ones."""

    name: str
    key: str
    settings: dict[str, Any]
    seed: int | None
    changed: dict[str, Any] = field(default_factory=dict)
    status: Literal["waiting", "running", "finished", "failed", "pruned"] = "waiting"
    began: float | None = None
    seconds: float = 0.0
    error: str = ""


class Book:
    """The runs that a study folder has files of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / RUNS
        self.by_key: dict[str, Record] = {}
        for path in sorted(self.runs.glob("*.json")):
            record = _read(path)
            if record is not None:
                self.by_key[record.key] = record
        self.known = set(self.by_key)
        for record in self.by_key.values():
            self._settle_what_was_left(record)

    def run_folder(self, record: Record) -> Path:
        return self.runs / record.name

    def config_file(self, record: Record) -> Path:
        return self.runs / f"{record.name}.yml"

    def log_file(self, record: Record) -> Path:
        return self.runs / f"{record.name}.log"

    def enter(self, planned: Planned) -> Record:
        """The record of a run: what is known of it already, or a new one in a folder that is no other run's."""
        record = self.by_key.get(planned.key)
        if record is None:
            taken = {each.name.lower() for each in self.by_key.values()}
            name = planned.name
            if name.lower() in taken or (self.runs / name).exists():
                name = f"{name}-{planned.key[:6]}"
            record = self.by_key[planned.key] = Record(name, planned.key, planned.settings, planned.seed)
        record.settings, record.seed, record.changed = planned.settings, planned.seed, planned.changed
        return record

    def save(self, record: Record) -> None:
        """Write a record down."""
        text = json.dumps(asdict(record), indent=1, ensure_ascii=False, default=str)
        write_whole(self.runs / f"{record.name}.json", text + "\n")

    def trial(self, record: Record, metric: str) -> Trial:
        """The row of a run."""
        waiting = record.status in ("waiting", "running")
        trial = Trial(
            record.name,
            record.settings,
            record.seed,
            folder=f"{RUNS}/{record.name}",
            status="waiting" if waiting else record.status,  # type: ignore[arg-type]
            seconds=record.seconds or None,
            key=record.key,
            changed=record.changed,
            error=record.error,
        )
        if record.status in ("finished", "pruned"):
            try:
                fill(trial, read_run(self.run_folder(record)), metric)
            except RunError as error:
                trial.status, trial.error = "failed", str(error)
        if record.status == "pruned":
            trial.metric = None  # not of the end, so that no other is like it
        return trial

    def error_of(self, record: Record, status: int) -> str:
        """The last lines that a failed run said."""
        ended = f"ended with status {status}"
        if status < 0:
            ended = f"was ended by signal {-status}" + (" (out of memory?)" if status == -9 else "")
        try:
            with self.log_file(record).open("rb") as file:
                file.seek(0, 2)
                file.seek(max(0, file.tell() - _LOG_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return ended
        lines = [line.rstrip() for line in lines if line.strip()]
        last = max((i for i, line in enumerate(lines) if re.match(r"(internal )?error: ", line)), default=None)
        told = lines[last:] if last is not None else lines[-_LOG_LINES:]
        text = "\n".join(told[:_LOG_LINES])[-_LONGEST_ERROR:]
        return text if last is not None and status >= 0 else f"{ended}:\n{text}"

    def has_ended(self, record: Record) -> bool:
        """Whether the run came to its end: its summary is there from then on."""
        return (self.run_folder(record) / SUMMARY).is_file()

    def _settle_what_was_left(self, record: Record) -> None:
        if record.status == "finished" and not self.has_ended(record):
            record.status, record.seconds = "waiting", 0.0  # somebody deleted it
        if record.status != "running":
            return
        began = record.began or time.time()
        record.seconds += max(0.0, _changed(self.log_file(record), self.run_folder(record) / SUMMARY) - began)
        summary = self.run_folder(record) / SUMMARY
        record.status = "finished" if summary.is_file() and summary.stat().st_mtime >= began else "waiting"
        self.save(record)


def _changed(*paths: Path) -> float:
    return max((path.stat().st_mtime for path in paths if path.is_file()), default=0.0)


def _read(path: Path) -> Record | None:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        names = Record.__dataclass_fields__
        record = Record(**{name: value for name, value in told.items() if name in names})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return record if record.name == path.stem else None
