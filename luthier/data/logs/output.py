"""Where the rows go when all are there: a file that is put in its place at once, or an object of a store."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from luthier.data.logs.sources import filesystem_of
from luthier.errors import RunError


def is_url(out: str) -> bool:
    return "://" in out


def exists(out: str, storage: dict[str, Any]) -> bool:
    if not is_url(out):
        return Path(out).expanduser().exists()
    filesystem, path = filesystem_of(out, storage)
    return bool(filesystem.exists(path))


def put_text(out: str, pieces: Iterable[bytes], storage: dict[str, Any]) -> None:
    """Write a whole file. Raises RunError: it cannot be written."""
    try:
        if is_url(out):
            filesystem, path = filesystem_of(out, storage)
            with filesystem.open(path, "wb") as file:
                for piece in pieces:
                    file.write(piece)
            return
        place = Path(out).expanduser()
        partial = place.with_name(f".partial-{place.name}")
        with partial.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, place)
    except OSError as error:
        raise RunError(f"{out}: cannot be written: {error}") from error


def put_file(out: str, made: Path, storage: dict[str, Any]) -> None:
    """Put a file that is whole in its place, and leave it where it was made, too: who is stopped now can do it again.
    On one disk it is the same file under two names."""
    if not is_url(out):
        place = Path(out).expanduser()
        partial = place.with_name(f".partial-{place.name}")
        try:
            partial.unlink(missing_ok=True)
            os.link(made, partial)
            os.replace(partial, place)
            return
        except OSError:
            pass  # another disk, or one that knows no second names: a copy
    with made.open("rb") as file:
        put_text(out, iter(lambda: file.read(1 << 20), b""), storage)


def beside(out: str, name: str) -> str:
    """data.jsonl -> data.jsonl.summary.json"""
    return f"{out}.{name}"


def working_folder(out: str) -> Path:
    """Where a preparation that is not finished keeps what it has: beside a local output."""
    if not is_url(out):
        return Path(beside(out, "progress")).expanduser()
    import hashlib

    cache = os.environ.get("LUTHIER_CACHE")
    root = Path(cache).expanduser() if cache else Path.home() / ".cache" / "luthier"
    return root / "logs" / hashlib.sha256(out.encode()).hexdigest()[:16]


def check_place(out: str) -> None:
    """Raises RunError: no file can be made there."""
    if is_url(out):
        return
    place = Path(out).expanduser()
    if place.is_dir():
        raise RunError(f"--out {out} is a folder; name a file in it, such as {place / 'data.jsonl'}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {out}: its folder cannot be made: {error.strerror}") from error
    if not os.access(place.parent, os.W_OK):
        raise RunError(f"--out {out}: that folder cannot be written to")


