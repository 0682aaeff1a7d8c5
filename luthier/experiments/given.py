"""What a run was given, as it is shown: its data and what became of it, its config, its environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from luthier.experiments.charts import histogram
from luthier.experiments.run_files import ConfigLine, Run
from luthier.experiments.sections import Table, machine, short_path


def data_sources(run: Run) -> Table | None:
    data = run.data
    rows = []
    for key, use in (("sources", "training"), ("test_sources", "evaluation")):
        for source in data.get(key) or []:
            dropped = sum(tally.get("count", 0) for tally in (source.get("dropped") or {}).values())
            counts = [source.get(name) for name in ("rows", "kept")]
            sizes = [source.get(name) for name in ("tokens", "trained_tokens", "longest")]
            name = short_path(str(source.get("path", "")))
            rows.append([name, source.get("type", ""), use, *map(_count, [*counts, dropped, *sizes])])
    head = ("data", "type", "for", "rows", "kept", "left out", "tokens", "trained", "longest")
    return Table(head, rows, numeric=frozenset(range(3, 9))) if rows else None


def data_mix(run: Run) -> Table | None:
    """What the steps had of each dataset: those that were done, or of a run that goes on still, those that it will."""
    mix = run.summary.get("mix") or run.data.get("mix")
    if not isinstance(mix, dict) or not mix.get("sources"):
        return None
    rows = [
        [
            str(source.get("name", "")),
            *(_count(source.get(key)) for key in ("documents", "an_epoch", "examples")),
            _share(source.get("share")),
            _count(source.get("trained_tokens")),
            _share(source.get("trained_share")),
            f"{source.get('epochs', 0):.3g}",
            _count(source.get("unseen")),
        ]
        for source in mix["sources"]
    ]
    unit = str(mix.get("unit", "documents"))
    head = ("data", unit, "an epoch", "in all steps", "share", "trained tokens", "share", "epochs", "never seen")
    how = str(mix.get("how", ""))
    caption = f"{how[:1].upper()}{how[1:]}; in {_count(mix.get('steps'))} steps"
    return Table(head, rows, caption, frozenset(range(1, 9)))


def data_drops(run: Run) -> Table | None:
    """What was left out or changed, why, how often, and where first."""
    rows = []
    for source in [*(run.data.get("sources") or []), *(run.data.get("test_sources") or [])]:
        for kind, what in (("dropped", "left out"), ("notes", "changed")):
            for reason, tally in (source.get(kind) or {}).items():
                count, of = tally.get("count", 0), source.get("rows") or 0
                share = f"{count / of:.1%}" if of else ""
                first = ", ".join(
                    f"{_place(place)}{f' ({detail})' if detail else ''}" for place, detail in tally.get("first") or []
                )
                rows.append([short_path(str(source.get("path", ""))), f"{what}: {reason}", _count(count), share, first])
    head = ("data", "what and why", "rows", "share", "first")
    return Table(head, rows, numeric=frozenset({2, 3})) if rows else None


def data_facts(run: Run) -> list[str]:
    data = run.data
    unit = data.get("unit", "documents")
    facts = []
    if data.get("train_documents"):
        held = data.get("validation_documents")
        facts.append(f"{data['train_documents']:,} {unit} to train on" + (f", {held:,} held out." if held else "."))
    if data.get("duplicates"):
        facts.append(f"{data['duplicates']:,} training {unit} repeat others, token for token.")
    if data.get("overlap"):
        facts.append(
            f"{data['overlap']:,} of the held-out {unit} are in the training data too: eval loss is too good by that."
        )
    facts += _repeats(data.get("repeats"), unit)
    balance = data.get("balance")
    if isinstance(balance, dict):
        facts.append(
            f"{balance.get('desirable', 0):,} desirable and {balance.get('undesirable', 0):,} undesirable answers, "
            f"weighted {balance.get('desirable_weight')} and {balance.get('undesirable_weight')}."
        )
    unused = {c for source in data.get("sources") or [] for c in source.get("unused_columns") or []}
    if unused:
        facts.append(f"Columns that were not read: {', '.join(sorted(unused))}.")
    return facts


def _repeats(repeats: Any, unit: str) -> list[str]:
    """What was left out since it repeats, and what text the held-out data shares with the training data."""
    if not isinstance(repeats, dict):
        return []
    near = f", nearly (Jaccard {repeats['threshold']:g})" if repeats.get("threshold") is not None else ""
    facts = []
    for name, what in (
        ("contaminating", "held-out ones, token for token"),
        ("near_contaminating", f"held-out ones{near}"),
        ("exact", "others"),
        ("near", f"others{near}"),
    ):
        tally = repeats.get(name) or {}
        if repeats.get("removed") and tally.get("count"):
            first = ", ".join(f"{_place(place)} ({detail})" for place, detail in tally.get("first") or [])
            facts.append(f"{tally['count']:,} training {unit} left out, which repeat {what}; first: {first}.")
    if repeats.get("shared_text"):
        facts.append(
            f"{repeats['shared_text']:,} of the held-out {unit} have {repeats.get('run_length')} tokens in a row in "
            "common with the training data."
        )
    return facts


def data_histogram(run: Run) -> Markup:
    bins = [tuple(map(float, each)) for each in run.data.get("histogram") or [] if len(each) == 3]
    return histogram(bins, "Lengths", str(run.data.get("unit", "documents")))  # type: ignore[arg-type]


@dataclass
class ConfigPart:
    """A section of the config, its lines as (text, origin in short, origin, idle)."""

    heading: str
    lines: list[tuple[str, str, str, bool]]


def config_parts(run: Run, *, chosen: bool) -> list[ConfigPart]:
    """The lines that somebody chose or that followed from a choice, or all the others. The heads of what has lines
    inside come along."""
    parts = []
    for heading, lines in run.lines:
        kept = [(line.text, short_origin(line.origin), line.origin, line.idle) for line in _chosen(lines, chosen)]
        if kept:
            parts.append(ConfigPart(heading, kept))
    return parts


def _chosen(lines: Sequence[ConfigLine], chosen: bool) -> list[ConfigLine]:
    found: list[ConfigLine] = []
    block: list[ConfigLine] = []
    for line in [*lines, None]:
        if block and (line is None or not line.text.startswith(" ")):
            # A key stands whole on one side, so that what is inside of it keeps its place.
            if any(each.chosen for each in block) is chosen:
                found += block
            block = []
        if line is not None:
            block.append(line)
    return found


def short_origin(origin: str) -> str:
    """`cfg.yml:12` of a line of a file, wherever that lies."""
    head, mark, line = origin.rpartition(":")
    return f"{Path(head).name}:{line}" if mark and line.isdigit() else origin


def environment(run: Run) -> list[tuple[str, str]]:
    found = run.environment
    hardware = found.get("hardware")
    rows = [("machine", machine(run)), ("system", str(found.get("system", "")))]
    if isinstance(hardware, dict) and "memory_gib" in hardware:
        rows.append(("memory", f"{hardware['memory_gib']} GiB"))
    rows += [("device", " ".join(str(found[key]) for key in ("device", "dtype") if key in found))]
    for key in ("processes", "tokens_per_pass"):
        if isinstance(found.get(key), int):
            rows.append((key.replace("_", " "), f"{found[key]:,}"))
    versions = found.get("versions")
    if isinstance(versions, dict):
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    if isinstance(found.get("command"), list):
        rows.append(("command", " ".join(map(str, found["command"]))))
    for source in [*(run.data.get("sources") or []), *(run.data.get("test_sources") or [])]:
        if source.get("fingerprint"):
            rows.append((f"hash of {short_path(str(source.get('path', '')))}", str(source["fingerprint"])))
    return [(name, value) for name, value in rows if value]


def _share(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) else ""


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) else ""


def _place(place: str) -> str:
    head, mark, line = str(place).rpartition(":")
    return f"{Path(head).name}:{line}" if mark else str(place)
