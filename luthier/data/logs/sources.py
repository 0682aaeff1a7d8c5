"""Where logs are: files, folders, globs and URLs of fsspec, as a list of files in a fixed order.

Files of one name with numbers behind it (rotated logs) are sorted by the numbers. Nothing is downloaded: a file is
opened where it is and read from front to back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import IO, Any

from luthier.data.stream.addresses import EXTRAS
from luthier.errors import ConfigError, DataError


@dataclass(frozen=True)
class Source:
    """A file.

    Attributes:
        name: as it is shown and noted in the rows. size: bytes as stored, at the time it was listed; no more is read.
        stamp: what changes when the file does (modification time, ETag).
    """

    name: str
    path: str
    size: int
    stamp: str
    filesystem: Any

    def open(self) -> IO[bytes]:
        """Raises DataError: it cannot be opened."""
        try:
            # Blocks are read one after the other: a second buffer, or a cache, would only hold memory.
            opened: IO[bytes] = self.filesystem.open(self.path, "rb")
        except (OSError, ValueError) as error:
            raise DataError(f"{self.name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
        return opened

    def identity(self) -> list[Any]:
        return [self.name, self.size, self.stamp]


def filesystem_of(url: str, storage: dict[str, Any] | None = None) -> tuple[Any, str]:
    """The filesystem of a path or URL, and the path in it.

    Raises ConfigError: no such protocol, or its driver is not installed.
    """
    import fsspec

    protocol = url.partition("://")[0] if "://" in url else "file"
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **(storage or {}) if protocol != "file" else {})
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        how = f"pip install 'luthier[{extra}]'" if extra else f"install its driver ({error})"
        raise ConfigError(f"{url}: reading {protocol}:// needs a package that is not installed: {how}") from error
    except ValueError as error:
        raise ConfigError(f"{url}: {error}") from error
    except Exception as error:  # a driver's own, of many kinds: credentials, regions, endpoints
        raise DataError(f"{url}: {type(error).__name__}: {error}") from error
    return filesystem, str(path)


def find(urls: list[str], storage: dict[str, Any] | None = None) -> list[Source]:
    """The files of all of them, sorted, each once.

    Raises DataError: one of them matches nothing, or cannot be listed.
    """
    found: dict[str, Source] = {}
    for url in urls:
        filesystem, path = filesystem_of(url, storage)
        try:
            listed = _listed(filesystem, path)
        except PermissionError as error:
            raise DataError(f"{url}: permission denied") from error
        except OSError as error:
            raise DataError(f"{url}: cannot be listed: {error}") from error
        except Exception as error:
            # Whatever a store's driver raises for a missing bucket or wrong credentials.
            raise DataError(f"{url}: {type(error).__name__}: {error}") from error
        if not listed:
            what = "no file matches" if re.search(r"[*?\[]", url) else "there is no file there"
            raise DataError(f"{url}: {what}")
        for info in listed:
            source = _source(filesystem, info)
            found.setdefault(source.name, source)
    return sorted(found.values(), key=lambda source: natural(source.name))


def natural(name: str) -> list[Any]:
    """A key that sorts app.log.2 before app.log.10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def _listed(filesystem: Any, path: str) -> list[dict[str, Any]]:
    # A file may have brackets or stars in its name.
    if re.search(r"[*?\[]", path) and not filesystem.exists(path):
        found = filesystem.glob(path, detail=True).values()
        return [each for info in found for each in _files(filesystem, info)]
    try:
        info = filesystem.info(path)
    except FileNotFoundError:
        return []
    return _files(filesystem, info)


def _files(filesystem: Any, info: dict[str, Any]) -> list[dict[str, Any]]:
    if info["type"] != "directory":
        return [info]
    below = filesystem.find(info["name"], detail=True).values()
    # Hidden files (.DS_Store, .nfs...) are a folder's own business; a file that is named is taken.
    return [each for each in below if not each["name"].rpartition("/")[2].startswith(".") and each["type"] == "file"]


def _source(filesystem: Any, info: dict[str, Any]) -> Source:
    path = info["name"]
    protocol = filesystem.protocol if isinstance(filesystem.protocol, str) else filesystem.protocol[0]
    name = _shown(path) if protocol in ("file", "local") else filesystem.unstrip_protocol(path)
    marks = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
    stamp = next((str(info[mark]) for mark in marks if info.get(mark)), "")
    return Source(name, path, int(info.get("size") or 0), stamp, filesystem)


def _shown(path: str) -> str:
    """Relative where that is shorter: rows are published, and a home folder is nobody's business."""
    import os

    relative = os.path.relpath(path)
    return path if relative.startswith("..") and len(relative) > len(path) else relative
