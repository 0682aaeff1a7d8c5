"""The data of a run: from the config's datasets to token ids on disk, with a report of what became of each
row.

Rows are read, turned into examples, rendered and written once; the next start with the same data, tokenizer
and options maps the files that are there. Only afterwards is validation data split off, so that another
`val_set_size` or seed tokenises nothing again.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from luthier.config import Config, DatasetEntry, UserPreference, UserPrompt
from luthier.config.preference import unit_of
from luthier.data.cache import Store, Writer, cache_folder, cache_key, open_store
from luthier.data.duplicates import find_repeats, shared_text
from luthier.data.formats import kind_of_entry
from luthier.data.readers import Rows, open_rows
from luthier.data.report import Balance, DataReport, Repeats, SourceReport, length_histogram
from luthier.data.tokenise import Chunk, Tokeniser, tokenise
from luthier.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.data.stream.blocks import Streamed

log = logging.getLogger("luthier")


class Document(NamedTuple):
    """Tokens of one document, int32, and labels aligned with them: -100 where a token is not trained.

    The first token of a document is never trained, since nothing leads to it. `lengths` is set for a row that
    was packed before it came here: the tokens of each document inside, summing to the row's; and for a `pair` of
    answers to one prompt: prompt and chosen answer, prompt and rejected answer. `prompt` are the tokens before an
    answer that is compared with others, else 0.
    """

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    lengths: tuple[int, ...] | None = None
    prompt: int = 0
    pair: bool = False
    desirable: bool = True


class TokenDataset:
    """Documents by index, mapped from disk; `lengths` and `trained` say how many tokens each has."""

    def __init__(self, store: Store, indices: npt.NDArray[np.int64] | None = None) -> None:
        documents = store.documents
        starts = np.cumsum(documents["length"]) - documents["length"]
        part_starts = np.cumsum(documents["parts"]) - documents["parts"]
        self._store = store
        self._indices = np.arange(len(documents)) if indices is None else np.asarray(indices, dtype=np.int64)
        self._starts = starts[self._indices]
        self._part_starts = part_starts[self._indices]
        self._parts = np.ascontiguousarray(documents["parts"])[self._indices]
        self.lengths: npt.NDArray[np.int64] = np.ascontiguousarray(documents["length"])[self._indices]
        """Tokens of each document."""
        self.trained: npt.NDArray[np.int64] = np.ascontiguousarray(documents["trained"])[self._indices]
        """Trained tokens of each document."""
        self.prompts: npt.NDArray[np.int64] = np.ascontiguousarray(documents["prompt"])[self._indices]
        """Tokens of the prompt, where a document is answers to one: each of its parts begins with them."""
        self.chosen: npt.NDArray[np.int64] = np.ascontiguousarray(documents["chosen"])[self._indices]
        """Trained tokens of the chosen answer, the first of a pair's two parts."""
        self.desirable: npt.NDArray[np.int64] = np.ascontiguousarray(documents["desirable"])[self._indices]
        """0 where an answer is labelled undesirable, else 1."""

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Document:
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        start = self._starts[index]
        stop = start + self.lengths[index]
        lengths = None
        if self._parts[index] > 1:
            first = self._part_starts[index]
            lengths = tuple(self._store.parts[first : first + self._parts[index]].tolist())
        return Document(
            self._store.input_ids[start:stop],
            self._store.labels[start:stop],
            lengths,
            int(self.prompts[index]),
            bool(self.chosen[index]),
            bool(self.desirable[index]),
        )

    def location(self, index: int) -> str:
        """Where the document's row is: "rows.jsonl:17"."""
        document = self._store.documents[self._indices[index]]
        return f"{self._store.files[document['file']]}:{document['line']}"

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """For each document the number of its row among all rows of the datasets, in the order they were
        read."""
        return np.ascontiguousarray(self._store.documents["row"])[self._indices]

    @property
    def digests(self) -> npt.NDArray[np.uint64]:
        """For each document a hash of its tokens."""
        return np.ascontiguousarray(self._store.documents["digest"])[self._indices]

    @property
    def part_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of the documents inside of each document, such as the two sides of a pair, end to end."""
        starts = np.repeat(self._part_starts - (np.cumsum(self._parts) - self._parts), self._parts)
        return self._store.parts[starts + np.arange(len(starts))]

    def chunk(self, indices: Sequence[int]) -> Chunk:
        """A copy of these documents, as tokenising makes them."""
        empty = np.zeros(0, np.int32)
        chosen = [self[index] for index in indices]
        documents = np.array(self._store.documents[self._indices[list(indices)]])
        files, documents["file"] = np.unique(documents["file"], return_inverse=True)
        parts = [length for each in chosen for length in each.lengths or (len(each.input_ids),)]
        return Chunk(
            np.concatenate([empty, *(each.input_ids for each in chosen)]),
            np.concatenate([empty, *(each.labels for each in chosen)]),
            documents,
            np.array(parts, np.int64),
            [self._store.files[file] for file in files],
            rows=0,
            columns=set(),
        )

    def subset(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> TokenDataset:
        """These documents, in this order, without a copy of their tokens."""
        return TokenDataset(self._store, self._indices[np.asarray(indices, dtype=np.int64)])


@dataclass(slots=True)
class PreparedData:
    """What a run trains on and is validated on."""

    train: TokenDataset
    validation: TokenDataset | None
    report: DataReport
    fingerprint: str
    """Hash of all that the data depends on; equal fingerprints mean equal documents in the same order."""
    stream: Streamed | None = None
    """Of a stream: what makes its blocks, and the first of them, whose documents `train` has."""

    def forget(self) -> None:
        """Let go of a stream's first block, which would be held as long as this is."""
        with Writer(None) as nothing:
            self.train, self.stream = TokenDataset(nothing.finish({})), None


