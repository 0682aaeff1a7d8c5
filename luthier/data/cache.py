"""Tokenised data on disk: one folder per content, written beside its place and renamed into it.

The folder's name is a hash of everything that the result depends on: the data files' content, the tokenizer
as it is in memory, templates, options, and the source of this package, so that there is no version number to
forget. A hit therefore needs no checking beyond that the files are whole; a folder that is not is made again.

    <key>/input_ids.bin, labels.bin   int32, all documents end to end
    <key>/documents.npy               one record per document (tokenise.DOCUMENT)
    <key>/parts.npy                   lengths of the documents inside of each (for rows packed elsewhere)
    <key>/meta.json                   sizes of the above, names of the data files, the report
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from luthier.config import Config, DatasetEntry
from luthier.data.tokenise import DOCUMENT, Chunk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("luthier")

_OPTIONS = (
    "sequence_len",
    "excess_length_strategy",
    "skip_bad_rows",
    "train_on_inputs",
    "chat_template",
    "chat_template_jinja",
    "chat_template_kwargs",
    "eot_tokens",
)
_STALE_SECONDS = 24 * 3600  # a temporary folder this old belongs to a process that was killed


@dataclass(slots=True)
class Store:
    """Tokenised documents, mapped from files or held in memory."""

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    documents: npt.NDArray[Any]
    parts: npt.NDArray[np.int64]
    files: list[str]
    meta: dict[str, Any]


def cache_folder(config: Config) -> Path:
    """Where tokenised data is kept."""
    given = config.data.dataset_prepared_path or os.environ.get("LUTHIER_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "luthier" / "datasets"


# --- keys ---------------------------------------------------------------------------------------------------


def cache_key(
    entries: Sequence[DatasetEntry],
    fingerprints: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> str:
    """Hash of everything that tokenising these entries depends on."""
    options = {name: getattr(config.data, name) for name in _OPTIONS}
    named = [
        options["chat_template"],
        options["chat_template_jinja"],
        *(entry.chat_template for entry in entries),
    ]
    content = {
        "source": _source_hash(),
        "versions": [metadata.version("transformers"), metadata.version("tokenizers")],
        "tokenizer": tokenizer_state(tokenizer),
        "options": options,
        "answers": _answers(config),
        "templates": [_file_text(name) for name in named],
        # What is mixed changes no row's tokens.
        "entries": [entry.model_dump(exclude={"weight", "epochs"}) for entry in entries],
        "data": list(fingerprints),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _answers(config: Config) -> list[Any] | None:
    """What of preference tuning changes a row's tokens: methods with the same rows share them."""
    preference = config.preference
    if preference.rl is None:
        return None
    return [preference.rl == "kto", preference.max_prompt_len]


