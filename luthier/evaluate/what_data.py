"""What `--data` means: which config says where the rows are, and how they are turned into tokens.

A run is measured on its own validation data unless told otherwise, a config brings its own settings with it, and files
are read as the run's first dataset was, or as `--type` says.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.config import Config
from luthier.config.datasets import TYPES, DatasetEntry
from luthier.config.entries import flaws
from luthier.data.formats import columns_of
from luthier.data.hub import notice_missing_network
from luthier.data.readers import open_rows
from luthier.errors import ConfigError, DataError
from luthier.evaluate.results import RUN_CONFIG, run_folder
from luthier.models.load import read_model_config
from luthier.models.rope import positions

log = logging.getLogger("luthier")

_ABOUT_PLACE = ("path", "name", "revision", "split", "data_files", "ds_type")


@dataclass(frozen=True)
class Wanted:
    """The data to measure on.

    Attributes:
        config: whose `test_datasets`, `val_set_size` or `datasets` it is. run: that of the target, if it is a run.
        own: whether the run's settings (its chat template among them) are those of `config`.
        name: of the result's files. described: for people. general: it is the general set, whose rows the config
            does not name.
    """

    config: Config
    run: Config | None
    own: bool
    name: str
    described: str
    general: bool = False


def what_data(target: str, data: Sequence[str], type: str | None) -> Wanted:
    """Raises ConfigError and DataError for what cannot be measured on."""
    must_exist(target)
    folder = run_folder(target)
    run = None if folder is None else Config.load(folder / RUN_CONFIG)
    configs = [name for name in data if name.endswith((".yml", ".yaml"))]
    if configs and (len(data) > 1 or type):
        beside = "--type" if type else "other data"
        raise ConfigError(f"--data {configs[0]}: a config says what its data is: leave {beside} out")
    if configs:
        wanted = _of_config(configs[0], run)
    elif data:
        wanted = _of_files(target, data, type, run)
    else:
        wanted = _of_run(target, type, run)
    _check(wanted.config)
    return wanted


def must_exist(target: str) -> None:
    """Refuse what can only be a folder and is none, before the hub is asked for it; and where there is no network, find
    that out once, before the hub's client waits for it at each file."""
    path = Path(target).expanduser()
    first, *inside = target.split("/")
    a_folder = target.startswith(("/", ".", "~")) or len(inside) > 1 or (inside and Path(first).is_dir())
    if a_folder and not path.exists():
        raise ConfigError(f"{target}: there is no such folder")
    run = run_folder(target)
    base = None if run is None else Config.load(run / RUN_CONFIG).model.base_model
    if not all(Path(name).expanduser().exists() for name in (target, base or target)):
        notice_missing_network()


def _of_run(target: str, type: str | None, run: Config | None) -> Wanted:
    if type is not None:
        raise ConfigError("--type says what the rows of data files are: give them with --data")
    if run is None:
        there = Path(target).expanduser().exists()
        what = "is no run" if there else "is no folder here, and a model on the hub is no run"
        raise ConfigError(f"{target} {what}, which would have validation data of its own: give --data")
    if not (run.data.test_datasets or run.data.val_set_size):
        raise ConfigError(
            f"{target}: the run held nothing out (neither val_set_size nor test_datasets): give --data, rows that it "
            "was not trained on"
        )
    return Wanted(run, run, True, "validation", "the run's own validation data")


def _of_config(path: str, run: Config | None) -> Wanted:
    config = Config.load(path)
    data = config.data
    if not data.val_set_size or data.test_datasets:
        _warn_of_trained(data.test_datasets or data.datasets, run)
    return Wanted(config, run, False, Path(path).stem, path)


def _warn_of_trained(entries: Sequence[DatasetEntry], run: Config | None) -> None:
    """Say which of the data the run was trained on."""

    def place(entry: DatasetEntry) -> tuple[str, str | None]:
        path = Path(entry.path).expanduser()
        return str(path.resolve()) if path.exists() else entry.path, entry.split

    trained = set() if run is None else {place(entry) for entry in run.data.datasets}
    for entry in entries:
        if place(entry) in trained:
            log.warning("%s: the run was trained on rows of it: how it does on others is not said by them", entry.path)


def _of_files(target: str, data: Sequence[str], type: str | None, run: Config | None) -> Wanted:
    if type is None and run is None:
        raise ConfigError(
            f"--data {data[0]}: {target} is no run, which would say what the rows are: add --type (alpaca, "
            "chat_template, completion, ...), or give a config"
        )
    described: dict[str, Any] = {"type": type}
    if type is None:
        assert run is not None
        first = run.flat()["datasets"][0]
        described = {key: value for key, value in first.items() if key not in _ABOUT_PLACE}
    entries = [{**described, "path": path} for path in data]
    name = Path(data[0]).stem if len(data) == 1 else f"{Path(data[0]).stem}-and-{len(data) - 1}"
    shown = data[0] if len(data) == 1 else f"{len(data)} files"
    if run is None:
        config = Config.from_flat({"base_model": target, "datasets": entries}, "--data")
        return Wanted(_within_model(config, target), None, False, name, shown)
    config = run.replace("--data", test_datasets=entries)
    if type in TYPES and config.preference.rl is not None:
        # What orpo sets for itself goes with it: its likelihood is that of prompts as well.
        own = {"train_on_inputs": None} if config.preference.rl == "orpo" else {}
        config = config.replace("--type", rl=None, **own)
    for entry in config.data.test_datasets:
        for _, message in flaws(entry, config.data.train_on_inputs, config.preference.rl):
            raise ConfigError(f"--data {entry.path}: {message}")
    _warn_of_trained(config.data.test_datasets, run)
    return Wanted(config, run, True, name, shown)


def _within_model(config: Config, target: str) -> Config:
    """A bare model has no sequence_len: its own positions are the limit."""
    folder = Path(target).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        return config  # an adapter: its base says
    limit = positions(read_model_config(config.model).get_text_config(decoder=True))
    if limit is None or limit >= config.data.sequence_len:
        return config
    return config.replace("the model's positions", sequence_len=limit)


def _check(config: Config) -> None:
    """What can be said of the rows before any is tokenised."""
    entries = config.data.test_datasets or config.data.datasets
    rl = config.preference.rl
    for entry in entries:
        _, row = next(iter(open_rows(entry).scan()), ("", None))
        if row is None:
            raise DataError(f"{entry.path}: there are no rows in it.")
        if rl is None and isinstance(row, dict) and {"chosen", "rejected"} <= row.keys() - columns_of(entry):
            raise DataError(
                f"{entry.path}: its rows are answers to compare (`chosen`, `rejected`): give a config with rl (dpo, "
                "orpo, ...) to --data; or name the answer to expect there, for instance with field_output"
            )
