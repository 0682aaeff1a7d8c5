"""What is broken, and which rows are the worst."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from luthier.data.inspect.checks import KINDS
from luthier.data.inspect.collect import Collected, Record
from luthier.data.inspect.verdict import Level, Verdict, percent, worst
from luthier.data.report import Tally

_SHOWN = 3
_OTHER_WEIGHTS = {
    "in the validation data": 5, "nearly in the validation data": 4, "repeats": 3, "nearly repeats": 2, "too long": 3,
}  # fmt: skip
_LABELS = 0.5  # share of one-word answers from which they are taken for labels
_OFTEN = 0.1  # share from which what need not be wrong is how this data is


def broken(found: Collected) -> Verdict:
    """All kinds of problems with their counts and first places."""
    by_kind: dict[str, list[tuple[Record, str]]] = defaultdict(list)
    for record in found.records:
        for kind, detail in record.problems:
            if kind in KINDS:
                by_kind[kind].append((record, detail))
    looked = len(found.records)
    levels: list[Level] = ["fine"]
    lines: list[tuple[Level, int, str]] = []
    for kind, hits in by_kind.items():
        level, remark = _level(kind, len(hits), looked)
        levels.append(level)
        first = Tally(len(hits), [(record.place, detail) for record, detail in hits[:_SHOWN]]).where()
        text = f"{len(hits):,} ({percent(len(hits), looked)}) {KINDS[kind].what}{remark}; {first}"
        lines.append((level, -KINDS[kind].weight, f"{level}: {text}" if level == "bad" else text))
    lines.sort(key=lambda line: (("bad", "look", "fine").index(line[0]), line[1]))
    common = _common(found)
    rows = sum(any(kind in KINDS and kind not in common for kind, _ in record.problems) for record in found.records)
    bad = [kind for kind, hits in by_kind.items() if _level(kind, len(hits), looked)[0] == "bad"]
    text = f"{rows:,} of {looked:,} rows looked at have something odd about them" if rows else "nothing odd in any row"
    if bad:
        limits = ", ".join(f"{kind} {_limit(kind)}" for kind in sorted(bad, key=lambda kind: -KINDS[kind].weight))
        text += f"; bad: {limits}"
    figures = {
        kind: {"rows": len(hits), "first": [[record.place, detail] for record, detail in hits[:_SHOWN]]}
        for kind, hits in by_kind.items()
    }
    return Verdict("broken", worst(levels), text, {"looked_at": looked, "kinds": figures}, [line[2] for line in lines])


def _limit(kind: str) -> str:
    bad = KINDS[kind].bad_share
    return f"(bad above {bad:.0%})" if bad else "(bad in any number)"


def _level(kind: str, count: int, of: int) -> tuple[Level, str]:
    bad = KINDS[kind].bad_share
    share = count / max(1, of)
    if bad is not None:  # of a small file, a row or two are no share
        return ("bad" if share > bad and (count > 2 or not bad) else "look"), ""
    if kind == "one word":
        labels = share > _LABELS
        return "fine", ", which look like labels" if labels else ""
    if share > _OFTEN:
        return "look", ", so many that it may be the way of this data"
    return ("look" if share > 0.01 else "fine"), ""


def worst_rows(found: Collected, count: int) -> list[Record]:
    """Rows by how much is wrong with them, one of each kind before the second of any."""
    common = _common(found)

    def weight(record: Record) -> int:
        return sum(_weight(kind) for kind, _ in record.problems if kind not in common)

    flagged = [record for record in found.records if weight(record)]
    turn: Counter[str] = Counter()
    order: list[tuple[int, int, int, Record]] = []
    for record in sorted(flagged, key=weight, reverse=True):
        main = max((kind for kind, _ in record.problems if kind not in common), key=_weight)
        order.append((turn[main], -weight(record), record.number, record))
        turn[main] += 1
    chosen = [record for *_, record in sorted(order, key=lambda each: each[:3])[:count]]
    return [replace(each, problems=[one for one in each.problems if one[0] not in common]) for each in chosen]


def _common(found: Collected) -> frozenset[str]:
    """Kinds that so many rows are of that they say nothing of a single one."""
    counted = Counter(kind for record in found.records for kind, _ in record.problems)
    limit = _LABELS * len(found.records)
    return frozenset(kind for kind in counted if counted[kind] > limit and kind in ("one word", "cut off", "line ends"))


def _weight(kind: str) -> int:
    return KINDS[kind].weight if kind in KINDS else _OTHER_WEIGHTS.get(kind, 1)


def reasons(problems: Iterable[tuple[str, str]]) -> str:
    """What is wrong with a row, the worst first."""
    ordered: Sequence[tuple[str, str]] = sorted(problems, key=lambda problem: -_weight(problem[0]))
    return "; ".join(f"{kind} ({detail})" if detail else kind for kind, detail in ordered)