@lru_cache(maxsize=1)
def _source_hash() -> str:
    digest = hashlib.sha256()
    types = Path(__file__).parents[1] / "config" / "preference_types.py"
    for path in [*sorted(Path(__file__).parent.rglob("*")), types]:
        if path.suffix in (".py", ".jinja"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _file_text(name: str | None) -> str | None:
    """Text of the template file that a setting names; None if it names none."""
    if not name or "\n" in name:
        return None
    with contextlib.suppress(OSError, ValueError):
        return Path(name).expanduser().read_text("utf-8")
    return None


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the tokenizer as it is in memory, wherever it was loaded from."""
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Truncation and padding are left over from whichever call came last, and no part of the vocabulary.
        truncation, padding = backend.truncation, backend.padding
        backend.no_truncation()
        backend.no_padding()
        digest.update(backend.to_str().encode("utf-8", "surrogatepass"))
        if truncation:
            backend.enable_truncation(**truncation)
        if padding:
            backend.enable_padding(**padding)
    else:
        digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode("utf-8", "surrogatepass"))
    settings = {
        name: value
        for name, value in tokenizer.init_kwargs.items()
        if isinstance(value, str | int | bool | float)
        and not any(part in name for part in ("path", "file", "name"))
    }
    state = [settings, tokenizer.special_tokens_map, tokenizer.chat_template]
    digest.update(json.dumps(state, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


# --- reading ------------------------------------------------------------------------------------------------


def open_store(folder: Path) -> Store | None:
    """The store in this folder; None if there is none, or if it is not whole (which is said)."""
    if not folder.is_dir():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        torn = [name for name, size in meta["sizes"].items() if (folder / name).stat().st_size != size]
        if not torn:
            documents = np.load(folder / "documents.npy", mmap_mode="r")
            return Store(
                np.memmap(folder / "input_ids.bin", dtype=np.int32, mode="r"),
                np.memmap(folder / "labels.bin", dtype=np.int32, mode="r"),
                documents,
                np.load(folder / "parts.npy"),
                meta["files"],
                meta,
            )
        problem = f"{', '.join(torn)} is not whole"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = str(error)
    log.warning("the cache %s cannot be used (%s): tokenising again", folder, problem)
    return None


# --- writing ------------------------------------------------------------------------------------------------


class Writer:
    """Takes chunks and becomes a Store: in a folder of the cache, or in memory if `folder` is None.

    A context manager; what was written is removed unless `finish` was reached. Raises OSError where the disk
    does.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._temporary: Path | None = None
        self._flat: list[IO[bytes]] = []
        self._ids: list[npt.NDArray[np.int32]] = []
        self._labels: list[npt.NDArray[np.int32]] = []
        self._documents: list[npt.NDArray[Any]] = []
        self._parts: list[npt.NDArray[np.int64]] = []
        self._files: dict[str, int] = {}

    def __enter__(self) -> Writer:
        if self._folder is not None:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(self._folder.parent)
            self._temporary = Path(
                tempfile.mkdtemp(prefix=f"{self._folder.name}.tmp-", dir=self._folder.parent)
            )
            self._flat = [(self._temporary / name).open("wb") for name in ("input_ids.bin", "labels.bin")]
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._flat:
            with contextlib.suppress(OSError):
                file.close()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def add(self, chunk: Chunk) -> None:
        if self._flat:
            for file, array in zip(self._flat, (chunk.input_ids, chunk.labels), strict=True):
                file.write(array.data)
        else:
            self._ids.append(chunk.input_ids)
            self._labels.append(chunk.labels)
        index = np.array(
            [self._files.setdefault(name, len(self._files)) for name in chunk.files], dtype=np.int64
        )
        documents = chunk.documents.copy()
        if len(documents):
            documents["file"] = index[documents["file"]]
        self._documents.append(documents)
        self._parts.append(chunk.parts)

    def finish(self, meta: dict[str, Any]) -> Store:
        """Put the store in its place. If another process was faster, its store, which is the same, stays."""
        documents = np.concatenate([np.zeros(0, dtype=DOCUMENT), *self._documents])
        parts = np.concatenate([np.zeros(0, dtype=np.int64), *self._parts])
        files = list(self._files)
        if self._folder is None or self._temporary is None:
            empty = np.zeros(0, dtype=np.int32)
            ids, labels = np.concatenate([empty, *self._ids]), np.concatenate([empty, *self._labels])
            return Store(ids, labels, documents, parts, files, meta)
        for file in self._flat:
            _sync(file)
            file.close()
        for name, array in (("documents.npy", documents), ("parts.npy", parts)):
            with (self._temporary / name).open("wb") as file:
                np.save(file, array)
                _sync(file)
        sizes = {path.name: path.stat().st_size for path in self._temporary.iterdir()}
        with (self._temporary / "meta.json").open("wb") as file:
            file.write(json.dumps({**meta, "sizes": sizes, "files": files}, indent=1).encode())
            _sync(file)
        _rename(self._temporary, self._folder)
        store = open_store(self._folder)
        if store is None:
            raise OSError(f"{self._folder} could not be read back")
        return store


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _rename(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        if open_store(folder) is None:
            # A torn store is in the way: put it aside under a name of ours, then remove it.
            torn = Path(f"{temporary}-torn")
            with contextlib.suppress(OSError):
                folder.rename(torn)
            shutil.rmtree(torn, ignore_errors=True)
            temporary.rename(folder)


def _remove_stale(parent: Path) -> None:
    for path in parent.glob("*.tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
