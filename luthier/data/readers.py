"""From a dataset entry to rows, each with the place that it came from.

An entry's `path` is a file, a folder of files, a folder that `datasets.save_to_disk` wrote, or an id on the
Hugging Face hub. All of them become `Rows`: an iterable of `(location, row)` with a fingerprint of the
content. Finding the files is done here, reading one of them in `files`. Local paths win over hub ids of the
same name.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from luthier.artifacts.source import local_dataset
from luthier.config.datasets import DatasetEntry
from luthier.data.files import KINDS, Row, kind_of, read_file, without_nulls
from luthier.data.hub import notice_missing_network
from luthier.errors import ConfigError, DataError

log = logging.getLogger("luthier")

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SPLIT = re.compile(r"(?P<name>[\w.-]+)(\[(?P<start>\d*):(?P<stop>\d*)\])?")
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
}
"""Words in file and folder names that say which split they hold; the hub goes by the same ones."""


@dataclass(frozen=True)
class Rows:
    """Rows of one dataset, in a fixed order, read anew by each iteration."""

    shown: str
    """What messages call this dataset: its path as the config has it."""
    source: Callable[[], Iterator[tuple[str, Row | DataError]]]
    hashed: Callable[[], str]
    start: int = 0
    stop: int | None = None
    files: tuple[tuple[Path, str], ...] = ()
    """The files here that they are in, each with its kind; none of a hub dataset."""

    @property
    def fingerprint(self) -> str:
        """Hash of the content, the names of its files, and the stretch that is taken; reads every byte
        once."""
        return hashlib.sha256(f"{self.hashed()} {self.start} {self.stop}".encode()).hexdigest()

    def scan(self) -> Iterator[tuple[str, Row | DataError]]:
        """Rows with their locations ("rows.jsonl:17"), and in place of a bad row the error that says what it
        is."""
        return islice(self.source(), self.start, self.stop)

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        for location, row in self.scan():
            if isinstance(row, DataError):
                raise DataError(f"{location}: {row}.")
            yield location, row

    def take(self, count: int) -> Rows:
        """The first `count` of these rows."""
        stop = self.start + count
        return Rows(
            self.shown,
            self.source,
            self.hashed,
            self.start,
            stop if self.stop is None else min(stop, self.stop),
            self.files,
        )


def open_rows(entry: DatasetEntry) -> Rows:
    """Find an entry's data. Raises DataError if there is none, or ConfigError if the entry contradicts
    itself."""
    path, count = without_count(local_dataset(entry.path))
    split, start, stop = parse_split(entry.split)
    local, is_hub = Path(path).expanduser(), False
    if path in ("json", "csv", "parquet", "arrow") and entry.data_files and not local.exists():
        # Named by the loader of `datasets` that reads it: the files alone say where the data is.
        rows = _rows_of_files(entry, _chosen_files(Path(), entry), path)
    elif local.is_dir():
        rows = _rows_of_folder(entry, local, split)
    elif local.exists() or glob.has_magic(path):
        _require_train(entry, split, f"{path} is a file")
        if entry.data_files:
            raise ConfigError(f"datasets: `data_files` names files in a folder, but {path} is a file.")
        rows = _rows_of_files(entry, _matches(Path(), path, f"path: {path}"))
    elif looks_like_a_hub_id(path):
        rows, start, stop, is_hub = _rows_of_hub(entry, path), 0, None, True
    elif "://" in path:
        raise ConfigError(
            f"datasets: path: {path} is an address, whose rows are read as they are needed: write `streaming: true`."
        )
    else:
        raise DataError(_missing_file(local))
    if not is_hub and (entry.name or entry.revision):
        key = "name" if entry.name else "revision"
        raise ConfigError(
            f"datasets: {key}: {getattr(entry, key)}: only a hub dataset has one, and {path} is local."
        )
    rows = Rows(entry.path, rows.source, rows.hashed, start, stop, rows.files)
    return rows if count is None else rows.take(count)


def without_count(path: str) -> tuple[str, int | None]:
    """`rows.jsonl#1000` -> ("rows.jsonl", 1000)."""
    match = re.fullmatch(r"(.+)#(\d+)", path)
    if match is None or Path(path).expanduser().exists():
        return path, None
    if int(match[2]) == 0:
        raise ConfigError(
            f"datasets: path: {path} takes no row at all. Write the number of rows behind the `#`."
        )
    return match[1], int(match[2])


def parse_split(split: str | None) -> tuple[str, int, int | None]:
    """`test[10:20]` -> ("test", 10, 20). A hub dataset's split is parsed by `datasets`, which knows more
    forms."""
    match = _SPLIT.fullmatch(split or "train")
    if match is None:
        return split or "train", 0, None
    return match["name"], int(match["start"] or 0), int(match["stop"]) if match["stop"] else None


def _require_train(entry: DatasetEntry, split: str, what: str) -> None:
    if split != "train":
        raise DataError(
            f"datasets: split: {entry.split}: {what}, all of which is the split `train`. Leave `split` out, "
            "or write `train[:1000]` for a part of it."
        )


# --- local files --------------------------------------------------------------------------------------------


def _rows_of_files(entry: DatasetEntry, paths: list[Path], kind: str | None = None) -> Rows:
    kinds = [entry.ds_type or kind or kind_of(path) for path in paths]
    for path, known in zip(paths, kinds, strict=True):
        if known is None:
            raise DataError(
                f"{path}: the name does not say what is in it. Known endings: {', '.join(sorted(KINDS))}; or "
                "say it with `ds_type: json` (or csv, parquet, arrow)."
            )

    def source() -> Iterator[tuple[str, Row | DataError]]:
        for path, known in zip(paths, kinds, strict=True):
            assert known is not None
            for number, row in read_file(path, known):
                yield f"{path}:{number}", row

    files = tuple((path, str(known)) for path, known in zip(paths, kinds, strict=True))
    return Rows(entry.path, source, lambda: _hash_files(paths), files=files)


def _hash_files(paths: list[Path]) -> str:
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_hash_file, paths))
    return " ".join(f"{path}={digest}" for path, digest in zip(paths, digests, strict=True))


def _hash_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _rows_of_folder(entry: DatasetEntry, folder: Path, split: str) -> Rows:
    if entry.data_files:
        return _rows_of_files(entry, _chosen_files(folder, entry))
    saved = _saved_to_disk(folder, split)
    if saved is not None:
        return _rows_of_files(entry, saved, "arrow")
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    known = [path for path in files if kind_of(path) or entry.ds_type]
    if not known:
        there = ", ".join(path.name for path in files[:5]) or "nothing"
        raise DataError(
            f"{folder}: no data files in this folder (known endings: {', '.join(sorted(KINDS))}). It holds: "
            f"{there}."
        )
    if len(known) < len(files):
        others = [str(path.relative_to(folder)) for path in files if path not in set(known)]
        log.info(
            "%s: %d other file(s) in the folder are not data: %s", folder, len(others), ", ".join(others[:5])
        )
    return _rows_of_files(entry, _files_of_split(known, folder, split))


def _files_of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """Those files whose names say `split`; names that say no split are `train` if no other file is."""
    named: dict[str | None, list[Path]] = {}
    for path in files:
        words = re.split(r"[^a-z0-9]+", str(path.relative_to(folder)).lower())
        said = (
            split
            if split in words
            else next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)
        )
        named.setdefault(said, []).append(path)
    wanted = _SPLIT_WORDS.get(split, split)
    chosen = named.get(split) or named.get(wanted) or (named.get(None) if wanted == "train" else None)
    if not chosen:
        there = ", ".join(sorted(name for name in named if name)) or "none by name"
        raise DataError(
            f"{folder}: there is no file of split `{split}` in this folder. Splits there: {there}."
        )
    left = [str(path.relative_to(folder)) for path in files if path not in set(chosen)]
    if left:
        log.warning(
            "%s: split `%s` is read from %d file(s); left out, for their names: %s",
            folder, split, len(chosen), ", ".join(left[:5]) + (", ..." if len(left) > 5 else ""),
        )  # fmt: skip
    return chosen


def _saved_to_disk(folder: Path, split: str) -> list[Path] | None:
    """The Arrow files of a folder that `datasets.save_to_disk` wrote, or None for any other folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = _read_json(folder / "dataset_dict.json").get("splits", [])
        if split not in splits:
            raise DataError(
                f"{folder}: there is no split `{split}` in this dataset. Splits there: {', '.join(splits)}."
            )
        folder = folder / split
    if not (folder / "state.json").is_file() or not (folder / "dataset_info.json").is_file():
        return None
    return [folder / part["filename"] for part in _read_json(folder / "state.json").get("_data_files", [])]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}.") from error
    return value if isinstance(value, dict) else {}