def prepare(config: Config, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """Tokenise the config's datasets, or find them in the cache. `report.log()` says what there is to say. Of streams,
    see `stream.prepare.prepare`.

    Raises DataError for rows that are bad (with their place), and for datasets of which nothing would be
    trained; ConfigError for entries that do not fit the data that they name.
    """
    began = time.perf_counter()
    data = config.data
    store, key, cached = documents_of(data.datasets, config, tokenizer)
    train = TokenDataset(store)
    sources = [SourceReport.from_json(source) for source in store.meta["sources"]]
    validation, test_sources, test_key = None, [], ""
    if data.test_datasets:
        test_store, test_key, test_cached = documents_of(data.test_datasets, config, tokenizer)
        validation = TokenDataset(test_store)
        test_sources = [SourceReport.from_json(source) for source in test_store.meta["sources"]]
        cached = cached and test_cached
    elif data.val_set_size:
        rows = sum(source.rows for source in sources)
        train, validation = split_off(train, rows, data.val_set_size, config.training.seed)
        test_key = f"{data.val_set_size} {config.training.seed}"
    train, repeats = _without_repeats(train, validation, sources, config, tokenizer)
    report = DataReport(
        sources, test_sources, cached, time.perf_counter() - began, train_documents=len(train)
    )
    report.histogram = length_histogram(train.part_lengths if config.preference.rl else train.lengths)
    _say_preferences(report, train, config)
    report.repeats = repeats
    report.duplicates = len(train) - len(np.unique(train.digests))
    if validation is not None:
        report.validation_documents = len(validation)
        report.overlap = int(np.isin(validation.digests, train.digests).sum())
    repeats_key = f"{data.dataset_exact_deduplication} {data.dataset_near_deduplication}"
    fingerprint = hashlib.sha256(f"{key} {test_key} {repeats_key}".encode()).hexdigest()
    return PreparedData(train, validation, report, fingerprint)


def _without_repeats(
    train: TokenDataset,
    validation: TokenDataset | None,
    sources: Sequence[SourceReport],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[TokenDataset, Repeats]:
    """The training documents that `dataset_exact_deduplication` and `dataset_near_deduplication` leave."""
    ends = np.cumsum([source.rows for source in sources])
    data = config.data

    def source_of(dataset: TokenDataset, index: int) -> str:
        return sources[int(np.searchsorted(ends, dataset.rows[index], side="right"))].path

    whole_prompts = data.train_on_inputs or any(entry.train_on_inputs for entry in data.datasets)
    left, repeats = find_repeats(
        train,
        validation,
        source_of,
        exact=data.dataset_exact_deduplication,
        threshold=data.dataset_near_deduplication,
        whole_prompts=whole_prompts,
    )
    if not len(left):
        raise DataError(
            f"nothing is left to train on: all {len(train):,} training documents are in the validation data too. Name "
            "other `test_datasets`, or a smaller `val_set_size`."
        )
    if validation is not None:
        found = shared_text(left, validation, tokenizer, whole_prompts)
        repeats.shared_text, repeats.run_length, repeats.looked_through = found
    return left, repeats


def _say_preferences(report: DataReport, train: TokenDataset, config: Config) -> None:
    """Pairs and labels of the training data."""
    preference = config.preference
    report.unit = unit_of(preference.rl)
    if preference.rl == "kto":
        good = int(train.desirable.sum())
        weights = preference.kto_desirable_weight, preference.kto_undesirable_weight
        report.balance = Balance(good, len(train) - good, *weights)
    elif preference.rl is not None:
        report.tokens_in_pairs, report.prompt_tokens = int(train.lengths.sum()), int(train.prompts.sum())


def split_off(dataset: TokenDataset, rows: int, size: float, seed: int) -> tuple[TokenDataset, TokenDataset]:
    """Hold out a fraction (below 1) or a number of rows, and all documents of those.

    All `rows` that were read are put in an order that depends on their number and the seed only; the first
    ones of which anything was kept are held out. So another tokenizer or `sequence_len` holds out the same
    rows, but for those that it drops.
    """
    held = held_rows(dataset.rows, rows, size, seed)
    is_held = held[dataset.rows]
    return dataset.subset(np.flatnonzero(~is_held)), dataset.subset(np.flatnonzero(is_held))


def held_rows(present: npt.NDArray[np.int64], rows: int, size: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which of all `rows` are held out, where those in `present` were kept."""
    order = np.random.default_rng(seed).permutation(rows)
    kept = np.zeros(rows, dtype=bool)
    kept[present] = True
    order = order[kept[order]]
    count = max(1, round(size * len(order))) if size < 1 else int(size)
    if count >= len(order):
        raise DataError(
            f"val_set_size: {size} would hold out {count:,} of {len(order):,} rows, and leave none to train "
            "on. Take a smaller one, or name other data in `test_datasets`."
        )
    held = np.zeros(rows, dtype=bool)
    held[order[:count]] = True
    return held


# --- tokenising, or not -------------------------------------------------------------------------------------


def documents_of(
    entries: Sequence[DatasetEntry], config: Config, tokenizer: PreTrainedTokenizerBase
) -> tuple[Store, str, bool]:
    """The entries' documents, their cache key, and whether they were in the cache."""
    opened = [open_rows(entry) for entry in entries]
    key = cache_key(entries, [rows.fingerprint for rows in opened], tokenizer, config)
    folder = cache_folder(config) / key
    store = open_store(folder)
    if store is not None:
        return store, key, True
    try:
        with Writer(folder) as writer:
            return _tokenise_all(writer, entries, opened, config, tokenizer), key, False
    except OSError as error:
        log.warning(
            "the cache folder %s cannot be written (%s): this run keeps its tokens in memory, and the next "
            "one tokenises again. `dataset_prepared_path` names another folder.",
            folder.parent,
            error.strerror or error,
        )
    with Writer(None) as writer:
        return _tokenise_all(writer, entries, opened, config, tokenizer), key, False


def _tokenise_all(
    writer: Writer,
    entries: Sequence[DatasetEntry],
    opened: Sequence[Rows],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
) -> Store:
    from luthier.data.render import Renderer

    tokeniser = Tokeniser(Renderer(tokenizer, config), config)
    vocabulary = len(tokenizer)
    rl = config.preference.rl
    sources = []
    first_number = 0
    for entry, rows in zip(entries, opened, strict=True):
        kind = kind_of_entry(entry, rl)
        if kind != "tokens":
            tokeniser.renderer.check(entry)
        source = SourceReport(entry.path, name_of_type(entry, rl), rows.fingerprint, unit=unit_of(rl))
        for chunk in tokenise(tokeniser, entry, rows, first_number, config.data.dataset_processes):
            if kind == "tokens" and len(chunk.input_ids) and chunk.input_ids.max() >= vocabulary:
                raise DataError(beyond_vocabulary(chunk.input_ids, chunk.documents, chunk.files, vocabulary))
            writer.add(chunk)
            source.count(chunk)
        first_number += source.rows
        _check_not_empty(source)
        sources.append(source)
    return writer.finish({"sources": [source.to_json() for source in sources]})


def name_of_type(entry: DatasetEntry, rl: str | None) -> str:
    """What reports call an entry's type."""
    if entry.type is None:
        return "tokens" if rl is None else "no type"
    if isinstance(entry.type, UserPreference):
        return "your own format"
    return "your own prompt" if isinstance(entry.type, UserPrompt) else entry.type


def _check_not_empty(source: SourceReport) -> None:
    if source.kept:
        return
    if not source.rows:
        raise DataError(f"{source.path}: there are no rows in it.")
    reasons = "; ".join(
        f"{tally.count:,} {reason}, {tally.where()}" for reason, tally in source.dropped.items()
    )
    raise DataError(
        f"{source.path}: nothing in it can be trained: all of its {source.rows:,} rows are left out "
        f"({reasons})."
    )


def beyond_vocabulary(
    ids: npt.NDArray[np.int32], documents: npt.NDArray[np.void], files: list[str], vocabulary: int
) -> str:
    """What there is to say of token ids that the tokenizer does not have."""
    at = int(np.argmax(ids >= vocabulary))
    document = documents[int(np.searchsorted(np.cumsum(documents["length"]), at, side="right"))]
    return (
        f"{files[document['file']]}:{document['line']}: `input_ids` holds {ids[at]}, and the tokenizer has "
        f"ids below {vocabulary} only. These rows were made with another tokenizer."
    )
