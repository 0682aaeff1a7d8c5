"""To the hub: a repository, private unless asked otherwise, and in it what `export.parcel` packs, as one commit.

A push compares before it sends. What the repository holds with the same hash is not sent again; large files go to
the storage first, by their hash, and one commit at the end makes all of them visible together. So a push that was
interrupted goes on where it stopped when the same command is given again, and nobody ever sees half of a model.
Afterwards the hashes are compared once more.

Tokens are never logged; the hub's own client finds them (HF_TOKEN, or the file of `hf auth login`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

import luthier
from luthier.data.hub import notice_missing_network, why_unreachable
from luthier.errors import ConfigError, LuthierError, RunError
from luthier.export.parcel import Parcel, pack

log = logging.getLogger("luthier")

# Between attempts. The client makes some requests once only; which errors of an upload it tries again differs from
# version to version.
_PAUSES_SECONDS = (1.0, 4.0)
_PASSES = {408, 429, 500, 502, 503, 504}
# The one base of all that its HTTP library raises: httpx in huggingface_hub 1, httpx2 in 2.
_HTTPError: type[Exception] = HfHubHTTPError.__mro__[1]
_SHARDS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")

Answer = TypeVar("Answer")


def push(
    target: str | os.PathLike[str],
    repo: str,
    *,
    merged: bool = False,
    private: bool = True,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    gguf: Sequence[str] = (),
    report: bool = False,
    dry_run: bool = False,
) -> str:
    """Upload a run, an adapter or a model to a repository on the hub, and give its URL.

    Args:
        target: the folder. repo: `owner/name`, created if it is not there. merged: upload RUN/merged instead of the
            adapter. private: of a new repository; an existing one keeps what it is. revision: branch, created if it is
            not there; None: the main one. message: of the commit. token: None: HF_TOKEN, or that of `hf auth login`.
        base_model: the base's id on the hub, where the folder names a local copy. license: for the card. gguf: files
            to add. report: add the run's report.html. dry_run: say what would be uploaded, and ask the hub nothing.

    Raises:
        ConfigError: a wrong name, no token, a public repository where a private one is meant.
        RunError, ModelError: nothing whole to upload; the hub cannot be reached or refuses.
    """
    _check_name(repo)
    branch = None if revision in (None, constants.DEFAULT_REVISION) else revision
    token = token or get_token()
    parcel = pack(
        os.fspath(target), repo, merged=merged, gguf=gguf, report=report, base_model=base_model, licence=license,
        revision=branch, secrets=[token],
    )  # fmt: skip
    _announce(parcel, repo)
    url = f"{constants.ENDPOINT}/{repo}" + (f"/tree/{branch}" if branch else "")
    if dry_run:
        log.info("nothing was uploaded (--dry-run)")
        return url
    _check_network()
    if not token:
        raise ConfigError(
            f"no token for {constants.ENDPOINT}: make one with write access at {constants.ENDPOINT}/settings/tokens, "
            "then set HF_TOKEN or run `hf auth login`"
        )
    hub = _Hub(repo, branch, token)
    hub.prepare(private, parcel)
    hub.upload(parcel, message or f"Upload {'an adapter' if parcel.is_adapter else 'a model'} with Luthier")
    log.info("%s is at %s", repo, url)
    return url


def _check_name(repo: str) -> None:
    owner, slash, name = repo.partition("/")
    if not (slash and owner and name):
        raise ConfigError(f"{repo}: the repository's name is owner/name, with the name of an account or organisation")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"{repo} cannot be a repository's name: {error}") from error


def _announce(parcel: Parcel, repo: str) -> None:
    sizes = parcel.sizes()
    log.info("%s: %d files, %s", repo, len(sizes), _shown(sum(sizes.values())))
    for name in sorted(sizes):
        log.info("  %s (%s)", name, _shown(sizes[name]))
    for remark in parcel.remarks:
        log.info("%s", remark)


def _shown(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def _check_network() -> None:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES:
        raise RunError("HF_HUB_OFFLINE is set, and a push needs the hub: unset it")
    if (reason := why_unreachable()) is not None:
        raise RunError(
            f"{constants.ENDPOINT} cannot be reached ({reason}): nothing was uploaded; look at the network, or "
            "HF_ENDPOINT"
        )
    # Earlier in this process there may have been no network.
    constants.HF_HUB_OFFLINE = False
    notice_missing_network.cache_clear()


class _Hub:
    """One repository, and what may go wrong with it."""

    def __init__(self, repo: str, branch: str | None, token: str) -> None:
        self.repo, self.branch, self.token = repo, branch, token
        self.api = HfApi(token=token, library_name="luthier", library_version=luthier.__version__)

    def prepare(self, private: bool, parcel: Parcel) -> None:
        """The repository and the branch, there and fit for the parcel."""
        account = self._ask(self.api.whoami).get("name", "?")
        log.info("%s, as %s", constants.ENDPOINT, account)
        try:
            info = self._ask(lambda: self.api.model_info(self.repo), absent=True)
        except RepositoryNotFoundError:
            self._ask(lambda: self.api.create_repo(self.repo, private=private, exist_ok=True))
            # Another process may have made it meanwhile, and not like this.
            info = self._ask(lambda: self.api.model_info(self.repo))
            log.info("%s is new, and %s", self.repo, "private" if info.private else "public")
        if private and not info.private:
            raise ConfigError(
                f"{self.repo} is public, and a push is private unless it is said otherwise: nothing was uploaded. Add "
                "--public to publish there, or choose another name"
            )
        if not private and info.private:
            log.warning("%s exists and is private: it stays so (its settings page changes that)", self.repo)
        there = {sibling.rfilename for sibling in info.siblings or []}
        other = {"config.json", "model.safetensors"} if parcel.is_adapter else {"adapter_config.json"}
        if self.branch is None and there & other:
            kind, found = ("an adapter", "a model") if parcel.is_adapter else ("a model", "an adapter")
            raise ConfigError(
                f"{self.repo} holds {found} ({min(there & other)}), and {kind} beside it would be loaded together with "
                "it: choose another name, or another branch with --revision"
            )
        if self.branch is not None:
            branch = self.branch
            self._ask(lambda: self.api.create_branch(self.repo, branch=branch, exist_ok=True))

    def upload(self, parcel: Parcel, message: str) -> None:
        """Send what the repository does not hold, and see that it holds all of it afterwards.

        Raises:
            RunError: it does not. What was sent stays in the storage, and is not sent again.
        """
        missing = self._missing(parcel)
        if kept := len(parcel.files) - len(missing):
            log.info("%d of %d files are there already, and the same", kept, len(parcel.files))
        for pause in (*_PAUSES_SECONDS, None):
            if not missing:
                return
            stale = self._stale(parcel)
            try:
                self._commit(parcel, missing, stale, message)
            except Exception as error:  # the storage's client has errors of its own kinds
                if pause is None or not _passes(error):
                    raise self._explained(error) from error
                log.warning("%s; once more in %g seconds", self._explained(error), pause)
                time.sleep(pause)
            # Also after a failure: the answer may have been lost, and the commit made.
            missing = self._missing(parcel)
        if missing:
            raise RunError(
                f"{self.repo} did not take {', '.join(missing[:4])}: does a .gitignore in the repository name them?"
            )

    def _commit(self, parcel: Parcel, names: Sequence[str], stale: Sequence[str], message: str) -> None:
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=parcel.files[name]) for name in names
        ]
        if stale:
            log.info("removed with the commit: %s, of an earlier model there", ", ".join(stale))
        operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
        self.api.create_commit(
            self.repo, operations=operations, commit_message=message, revision=self.branch, repo_type="model"
        )

    def _missing(self, parcel: Parcel) -> list[str]:
        """Names of the files that the repository does not hold, or not with this content."""
        names = sorted(parcel.files)
        found = self._ask(lambda: self.api.get_paths_info(self.repo, names, revision=self.branch))
        there = {each.path: each for each in found}
        return [name for name in names if name not in there or not _same(parcel.files[name], there[name])]

    def _stale(self, parcel: Parcel) -> list[str]:
        """Files of weights in the repository that are not of this model."""
        if parcel.is_adapter:
            return []
        found = self._ask(lambda: self.api.list_repo_files(self.repo, revision=self.branch))
        return sorted(name for name in found if _SHARDS.fullmatch(name) and name not in parcel.files)

    def _ask(self, call: Callable[[], Answer], *, absent: bool = False) -> Answer:
        """The answer to a request that may be repeated.

        Args:
            absent: let RepositoryNotFoundError through.
        """
        for pause in (*_PAUSES_SECONDS, None):
            try:
                return call()
            except RepositoryNotFoundError as error:
                if absent and _status(error) != 401:
                    raise
                raise self._explained(error) from error
            except (OSError, ValueError, _HTTPError) as error:
                if pause is None or not _passes(error):
                    raise self._explained(error) from error
                log.warning("%s; once more in %g seconds", self._explained(error), pause)
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _explained(self, error: BaseException) -> LuthierError:
        """One message for what the hub or the way to it did."""
        if isinstance(error, LuthierError):
            return error
        error = _cause(error)
        status, endpoint = _status(error), constants.ENDPOINT
        said = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", " ".join(str(error).split()))  # signed URLs are keys
        said = said.replace(self.token, "***")[:400]
        again = "what was sent stays; the same command goes on from there"
        if status == 401:
            return ConfigError(
                f"{endpoint} does not accept the token: make one with write access at {endpoint}/settings/tokens, then "
                "set HF_TOKEN or run `hf auth login` (HF_TOKEN comes first)"
            )
        if status == 403:
            return ConfigError(
                f"{endpoint} does not let this token write to {self.repo}: it needs write access, and its account has "
                f"to be {self.repo.split('/')[0]} or a member of it ({said})"
            )
        if status == 404:
            return RunError(f"{endpoint} has no {self.repo}, or no such account, or hides it from this token ({said})")
        if isinstance(error, OfflineModeIsEnabled):
            return RunError(f"{endpoint} cannot be reached: {again}")
        if status is not None:
            return RunError(f"{endpoint} answered {status}: {said}; {again}")
        if isinstance(error, ValueError) and "metadata in README.md" in said:
            return RunError(f"the hub refuses the model card: {said}")
        return RunError(f"the push to {endpoint} broke off: {type(error).__name__}: {said}; {again}")


def _cause(error: BaseException) -> BaseException:
    """What an upload's error is about, under what the client wraps it in."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _passes(error: BaseException) -> bool:
    """Whether another attempt may succeed."""
    error = _cause(error)
    if isinstance(error, (LuthierError, OfflineModeIsEnabled)):
        return False
    status = _status(error)
    return status in _PASSES if status is not None else isinstance(error, _HTTPError)


def _same(file: Path | bytes, there: Any) -> bool:
    """Whether the repository's file has the same content, by the hash that it is kept under there: SHA-256 of large
    files, git's SHA-1 of others."""
    size = len(file) if isinstance(file, bytes) else file.stat().st_size
    if size != getattr(there, "size", None):
        return False
    if there.lfs is not None:
        return _digest(hashlib.sha256(), file) == str(there.lfs.sha256)
    return _digest(hashlib.sha1(b"blob %d\0" % size), file) == str(there.blob_id)


def _digest(hasher: Any, file: Path | bytes) -> str:
    if isinstance(file, bytes):
        hasher.update(file)
        return str(hasher.hexdigest())
    with file.open("rb") as opened:
        while block := opened.read(1 << 22):
            hasher.update(block)
    return str(hasher.hexdigest())
