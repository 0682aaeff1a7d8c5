"""One pass over all rows: a record of each, with its sizes, its hashes and what is wrong with it.

A record is about a kilobyte, and at most two more for its shingles; where there are more rows than `limit`, every
second one is let go and from there on only every second one looked at, as often as it takes, so that the sample is
spread evenly over the data whatever its length.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from luthier.config import DatasetEntry
from luthier.data.files import Row
from luthier.data.formats import columns_of
from luthier.data.inspect.checks import hidden, problems_of
from luthier.data.inspect.sources import UNREAD, Material, check_type, rows_of
from luthier.data.inspect.views import View, hashed_words, views_of, words_of
from luthier.data.near import shingles
from luthier.data.preferences import LeftOut
from luthier.errors import DataError

if TYPE_CHECKING:
    from luthier.data.tokenise import Tokeniser

CLIPPED = 400  # characters of a row that are kept for showing
_SKETCH = 256  # least shingles that a set of a text is kept as
_MOST_VALUES = 50  # distinct values of a column that may be a category
_CHUNK = 500


@dataclass(slots=True)
class Record:
    """A row.

    Attributes:
        tokens: of the longest example that it makes, which sequence_len bounds; trained: trained ones of all.
        key, prompt_key: hashes of all its texts and of its prompt. sets: shingles of the whole and of each answer.
        short: its only answer, if that is one word or two, in lower case.
    """

    place: str
    number: int
    source: int
    tokens: int = 0
    trained: int = 0
    readable: bool = True
    key: bytes = b""
    prompt_key: bytes = b""
    first_words: str = ""
    asking: str = ""
    words: int = 0
    short: str = ""
    given: bool | None = None
    label: bool | None = None
    groups: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    sets: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    text: str = ""


@dataclass(slots=True)
class Collected:
    """All that was looked at. `rows`: how many each source has; `stride`: every how manyth was looked at; `streamed`:
    so many rows at most were read, of a stream."""

    material: Material
    records: list[Record] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    stride: int = 1
    streamed: int | None = None

    def held(self, record: Record) -> bool:
        """Whether a row is in a dataset for validation."""
        return self.material.entries[record.source][1]


def collect(material: Material, limit: int) -> Collected:
    """Look at all rows, or evenly at `limit` of them at most and half as many at least.

    Raises DataError where nothing of a dataset fits its type.
    """
    streamed = limit if material.config.data.streaming else None
    found = Collected(material, streamed=streamed)
    tokeniser = _tokeniser(material)
    number = 0
    values: dict[tuple[int, str], set[str]] = {}
    for source, (entry, _) in enumerate(material.entries):
        before = number
        rows = ((at, location, row) for at, (location, row) in enumerate(rows_of(entry, streamed), start=number))
        while chunk := list(itertools.islice(rows, _CHUNK)):
            number = chunk[-1][0] + 1
            chosen = [each for each in chunk if each[0] % found.stride == 0]
            records = [_record(*each, source, entry, material, values) for each in chosen]
            _count_tokens(records, chosen, entry, tokeniser)
            found.records += records
            while len(found.records) > limit:
                found.stride *= 2
                found.records = [record for record in found.records if record.number % found.stride == 0]
        found.rows.append(number - before)
        _check(found, source, entry)
    return found


def _tokeniser(material: Material) -> Tokeniser | None:
    if material.tokenizer is None:
        return None
    from luthier.data.render import Renderer
    from luthier.data.tokenise import Tokeniser

    keys: dict[str, Any] = {"sequence_len": UNREAD, "skip_bad_rows": True}
    if material.config.preference.rl is not None:
        keys["max_prompt_len"] = None
    config = material.config.replace("inspect", **keys)
    renderer = Renderer(material.tokenizer, config)
    for entry, _ in material.entries:
        if entry.type is not None or config.preference.rl is not None:
            renderer.check(entry)
    return Tokeniser(renderer, config)


def _check(found: Collected, source: int, entry: DatasetEntry) -> None:
    if not found.rows[source]:
        raise DataError(f"{entry.path}: there are no rows in it.")
    records = [record for record in found.records if record.source == source]
    if records and not any(record.readable for record in records):
        problems = [detail for record in records for kind, detail in record.problems if kind == "unreadable"]
        check_type(entry, found.material.config.preference.rl, problems)


def _record(
    number: int,
    place: str,
    row: Row | DataError,
    source: int,
    entry: DatasetEntry,
    material: Material,
    values: dict[tuple[int, str], set[str]],
) -> Record:
    record = Record(place, number, source)
    rl = material.config.preference.rl
    try:
        if isinstance(row, DataError):
            raise row
        views = views_of(row, entry, material.config.data.train_on_inputs, rl)
    except LeftOut:
        record.problems = [("same answers", "")]
        record.readable, record.text = True, _clipped(str(row))
        return record
    except DataError as error:
        record.readable = False
        record.problems = [("unreadable", str(error))]
        record.text = "" if isinstance(row, DataError) else _clipped(str(row))
        return record
    _describe(record, views, material)
    for name, value in row.items():
        if name not in columns_of(entry, rl) and isinstance(value, str | int | bool) and len(str(value)) <= 40:
            seen = values.setdefault((source, name), set())
            if len(seen) <= _MOST_VALUES:
                seen.add(str(value))
                record.groups[name] = str(value)
    return record


def _describe(record: Record, views: list[View], material: Material) -> None:
    first = views[0]
    whole = "\x00".join(view.system + "\x01" + view.text + str(view.label) for view in views)
    record.key = _digest(whole)
    record.prompt_key = _digest(first.system + "\x01" + first.prompt) if first.prompt else b""
    answer = first.answers[0] if first.answers else ""
    record.first_words = " ".join(words_of(answer[:200])[:2])
    record.asking = " ".join(words_of(first.prompt[:200])[:2])
    record.words = len(words_of(answer))
    if len(views) == 1 and len(first.answers) == 1 and record.words <= 2:
        record.short = record.first_words
    record.given = None if first.given is None else bool(first.given.strip())
    record.label = first.label if len(views) == 1 else None
    special = material.tokenizer.all_special_tokens if material.tokenizer is not None else ()
    problems: dict[str, str] = {}
    for view in views:
        for kind, detail in problems_of(view, special):
            problems.setdefault(kind, detail)
    record.problems = list(problems.items())
    hashed = hashed_words("\n".join(view.text for view in views))
    answers = [answer for view in views for answer in view.answers]
    record.sets = [_sketch(hashed), *(_sketch(hashed_words(answer)) for answer in answers[:2])]
    texts = [first.prompt, *answers[:2]]
    record.text = _clipped(" → ".join(text for text in texts if text))
    # An estimate, which `_count_tokens` replaces where there is a tokenizer.
    record.tokens = max(_size(view.system + view.text) for view in views)
    record.trained = sum(_size(answer) for answer in answers)


def _size(text: str) -> int:
    return -(-len(text.encode("utf-8", "surrogatepass")) // 4)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _sketch(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The shingles of a text, of a long one the least 256: as many of them in common as of all (Broder 1997)."""
    return shingles(words)[:_SKETCH]


def _clipped(text: str) -> str:
    text = hidden(text[: 2 * CLIPPED])
    return text if len(text) <= CLIPPED else text[: CLIPPED - 1] + "…"


def _count_tokens(
    records: list[Record], rows: list[Any], entry: DatasetEntry, tokeniser: Tokeniser | None
) -> None:
    """Tokens as they would be trained, in place of the estimate."""
    if tokeniser is None or not rows:
        return
    chunk = tokeniser.chunk(entry, rows)
    by_number = {record.number: record for record in records}
    for record in records:
        record.tokens = record.trained = 0
    parts = _parts(chunk.documents, chunk.parts)
    for document, lengths in zip(chunk.documents, parts, strict=True):
        record = by_number[int(document["row"])]
        longest = max(lengths) if document["prompt"] else int(document["length"])
        record.tokens = max(record.tokens, longest)
        record.trained += int(document["trained"])


def _parts(documents: npt.NDArray[Any], parts: npt.NDArray[np.int64]) -> Iterator[list[int]]:
    ends = np.cumsum(documents["parts"])
    for end, count in zip(ends.tolist(), documents["parts"].tolist(), strict=True):
        yield parts[end - count : end].tolist()
