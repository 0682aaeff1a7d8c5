"""From rows to token ids, a chunk of rows at a time, on as many cores as pay.

A chunk goes through format, renderer and length policy in one go, and comes back as flat arrays with counts,
so that a process can send it to its parent cheaply. Text formats need no processes: a fast tokenizer takes a
whole chunk on threads of its own. Chat templates are Jinja, which is Python, so their chunks go to processes.
Results are taken in the order of the rows either way, and so is the first error.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from luthier.config import Config, DatasetEntry
from luthier.data import report as said
from luthier.data.examples import ChatExample, Example, PreferenceExample, TextExample, TokenExample
from luthier.data.files import Row
from luthier.data.formats import columns_of, examples_of, kind_of_entry
from luthier.data.lengths import cut_answers, too_long
from luthier.data.preferences import LeftOut, kind_of_preference
from luthier.data.readers import Rows
from luthier.data.report import Tallies, Tally
from luthier.errors import DataError

if TYPE_CHECKING:
    from luthier.data.render import Rendered, Renderer

IGNORED = -100
CHUNK = 1000  # rows; enough for the tokenizer's threads, little enough to hold a few of them in memory
_WATCH_SECONDS = 2.0  # between two looks of a process at whether its parent is there
_SERIAL_CHUNKS = 2  # below this many, starting processes costs more than they gain

ReadRow = tuple[int, str, Row | DataError]
"""Number among all rows of the datasets, location, and the row or what is wrong with it."""

DOCUMENT = np.dtype(
    [
        ("length", np.int64),
        ("trained", np.int64),
        ("row", np.int64),  # number of its row among all rows of the datasets
        ("file", np.int64),  # its row's place: file, and line or row in there
        ("line", np.int64),
        ("parts", np.int64),  # documents that it holds: 1, unless its row was packed elsewhere or is a pair of answers
        ("prompt", np.int64),  # tokens of the prompt that its answers follow, at the beginning of each part; else 0
        ("chosen", np.int64),  # labels of its first part, where it is a pair of answers, the chosen one first; else 0
        ("desirable", np.int64),  # 0 for an answer that is labelled undesirable; else 1
        ("digest", np.uint64),
    ]
)


@dataclass(slots=True)
class Chunk:
    """Documents of some rows, end to end, and what was left out."""

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    documents: npt.NDArray[Any]
    """Of dtype DOCUMENT; `file` indexes `files`."""
    parts: npt.NDArray[np.int64]
    files: list[str]
    rows: int
    columns: set[str]
    dropped: Tallies = field(default_factory=dict)
    notes: Tallies = field(default_factory=dict)


@dataclass(slots=True)
class Tokeniser:
    """The work on one chunk: everything that it depends on, in a form that can be sent to a process."""

    renderer: Renderer
    config: Config

    def chunk(self, entry: DatasetEntry, rows: Sequence[ReadRow]) -> Chunk:
        """Raises DataError with the row's location, unless `skip_bad_rows` counts it."""
        builder = _Builder(entry, self.config, rows, self.renderer.encoder.opening)
        examples = builder.examples()
        rendered = self.renderer.render_each([example for _, _, example in examples], entry)
        for (number, location, example), result in zip(examples, rendered, strict=True):
            if isinstance(result, DataError):
                builder.bad_row(location, result)
            else:
                builder.add(number, location, example, result)
        return builder.done()


