"""`luthier prepare logs`: from logs, wherever they are, to rows that `luthier train` takes."""

from __future__ import annotations

import difflib
import json
import logging
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.data.logs import mask as masks
from luthier.data.logs import output
from luthier.data.logs.progress import Progress
from luthier.data.logs.records import own_start
from luthier.data.logs.run import Preparation, check_rows
from luthier.data.logs.settings import TASKS, Settings
from luthier.data.logs.sources import Source, find
from luthier.errors import ConfigError, DataError, RunError

log = logging.getLogger("luthier")

Texts = list[str] | None
DRY_RECORDS = 10_000


def command(
    what: Annotated[str, typer.Argument(metavar="logs", help="What is prepared.", show_default=False)],
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help="Files, folders, globs, URLs (s3://, az://, gs://, file://).", show_default=False
        ),
    ],
    out: Annotated[str, typer.Option(metavar="FILE", help="The rows, as JSON lines: a file or a URL.")] = "",
    kinds: Annotated[
        Texts,
        typer.Option(
            "--as", metavar="KIND[,KIND]",
            help="completion (default), or instruction rows: severity, template, next-line, summarise, anomaly.",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a row, with what training puts around it.")] = 2048,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Model whose tokenizer counts. Default: an estimate, 2 bytes a token."),
    ] = None,
    overlap: Annotated[int, typer.Option(help="Records that a completion row repeats of the one before.")] = 2,
    overlap_tokens: Annotated[
        int, typer.Option(help="Or so many tokens of whole records, instead of a number of them.")
    ] = 0,
    context: Annotated[int, typer.Option(help="Records before, for next-line, at most.")] = 10,
    validation: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows of the last part of each source go there.")
    ] = None,
    validation_share: Annotated[float, typer.Option(help="How large that part is.")] = 0.1,
    keep_per_template: Annotated[
        int, typer.Option(help="Records of a template that are all kept; of more, ever fewer. 0: all.")
    ] = 100,
    max_templates: Annotated[int, typer.Option(help="Templates at most.")] = 10_000,
    similarity: Annotated[float, typer.Option(help="Share of words that records of a template have alike.")] = 0.5,
    dedup: Annotated[bool, typer.Option("--dedup/--no-dedup", help="Leave out exact duplicates.")] = True,
    mask: Annotated[
        Texts, typer.Option(metavar="NAME[,NAME]", help="Further masks, such as host; all: all.")
    ] = None,
    no_mask: Annotated[
        Texts, typer.Option(metavar="NAME[,NAME]", help="Masks that are left out; all: all.")
    ] = None,
    mask_pattern: Annotated[
        Texts, typer.Option(metavar="NAME=REGEX", help="A mask of your own; may be repeated.")
    ] = None,
    pseudonyms: Annotated[
        str | None, typer.Option(metavar="KEYFILE", help="<IP_3fa2c1d0> for <IP>, the same for the same, by a key.")
    ] = None,
    record_start: Annotated[
        str | None, typer.Option(metavar="REGEX", help="How a record begins. Default: found from the file.")
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(help="Of files without a byte order mark. Default: UTF-8 or UTF-16, as found.")
    ] = None,
    max_line_bytes: Annotated[int, typer.Option(help="Longer lines are cut.")] = 65536,
    labels: Annotated[str | None, typer.Option(metavar="FILE.csv", help="For anomaly: key, label.")] = None,
    label_key: Annotated[
        str | None, typer.Option(metavar="REGEX", help="How a key looks in a record. Default: blk_... of HDFS.")
    ] = None,
    label_columns: Annotated[
        str | None, typer.Option(metavar="KEY,LABEL", help="Names of the two columns. Default: the first two.")
    ] = None,
    storage_option: Annotated[
        Texts, typer.Option(metavar="KEY=VALUE", help="For the driver of a URL, such as anon=true; may be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Read so many records only. 0: all.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help=f"Write nothing; show counts and rows of {DRY_RECORDS:,} records.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Make training rows of unstructured logs: joined, masked, thinned, cut to a token budget.

    A run that was stopped goes on when the same command is given again.
    """
    if what != "logs":
        raise ConfigError(f"{what}: there is luthier prepare logs SOURCE... --out data.jsonl, and nothing else")
    settings = Settings(
        tasks=tasks_of(kinds or []),
        max_tokens=max_tokens,
        overlap=overlap,
        overlap_tokens=overlap_tokens,
        tokenizer=tokenizer,
        keep_per_template=keep_per_template,
        max_templates=max_templates,
        similarity=similarity,
        dedup=dedup,
        masks=masks.chosen(mask or [], no_mask or []),
        mask_patterns=tuple(masks.own_mask(text) for text in mask_pattern or []),
        pseudonyms=pseudonyms,
        record_start=record_start,
        max_line_bytes=max_line_bytes,
        encoding=encoding,
        labels=labels,
        label_key=label_key,
        label_columns=label_columns,
        context=context,
        limit=limit or (DRY_RECORDS if dry_run else 0),
        validation=validation,
        validation_share=validation_share,
        storage=_storage(storage_option or []),
    )
    _check(settings)
    if dry_run:
        _dry(settings, find(sources, settings.storage))
        return
    if not out:
        raise ConfigError("--out is missing: the file of the rows, such as --out data.jsonl (or --dry-run for a look)")
    if validation is not None and validation == out:
        raise ConfigError("--validation and --out name the same file")
    prepare(settings, find(sources, settings.storage), out, overwrite)


def prepare(settings: Settings, sources: list[Source], out: str, overwrite: bool = False) -> None:
    """Read all sources and write the rows, the table of templates and the summary; or go on with what was begun.

    Raises:
        RunError: there is a finished output, or one that was begun otherwise. DataError: no row came out.
    """
    sources = _without_own(sources, [out, *([settings.validation] if settings.validation else [])])
    output.check_place(out)
    if settings.validation:
        output.check_place(settings.validation)
    folder = output.working_folder(out)
    if not (folder / "progress.json").exists() and not overwrite:
        for place in (out, settings.validation):
            if place and output.exists(place, settings.storage):
                raise RunError(f"{place} exists; --overwrite replaces it")
    fingerprint = {"options": settings.fingerprint(), "sources": _fingerprint(settings, sources)}
    progress = Progress(folder, overwrite, fingerprint, out)
    try:
        run = Preparation(settings, sources, progress)
        run.read()
        if not sum(run.counts.of("rows").values()):
            progress.remove()
            check_rows(run.counts, ", ".join(source.name for source in sources[:3]))
        run.note()
        _finish(run, out)
        progress.remove()
    finally:
        progress.close()
    print(run.counts.text())
    more = f", {settings.validation}" if settings.validation else ""
    print(f"written: {out}{more}, {output.beside(out, 'templates.jsonl')}, {output.beside(out, 'summary.json')}")
    if not run.counts["validation_rows"] and settings.validation:
        log.warning("%s: no row came out for validation; the sources are too small for that share", settings.validation)


def tasks_of(given: list[str]) -> tuple[str, ...]:
    """Raises ConfigError: no such kind of rows, or completion together with others."""
    names = list(dict.fromkeys(part.strip() for text in given for part in text.split(",") if part.strip()))
    for name in names:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.4)
            meant = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"--as {name}: there are no such rows.{meant} There are {', '.join(TASKS)}")
    if "completion" in names and len(names) > 1:
        raise ConfigError("--as completion goes alone: its rows have other columns than instructions have")
    return tuple(names) or ("completion",)


def _check(settings: Settings) -> None:
    """Raises ConfigError for what can be known before anything is read."""
    s = settings
    at_least = (
        ("--max-tokens", s.max_tokens, 16 if s.tasks == ("completion",) else 128),
        ("--overlap", s.overlap, 0), ("--overlap-tokens", s.overlap_tokens, 0),
        ("--context", s.context, 1), ("--keep-per-template", s.keep_per_template, 0),
        ("--max-templates", s.max_templates, 1), ("--max-line-bytes", s.max_line_bytes, 256), ("--limit", s.limit, 0),
    )  # fmt: skip
    for option, number, least in at_least:
        if number < least:
            raise ConfigError(f"{option} {number}: at least {least}")
    if not 0 < s.similarity <= 1:
        raise ConfigError(f"--similarity {s.similarity}: a share, above 0 and at most 1")
    if not 0 < s.validation_share < 1:
        raise ConfigError(f"--validation-share {s.validation_share}: a share, between 0 and 1")
    if "anomaly" in s.tasks and s.labels is None:
        raise ConfigError(
            "--as anomaly needs labels: --labels FILE.csv, with a key (HDFS: BlockId) a label (Normal, Anomaly) a row"
        )
    if s.labels is not None and "anomaly" not in s.tasks:
        raise ConfigError("--labels: only the rows of --as anomaly have labels")
    if s.label_columns is not None and s.labels is None:
        raise ConfigError("--label-columns: there is no --labels FILE.csv that they are of")
    if s.record_start:
        own_start(s.record_start)


def _storage(given: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"\w+", name):
            raise ConfigError(f"--storage-option {text!r}: write KEY=VALUE")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def _without_own(sources: list[Source], outs: list[str]) -> list[Source]:
    """Without what was written here before: rows beside the logs are no logs."""
    own = {str(Path(out).expanduser().resolve()) for out in outs if not output.is_url(out)} | set(outs)

    def is_own(source: Source) -> bool:
        path = source.path if not source.name.startswith(("memory", "s3", "az", "gs")) else source.name
        beside = (".progress/", ".templates", ".summary")
        return any(path == each or path.startswith(tuple(each + end for end in beside)) for each in own)

    left = [source for source in sources if not is_own(source)]
    if len(left) < len(sources):
        log.info("%d files among the sources are the output's own, and not read", len(sources) - len(left))
    if not left:
        raise DataError("all sources are the output's own files")
    return left


def _fingerprint(settings: Settings, sources: list[Source]) -> list[Any]:
    """What the rows are made of; a file of labels and a key are a part of it."""
    named = [Path(name).expanduser() for name in (settings.labels, settings.pseudonyms) if name]
    files = [[str(path), path.stat().st_size, str(path.stat().st_mtime)] for path in named if path.exists()]
    return [*(source.identity() for source in sources), *files]


def _finish(run: Preparation, out: str) -> None:
    """Rows, templates and summary in their places. Whoever is stopped in here does all of it again."""
    settings, storage = run.settings, run.settings.storage
    assert run.progress is not None
    places = [("validation", settings.validation), ("train", out)]
    for part, place in places:
        if place is None:
            continue
        if run.names_templates:
            output.put_text(place, run.finished_rows(part), storage)
        else:
            output.put_file(place, run.progress.rows(part), storage)
    output.put_text(output.beside(out, "templates.jsonl"), run.table(), storage)
    told: dict[str, Any] = {"options": {name: value for name, value in vars(settings).items() if name != "storage"}}
    told["tokens"] = settings.tokenizer or "estimated, 2 bytes a token"
    told["counts"] = run.counts.summary()
    text = json.dumps(told, indent=2, ensure_ascii=False) + "\n"
    output.put_text(output.beside(out, "summary.json"), [text.encode()], storage)


def _dry(settings: Settings, sources: list[Source]) -> None:
    run = Preparation(settings, sources, None)
    run.read()
    print(run.counts.text())
    for part, row in run.samples:
        shown = json.dumps(row, ensure_ascii=False)
        print(f"{part}: {shown if len(shown) < 1500 else shown[:1500] + '...'}")
    log.info("nothing was written (--dry-run); up to %s records were read (--limit)", f"{settings.limit:,}")
