"""A run folder as it is read: what is there, and nothing made up for what is not.

A run may be unfinished, cut off in the middle of a line, or made by an older version. Only `config.yaml` has to be
there; each other part is empty if its file is missing or broken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from luthier.errors import RunError

Row = dict[str, Any]
# (step, value)
Points = list[tuple[float, float]]

CONFIG, METRICS, SAMPLES, NOTES = "config.yaml", "metrics.jsonl", "samples.jsonl", "notes.jsonl"
SUMMARY, ENVIRONMENT, EVALUATION = "summary.json", "environment.json", "evaluation"
# Parts of a run that may have been measured by themselves.
CHECKPOINT, MERGED = "checkpoint-", "merged"

# Answers of an evaluation that are read for its table of examples.
MOST_ROWS = 400


@dataclass(frozen=True)
class ConfigLine:
    """A line of `config.yaml`: its text, where the value is from, and whether it would do nothing."""

    text: str
    origin: str
    idle: bool

    @property
    def chosen(self) -> bool:
        return self.origin != "default"


@dataclass
class Run:
    """What a run folder holds.

    Attributes:
        label: how the run is called on a page. config: flat keys. lines: those of `config.yaml`, by section.
        metrics: training rows, evaluation rows and shares of samples, in the order of steps.
        summary: what the run came to; empty until it ends. evaluations: (name, result, example rows) of the run as it
            ended. parts: the same of its checkpoints, by step, and of its merged model; `part` in the result says of
            which.
    """

    folder: Path
    label: str
    config: Row
    lines: list[tuple[str, list[ConfigLine]]]
    metrics: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    notes: list[Row] = field(default_factory=list)
    summary: Row = field(default_factory=dict)
    environment: Row = field(default_factory=dict)
    evaluations: list[tuple[str, Row, list[Row]]] = field(default_factory=list)
    parts: list[tuple[str, Row, list[Row]]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @cached_property
    def steps(self) -> int:
        """Steps done, as far as rows tell."""
        return max((int(row["step"]) for row in self.metrics), default=0)

    @property
    def total_steps(self) -> int | None:
        total = self.environment.get("total_steps")
        return total if isinstance(total, int) else None

    @cached_property
    def epochs(self) -> Points:
        return self.points("epoch")

    def epoch_of(self, step: float) -> float | None:
        """The epoch that a step is in, from the rows around it: epochs go evenly with steps."""
        return step * self.epochs[-1][1] / self.epochs[-1][0] if self.epochs and self.epochs[-1][0] else None

    def points(self, name: str) -> Points:
        """The finite values of a figure over the steps."""
        return self._columns.get(name, [])

    @cached_property
    def _columns(self) -> dict[str, Points]:
        found: dict[str, Points] = {}
        for row in self.metrics:
            step = float(row["step"])
            for name, value in row.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    found.setdefault(name, []).append((step, float(value)))
        return found

    def last(self, name: str) -> float | None:
        points = self.points(name)
        return points[-1][1] if points else None

    @property
    def data(self) -> Row:
        """Counts of the data, as `environment.json` has them."""
        return _mapping(self.environment.get("data"))


def read_run(path: str | Path) -> Run:
    """Read a run folder.

    Raises:
        RunError: there is none, or its config cannot be read.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        raise RunError(f"{folder}: there is no such run folder")
    if not folder.is_dir():
        raise RunError(f"{folder} is a file; a report is made of a run folder, which is what output_dir named")
    if not (folder / CONFIG).is_file():
        raise RunError(
            f"{folder} is no run folder: it has no {CONFIG}, which `luthier train` writes before the first step"
        )
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"{folder / CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise RunError(f"{folder / CONFIG} is no config: it has to be keys and values")
    return Run(
        folder,
        folder.resolve().name,
        config,
        config_lines(text),
        metrics=sorted(_rows(folder / METRICS), key=lambda row: row["step"]),
        samples=list(_rows(folder / SAMPLES)),
        notes=list(_rows(folder / NOTES)),
        summary=_object(folder / SUMMARY),
        environment=_object(folder / ENVIRONMENT),
        evaluations=list(_evaluations(folder / EVALUATION)),
        parts=list(_of_parts(folder / EVALUATION)),
    )


def config_lines(text: str) -> list[tuple[str, list[ConfigLine]]]:
    """The lines of a `config.yaml` under the headings of its sections; a line ends with its value's origin."""
    sections: list[tuple[str, list[ConfigLine]]] = []
    for line in text.split("\n"):
        body, mark, origin = line.rpartition("  # ")
        if mark:
            idle = body.startswith("# ")
            if not sections:
                sections.append(("", []))
            sections[-1][1].append(ConfigLine(body[2:] if idle else body, origin.strip(), idle))
        elif line.startswith("# "):
            sections.append((line[2:].strip(), []))
    return [(heading, lines) for heading, lines in sections if lines]


def _evaluations(folder: Path) -> Iterator[tuple[str, Row, list[Row]]]:
    # By name without its ending, so that `general` comes before `general-limit20`.
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stem):
        result = _object(path)
        if not isinstance(result.get("figures"), dict):
            continue
        name = result.get("rows")
        rows = list(_objects(folder / Path(name).name)) if isinstance(name, str) else []
        yield path.stem, result, rows


def _of_parts(folder: Path) -> Iterator[tuple[str, Row, list[Row]]]:
    """Results of checkpoints and of the merged model, each in a folder of the part's name."""
    found = [path for path in folder.glob("*") if path.is_dir() and (step_of(path.name) or path.name == MERGED)]
    for path in sorted(found, key=lambda path: step_of(path.name) or math.inf):
        for name, result, rows in _evaluations(path):
            yield name, {**result, "part": path.name}, rows


def step_of(part: str) -> int | None:
    """The step of a checkpoint, by its folder's name."""
    number = part.removeprefix(CHECKPOINT)
    return int(number) if number != part and number.isdecimal() else None


def _rows(path: Path) -> Iterator[Row]:
    """Rows that have a step."""
    for row in _objects(path, limit=None):
        if isinstance(row.get("step"), int | float):
            yield row


def _objects(path: Path, limit: int | None = MOST_ROWS) -> Iterator[Row]:
    """Objects of a JSONL file; a line cut off by a kill is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file):
            if limit is not None and number >= limit:
                return
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def _object(path: Path) -> Row:
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8", errors="replace")))
    except (OSError, ValueError):
        return {}


def _mapping(value: Any) -> Row:
    return value if isinstance(value, dict) else {}
