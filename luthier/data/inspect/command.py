"""`luthier inspect data`: the verdicts, the worst first, and below them the worst rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from luthier.data.inspect.verdict import LEVELS, Verdict
from luthier.errors import ConfigError, RunError

_STYLES = {"bad": "bold red", "look": "yellow", "fine": "green"}
_LIMIT = 200_000


def command(
    what: Annotated[str, typer.Argument(metavar="data", help="What to inspect: data.", show_default=False)],
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG [KEY=VALUE]... | FILE...",
            help="A config, with overrides behind it; or files, folders or datasets of the hub.",
            show_default=False,
        ),
    ],
    type: Annotated[
        str | None,
        typer.Option(help="What rows of the files are, such as alpaca. Default: guessed from their columns."),
    ] = None,
    rl: Annotated[str | None, typer.Option(help="Method that the rows are for, such as dpo. Default: guessed.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Model whose tokenizer counts. Default: the config's, else an estimate."),
    ] = None,
    sequence_len: Annotated[
        int | None, typer.Option(min=1, help="Longest document. Default: the config's, else 2048.")
    ] = None,
    validation: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Validation data that the files must not give away.")
    ] = None,
    near: Annotated[float, typer.Option(min=0.5, max=1.0, help="Jaccard similarity of near duplicates.")] = 0.8,
    worst: Annotated[int, typer.Option(min=0, help="How many of the worst rows are shown.")] = 10,
    limit: Annotated[
        int, typer.Option(min=100, help="Rows that are looked at, drawn evenly where there are more.")
    ] = _LIMIT,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all of it for machines; - for standard output.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="End with status 1 where something is bad.")] = False,
) -> int:
    """Say whether data looks large enough, balanced, free of repeats, short enough and whole; show its worst rows."""
    if what != "data":
        raise ConfigError(f"luthier inspect {what}: data can be inspected, as in `luthier inspect data {what}`.")
    result = inspect_data(
        sources, type=type, rl=rl, tokenizer=tokenizer, sequence_len=sequence_len, validation=validation or [],
        near=near, worst=worst, limit=limit,
    )  # fmt: skip
    if json_file is not None:
        _write(json_file, result)
    if json_file is None or str(json_file) != "-":
        show(result, Console(highlight=False, soft_wrap=True))
    return int(strict and any(verdict["level"] == "bad" for verdict in result["verdicts"]))


def inspect_data(
    sources: Sequence[str],
    *,
    type: str | None = None,
    rl: str | None = None,
    tokenizer: str | None = None,
    sequence_len: int | None = None,
    validation: Sequence[str] = (),
    near: float = 0.8,
    worst: int = 10,
    limit: int = _LIMIT,
) -> dict[str, Any]:
    """All that the verb says, as plain values: `said`, `verdicts` (the worst first), `worst`.

    Raises:
        ConfigError, DataError, ModelError: as `sources.material_of` and `collect.collect`.
    """
    from luthier.data.inspect.collect import collect
    from luthier.data.inspect.judge import balanced, large_enough, short_enough
    from luthier.data.inspect.repeats import repeats
    from luthier.data.inspect.sources import material_of
    from luthier.data.inspect.whole import broken, worst_rows

    material = material_of(
        sources, type=type, rl=rl, tokenizer=tokenizer, sequence_len=sequence_len, validation=validation
    )
    found = collect(material, limit)
    train = [record for record in found.records if record.readable and not found.held(record)]
    verdicts: list[Verdict] = [
        broken(found),
        *repeats(found, near),
        short_enough(found, train),
        balanced(found, train),
        large_enough(found, train),
    ]
    verdicts.sort(key=lambda verdict: LEVELS.index(verdict.level))
    said = list(material.said)
    if found.streamed is not None:
        said.append(f"of a stream the first {found.streamed:,} rows of each dataset are looked at (--limit)")
    if found.stride > 1:
        said.append(
            f"{len(found.records):,} of {sum(found.rows):,} rows were looked at, every {found.stride}th; "
            "counts are of those, "
            "and equal rows further apart than that are not seen (--limit)"
        )
        if material.config.data.val_set_size and not material.config.data.test_datasets:
            said.append("contamination was not measured: which rows val_set_size holds out takes all of them (--limit)")
    return {
        "sources": [
            {"path": entry.path, "type": _plain(entry.type), "rows": rows, "validation": held}
            for rows, (entry, held) in zip(found.rows, material.entries, strict=True)
        ],
        "tokens": "estimated" if material.tokenizer is None else "counted",
        "rl": material.config.preference.rl,
        "said": said,
        "verdicts": [
            {"name": each.name, "level": each.level, "text": each.text, "more": each.more, "figures": each.figures}
            for each in verdicts
        ],
        "worst": [
            {"place": record.place, "problems": [list(problem) for problem in record.problems], "text": record.text}
            for record in worst_rows(found, worst)
        ],
    }


def _plain(type: Any) -> Any:
    return type if isinstance(type, str | None) else type.model_dump(exclude_none=True)


def _write(path: Path, result: dict[str, Any]) -> None:
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    if str(path) == "-":
        print(text, end="")
        return
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise RunError(f"--json {path}: cannot be written: {error.strerror or error}.") from error


def show(result: dict[str, Any], console: Console) -> None:
    """Print it."""
    from luthier.data.inspect.whole import reasons

    for source in result["sources"]:
        use = ", for validation" if source["validation"] else ""
        own = "a prompt of its own" if source["type"] else "rows without a type"
        kind = source["type"] if isinstance(source["type"], str) else own
        console.print(f"{source['path']}: {source['rows']:,} rows ({kind}){use}", markup=False)
    for line in result["said"]:
        console.print(f"  {line}", style="dim", markup=False)
    for verdict in result["verdicts"]:
        console.print()
        console.print(f"{verdict['level']:>4}", style=_STYLES[verdict["level"]], end="  ", markup=False)
        console.print(f"{verdict['name']}: {_visible(verdict['text'])}", markup=False)
        for line in verdict["more"]:
            console.print(f"        {_visible(line)}", markup=False)
    if result["worst"]:
        console.print(f"\nthe {len(result['worst'])} worst rows")
    for row in result["worst"]:
        console.print(f"\n{row['place']}: {_visible(reasons(map(tuple, row['problems'])))}", style="bold", markup=False)
        console.print(f"    {_visible(row['text'])}", style="dim", markup=False)


def _visible(text: str) -> str:
    """In one line, control characters by their code."""
    text = text.replace("\n", "⏎")
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)
