"""Records -> `completion` rows: as many as the token budget holds, cut between records, each row beginning with the
last few of the row before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from luthier.data.logs.counts import Counts
from luthier.data.logs.tokens import TokenCount

Row = dict[str, Any]
Write = Callable[..., None]
"""Takes the kind of a row, the row, its tokens, and the part that it is for (default: the one that is written
now)."""


class Masked(NamedTuple):
    """A record that was masked. `start`, `end`: bytes of the source's stream; `line`, `last`: of its lines, from 1."""

    text: str
    template: int
    start: int
    end: int
    line: int
    last: int


def provenance(source: str, records: list[Masked]) -> Row:
    """Where a row is from; records in the order of the source."""
    templates = list(dict.fromkeys(record.template for record in records))
    return {
        "source": source,
        "bytes": [records[0].start, records[-1].end],
        "lines": [records[0].line, records[-1].last],
        "records": len(records),
        "templates": templates,
    }


class Chunks:
    """One source's, or one part's of it: `close` ends it, and what follows begins anew, without overlap."""

    def __init__(
        self, budget: int, overlap: int, overlap_tokens: int, tokens: TokenCount, counts: Counts, write: Write
    ) -> None:
        """`budget`: tokens of a row's text. `overlap`: records; `overlap_tokens`: if not 0, so many."""
        self._overlap_tokens = overlap_tokens
        self._budget, self._overlap, self._tokens, self._counts, self._write = budget, overlap, tokens, counts, write
        self.source = ""
        self._held: list[Masked] = []
        self._sizes: list[int] = []
        self._total = 0
        self._new = 0  # of the records held, how many no row has yet

    def add(self, record: Masked) -> None:
        size = self._tokens.of(record.text + "\n")
        if size > self._budget:
            self._write_held()
            self._clear()
            self._split(record)
            return
        if self._total + size > self._budget:
            self._write_held()
            self._keep_overlap(size)
        self._append(record, size)

    def close(self) -> None:
        self._write_held()
        self._clear()

    def _append(self, record: Masked, size: int) -> None:
        self._held.append(record)
        self._sizes.append(size)
        self._total += size
        self._new += 1

    def _clear(self) -> None:
        self._held, self._sizes, self._total, self._new = [], [], 0, 0

    def _keep_overlap(self, size: int) -> None:
        """The last records, as far as they leave more than half of the next row."""
        keep = 0
        room = min(self._budget // 2, self._budget - size)
        last = self._sizes[-self._overlap :] if self._overlap else []
        if self._overlap_tokens:
            room, last = min(room, self._overlap_tokens), self._sizes
        for each in reversed(last):
            if each > room:
                break
            room -= each
            keep += 1
        self._held = self._held[len(self._held) - keep :]
        self._sizes = self._sizes[len(self._sizes) - keep :]
        self._total, self._new = sum(self._sizes), 0

    def _write_held(self) -> None:
        if not self._new:
            return
        records, self._held = self._held, list(self._held)
        text = "\n".join(record.text for record in records)
        # The records' own tokens are a close guess of those of the whole, and rarely a little less.
        size = self._tokens.of(text)
        if size > self._budget and len(records) > 1:
            half = len(records) // 2
            for part in (records[:half], records[half:]):
                part_text = "\n".join(record.text for record in part)
                self._put(part_text, part, self._tokens.of(part_text))
            return
        self._put(text, records, size)

    def _put(self, text: str, records: list[Masked], size: int) -> None:
        row = {"text": text, "provenance": provenance(self.source, records)}
        self._write("completion", row, size + self._tokens.around)

    def _split(self, record: Masked) -> None:
        """A record that no row holds: in pieces, each with the bytes of the whole."""
        self._counts["records_over_budget"] += 1
        text, part = record.text, 0
        while text:
            end = self._tokens.cut(text, self._budget)
            piece, text = text[:end], text[end:]
            part += 1
            row = {"text": piece, "provenance": provenance(self.source, [record]) | {"part": part}}
            self._write("completion", row, self._tokens.of(piece) + self._tokens.around)

    def state(self) -> dict[str, Any]:
        return {"source": self.source, "held": self._held, "sizes": self._sizes, "new": self._new}

    def restore(self, state: dict[str, Any]) -> None:
        self.source = state["source"]
        self._held = [Masked(*each) for each in state["held"]]
        self._sizes, self._new = state["sizes"], state["new"]
        self._total = sum(self._sizes)
