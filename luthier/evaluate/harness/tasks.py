"""Tasks of lm-evaluation-harness by name, with their data, before any model is loaded."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from luthier.data.hub import notice_missing_network
from luthier.errors import ConfigError, DataError

# What the hub's client and datasets say where there is no network.
_OFFLINE = ("offline", "couldn't reach", "connection", "couldn't find any data file")


def load_tasks(tasks: str, include_path: str | Path | None) -> tuple[list[str], dict[str, Any]]:
    """The names that are asked for, and the harness's tasks and groups.

    Raises:
        ConfigError: no such task or folder, or a task that cannot be run here. DataError: a task's data is not there.
    """
    asked = [name for name in (part.strip() for part in tasks.split(",")) if name]
    if not asked:
        raise ConfigError("--tasks: no task is named; names are separated by commas: gsm8k,arc_easy")
    folder = None if include_path is None else Path(include_path).expanduser()
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--include_path {include_path}: there is no such folder")
    notice_missing_network()
    if folder is not None and not any(set("*?[") & set(name) for name in asked):
        # The harness's own tasks are thousands of files, and are not read where the folder has all that is named.
        own = _manager(folder, include_defaults=False)
        if all(name in own.all_tasks for name in asked):
            with contextlib.suppress(DataError):  # a group of the folder may have tasks of the harness
                return asked, _checked(_load(own, asked))
    manager = _manager(folder, include_defaults=True)
    names: list[str] = []
    for name in asked:
        names += [each for each in _matches(manager, name, folder) if each not in names]
    return names, _checked(_load(manager, names))


def _manager(folder: Path | None, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    try:
        return TaskManager(include_path=None if folder is None else str(folder), include_defaults=include_defaults)
    except Exception as error:  # a YAML file of the folder that is none
        raise ConfigError(f"--include_path {folder}: {words_of(error)}") from error


def _matches(manager: Any, name: str, folder: Path | None) -> list[str]:
    if name.endswith((".yaml", ".yml")) and Path(name).expanduser().is_file():
        return [str(Path(name).expanduser())]
    if found := manager.match_tasks([name]):
        return list(found)
    # The harness passes over files that it cannot read, and one of them may be what is meant.
    for path in sorted(folder.rglob("*.y*ml")) if folder is not None else ():
        try:
            yaml.compose(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"--tasks {name}: no such task, and {path} cannot be read: {words_of(error)}") from error
    near = difflib.get_close_matches(name, manager.all_tasks, 5)
    hint = f"; near it: {', '.join(near)}" if near else ""
    raise ConfigError(
        f"--tasks {name}: lm-evaluation-harness has no such task{hint}. `lm-eval ls tasks` lists them, and "
        "--include_path FOLDER adds those of a folder"
    )


def _checked(loaded: dict[str, Any]) -> dict[str, Any]:
    """Refuses what cannot be run here."""
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"--tasks {name}: it runs code that the model writes, which is not done here")
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"--tasks {name}: its questions have images or sound, and models here read text")
    return loaded


def _load(manager: Any, names: Sequence[str]) -> dict[str, Any]:
    """Tasks and groups with their data; each name for itself, to say which one it is that cannot be had."""
    objects: list[Any] = []
    for name in names:
        try:
            objects += topmost(manager.load([name]))
        except Exception as error:  # of the hub, of datasets, of a task's own code
            lowered = str(error).lower()
            offline = isinstance(error, ConnectionError) or any(word in lowered for word in _OFFLINE)
            hint = "; the hub cannot be reached, and the data is not on this machine" if offline else ""
            raise DataError(f"--tasks {name}: it cannot be loaded{hint}: {words_of(error)}") from error
    return dict(manager.load(objects))


def topmost(loaded: Mapping[str, Any]) -> list[Any]:
    """The topmost groups, and the tasks that are in none."""
    groups = loaded.get("groups", {})
    inner = {child for children in loaded.get("group_map", {}).values() for child in children}
    in_groups = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    top = [group for key, group in groups.items() if key not in inner]
    return top + [task for key, task in loaded["tasks"].items() if key not in in_groups]


def words_of(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