class _Builder:
    """Collects the documents of one chunk."""

    def __init__(
        self, entry: DatasetEntry, config: Config, rows: Sequence[ReadRow], opening: list[int]
    ) -> None:
        self.entry = entry
        self.opening = opening
        self.rows = rows
        self.skip_bad_rows = config.data.skip_bad_rows
        self.limit = config.data.sequence_len
        self.strategy = config.data.excess_length_strategy
        self.rl = config.preference.rl
        self.max_prompt = config.preference.max_prompt_len
        self.splits = kind_of_entry(entry, self.rl) == "completion"
        own = entry.train_on_inputs
        self.train_on_inputs = config.data.train_on_inputs if own is None else own
        self.ids: list[npt.NDArray[np.int32]] = []
        self.labels: list[npt.NDArray[np.int32]] = []
        self.documents: list[tuple[int, ...]] = []
        self.parts: list[int] = []
        self.files: dict[str, int] = {}
        self.columns: set[str] = set()
        self.dropped: Tallies = {}
        self.notes: Tallies = {}

    def examples(self) -> list[tuple[int, str, Example]]:
        examples: list[tuple[int, str, Example]] = []
        for number, location, row in self.rows:
            notes: Counter[str] = Counter()
            try:
                if isinstance(row, DataError):
                    raise row
                self.columns.update(row)
                made = examples_of(row, self.entry, self.train_on_inputs, self.rl, notes)
                examples += [(number, location, example) for example in made]
            except LeftOut as left:
                self._drop(str(left), location)
                continue
            except DataError as error:
                self.bad_row(location, error)
                continue
            for note, count in notes.items():
                if count:
                    self._note(note, location, count=count)
        return examples

    def bad_row(self, location: str, error: DataError) -> None:
        text = str(error).rstrip(".")
        if not self.skip_bad_rows:
            raise DataError(
                f"{location}: {text}. (`skip_bad_rows: true` leaves such rows out and counts them.)"
            ) from error
        self._drop(said.BAD_ROW, location, text)

    def add(self, number: int, location: str, example: Example, rendered: Rendered) -> None:
        for note, detail in rendered.notes:
            self._note(note, location, detail)
        ids = np.asarray(rendered.input_ids, dtype=np.int32)
        labels = np.asarray(rendered.labels, dtype=np.int32)
        lengths = list(rendered.lengths) if rendered.lengths else [len(ids)]
        if isinstance(example, PreferenceExample):
            self._add_answers(number, location, example, ids, labels, lengths, rendered.prompt)
            return
        if self.splits:
            pieces = _split(len(ids), self.limit)
            if len(pieces) > 1:
                self._note(said.SPLIT, location)
            for start, stop in pieces:
                self._keep(number, location, example, ids[start:stop], labels[start:stop], [stop - start])
            return
        if self.entry.labels_shifted:
            # A label that was put back behind the last token is a target only: it takes no room of its own,
            # but a document must not have more positions than the model.
            room = self.limit + len(lengths)
            if lengths == [self.limit + 1]:
                ids, labels, lengths = ids[:-1], labels[:-1], [self.limit]
                self._note("labels behind the last position of sequence_len, left out", location)
        else:
            room = self.limit
        if len(ids) > room:
            if self.strategy == "raise":
                raise DataError(
                    f"{location}: {len(ids):,} tokens, and sequence_len is {self.limit:,}. Raise "
                    "sequence_len, or let `excess_length_strategy` drop or truncate such rows."
                )
            if self.strategy == "drop":
                self._drop(said.TOO_LONG, location, f"{len(ids):,} tokens")
                return
            self._note(said.TRUNCATED, location, f"{len(ids):,} tokens")
            ids, labels, lengths = ids[: self.limit], labels[: self.limit], _cut(lengths, self.limit)
        self._keep(number, location, example, ids, labels, lengths)

    def _add_answers(
        self,
        number: int,
        location: str,
        example: PreferenceExample,
        ids: npt.NDArray[np.int32],
        labels: npt.NDArray[np.int32],
        lengths: list[int],
        prompt: int,
    ) -> None:
        """Answers to one prompt, within the limits of lengths."""
        reason, detail = too_long(prompt, lengths, self.limit, self.max_prompt)
        if reason and self.strategy == "raise":
            raise DataError(
                f"{location}: {detail} ({reason}). Raise the limit, or let `excess_length_strategy` drop or truncate "
                "such rows."
            )
        if reason and self.strategy == "drop":
            self._drop(reason, location, detail)
            return
        if reason:
            self._note(said.PROMPT_TRUNCATED if reason == said.PROMPT_TOO_LONG else said.TRUNCATED, location, detail)
            opening = len(self.opening) if ids[: len(self.opening)].tolist() == self.opening else 0
            ids, labels, lengths, prompt = cut_answers(
                ids, labels, lengths, prompt, opening, self.limit, self.max_prompt
            )
        first = lengths[0]
        if len(lengths) == 2 and np.array_equal(ids[:first], ids[first:]):
            self._drop(said.SAME_TOKENS, location)
            return
        sides = [labels[:first], labels[first:]][: len(lengths)]
        if any((side[max(prompt, 1) :] == IGNORED).all() for side in sides):
            self._drop(said.UNTRAINED, location, "an answer of which nothing is left")
            return
        self._keep(number, location, example, ids, labels, lengths, prompt)

    def _keep(
        self,
        number: int,
        location: str,
        example: Example,
        ids: npt.NDArray[np.int32],
        labels: npt.NDArray[np.int32],
        lengths: list[int],
        prompt: int = 0,
    ) -> None:
        if len(lengths) == 1:
            if len(labels) and labels[0] != IGNORED:
                labels = labels.copy()
                labels[0] = IGNORED
        else:
            labels = labels.copy()
            labels[np.cumsum([0, *lengths[:-1]])] = IGNORED
        trained = int(np.count_nonzero(labels != IGNORED))
        if not trained:
            self._drop(said.UNTRAINED, location, _why_untrained(example, self.entry, len(ids)))
            return
        name, _, line = location.rpartition(":")
        hashed = hashlib.blake2b(ids.tobytes(), digest_size=8)
        chosen, desirable = 0, 1
        if isinstance(example, PreferenceExample):
            # The same tokens are another example with the other label, or with the answers parted elsewhere.
            chosen = int(np.count_nonzero(labels[: lengths[0]] != IGNORED)) if len(lengths) == 2 else 0
            desirable = int(example.desirable)
            hashed.update(repr((prompt, lengths, desirable)).encode())
        digest = int.from_bytes(hashed.digest(), "little")
        file = self.files.setdefault(name, len(self.files))
        self.ids.append(ids)
        self.labels.append(labels)
        self.documents.append(
            (len(ids), trained, number, file, int(line), len(lengths), prompt, chosen, desirable, digest)
        )
        self.parts += lengths

    def done(self) -> Chunk:
        empty = [np.zeros(0, dtype=np.int32)]
        return Chunk(
            np.concatenate(self.ids or empty),
            np.concatenate(self.labels or empty),
            np.array(self.documents, dtype=DOCUMENT),
            np.array(self.parts, dtype=np.int64),
            list(self.files),
            len(self.rows),
            self.columns - columns_of(self.entry, self.rl),
            self.dropped,
            self.notes,
        )

    def _drop(self, reason: str, location: str, detail: str = "") -> None:
        self.dropped.setdefault(reason, Tally()).add(location, detail)

    def _note(self, note: str, location: str, detail: str = "", count: int = 1) -> None:
        self.notes.setdefault(note, Tally()).add(location, detail, count)


