"""Rows of several datasets to chunks of tokens, beside a training that must not wait."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from luthier.config import Config, DatasetEntry
from luthier.data.dataset import beyond_vocabulary
from luthier.data.formats import kind_of_entry
from luthier.data.render import Renderer
from luthier.data.tokenise import CHUNK, Chunk, ReadRow, Tokeniser, pool_of, processes_that_pay, work
from luthier.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AHEAD = 2  # chunks per process that may be under way, so that rows are not held in memory for long


class Stopped(Exception):
    """The run has no use for what is being made."""


class Maker:
    """Turns rows of several entries into chunks of tokens: in the thread that asks where a fast tokenizer does the
    work, which lets others run meanwhile; in processes where templates do, which are started before the model is
    there and stay.

    Args:
        others: how many do the same. processes: how many to start; None: as the config says, or as many as pay.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        entries: Sequence[DatasetEntry],
        others: int,
        stopped: threading.Event,
        processes: int | None = None,
    ) -> None:
        # A copy, since a tokenizer must not be used by two threads at once.
        self._tokeniser = Tokeniser(Renderer(copy.deepcopy(tokenizer), config), config)
        self._entries, self._stopped = entries, stopped
        self._vocabulary, self._rl = len(tokenizer), config.preference.rl
        for entry in entries:
            if kind_of_entry(entry, self._rl) != "tokens":
                self._tokeniser.renderer.check(entry)
        self._count = 1
        if processes or config.data.dataset_processes:
            self._count = processes or config.data.dataset_processes or 1
        elif config.data.shuffle_buffer_size > 2 * CHUNK:
            self._count = max(processes_that_pay(self._tokeniser, entry) for entry in entries)
            self._count = max(min(2, self._count), self._count // others)
        self._pool: ProcessPoolExecutor | None = None

    def chunks(self, rows: Iterable[tuple[int, ReadRow]]) -> list[tuple[int, Chunk]]:
        """Rows, each with the number of its entry, as (number of the entry, chunk), in an order that follows from the
        rows alone."""
        waiting: list[tuple[int, Chunk | Future[Chunk]]] = []
        buffers: list[list[ReadRow]] = [[] for _ in self._entries]
        for index, row in rows:
            if self._stopped.is_set():
                raise Stopped
            buffers[index].append(row)
            if len(buffers[index]) == CHUNK:
                waiting.append((index, self._submit(index, buffers[index])))
                buffers[index] = []
                if len(waiting) > _AHEAD * self._count:
                    place = len(waiting) - 1 - _AHEAD * self._count
                    waiting[place] = (waiting[place][0], self._result(*waiting[place]))
        waiting += [(index, self._submit(index, left)) for index, left in enumerate(buffers) if left]
        return [(index, self._result(index, chunk)) for index, chunk in waiting]

    def _submit(self, index: int, rows: list[ReadRow]) -> Chunk | Future[Chunk]:
        entry = self._entries[index]
        if self._count == 1:
            return self._tokeniser.chunk(entry, rows)
        if self._pool is None:
            self._pool = pool_of(self._tokeniser, self._count)
        return self._pool.submit(work, entry, rows)

    def _result(self, index: int, chunk: Chunk | Future[Chunk]) -> Chunk:
        if isinstance(chunk, Future):
            try:
                chunk = chunk.result()
            except BrokenProcessPool as error:
                raise DataError(
                    f"{self._entries[index].path}: a process that tokenised it was killed, most likely for want of "
                    f"memory. Try with fewer: `dataset_processes: 1` (it was {self._count})."
                ) from error
        tokens = kind_of_entry(self._entries[index], self._rl) == "tokens"
        if tokens and chunk.input_ids.max(initial=0) >= self._vocabulary:
            raise DataError(beyond_vocabulary(chunk.input_ids, chunk.documents, chunk.files, self._vocabulary))
        return chunk

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
