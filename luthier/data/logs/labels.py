"""Which sessions are anomalous, as somebody found out: a CSV file of a key (HDFS: a block's id) and a label.

It is kept as hashes, nine bytes a session, so that the 575,061 blocks of HDFS take 5 MB.
"""

from __future__ import annotations

import csv
import re
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xxhash

from luthier.errors import ConfigError, DataError

_NORMAL = frozenset(("normal", "0", "false", "no", "-", "ok", "success"))
_ANOMALOUS = frozenset(("anomaly", "anomalous", "abnormal", "1", "true", "yes", "fail", "failure"))
_KEYS = {"blockid": r"blk_-?\d+", "block_id": r"blk_-?\d+"}
NORMAL, ANOMALOUS = "normal", "anomalous"


class Labels:
    """`key`: what finds a session's key in a record; `of` gives its label, None where there is none."""

    def __init__(self, file: str, key: str | None, columns: str | None = None) -> None:
        """`columns`: the names of two, with a comma between; None: the first two.

        Raises DataError: the file cannot be read, or a label is neither; ConfigError: no key is known.
        """
        try:
            with Path(file).expanduser().open(newline="", encoding="utf-8-sig") as opened:
                header, hashes, labels = _read(csv.reader(opened), file, columns)
        except FileNotFoundError as error:
            raise DataError(f"--labels {file}: there is no such file") from error
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"--labels {file}: cannot be read: {error}") from error
        if not hashes:
            raise DataError(f"--labels {file}: there are no labels in it")
        order = np.argsort(np.array(hashes, dtype=np.uint64), kind="stable")
        self._hashes = np.array(hashes, dtype=np.uint64)[order]
        self._labels = np.array(labels, dtype=np.uint8)[order]
        pattern = key or _KEYS.get(header.lower())
        if pattern is None:
            raise ConfigError(
                f"--labels {file}: its column of keys is {header!r}; what such a key looks like in a record is said by "
                "--label-key REGEX, such as 'session=(\\w+)'"
            )
        try:
            self.key = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"--label-key {pattern!r} is no regular expression: {error}") from error

    def __len__(self) -> int:
        return len(self._hashes)

    def of(self, key: str) -> str | None:
        wanted = np.uint64(xxhash.xxh3_64_intdigest(key.encode()))
        at = int(np.searchsorted(self._hashes, wanted))
        if at == len(self._hashes) or self._hashes[at] != wanted:
            return None
        return ANOMALOUS if self._labels[at] else NORMAL

    def keys_in(self, text: str) -> list[str]:
        """The keys that a record names: the pattern's first group, if it has one."""
        return list(dict.fromkeys(found[found.lastindex or 0] for found in self.key.finditer(text)))


def _read(rows: Iterable[list[str]], file: str, columns: str | None) -> tuple[str, array[int], array[int]]:
    header, hashes, labels = "", array("Q"), array("B")
    first, second = 0, 1
    for number, row in enumerate(rows, 1):
        if not row:
            continue
        if number == 1 and columns is not None:
            first, second = _places(row, columns, file)
            header = row[first].strip()
            continue
        if len(row) <= max(first, second):
            raise DataError(f"--labels {file}:{number}: a key and a label are wanted: {','.join(row)[:60]!r}")
        key, label = row[first].strip(), row[second].strip().lower()
        if label not in _NORMAL and label not in _ANOMALOUS:
            if number == 1:
                header = key
                continue
            raise DataError(f"--labels {file}:{number}: {label[:40]!r} is neither Normal nor Anomaly (nor 0 nor 1)")
        hashes.append(xxhash.xxh3_64_intdigest(key.encode()))
        labels.append(int(label in _ANOMALOUS))
    return header, hashes, labels


def _places(header: list[str], columns: str, file: str) -> tuple[int, int]:
    names = [name.strip() for name in header]
    wanted = [name.strip() for name in columns.split(",")]
    missing = [name for name in wanted if name not in names]
    if len(wanted) != 2 or missing:
        raise ConfigError(
            f"--label-columns {columns}: two names are wanted, of key and label; {file} has {', '.join(names)}"
        )
    return names.index(wanted[0]), names.index(wanted[1])
