"""The HTTP side: routes, keys, bodies, streams, and clients that leave.

A request's status is decided when its first token is there or its trouble is: so a stream that could not begin is an
error with a status of its own, and only what goes wrong later is an event in the stream.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from luthier.serve.answers import DONE, Shape, sse, usage_of
from luthier.serve.errors import FAILED, ApiError
from luthier.serve.requests import Asked, parse, read_chat, read_text
from luthier.serve.service import Job, Service

# A body that is too long is read to its end up to so many times the limit, for a client that only listens when it has
# said all.
_POLITE = 4
_NOBODY = 499  # what is written for a client that has gone; nobody reads it


def create_app(service: Service, api_key: str | None) -> FastAPI:
    """The application; `api_key` is asked for at every route but /health."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.stop()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(HTTPException, _as_json)
    app.add_exception_handler(ApiError, _as_json)
    app.add_exception_handler(Exception, _as_json)

    @app.get("/health")
    async def health() -> Response:
        if service.draining or not service.worker.healthy:
            state = "stopping" if service.draining else "failing"
            return JSONResponse({"status": state}, 503)
        return JSONResponse({"status": "ok", "waiting": service.waiting, "running": service.running})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        _check_key(request, api_key)
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        _check_key(request, api_key)
        return JSONResponse({"object": "list", "data": [_model(name, service) for name in service.models]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        _check_key(request, api_key)
        service.model(name)
        return JSONResponse(_model(name, service))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _Exchange(service, request, api_key, read_chat, chat=True).answer()

    @app.post("/v1/completions")
    async def text(request: Request) -> Response:
        return await _Exchange(service, request, api_key, read_text, chat=False).answer()

    return app


def _model(name: str, service: Service) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.created, "owned_by": "luthier"}


async def _as_json(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # no such route, or not by this method
        text = f"{request.method} {request.url.path}: {error.detail}"
        error = ApiError(error.status_code, text)
    elif not isinstance(error, ApiError):  # a fault of the server's, whose traceback goes into its log
        error = ApiError(500, FAILED)
    return JSONResponse(error.body, error.status, headers=error.headers)


def _check_key(request: Request, api_key: str | None) -> None:
    if api_key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    same = hmac.compare_digest(given.strip().encode(), api_key.encode())
    if scheme.lower() != "bearer" or not same:
        message = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
        raise ApiError(401, message, code="invalid_api_key")


async def _read_body(request: Request, limit: int, seconds: float) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A web page can have a browser send other kinds here without being asked whether it may.
    if kind != "application/json":
        raise ApiError(415, f"the body must be application/json, and is {kind or 'of no kind'}")
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    parts.append(part)
                elif size > _POLITE * limit:
                    break
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {seconds:g} seconds") from error
    if size > limit:
        raise ApiError(413, f"the body is longer than {limit} bytes", code="body_too_large")
    return b"".join(parts)


class _Exchange:
    """One request for text, from its body to the end of its answer."""

    def __init__(
        self,
        service: Service,
        request: Request,
        api_key: str | None,
        read: Callable[[dict[str, Any]], Asked],
        *,
        chat: bool,
    ) -> None:
        self.service, self.request, self.api_key, self.read, self.chat = service, request, api_key, read, chat
        self.began = time.monotonic()
        self.model = ""

    async def answer(self) -> Response:
        try:
            response = await self._answer()
        except ApiError as error:
            self._count(error.status)
            raise
        except Exception:
            self._count(500)
            raise
        self._count(response.status_code)
        return response

    def _count(self, status: int) -> None:
        if status == _NOBODY:
            self.service.metrics.vanished.inc()
        self.service.metrics.requests.labels(self.request.url.path, self.model, str(status)).inc()

    async def _answer(self) -> Response:
        _check_key(self.request, self.api_key)
        limits = self.service.limits
        try:
            body = await _read_body(self.request, limits.max_body, limits.body_seconds)
        except Exception as error:
            if type(error).__name__ == "ClientDisconnect":
                return Response(status_code=_NOBODY)
            raise
        asked = self.read(parse(body))
        self.model = self.service.model(asked.model).name
        shape = Shape(self.model, int(time.time()), chat=self.chat, usage=asked.include_usage)
        return await self._unless_gone(self._begin(asked, shape))

    async def _begin(self, asked: Asked, shape: Shape) -> Response:
        job = await self.service.begin(asked, self.began)
        try:
            if not asked.stream:
                whole = await self._whole(job, shape)
                return JSONResponse(whole)
            first = await job.next()
        except BaseException:  # being cancelled too
            self.service.cancel(job)
            raise
        return _Stream(self._chunks(job, shape, first), lambda: self._left(job))

    async def _whole(self, job: Job, shape: Shape) -> dict[str, Any]:
        done = {}
        while (event := await job.next()) is not None:
            if event.completion is not None:
                done[job.index[event.row]] = event.completion
        self._ended(job)
        return shape.whole([done[index] for index in sorted(done)], usage_of(job.prompt_tokens, job.rows))

    async def _chunks(self, job: Job, shape: Shape, event: Any) -> AsyncIterator[bytes]:
        opened = set()
        try:
            while event is not None:
                index, chunk = job.index[event.row], b""
                if index not in opened:
                    opened.add(index)
                    chunk = shape.opening(index)
                if event.piece:
                    chunk += shape.piece(index, event.piece)
                if event.completion is not None:
                    chunk += shape.end(index, event.completion.finish_reason)
                if chunk:
                    yield chunk
                event = await job.next()
        except ApiError as error:
            yield sse(error.body)
            return
        self._ended(job)
        yield shape.usage(usage_of(job.prompt_tokens, job.rows)) + DONE

    def _ended(self, job: Job) -> None:
        self.service.metrics.seconds.labels(self.model).observe(time.monotonic() - self.began)

    def _left(self, job: Job) -> None:
        """After a stream, however it has ended."""
        if any(row in self.service.jobs for row in job.rows):
            self.service.metrics.vanished.inc()
        self.service.cancel(job)

    async def _unless_gone(self, answer: Coroutine[Any, Any, Response]) -> Response:
        """The answer, which is given up when the client goes."""
        answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                return answering.result()
            return Response(status_code=_NOBODY)
        finally:
            for task in (answering, leaving):
                if not task.done():
                    task.cancel()
                    with suppress(asyncio.CancelledError, ApiError):
                        await task

    async def _gone(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass


class _Stream(StreamingResponse):
    """Server-sent events, and something to do afterwards even if not one of them was sent."""

    def __init__(self, chunks: AsyncIterator[bytes], afterwards: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # a proxy is to pass each on at once
        super().__init__(chunks, media_type="text/event-stream", headers=headers)
        self._afterwards = afterwards

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._afterwards()


