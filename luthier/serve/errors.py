"""What a client is told when a request cannot be answered, in the shape that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

# By status: OpenAI's name for the kind of error.
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


FAILED = "the server failed at this request; its log says why"


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        param: the field of the request that it is about. code: OpenAI's word for the case, where it has one.
        retry_after: seconds after which it may go better.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        # What a client called something may hold half a pair of surrogates, which no answer can carry.
        self.message, self.param = _writable(message), None if param is None else _writable(param)
        self.status, self.code = status, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _KINDS.get(self.status, default)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def _writable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request itself is wrong."""
    return ApiError(400, message, param=param, code=code)


def stopping() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
