"""The stages put together: sources -> rows, in one pass."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.data.logs import settings as bounds
from luthier.data.logs.chunks import Chunks, Masked, Row
from luthier.data.logs.counts import Counts
from luthier.data.logs.decode import SNIFFED, Decoder, binary_kind, encoding_of
from luthier.data.logs.labels import Labels
from luthier.data.logs.mask import Mask, Masker
from luthier.data.logs.progress import Progress
from luthier.data.logs.records import Joiner, Record, Starts, own_start, starts_of
from luthier.data.logs.repeats import Memo, Seen, is_kept
from luthier.data.logs.settings import Settings
from luthier.data.logs.sources import Source
from luthier.data.logs.streams import blocks, size_of
from luthier.data.logs.tasks import Anomaly, NextLine, Severity, Summarise, Task, Template, filled
from luthier.data.logs.templates import Templates
from luthier.data.logs.tokens import TokenCount
from luthier.errors import DataError

log = logging.getLogger("luthier")

_SAID_EVERY = 10.0  # seconds between two lines about the progress
_TOLD_BY_NAME = 20  # files that are skipped, each with a line; the others are only counted


class _Enough(Exception):
    """`--limit` records were read."""


class Preparation:
    """One run of `luthier prepare logs`; with a `progress` of an earlier one it goes on from there."""

    def __init__(self, settings: Settings, sources: list[Source], progress: Progress | None) -> None:
        """`progress` None: a dry run, whose first rows are in `samples`."""
        self.settings, self._sources, self.progress = settings, sources, progress
        self.counts = Counts()
        self.samples: list[tuple[str, Row]] = []
        self.templates = Templates(settings.max_templates, settings.similarity)
        self._tokens = TokenCount(settings.tokenizer)
        self._masker = Masker(settings.masks, settings.mask_patterns, settings.pseudonyms, self.counts)
        self._seen = Seen(bounds.SEEN_SLOTS)
        # Shape -> its masks and its template.
        self._shapes: Memo[tuple[tuple[Mask, ...], int]] = Memo(bounds.MEMO_BYTES)
        self._kept: dict[str, dict[int, int]] = {"train": {}, "validation": {}}  # template -> its records in that part
        self._part = "train"
        self._chunks: Chunks | None = None
        self._tasks: list[Task] = []
        self._own_start = own_start(settings.record_start) if settings.record_start else None
        self._cut: float = float("inf")  # byte of the stream from which records are for validation
        self._make_tasks()
        self._said = self._began = time.monotonic()
        self._since = 0  # bytes since the last note
        self._at: dict[str, Any] = {"source": 0}
        if progress is not None and progress.note is not None:
            self._restore(progress.note["state"], progress.seen())

    def _labels(self) -> Labels:
        return Labels(self.settings.labels or "", self.settings.label_key, self.settings.label_columns)

    def _make_tasks(self) -> None:
        settings = self.settings
        budget = settings.max_tokens - self._tokens.around
        told = (budget, self._tokens, self.counts, self._write)
        makers = {
            "severity": lambda: Severity(*told),
            "template": lambda: Template(*told),
            "next-line": lambda: NextLine(*told, settings.context),
            "summarise": lambda: Summarise(*told),
            "anomaly": lambda: Anomaly(*told, self._labels()),
        }
        for name in settings.tasks:
            if name == "completion":
                self._chunks = Chunks(budget, settings.overlap, settings.overlap_tokens, *told[1:])
            else:
                self._tasks.append(makers[name]())

    # --- one pass

    def read(self) -> None:
        """All that is left to read."""
        going_on = self._at if "position" in self._at else None
        try:
            for index in range(self._at["source"], len(self._sources)):
                self._at = {"source": index}
                self._source(self._sources[index], going_on)
                going_on = None
                self._at = {"source": index + 1}
                if self._since >= bounds.CHECKPOINT:
                    self.note()
        except _Enough:
            log.info("--limit: the first %s records were read", f"{self.counts['records']:,}")
            self._end_of_source()
        self.counts["templates"] = len(self.templates)
        self.counts["repeats_forgotten"] = self._seen.forgotten

    def _source(self, source: Source, going_on: dict[str, Any] | None) -> None:
        counts = self.counts if going_on is None else Counts()
        stream = blocks(source, 0, counts)
        first: list[bytes] = []
        while sum(map(len, first)) < SNIFFED and (block := next(stream, b"")):
            first.append(block)
        head = b"".join(first)[:SNIFFED]
        if going_on is None and not self._is_log(source, head):
            self.counts["bytes_skipped"] += source.size
            return
        encoding, mark = encoding_of(head, self.settings.encoding)
        decoder = Decoder(encoding, self.settings.max_line_bytes, self.counts)
        joiner = Joiner(self._starts(head[mark:], encoding), self.counts, mark)
        self._cut = float("inf")
        if self.settings.validation:
            self._cut = size_of(source) * (1 - self.settings.validation_share)
        self._name(source)
        if going_on is None:
            self.counts["files"] += 1
            position, parts = 0, _chained(first, stream)
        else:
            decoder.restore(going_on["decoder"])
            joiner.restore(going_on["joiner"])
            position, parts = going_on["position"], blocks(source, going_on["position"], self.counts)
        for block in parts:
            skipped = max(mark - position, 0)  # of the byte order mark
            self._records(source, joiner.records(decoder.lines(block[skipped:])))
            position += len(block)
            self._read_on(source, len(block))
            if self._since >= bounds.CHECKPOINT:
                self._at |= {"position": position, "decoder": decoder.state(), "joiner": joiner.state()}
                self.note()
        self._records(source, joiner.records(decoder.last()))
        self._records(source, joiner.last())
        self._end_of_source()

    def _is_log(self, source: Source, head: bytes) -> bool:
        """Whether there is text in it; what there is not, is counted."""
        kind = "empty" if not head else None
        if head and not encoding_of(head, self.settings.encoding)[0].startswith("utf-16"):
            kind = binary_kind(head)
        if kind is None:
            return True
        self.counts[f"files_skipped.{kind}"] += 1
        skipped = sum(self.counts.of("files_skipped").values())
        if skipped <= _TOLD_BY_NAME:
            log.info("%s: not read: %s", source.name, kind)
        elif skipped == _TOLD_BY_NAME + 1:
            log.info("further files are not read either, and only counted")
        return False

    def _starts(self, head: bytes, encoding: str) -> Starts:
        if self._own_start is not None:
            return Starts(self._own_start)
        sample = Decoder(encoding, self.settings.max_line_bytes, Counts()).lines(head + "\n".encode(encoding))
        return starts_of(text for text, _ in sample)

    def _name(self, source: Source) -> None:
        for stage in (self._chunks, *self._tasks):
            if stage is not None:
                stage.source = source.name

    def _end_of_source(self) -> None:
        if self._chunks is not None:
            self._chunks.close()
        for task in self._tasks:
            task.end_of_source()
        self._part = "train"

    def _begin_validation(self) -> None:
        """Nothing of the part before goes on into this one."""
        if self._chunks is not None:
            self._chunks.close()
        for task in self._tasks:
            task.close()
            if isinstance(task, Anomaly):
                task.part = "validation"
        self._part = "validation"

    # --- records

    def _records(self, source: Source, records: list[Record]) -> None:
        if not records:
            return
        counts, settings, sizes = self.counts, self.settings, self.templates.sizes
        tasks, chunks = self._tasks, self._chunks
        shapes, by_length = self._masker.shapes([record.text for record in records])
        for at, (record, shape) in enumerate(zip(records, shapes, strict=True)):
            if settings.limit and counts["records"] >= settings.limit:
                raise _Enough
            counts["records"] += 1
            if record.start >= self._cut and self._part == "train":
                self._begin_validation()
            text, template = self._masked(record.text, shape, by_length.get(at, ()))
            sizes[template] = sizes.get(template, 0) + 1
            kept = True
            if settings.dedup and not self._seen.first(text):
                counts["duplicates"] += 1
                kept = False
            elif template:
                share = self._kept[self._part]
                share[template] = k = share.get(template, 0) + 1
                if not is_kept(k, self._keep()):
                    counts["thinned"] += 1
                    kept = False
            counts["kept"] += kept
            if chunks is not None:
                if kept:
                    last = record.line + record.lines - 1
                    chunks.add(Masked(text, template, record.start, record.end, record.line, last))
            elif tasks:
                masked = Masked(text, template, record.start, record.end, record.line, record.line + record.lines - 1)
                for task in tasks:
                    task.see(masked, record.text, kept)
        counts["templates"] = len(self.templates)

    def _keep(self) -> int:
        """Of a template, in this part: validation gets its share."""
        keep = self.settings.keep_per_template
        return keep if self._part == "train" or not keep else max(1, round(keep * self.settings.validation_share))

    def _masked(self, text: str, shape: str, by_length: tuple[Mask, ...]) -> tuple[str, int]:
        """The text without secrets, and its template."""
        masker = self._masker
        known = None if by_length else self._shapes.get(shape)
        if known is not None:
            masks, template = known
            return masker.masked(text, masks) if masks else text, template
        masks = masker.that_may_match(shape, by_length)
        text = masker.masked(text, masks) if masks else text
        template = self.templates.of(text)
        # Long texts hardly come twice.
        if not by_length and not masker.depends_on_text and len(shape) <= _LONGEST_SHAPE:
            self._shapes.put(shape, (masks, template))
        return text, template

    # --- rows

    def _write(self, kind: str, row: Row, tokens: int, part: str | None = None) -> None:
        counts, part = self.counts, part or self._part
        counts[f"rows.{kind}"] += 1
        counts["tokens"] += tokens
        if part == "validation":
            counts["validation_rows"] += 1
            counts["validation_tokens"] += tokens
        if self.progress is None:
            if len(self.samples) < 3:
                self.samples.append((part, row))
            return
        self.progress.write(part, line_of(row))

    def finished_rows(self, part: str) -> Iterator[bytes]:
        """The rows with the templates' texts in them."""
        assert self.progress is not None
        with self.progress.rows(part).open("rb") as file:
            for line in file:
                row = json.loads(line)
                answer = filled(row, self.templates)
                if answer is not None:
                    row["output"] = answer
                    tokens = self._tokens.of(answer)
                    self.counts["tokens"] += tokens
                    if part == "validation":
                        self.counts["validation_tokens"] += tokens
                    line = line_of(row)
                yield line

    @property
    def names_templates(self) -> bool:
        return bool({"template", "summarise"} & set(self.settings.tasks))

    def table(self) -> Iterator[bytes]:
        """The templates, the most frequent first: number, records, of these in rows, text."""
        kept = self._kept
        for number, size in sorted(self.templates.sizes.items(), key=lambda item: (-item[1], item[0])):
            text = self.templates.text(number) if number else "(no template: the table was full)"
            said = {"template": number, "records": size, "text": text}
            if self.settings.validation:
                said["records_validation"] = kept["validation"].get(number, 0)
            yield line_of(said)

    # --- notes

    def _read_on(self, source: Source, size: int) -> None:
        self.counts["bytes"] += size
        self._since += size
        now = time.monotonic()
        if now - self._said >= _SAID_EVERY:
            self._said = now
            log.info(
                "%s MB, %s records, %s rows; in %s",
                f"{self.counts['bytes'] / 1e6:,.0f}", f"{self.counts['records']:,}",
                f"{sum(self.counts.of('rows').values()):,}", source.name,
            )  # fmt: skip

    def note(self) -> None:
        """How far it went, for a run that goes on from here."""
        self._since = 0
        # What is only remembered to save work is not written down: who goes on from here begins without it, too.
        self._shapes.forget()
        self.templates.forget()
        if self.progress is None:
            return
        stages = {task.name: task.state() for task in self._tasks}
        state = {
            "at": self._at,
            "counts": dict(self.counts),
            "templates": self.templates.state(),
            "kept": {part: list(share.items()) for part, share in self._kept.items()},
            "forgotten": self._seen.forgotten,
            "part": self._part,
            "chunks": self._chunks.state() if self._chunks is not None else None,
            "tasks": stages,
        }
        self.progress.save(state, self._seen.dump())

    def _restore(self, state: dict[str, Any], seen: Path) -> None:
        self._at, self._part = state["at"], state["part"]
        self.counts.update(state["counts"])
        self.templates.restore(state["templates"])
        self._kept = {part: dict(share) for part, share in state["kept"].items()}
        self._seen.load(seen, state["forgotten"])
        if self._chunks is not None:
            self._chunks.restore(state["chunks"])
        for task in self._tasks:
            if (known := state["tasks"][task.name]) is not None:
                task.restore(known)
        log.info("going on after %s bytes and %s records", f"{self.counts['bytes']:,}", f"{self.counts['records']:,}")


_LONGEST_SHAPE = 500
"""Characters of a shape that is remembered."""


def _chained(first: list[bytes], stream: Iterator[bytes]) -> Iterator[bytes]:
    yield from first
    yield from stream


def line_of(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def check_rows(counts: Counts, where: str) -> None:
    """Raises DataError: there are none."""
    if sum(counts.of("rows").values()):
        return
    raise DataError(f"{where}: there is nothing to write: no row came out. {counts.text()}")
