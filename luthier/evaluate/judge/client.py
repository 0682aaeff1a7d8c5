"""A judge behind an OpenAI-compatible endpoint (`POST .../chat/completions`), at temperature 0.

Servers differ in what they take and fail in many ways. What one refuses (a JSON schema, a temperature, the name of the
limit on tokens) is left out from then on, which is said; what fails for a while (429, 5xx, timeouts, broken
connections, an answer that is no verdict) is tried again with growing waits, a bounded number of times. The standard
library's client is enough for that, and no redirect is followed: the key goes to the address that was named.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import logging
import random
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from typing import Any

from luthier.errors import RunError
from luthier.evaluate.judge.budget import Purse, Use
from luthier.evaluate.judge.question import SCHEMA, UnusableVerdict, Verdict, read_verdict, shortened

log = logging.getLogger("luthier")

OPENAI = "https://api.openai.com/v1"
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before the second attempt; doubled for each further one
LONGEST_RETRY_AFTER = 300.0  # a server that asks for more is not waited for
UNUSABLE_TRIES = 3  # at temperature 0 a further one rarely helps, and each costs
MOST_BYTES = 4 * 2**20  # of a response
FRAME_TOKENS = 400  # at most, of what a server puts around a message: its template, the schema
TRANSIENT = (408, 409, 425, 429)  # and all from 500 on


class NotJudged(Exception):
    """No verdict on one message. `used`: what the attempts at it cost."""

    def __init__(self, message: str = "", used: Use | None = None) -> None:
        super().__init__(message)
        self.used = used or Use()


class Stopped(NotJudged):
    """The command is ending: nothing more is to be asked."""


class CapReached(NotJudged):
    """The next request could go beyond the cap."""


class PairFailed(NotJudged):
    """All attempts failed. `refused`: the server called the request itself bad."""

    refused = False


class _Failed(Exception):
    """One attempt failed; `wait`: seconds that the server asks for; `again`: another one may succeed."""

    def __init__(
        self, message: str, used: Use | None = None, *, wait: float | None = None, again: bool = True
    ) -> None:
        super().__init__(message)
        self.used, self.wait, self.again = used or Use(), wait, again


class _Unusable(_Failed):
    """The judge answered, and it is no verdict."""


class _Adapted(Exception):
    """The server refused a part of the request, which is left out from now on."""


@dataclass(frozen=True)
class _Dialect:
    """What the server takes."""

    form: str = "json_schema"  # then json_object, then nothing: the message asks for JSON anyway
    limit: str = "max_tokens"
    temperature: bool = True
    swapped: bool = False  # `limit` is no longer what it began with


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class Endpoint:
    """One server and model. `ask` may be called from several threads.

    Args:
        url: up to and without `/chat/completions`. key: goes into the Authorization header and nowhere else.
        retries: further attempts after a failed one. timeout: seconds for one attempt. most_out: tokens of an answer.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None,
        purse: Purse,
        *,
        retries: int = 5,
        timeout: float = 120.0,
        most_out: int = 1024,
    ) -> None:
        self.url, self.model, self.purse = url.rstrip("/"), model, purse
        self.retries, self.timeout, self.most_out = retries, timeout, most_out
        self.stop = threading.Event()
        self._key = key
        self._fullest = _Dialect(limit="max_completion_tokens" if self.url == OPENAI else "max_tokens")
        self._dialect = self._fullest
        self._sure = False  # that the server takes the dialect's form, or refuses for other reasons
        self._lock = threading.Lock()
        self._not_before = 0.0  # after a 429 all threads wait
        self._open = urllib.request.build_opener(_NoRedirects).open

    def ask(self, text: str) -> Verdict:
        """The verdict of the judge on one message; its token counts are those of all attempts.

        Raises:
            PairFailed: all attempts failed. CapReached, Stopped: it was not asked (again).
            RunError: no request to this server can succeed (no such model, a wrong key, no credit).
        """
        used, attempt, unusable = Use(), 0, 0
        try:
            while True:
                try:
                    verdict = self._attempt(text)
                except _Adapted:  # bounded: each leaves one thing out, and only once is anything taken in again
                    continue
                except _Failed as failure:
                    used += failure.used
                    unusable += isinstance(failure, _Unusable)
                    attempt += 1
                    if not failure.again or attempt > self.retries or unusable >= UNUSABLE_TRIES:
                        end = PairFailed(f"{failure} ({attempt} attempts)" if attempt > 1 else str(failure))
                        end.refused = not failure.again
                        raise end from failure
                    self._wait_after(failure, attempt)
                else:
                    total = used + Use(verdict.tokens_in, verdict.tokens_out)
                    return replace(verdict, tokens_in=total.tokens_in, tokens_out=total.tokens_out)
        except NotJudged as end:
            end.used += used
            raise

    def _wait_after(self, failure: _Failed, attempt: int) -> None:
        wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.8, 1.2)
        if failure.wait is not None:
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + failure.wait)
            wait = max(wait, failure.wait)  # a server that always says 0 is not asked without a pause
        log.info("the judge: %s; attempt %d of %d in %.1f s", failure, attempt + 1, self.retries + 1, wait)
        if self.stop.wait(wait):
            raise Stopped

    def _attempt(self, text: str) -> Verdict:
        if self.stop.wait(max(0.0, self._not_before - time.monotonic())):
            raise Stopped
        dialect = self._dialect
        payload = json.dumps(self._request(text, dialect)).encode("ascii")
        most = Use(len(text.encode("utf-8", "surrogatepass")) + FRAME_TOKENS, self.most_out)
        if not self.purse.reserve(most, self.stop.is_set):
            raise Stopped if self.stop.is_set() else CapReached
        used: Use | None = None
        try:
            status, headers, body = self._post(payload)
            used = Use()  # a server that answers with an error bills nothing
            if status == 200:
                used = _usage(body)
                self._settle_on(dialect)
                return self._verdict(body, used or most)
            raise self._refusal(status, headers, body, dialect)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(reason := getattr(error, "reason", error), ssl.SSLCertVerificationError):
                raise RunError(f"{self.url}: its certificate cannot be verified: {reason.verify_message}") from error
            if isinstance(reason, ConnectionRefusedError | socket.gaierror):
                used = Use()
            raise _Failed(_named(error, self.timeout), most if used is None else used) from error
        except _Failed as failure:
            failure.used = most if used is None else used
            raise
        finally:
            self.purse.settle(most, used)

    def _request(self, text: str, dialect: _Dialect) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            dialect.limit: self.most_out,
        }
        if dialect.temperature:
            request["temperature"] = 0
        if dialect.form == "json_schema":
            schema = {"name": "verdict", "strict": True, "schema": SCHEMA}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif dialect.form == "json_object":
            request["response_format"] = {"type": "json_object"}
        return request

    def _post(self, payload: bytes) -> tuple[int, Any, str]:
        """Status, headers and text of a response. OSError, HTTPException: there was none, or it broke off."""
        headers = {"Content-Type": "application/json", "User-Agent": "luthier"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", payload, headers, method="POST")
        end = time.monotonic() + self.timeout
        try:
            response = self._open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            response = error
        with response:
            body = b""
            while piece := response.read1(65536):
                body += piece
                if len(body) > MOST_BYTES:
                    raise _Unusable(f"its response has more than {MOST_BYTES >> 20} MiB")
                if time.monotonic() > end:  # the timeout of a socket begins anew with each piece
                    raise TimeoutError
            if response.length:  # `read1` does not say that the connection ended early
                raise http.client.IncompleteRead(body, response.length)
            text = body.decode("utf-8", "replace")
            # Some servers repeat the key in their errors.
            return response.status, response.headers, text.replace(self._key, "***") if self._key else text

    def _verdict(self, body: str, used: Use) -> Verdict:
        try:
            response = json.loads(body)
            (choice, *_) = response["choices"]
            content = _text_of(choice["message"].get("content"))
            refusal = choice["message"].get("refusal")
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            raise _Unusable(f"its response is no chat completion: {shortened(body, 200)}") from error
        if refusal or not isinstance(content, str):
            raise _Unusable(f"it refused: {shortened(str(refusal), 200)}" if refusal else "its message has no text")
        try:
            verdict = read_verdict(content)
        except UnusableVerdict as error:
            if choice.get("finish_reason") == "length":
                message = f"its answer was cut off at {self.most_out} tokens, see --judge-tokens"
                raise _Unusable(message) from error
            raise _Unusable(str(error)) from error
        model = str(response.get("model") or self.model)
        return replace(verdict, tokens_in=used.tokens_in, tokens_out=used.tokens_out, model=model)

    def _refusal(self, status: int, headers: Any, body: str, dialect: _Dialect) -> Exception:
        """What an error of the server's means."""
        said = _message(body)
        shown = f"it answers {status}" + (f" ({shortened(said, 200)})" if said else "")
        lowered = said.lower()
        if status == 429 and "insufficient_quota" in body:
            return RunError(f"{self.url}: the account has no credit left: {said[:300]}")
        if status in TRANSIENT or status >= 500:
            wait = _retry_after(headers.get("Retry-After"))
            if wait is not None and wait > LONGEST_RETRY_AFTER:
                return RunError(
                    f"{self.url}: it asks to wait {wait:.0f} s ({shown}); run the same command again then"
                )
            return _Failed(shown, wait=wait)
        if status in (401, 403):
            return RunError(f"{self.url}: it refuses the key: {shown}; see --api-key-env")
        if status in (301, 302, 303, 307, 308):
            return RunError(f"{self.url}: it redirects to {headers.get('Location')}; give that address if it is right")
        if status in (404, 405):
            return RunError(f"{self.url}: no such address, or no model {self.model!r} there: {shown}")
        if status in (400, 422) and self._adapt(dialect, lowered):
            return _Adapted()
        return _Failed(shown, again=False)

    def _settle_on(self, dialect: _Dialect) -> None:
        """The server takes this dialect: from now on a refusal that names nothing is about the pair."""
        with self._lock:
            if not self._sure:
                self._dialect, self._sure = dialect, True

    def _adapt(self, before: _Dialect, said: str) -> bool:
        """Leave out what a refusal is about: what it names, or, as long as the server has answered nothing, the form,
        which some servers refuse without a word about it. False: it is about none of these."""
        with self._lock:
            if self._dialect != before:  # another thread was first
                return True
            after = _without(before, said)
            if after is None and not self._sure and "context length" not in said:
                after = _plainer(before)
                if after is None:  # it was not the form
                    self._dialect, self._sure = self._fullest, True
            if after is None:
                return False
            self._dialect = after
        if not after.temperature and before.temperature:
            log.warning("the judge takes no temperature: its verdicts may differ from one time to the next")
        elif after.form != before.form:
            log.info("the judge takes no %s; going on with %s", before.form, after.form or "the words of the question")
        else:
            log.info("the judge takes no %s; going on with %s", before.limit, after.limit)
        log.debug("it said: %s", said)
        return True


def _without(dialect: _Dialect, said: str) -> _Dialect | None:
    """The dialect without what an error message names; None if it names nothing that can be left out."""
    if "context length" in said:  # such messages name the limit too
        return None
    if "temperature" in said and dialect.temperature:
        return replace(dialect, temperature=False)
    if dialect.limit in said and not dialect.swapped:
        other = "max_tokens" if dialect.limit == "max_completion_tokens" else "max_completion_tokens"
        return replace(dialect, limit=other, swapped=True)
    if any(word in said for word in ("response_format", "json_schema", "json_object", "schema", "grammar", "guided")):
        return _plainer(dialect)
    return None


def _plainer(dialect: _Dialect) -> _Dialect | None:
    """The dialect with the next weaker form of an answer; None: it asks for none."""
    following = {"json_schema": "json_object", "json_object": ""}.get(dialect.form)
    return None if following is None else replace(dialect, form=following)


def _text_of(content: Any) -> Any:
    """A message's text, which some servers give in pieces, reasoning apart."""
    if not isinstance(content, list):
        return content
    return "".join(piece["text"] for piece in content if piece["type"] == "text")


def _usage(body: str) -> Use | None:
    """What a response says it used; None where it says nothing."""
    try:
        usage = json.loads(body)["usage"]
        found = Use(int(usage["prompt_tokens"]), int(usage["completion_tokens"]))
    except (ValueError, OverflowError, RecursionError, LookupError, TypeError):
        return None
    return found if min(found.tokens_in, found.tokens_out) >= 0 else None


def _message(body: str) -> str:
    """The text of an error in the forms that servers give it."""
    try:
        error = json.loads(body)
    except (ValueError, RecursionError):
        return body.strip()
    for name in ("error", "message", "detail"):
        if isinstance(error, dict) and error.get(name):
            error = error[name]
    return error if isinstance(error, str) else json.dumps(error)


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number, or a date (RFC 9110, section 10.2.3)."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _named(error: Exception, timeout: float) -> str:
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return f"no answer within {timeout:g} s"
    if isinstance(reason, http.client.IncompleteRead | http.client.RemoteDisconnected):
        return "the connection broke off"
    return f"{getattr(reason, 'strerror', None) or reason}"
