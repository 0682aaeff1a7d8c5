"""Records -> instruction rows, in Alpaca's columns: instruction, input, output.

Each task sees every record of a source in its order, also those that are left out as repeats: what comes next, or
what happened in a window, is what really did. A row is made of records that are kept. Templates change while a log
is read, so rows that name one hold its number, and get its text at the end (`filled`).
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from typing import Any

from luthier.data.logs import settings as bounds
from luthier.data.logs.chunks import Masked, Row, Write, provenance
from luthier.data.logs.counts import Counts
from luthier.data.logs.labels import ANOMALOUS, NORMAL, Labels
from luthier.data.logs.severity import severity_of, without_severity
from luthier.data.logs.templates import Templates
from luthier.data.logs.tokens import TokenCount

INSTRUCTIONS = {
    "severity": "What is the severity of this log record? Answer with one word: TRACE, DEBUG, INFO, NOTICE, WARNING, "
    "ERROR or CRITICAL.",
    "template": "Write the template of this log record: its constant words, with placeholders such as <*> for what "
    "varies.",
    "next-line": "Here are consecutive records of a log. Write the record that comes next.",
    "summarise": "Summarise this part of a log: how many records there are of each template, the most frequent first.",
    "anomaly": f"Here are the log records of one session. Is it {NORMAL} or {ANOMALOUS}?",
}
_FRAME = 64
"""Tokens that a prompt in Alpaca's form takes besides its columns, at most."""


class Task:
    """One kind of rows. `see` is called for each record, `close` where a source or a part of it ends."""

    name = ""

    def __init__(self, budget: int, tokens: TokenCount, counts: Counts, write: Write) -> None:
        self._tokens, self._counts, self._write = tokens, counts, write
        self._budget = max(budget - _FRAME - tokens.of(INSTRUCTIONS[self.name]), 16)
        self.source = ""

    def see(self, record: Masked, raw: str, kept: bool) -> None:
        raise NotImplementedError

    def close(self) -> None: ...

    def end_of_source(self) -> None:
        self.close()

    def state(self) -> Any:
        return None

    def restore(self, state: Any) -> None: ...

    def _cut(self, text: str) -> str:
        """At most as long as the budget."""
        if self._tokens.of(text) <= self._budget:
            return text
        self._counts["records_over_budget"] += 1
        return text[: self._tokens.cut(text, self._budget)]

    def _put(self, asked: str, answer: Any, records: list[Masked], **more: Any) -> None:
        row: Row = {"instruction": INSTRUCTIONS[self.name], "input": asked, "output": answer}
        row["provenance"] = provenance(self.source, records) | more
        size = self._tokens.of(row["instruction"]) + self._tokens.of(asked)
        size += self._tokens.of(answer) if isinstance(answer, str) else 0
        self._write(self.name, row, size + self._tokens.around)


class Severity(Task):
    """The record without any word of a level -> its level."""

    name = "severity"

    def see(self, record: Masked, raw: str, kept: bool) -> None:
        if kept:
            level = severity_of(record.text)
            if level is None:
                self._counts["without.severity"] += 1
            else:
                self._put(self._cut(without_severity(record.text)), level, [record])


class Template(Task):
    """The record -> its template."""

    name = "template"

    def see(self, record: Masked, raw: str, kept: bool) -> None:
        if kept and record.template:
            self._put(self._cut(record.text), {"template": record.template}, [record])


class NextLine(Task):
    """The records before -> the record."""

    name = "next-line"

    def __init__(self, budget: int, tokens: TokenCount, counts: Counts, write: Write, context: int) -> None:
        super().__init__(budget, tokens, counts, write)
        self._before: deque[tuple[Masked, int]] = deque(maxlen=context)

    def see(self, record: Masked, raw: str, kept: bool) -> None:
        size = self._tokens.of(record.text + "\n")
        if kept and self._before:
            room, taken = self._budget - size, []
            for each, its in reversed(self._before):
                if its > room:
                    break
                room -= its
                taken.append(each)
            if taken:
                taken.reverse()
                asked = "\n".join(each.text for each in taken)
                self._put(asked, record.text, [*taken, record])
            else:
                self._counts["without.next-line (too long)"] += 1
        self._before.append((record, size))

    def close(self) -> None:
        self._before.clear()

    def state(self) -> Any:
        return list(self._before)

    def restore(self, state: Any) -> None:
        self._before.extend((Masked(*record), size) for record, size in state)


