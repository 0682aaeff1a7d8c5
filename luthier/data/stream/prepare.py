"""What a run knows of streamed data before its first step: the first block, and the rows that are held out.

Held out are the first rows of each dataset, as many as its weight says, and every round begins behind them.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from luthier.config import Config
from luthier.config.preference import unit_of
from luthier.data.cache import Writer
from luthier.data.dataset import PreparedData, TokenDataset, documents_of, name_of_type
from luthier.data.dataset import prepare as prepare_whole
from luthier.data.report import DataReport, SourceReport, length_histogram
from luthier.data.stream.blocks import Blocks, Start, Streamed, fingerprint_of
from luthier.data.stream.mix import Mix
from luthier.data.stream.sources import Position, Source, open_source
from luthier.data.stream.tokens import Maker
from luthier.data.tokenise import ReadRow
from luthier.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare(config: Config, tokenizer: PreTrainedTokenizerBase, processes: int = 1) -> PreparedData:
    """The data of a run in so many processes: all of it (`dataset.prepare`), or the beginning of a stream."""
    return prepare_stream(config, tokenizer, processes) if config.data.streaming else prepare_whole(config, tokenizer)


def prepare_stream(
    config: Config, tokenizer: PreTrainedTokenizerBase, processes: int
) -> PreparedData:
    """Open the config's datasets and tokenise the first block of a run in so many processes; `train` is that one.

    Raises:
        DataError, ConfigError: as `dataset.prepare`, for what is read so far.
    """
    began = time.perf_counter()
    data, training = config.data, config.training
    sources = [open_source(entry) for entry in data.datasets]
    validation, test_sources = None, []
    held: list[Position | None] = [None] * len(sources)
    if data.test_datasets:
        store, _, _ = documents_of(data.test_datasets, config, tokenizer)
        validation = TokenDataset(store)
        test_sources = [SourceReport.from_json(source) for source in store.meta["sources"]]
    elif data.val_set_size:
        validation, test_sources, held = hold_out(config, tokenizer, sources)
    rows_per_step = training.micro_batch_size * training.gradient_accumulation_steps * processes
    blocks = Blocks(config, tokenizer, sources, held, rows_per_step, processes)
    first = blocks.make(Start(), None)
    train = first.dataset
    report = DataReport(
        first.reports, test_sources, False, time.perf_counter() - began, train_documents=len(train)
    )
    rows = sum(source.rows for source in first.reports)
    report.stream = _what_is_known(sources, rows, first.ends_round)
    report.unit = unit_of(config.preference.rl)
    report.histogram = length_histogram(train.part_lengths if config.preference.rl else train.lengths)
    report.duplicates = len(train) - len(np.unique(train.digests))
    if validation is not None:
        report.validation_documents = len(validation)
        report.overlap = int(np.isin(validation.digests, train.digests).sum())
    prepared = PreparedData(train, validation, report, _name_of(train, config))
    prepared.stream = Streamed(blocks, first)
    return prepared


def _name_of(train: TokenDataset, config: Config) -> str:
    """Hash of what the stream's rows become: of their beginning, which is there to look at, and of what is done with
    all of them. `skip_bad_rows` is no part of it: a run that met a bad row may go on with it."""
    data = config.data
    # Not what a large step reads beyond the buffer, so that another step is recognised as that.
    first = train.rows < data.shuffle_buffer_size
    done = [
        *([entry.weight for entry in data.datasets], data.mix_strategy, data.mix_stopping),
        *(data.val_set_size, data.shuffle_buffer_size, data.sequence_len, data.excess_length_strategy),
        config.preference.max_prompt_len,
    ]
    content = train.digests[first].tobytes() + train.trained[first].tobytes() + json.dumps(done).encode()
    return hashlib.sha256(content).hexdigest()


def _what_is_known(sources: Sequence[Source], rows: int, whole: bool) -> str:
    files = [stamp for source in sources for stamp in source.stamps]
    known = [stamp.size for stamp in files if stamp.size >= 0]
    size = f", {sum(known) / 2**20:,.1f} MiB in {len(known):,} file(s)" if known else ""
    what = "that is all of them" if whole else "how many there are is not known"
    return (
        f"streamed{size}: the first {rows:,} rows are looked at before training ({what}); files are recognised by "
        "their names, sizes and times, not by their content"
    )


def hold_out(
    config: Config, tokenizer: PreTrainedTokenizerBase, sources: Sequence[Source]
) -> tuple[TokenDataset, list[SourceReport], list[Position | None]]:
    """The first `val_set_size` rows, of each source as its weight says; and where each goes on behind them. Rows are
    numbered source by source.

    Raises:
        DataError: there are fewer rows, or nothing of them is kept.
    """
    data, rl = config.data, config.preference.rl
    count = int(data.val_set_size)
    mix = Mix(sources, [None] * len(sources), [entry.weight or 1.0 for entry in data.datasets])
    rows: list[list[tuple[str, object]]] = [[] for _ in sources]
    for _ in range(count):
        index, location, row = mix.next()  # type: ignore[misc]  # by weight there is always another
        if any(mix.passes):
            raise DataError(
                f"val_set_size: {count:,} rows would be held out, and {sources[index].shown} has only "
                f"{len(rows[index]):,} to give: take fewer, or name other data in `test_datasets`."
            )
        rows[index].append((location, row))
    reports = [
        SourceReport(f"{source.shown} (held out)", name_of_type(entry, rl), fingerprint_of(source), unit=unit_of(rl))
        for entry, source in zip(data.datasets, sources, strict=True)
    ]
    maker = Maker(config, tokenizer, data.datasets, 1, threading.Event(), processes=1)
    with Writer(None) as writer:
        number = 0
        for index, of_source in enumerate(rows):
            numbered: list[tuple[int, ReadRow]] = [
                (index, (number + n, location, row))  # type: ignore[misc]
                for n, (location, row) in enumerate(of_source)
            ]
            number += len(of_source)
            for _, chunk in maker.chunks(numbered):
                reports[index].count(chunk)
                writer.add(chunk)
        store = writer.finish({})
    if not len(store.documents):
        reasons = "; ".join(f"{report.path}: {reason}" for report in reports for reason in report.dropped)
        raise DataError(f"val_set_size: none of the first {count:,} rows can be used ({reasons}).")
    return TokenDataset(store), reports, list(mix.position()["from"])
