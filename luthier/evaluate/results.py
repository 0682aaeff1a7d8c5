"""Where results of evaluations lie, and in which form.

Every kind has the same frame: a JSON file that says what was measured, and beside it, where there are any, the rows in
a JSONL of the same name. Those of a run lie in its folder, so that they go where it goes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from luthier.errors import RunError

log = logging.getLogger("luthier")

FOLDER = "evaluation"
RUN_CONFIG = "config.yaml"


def digest(value: Any) -> str:
    """Hash of a JSON value, as 32 hexadecimal digits."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def run_folder(target: str) -> Path | None:
    """The run that a target is, or is a checkpoint or the merged model of."""
    folder = Path(target).expanduser()
    if (folder / RUN_CONFIG).is_file():
        return folder
    inside = folder.name.startswith("checkpoint-") or folder.name in ("merged", "merged-4bit")
    above = folder.parent
    return above if inside and (above / RUN_CONFIG).is_file() else None


def results_folder(target: str, output: Path | None = None) -> Path:
    """`output`, else the run's `evaluation`, else `evaluation/NAME` here."""
    if output is not None:
        return output
    own, run = Path(target).expanduser(), run_folder(target)
    if run is None:
        name = own.resolve().name if own.exists() else target.strip("/")
        return Path(FOLDER) / re.sub(r"[^\w.-]+", "--", name)
    return run / FOLDER if own.resolve() == run.resolve() else run / FOLDER / own.name


def ready(folder: Path) -> Path:
    """The folder, which is there and can be written to: said before hours of work, and not after them.

    Raises:
        RunError: it cannot be.
    """
    probe = folder / f".partial-{os.getpid()}-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return folder


def check_writable(folder: Path) -> None:
    """Make the folder of the results, before anything is measured that would be lost.

    Raises:
        RunError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise RunError(f"{folder}: cannot be written: name another folder with --output")
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> RunError:
    return RunError(f"{folder}: cannot be written: {error.strerror or error}: name another folder with --output")


def write_results(
    folder: Path,
    name: str,
    *,
    kind: str,
    target: str,
    compare: str | None,
    figures: dict[str, Any],
    rows: Iterable[dict[str, Any]] | str | None = None,
    **further: Any,
) -> tuple[Path, dict[str, Any]]:
    """Write `name.json` and `name.jsonl`, each whole or not at all; gives the JSON's path and its content. `rows` may
    also name a file of the folder that holds them already. A result with another model beside it is not lost to one
    without: that has a name of its own.

    Raises:
        RunError: the folder cannot be written.
    """
    name = _name_beside(folder, name, target, compare)
    described = {
        "kind": kind,
        "target": target,
        "compare": compare,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **further,
        "figures": figures,
        "rows": rows if rows is None or isinstance(rows, str) else f"{name}.jsonl",
    }
    path = folder / f"{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            log.info("%s is replaced", path)
        if rows is not None and not isinstance(rows, str):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            _write_whole(path.with_suffix(".jsonl"), lines)
        _write_whole(path, [json.dumps(described, indent=2, ensure_ascii=False) + "\n"])
    except OSError as error:
        raise _unwritable(folder, error) from error
    return path, described


def _name_beside(folder: Path, name: str, target: str, compare: str | None) -> str:
    """`name`, or one that says what the model is set beside where the result that is there sets it beside another."""
    path = folder / f"{name}.json"
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        there = old["compare"] if _same_model(old["target"], target) else None
    except (OSError, ValueError, KeyError, TypeError):
        return name
    if not isinstance(there, str) or (compare is not None and _same_model(there, compare)):
        return name
    how = "alone" if compare is None else "beside-" + re.sub(r"[^\w.-]+", "--", compare.strip("./"))[-60:]
    log.info("%s, with %s beside the model, stays: this result is %s-%s.json", path, there, name, how)
    return f"{name}-{how}"


def _same_model(one: str, other: str) -> bool:
    """Whether two strings name the same model; one that is a folder here may be written in several ways."""
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def _write_whole(path: Path, pieces: Iterable[str]) -> None:
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(pieces)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