class Summarise(Task):
    """A window of records -> how many there are of each template."""

    name = "summarise"

    def __init__(self, budget: int, tokens: TokenCount, counts: Counts, write: Write) -> None:
        super().__init__(budget, tokens, counts, write)
        # The answer wants room, too: a third, for templates that are about as long as records.
        self._budget = max(2 * self._budget // 3, 16)
        self._held: list[Masked] = []
        self._total = 0

    def see(self, record: Masked, raw: str, kept: bool) -> None:
        size = self._tokens.of(record.text + "\n")
        if self._held and self._total + size > self._budget:
            self.close()
        if size > self._budget:
            self._counts["without.summarise (too long)"] += 1
            return
        self._held.append(record)
        self._total += size

    def close(self) -> None:
        held, self._held, self._total = self._held, [], 0
        if len(held) > 1:
            counted = Counter(record.template for record in held)
            asked = "\n".join(record.text for record in held)
            self._put(asked, {"summary": [[number, n] for number, n in counted.most_common()]}, held)

    def state(self) -> Any:
        return [self._held, self._total]

    def restore(self, state: Any) -> None:
        self._held = [Masked(*record) for record in state[0]]
        self._total = state[1]


class Anomaly(Task):
    """The records of a session, as far as they fit -> its label. A session belongs to the part in which it begins."""

    name = "anomaly"

    def __init__(self, budget: int, tokens: TokenCount, counts: Counts, write: Write, labels: Labels) -> None:
        super().__init__(budget, tokens, counts, write)
        self._labels = labels
        self._open: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._characters = 0
        self.part = "train"

    def see(self, record: Masked, raw: str, kept: bool) -> None:
        labelled = False
        for key in self._labels.keys_in(raw):
            session = self._open.get(key)
            if session is None:
                if self._labels.of(key) is None:
                    continue
                first = record._replace(text="")
                session = {"part": self.part, "first": first, "texts": [], "templates": [], "n": 0, "length": 0}
                self._open[key] = session
            labelled = True
            self._open.move_to_end(key)
            self._add(session, record)
            while len(self._open) > bounds.MAX_SESSIONS or self._characters > bounds.MAX_OPEN_CHARACTERS:
                self._counts["sessions_cut"] += 1
                self._finish(*self._open.popitem(last=False))
        if not labelled:
            self._counts["without.anomaly (no label for it)"] += 1

    def _add(self, session: dict[str, Any], record: Masked) -> None:
        session["last"] = record._replace(text="")
        session["n"] += 1
        if record.template not in session["templates"] and len(session["templates"]) < 200:
            session["templates"].append(record.template)
        if session["length"] < bounds.MAX_SESSION_CHARACTERS:
            text = record.text[: bounds.MAX_SESSION_CHARACTERS]
            session["texts"].append(text)
            session["length"] += len(text) + 100  # that is what a text takes besides its characters
            self._characters += len(text) + 100

    def _finish(self, key: str, session: dict[str, Any]) -> None:
        self._characters -= session["length"]
        asked = self._cut("\n".join(session["texts"]))
        first, last = session["first"], session["last"]
        row: Row = {"instruction": INSTRUCTIONS[self.name], "input": asked, "output": str(self._labels.of(key))}
        row["provenance"] = provenance(self.source, [first, last]) | {
            "records": session["n"], "templates": session["templates"],
        }  # fmt: skip
        if key in asked:  # not where it was masked
            row["provenance"]["session"] = key
        size = sum(self._tokens.of(row[column]) for column in ("instruction", "input", "output"))
        self._write(self.name, row, size + self._tokens.around, session["part"])

    def end_of_source(self) -> None:
        while self._open:
            self._finish(*self._open.popitem(last=False))
        self.part = "train"

    def state(self) -> Any:
        return [list(self._open.items()), self._characters, self.part]

    def restore(self, state: Any) -> None:
        for key, session in state[0]:
            self._open[key] = session | {name: Masked(*session[name]) for name in ("first", "last")}
        self._characters, self.part = state[1], state[2]


def filled(row: Row, templates: Templates) -> str | None:
    """The answer of a row that names templates by their numbers, now that they are known; None: it names none."""
    answer = row.get("output")
    if not isinstance(answer, dict):
        return None
    if "template" in answer:
        return templates.text(answer["template"])
    return "\n".join(f"{n} x {templates.text(number) or '(no template)'}" for number, n in answer["summary"])