def _chosen_files(folder: Path, entry: DatasetEntry) -> list[Path]:
    patterns = [entry.data_files] if isinstance(entry.data_files, str) else list(entry.data_files or [])
    chosen: dict[Path, None] = {}
    for pattern in patterns:
        chosen.update(dict.fromkeys(_matches(folder, pattern, f"data_files: {pattern}")))
    return list(chosen)


def _matches(folder: Path, pattern: str, key: str) -> list[Path]:
    path = folder / Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if not glob.has_magic(pattern):
        raise DataError(_missing_file(path))
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
    if not found:
        raise DataError(f"datasets: {key}: no file matches. Looked in {folder.resolve()}.")
    return found


def _missing_file(path: Path) -> str:
    """Where the file was looked for, and what of a similar name there is."""
    parent = path.resolve().parent
    while not parent.is_dir():
        parent = parent.parent
    message = f"{path}: there is no such file or folder; looked for {path.resolve()}."
    if parent != path.resolve().parent:
        return f"{message} The folder {parent} is there, what the path names inside of it is not."
    try:
        names = sorted(os.listdir(parent))
    except OSError:
        return message
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    close += [name for name in names if name.split(".")[0] == path.name.split(".")[0] and name not in close]
    return f"{message} There is: {', '.join(close[:3])}." if close else message