def _split(length: int, limit: int) -> list[tuple[int, int]]:
    """Cut a text into documents. The last one has two tokens at least: a lone one cannot be trained."""
    bounds = [*range(0, length, limit), length]
    if len(bounds) > 2 and bounds[-1] - bounds[-2] == 1 and limit > 2:
        bounds[-2] -= 1
    return list(itertools.pairwise(bounds))


def _cut(lengths: list[int], limit: int) -> list[int]:
    ends = np.minimum(np.cumsum(lengths), limit)
    return [int(length) for length in np.diff(ends, prepend=0) if length]


def _why_untrained(example: Example, entry: DatasetEntry, length: int) -> str:
    if length < 2:
        return f"{length} token(s) in all, and the first one follows from nothing"
    if isinstance(example, ChatExample):
        roles = ", ".join(dict.fromkeys(message["role"] for message in example.messages))
        wanted = ", ".join(entry.roles_to_train if entry.roles_to_train is not None else ["assistant"])
        return f"{length:,} tokens; messages of {roles}, where those of {wanted} are trained unless flagged"
    if isinstance(example, TokenExample):
        return "its labels are -100 throughout, or only at the first token of a document"
    assert isinstance(example, TextExample)
    if not any(segment.trained and segment.text for segment in example.segments):
        return f"{length:,} tokens, none of them in a segment with `label: true`"
    return f"what is left of it, {length:,} tokens, is all prompt"


