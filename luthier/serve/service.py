"""Requests in progress: who waits, who runs, who is turned away.

All of it belongs to the event loop's thread, so that no count needs a lock; the worker's events arrive there in one
call for each step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from luthier.generate.engine import Engine
from luthier.generate.rows import Row
from luthier.models.several import Several
from luthier.serve.errors import FAILED, ApiError, bad, stopping
from luthier.serve.metrics import Metrics
from luthier.serve.requests import Asked
from luthier.serve.served import Served
from luthier.serve.worker import Event, Worker


@dataclass(frozen=True)
class Limits:
    """max_tokens: of an answer (None: the model's context). max_queue: texts that wait for their first token.
    max_body: bytes. body_seconds: for a body to arrive."""

    max_tokens: int | None = None
    max_queue: int = 1024
    max_body: int = 4 * 2**20
    body_seconds: float = 60.0


class Job:
    """A request's texts on their way. `events` come in the order in which they happen; a text's last one says so."""

    def __init__(self, served: Served, rows: Sequence[Row], n: int, began: float) -> None:
        self.served, self.rows, self.began = served, list(rows), began
        self.index = {row: at for at, row in enumerate(rows)}
        # Several answers to one prompt read it once.
        self.prompt_tokens = sum(len(row.prompt_ids) for row in self.rows[::n])
        self.started = False
        self._open = len(self.rows)
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        self._events.put_nowait(event)

    async def next(self) -> Event | None:
        """The next event; None once every text has had its last.

        Raises:
            ApiError: a text was lost, and with it the request.
        """
        if self._open == 0:
            return None
        event = await self._events.get()
        if event.problem is not None:
            raise _error(event.problem)
        self._open -= event.last
        return event


def _error(problem: str) -> ApiError:
    if problem == "stopping":
        return stopping()
    if problem == "memory":
        return ApiError(503, "out of memory; the server goes on with smaller batches", code="memory", retry_after=1)
    return ApiError(500, FAILED)


class Service:
    """Models, the worker that runs them, and the requests in between."""

    def __init__(
        self, several: Several, limits: Limits, max_cached_tokens: int, *, idle_seconds: float = 60.0
    ) -> None:
        self.limits, self.metrics = limits, Metrics()
        self.created = int(time.time())
        self.models = {
            name: Served(several, name, max_cached_tokens, limits.max_tokens) for name in several.names
        }
        first: Engine = next(iter(self.models.values())).engine
        embeddings: Any = several.model.get_input_embeddings()
        self.worker = Worker(several.loop(first), embeddings.weight.device, self._from_worker, idle_seconds)
        self.draining = self.hurry = False
        self.jobs: dict[Row, Job] = {}
        self.preparing = 0  # texts whose prompts are being made
        self.unstarted: set[Row] = set()
        self._prompts = ThreadPoolExecutor(1, "luthier-prompts")
        self._loop: asyncio.AbstractEventLoop | None = None
        self.metrics.watch(lambda: self.waiting, lambda: self.running)

    @property
    def waiting(self) -> int:
        return self.preparing + len(self.unstarted)

    @property
    def running(self) -> int:
        return len(self.jobs) - len(self.unstarted)

    @property
    def busy(self) -> bool:
        return bool(self.jobs or self.preparing)

    def start(self) -> None:
        """From inside the event loop."""
        self._loop = asyncio.get_running_loop()
        self.worker.start()

    def stop(self) -> None:
        self._loop = None
        self.worker.stop()
        self._prompts.shutdown(wait=False, cancel_futures=True)

    def model(self, name: str) -> Served:
        """
        Raises:
            ApiError: nothing here goes by that name.
        """
        if name not in self.models:
            raise ApiError(
                404,
                f"the model {name!r} does not exist here; there is: {', '.join(self.models)}",
                param="model",
                code="model_not_found",
            )
        return self.models[name]

    async def begin(self, asked: Asked, began: float) -> Job:
        """Put a request into the queue.

        Raises:
            ApiError: it cannot be answered, or not now.
        """
        served = self.model(asked.model)
        served.check(asked)
        self._admit(asked.choices)
        self.preparing += asked.choices
        try:
            assert self._loop is not None
            rows = await self._loop.run_in_executor(self._prompts, served.rows, asked)
        finally:
            self.preparing -= asked.choices
        job = Job(served, rows, asked.n, began)
        self.jobs.update((row, job) for row in rows)
        self.unstarted.update(rows)
        self.metrics.prompt_tokens.labels(served.name).inc(job.prompt_tokens)
        self.worker.submit(rows, served.engine.tokenizer)
        return job

    def _admit(self, texts: int) -> None:
        if self.draining:
            raise stopping()
        most = self.limits.max_queue
        if texts > most:
            raise bad(f"n: {texts} answers in one request, and the queue here holds {most}", "n")
        if self.waiting + texts > most:
            raise ApiError(
                429,
                f"{self.waiting} texts are waiting, and at most {most} may: try again later",
                code="queue_full",
                retry_after=1,
            )

    def cancel(self, job: Job) -> None:
        """Stop what is still written for a request."""
        left = [row for row in job.rows if self.jobs.pop(row, None) is not None]
        self.unstarted.difference_update(left)
        if left:
            self._count(job, left)
            self.worker.cancel(left)

    async def drain(self, seconds: float) -> None:
        """Take no more requests, and let those that are here end; after so many seconds or in a hurry, they are
        told that they will not."""
        self.draining = True
        until = time.monotonic() + seconds
        while self.busy and time.monotonic() < until and not self.hurry:
            await asyncio.sleep(0.02)
        left = dict(self.jobs)
        self._take([Event(row, problem="stopping") for row in left])
        self.worker.cancel(left)

    def _from_worker(self, events: list[Event]) -> None:
        """In the worker's thread."""
        loop = self._loop
        if loop is not None and events:
            with suppress(RuntimeError):  # it has closed since
                loop.call_soon_threadsafe(self._take, events)

    def _take(self, events: list[Event]) -> None:
        now = time.monotonic()
        for event in events:
            job = self.jobs.get(event.row)
            if job is None:  # its client has gone meanwhile
                continue
            if event.problem is None:
                self.unstarted.discard(event.row)
                if not job.started:
                    job.started = True
                    self.metrics.first_token.labels(job.served.name).observe(now - job.began)
            else:
                self.metrics.lost.labels(event.problem).inc()
            if event.last:
                self.unstarted.discard(event.row)
                del self.jobs[event.row]
                self._count(job, [event.row])
            job.put(event)

    def _count(self, job: Job, rows: Sequence[Row]) -> None:
        self.metrics.new_tokens.labels(job.served.name).inc(sum(len(row.token_ids) for row in rows))
