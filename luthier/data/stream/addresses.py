"""Files at addresses (`s3://bucket/rows-*.jsonl`), through fsspec: what there is, and its bytes.

fsspec reads what is asked for and keeps no copy on the disk. Keys and endpoints come from where the storage's own
tools have them: the environment, and their files.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from luthier.errors import DataError

_ADDRESS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://", re.IGNORECASE)
EXTRAS = {
    **dict.fromkeys(("http", "https"), "http"),
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl", "wasb", "wasbs"), "azure"),
}
"""What of Luthier's extras brings the driver of a scheme."""
# What storages call the version or the time of a file, the most telling first.
_VERSIONS = (
    *("ETag", "etag", "md5Hash", "content_md5", "version_id"),
    *("mtime", "LastModified", "last_modified", "created"),
)


class Stamp(NamedTuple):
    """A file, and what tells whether it is still the same without reading it: size (-1: not known), time or tag."""

    path: str
    size: int
    version: str


def is_address(path: str) -> bool:
    return _ADDRESS.match(path) is not None


@contextmanager
def readable_address(address: str) -> Iterator[None]:
    """Inside, what a storage's driver raises becomes a DataError that names the address."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        scheme = scheme_of(address)
        extra = EXTRAS.get(scheme)
        how = f"pip install 'luthier[{extra}]'" if extra else str(error)
        raise DataError(f"{address}: reading {scheme}:// needs a package that is not installed: {how}") from error
    except Exception as error:  # each storage's driver has errors of its own, with no class in common
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{address}: cannot be read: {said[:300]}") from error


def scheme_of(address: str) -> str:
    match = _ADDRESS.match(address)
    return match["scheme"].lower() if match else ""


def find_files(address: str) -> list[Stamp]:
    """The files that an address means: itself, those in a folder, or those that match its wildcards; by name.

    Raises:
        DataError: none, or the storage cannot be asked.
    """
    import fsspec

    with readable_address(address):
        try:
            system, path = fsspec.core.url_to_fs(address)
        except ValueError as error:  # no such protocol
            raise DataError(f"{address}: {error}.") from error
        http = scheme_of(address) in ("http", "https")
        if glob.has_magic(path.partition("?")[0] if http else path):
            found = system.glob(path, detail=True)
        elif not http and system.isdir(path):
            found = system.find(path, detail=True)
        else:
            try:
                found = {path: system.info(path)}
            except FileNotFoundError:
                found = {}
        stamps = [_stamp(system, info) for _, info in sorted(found.items()) if info.get("type") != "directory"]
    if not stamps:
        silent = ", or the server does not answer" if http else ""
        raise DataError(f"{address}: there is no such file, and none that matches{silent}.")
    return stamps


def _stamp(system: Any, info: dict[str, Any]) -> Stamp:
    size = info.get("size", info.get("Size"))
    version = next((str(info[name]) for name in _VERSIONS if info.get(name) is not None), "")
    return Stamp(system.unstrip_protocol(info["name"]), -1 if size is None else int(size), version)


@contextmanager
def open_address(address: str) -> Iterator[Any]:
    """A file's bytes, which can be sought where the storage can."""
    import fsspec

    with readable_address(address):
        options, seekable = {}, True
        if scheme_of(address) in ("http", "https"):
            system, path = fsspec.core.url_to_fs(address)
            if not system.info(path).get("partial"):  # the server gives whole files only
                options, seekable = {"block_size": 0}, False
        file = fsspec.open(address, "rb", **options).open()
    try:
        yield _Reported(file, address, seekable)
    finally:
        file.close()


class _Reported:
    """A file whose own errors name its address; as much of one as `io.BufferedReader` asks for."""

    def __init__(self, file: Any, address: str, seekable: bool) -> None:
        self._file, self._address = file, address
        self._seekable = seekable and bool(file.seekable())

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return self._seekable

    def readinto(self, buffer: Any) -> int:
        with readable_address(self._address):
            found = self._file.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def seek(self, offset: int, whence: int = 0) -> int:
        with readable_address(self._address):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()