# --- the hub ------------------------------------------------------------------------------------------------


def looks_like_a_hub_id(path: str) -> bool:
    return bool(_HUB_ID.fullmatch(path)) and not path.startswith(".") and kind_of(Path(path)) is None


def _rows_of_hub(entry: DatasetEntry, name: str) -> Rows:
    """A dataset of the hub (or of the hub's cache on this machine), through `datasets`."""
    import datasets
    from datasets.exceptions import DatasetsError

    notice_missing_network()
    try:
        loaded = datasets.load_dataset(
            name,
            entry.name,
            split=entry.split or "train",
            revision=entry.revision,
            data_files=entry.data_files,
        )
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"{name}: neither a file or folder here ({Path(name).resolve()}) nor a dataset that the hub "
            f"gives: {_first_lines(error)} Check the id, `name`, `split` and `revision`; a gated dataset "
            "needs `hf auth login`; without a network, only what is on this machine can be read."
        ) from error

    def source() -> Iterator[tuple[str, Row | DataError]]:
        number = 0
        for table in loaded.with_format("arrow").iter(batch_size=1000):
            for row in table.to_pylist():
                number += 1
                yield f"{name}:{number}", without_nulls(row)

    def hashed() -> str:
        files = [Path(file["filename"]) for file in loaded.cache_files]
        digests = [_hash_file(path) for path in files]
        return " ".join([name, str(entry.split or "train"), str(len(loaded)), *digests])

    return Rows(entry.path, source, hashed)


def _first_lines(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return text if text.endswith(".") else text + "."