# --- many chunks --------------------------------------------------------------------------------------------


def tokenise(
    tokeniser: Tokeniser, entry: DatasetEntry, rows: Rows, first_number: int, processes: int | None
) -> Iterator[Chunk]:
    """Chunks of an entry, in the order of its rows. `processes` None: as many as pay."""
    numbered = ((first_number + i, location, row) for i, (location, row) in enumerate(rows.scan()))
    chunks = iter(lambda: list(itertools.islice(numbered, CHUNK)), [])
    count = processes_that_pay(tokeniser, entry) if processes is None else processes
    if count > 1 and processes is None:
        ahead = list(itertools.islice(chunks, _SERIAL_CHUNKS + 1))
        if len(ahead) <= _SERIAL_CHUNKS:
            count = 1
        chunks = itertools.chain(ahead, chunks)
    if count > 1:
        yield from _in_processes(tokeniser, entry, chunks, count)
    else:
        for chunk in chunks:
            yield tokeniser.chunk(entry, chunk)


def processes_that_pay(tokeniser: Tokeniser, entry: DatasetEntry) -> int:
    """How many processes an entry is tokenised in, if nobody says."""
    kind = kind_of_entry(entry, tokeniser.config.preference.rl)
    in_rust = getattr(tokeniser.renderer.tokenizer, "is_fast", False)
    if kind == "preference":
        kind = "chat_template" if kind_of_preference(entry).form in ("any", "template") else "prompt"
    if kind == "tokens" or (kind != "chat_template" and in_rust):
        return 1
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


_tokeniser: Tokeniser | None = None  # of a worker process


def _start_worker(tokeniser: Tokeniser) -> None:
    global _tokeniser
    _tokeniser = tokeniser
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    # Each worker would warn of its own first case; the report counts all of them.
    logging.getLogger("luthier").setLevel(logging.ERROR)


def _end_with_parent(parent: int) -> None:
    """A parent that was killed ends no pool: its processes would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def pool_of(tokeniser: Tokeniser, count: int) -> ProcessPoolExecutor:
    """Processes for `work`, started before this returns where they are forked: the caller's threads come later."""
    # Forked workers share the loaded tokenizer and start at once; a tokenizer's threads do not survive a
    # fork, so it must not look for them in there.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        pool = ProcessPoolExecutor(count, context, _start_worker, (tokeniser,))
        pool.submit(os.getpid)
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
    return pool


def work(entry: DatasetEntry, rows: list[ReadRow]) -> Chunk:
    """`Tokeniser.chunk` in a process of `pool_of`."""
    assert _tokeniser is not None
    return _tokeniser.chunk(entry, rows)


def _in_processes(
    tokeniser: Tokeniser, entry: DatasetEntry, chunks: Iterator[list[ReadRow]], count: int
) -> Iterator[Chunk]:
    """Chunks from a pool, in order, with at most two per process under way, so that rows are not read far
    ahead."""
    pool = pool_of(tokeniser, count)
    waiting: deque[Future[Chunk]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(work, entry, chunk))
            if len(waiting) >= 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"{entry.path}: a process that tokenised it was killed, most likely for want of memory. Try with "
            f"fewer: `dataset_processes: 1` (it was {count})."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
