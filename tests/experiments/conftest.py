"""Run folders as `train` leaves them, made from rows: no model is trained here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from luthier.config import Config

Row = dict[str, Any]
MakeRun = Callable[..., Path]
# Elements that have no end.
VOID = {"meta", "br", "hr", "img", "input", "link"}
# Losses of an evaluation after every ten steps; `train` and `eval_loss` of a run that overfits from step 30 on.
TRAIN = [2.0, 1.4, 1.0, 0.7, 0.5, 0.3]
RISES = [1.9, 1.5, 1.2, 1.3, 1.5, 1.8]
FALLS = [1.9, 1.5, 1.2, 1.1, 1.0, 0.9]


def curve(train: Sequence[float] = TRAIN, evaluated: Sequence[float] = (), **figures: Sequence[float]) -> list[Row]:
    """Rows of `metrics.jsonl`: two of training to each value, ten steps to an evaluation."""
    rows: list[Row] = []
    for place, loss in enumerate(train):
        more = {name.replace("__", "/"): values[place] for name, values in figures.items()}
        for step in (10 * place + 5, 10 * place + 10):
            rows.append(
                {"step": step, "epoch": step / 20, "loss": loss, "learning_rate": 1e-3, "grad_norm": 0.5,
                 "tokens": 100 * step, "trained_tokens": 10 * step, "tokens_per_second": 900.0, "seconds": step / 2,
                 "peak_memory_gib": 1.5} | {k: v for k, v in more.items() if not k.startswith("eval_")}
            )  # fmt: skip
        if evaluated:
            own = {name: value for name, value in more.items() if name.startswith("eval_")}
            rows.append({"step": 10 * place + 10, "eval_loss": evaluated[place], **own})
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """(name, metrics, other files by name as rows or as an object, config keys) -> run folder."""

    def make(
        name: str = "run",
        metrics: Iterable[Row] | None = None,
        files: Mapping[str, Any] | None = None,
        **keys: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        rows = {"path": "rows.jsonl"} | ({} if "rl" in keys else {"type": "alpaca"})
        flat = {"base_model": "org/base", "datasets": [rows], "adapter": "lora"}
        config = Config.from_flat({**flat, "output_dir": str(folder), **keys}, "cfg.yml:3")
        (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        if metrics is not None:
            write_rows(folder / "metrics.jsonl", metrics)
        for file, content in (files or {}).items():
            path = folder / file
            path.parent.mkdir(exist_ok=True)
            if isinstance(content, list):
                write_rows(path, content)
            else:
                path.write_text(json.dumps(content), encoding="utf-8")
        return folder

    return make


class Page(HTMLParser):
    """A page as its elements: what is open must be closed in order, and all text is gathered."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> inside of {self.open[-3:]}"
        self.open.pop()
        self.text += " " if tag in ("td", "th", "dt", "dd") else ""

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def headings(self) -> set[str | None]:
        """The ids of the parts that the page has."""
        return {attrs.get("id") for tag, attrs in self.tags if tag == "section" and "id" in attrs}

    def charts(self) -> list[str]:
        """What is said of each drawing to who cannot see it."""
        return [attrs["aria-label"] or "" for tag, attrs in self.tags if tag == "svg"]
