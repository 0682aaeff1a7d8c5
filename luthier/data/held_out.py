"""The rows that a model is measured on: what a config validates on, tokenised as in training.

The same entries, the same renderer and the same seed give the same documents and the same split as the run's own
validation, so that a figure over them continues those of the run's log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from luthier.config import Config, DatasetEntry
from luthier.data.dataset import TokenDataset, documents_of, split_off
from luthier.data.mixed import names_of
from luthier.data.readers import open_rows
from luthier.data.report import SourceReport
from luthier.data.values import fields_of, type_name
from luthier.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("luthier")


@dataclass(frozen=True)
class HeldOut:
    """Documents to measure on.

    Attributes:
        entries, sources: the datasets that their rows are from, and what became of those rows.
        what: which key of the config names them: `test_datasets`, `val_set_size`, or `datasets` for all of its data.
    """

    documents: TokenDataset
    entries: Sequence[DatasetEntry]
    sources: Sequence[SourceReport]
    what: str

    def names(self) -> list[str]:
        """What to call each dataset: its file's name, or its whole path where two are called the same."""
        return names_of(self.entries)

    def datasets_of(self, rows: npt.NDArray[np.int64]) -> list[str]:
        """The name of the dataset that each of these rows is from."""
        ends = np.cumsum([source.rows for source in self.sources])
        names = self.names()
        return [names[place] for place in np.searchsorted(ends, rows, side="right")]

    def columns(self, names: Sequence[str], rows: Iterable[int]) -> dict[int, dict[str, str]]:
        """row number -> the values of these columns, as text; all of them are read again.

        Raises:
            DataError: a row lacks a column, or has something in it that is no name for a group.
        """
        wanted = set(rows)
        found: dict[int, dict[str, str]] = {}
        first = 0
        for entry, source in zip(self.entries, self.sources, strict=True):
            for number, (location, row) in enumerate(islice(_scan(entry), source.rows), start=first):
                if number in wanted and not isinstance(row, DataError):
                    found[number] = {name: _group(row, name, location) for name in names}
            first += source.rows
        return found


def _group(row: dict[str, Any], name: str, location: str) -> str:
    value: Any = row
    for part in (name,) if name in row else name.split("."):  # `meta.category` is a field of an object
        if not isinstance(value, dict) or part not in value:
            raise DataError(f"{location}: there is no column `{name}` to group by; {fields_of(row)}.")
        value = value[part]
    if isinstance(value, (str, int, float)):
        return str(value)
    raise DataError(
        f"{location}: `{name}` is {type_name(value)}: rows can be grouped by text, numbers, true and false."
    )


def _scan(entry: DatasetEntry) -> Iterator[tuple[str, Any]]:
    """Rows from the first on, wherever they are."""
    from luthier.data.stream.addresses import is_address
    from luthier.data.stream.sources import open_source

    return iter(open_source(entry).begin(None)) if is_address(entry.path) else open_rows(entry).scan()


def _held_out_of_stream(config: Config, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    """The first rows of a stream's datasets, if the config holds them out."""
    from luthier.data.stream.prepare import hold_out
    from luthier.data.stream.sources import open_source

    data = config.data
    if not data.val_set_size:
        raise DataError(
            "the config streams its datasets and holds nothing of them out: name rows to measure on (--data, "
            "test_datasets, or val_set_size as a number of rows)"
        )
    documents, sources, _ = hold_out(config, tokenizer, [open_source(entry) for entry in data.datasets])
    return HeldOut(documents, data.datasets, sources, "val_set_size")


def held_out(config: Config, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    """A config's `test_datasets`, else the rows that its `val_set_size` holds out, else all rows of its `datasets`.
    What is left out of them is logged.

    Raises:
        DataError, ConfigError: as `dataset.prepare`.
    """
    data = config.data
    entries = data.test_datasets or data.datasets
    if data.streaming and not data.test_datasets:
        return _held_out_of_stream(config, tokenizer)
    store, _, _ = documents_of(entries, config, tokenizer)
    documents = TokenDataset(store)
    sources = [SourceReport.from_json(source) for source in store.meta["sources"]]
    what = "test_datasets" if data.test_datasets else "datasets"
    if not data.test_datasets and data.val_set_size:
        rows = sum(source.rows for source in sources)
        documents = split_off(documents, rows, data.val_set_size, config.training.seed)[1]
        what = "val_set_size"
    for source in sources:
        for reason, tally in source.dropped.items():
            log.warning("%s: %s rows left out: %s, %s", source.path, f"{tally.count:,}", reason, tally.where())
    return HeldOut(documents, entries, sources, what)
