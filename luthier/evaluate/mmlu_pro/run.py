"""`luthier evaluate RUN --benchmark mmlu_pro`: MMLU-Pro as it is published, on any run, adapter or model.

Every answer is written to disk as it comes, under a hash of its prompt. So a run that was killed goes on where it
stopped, `--subjects all` after `--subjects math` asks the other subjects only, and what was measured with other weights
or settings, which has a file of its own, never mixes in. With `--compare` two models are asked the same questions, one
model after the other, each with a file of its own, and compared question by question.

Two measures. `cot` is the benchmark's own: worked examples, the model reasons, the letter is read out of its text.
`loglik` is quick, one pass for each question: the letter that the model finds likeliest behind "Answer:", without any
reasoning. It is another measure, and its figures are not comparable with published ones.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from luthier.data.render import Renderer
from luthier.data.tokenizer import terminator_ids
from luthier.errors import ConfigError
from luthier.evaluate.measure import DTYPES
from luthier.evaluate.mmlu_pro.ask import Asked, Runner, Settings, encoder_of
from luthier.evaluate.mmlu_pro.data import Benchmark, choose_subjects, load_benchmark
from luthier.evaluate.mmlu_pro.figures import ROLES, figures_of
from luthier.evaluate.opened import Which, identity, which_models
from luthier.evaluate.record import Record, as_table
from luthier.evaluate.results import digest, ready, results_folder, write_results
from luthier.evaluate.store import Store
from luthier.generate.batches import cached_tokens
from luthier.generate.engine import Engine, default_terminators
from luthier.models.device import choose_device
from luthier.models.memory import free_unused

log = logging.getLogger("luthier")

MODES = ("cot", "loglik")

# As in the published script: no model saw more context than this, so that long prompts have fewer examples.
SHOTS, NEW_TOKENS, CONTEXT = 5, 2048, 4096

# Columns of the table of results; the first ones say what a row is of.
KEY = ("model", "mode", "subjects", "limit", "shots", "max_new_tokens", "context", "chat", "dtype")
SHOWN = ("model", "mode", "subjects", "questions", "shots", "accuracy", "accuracy_with_guess", "no_answer")


@dataclass(frozen=True)
class Questions:
    """Which of the benchmark's questions are asked: of which subjects, and the first how many of each."""

    benchmark: Benchmark
    subjects: Sequence[str]
    limit: int | None

    @property
    def named(self) -> list[str] | str:
        return list(self.subjects) if len(self.subjects) < len(self.benchmark.test) else "all"


@dataclass
class Side:
    """A model that was asked: `rows` are its answers in the order of the questions."""

    which: Which
    header: dict[str, Any]
    answers: Path
    rows: list[dict[str, Any]] = field(default_factory=list)


def run_mmlu_pro(
    target: str,
    *,
    compare: str | None = None,
    data: str | Sequence[str] | None = None,
    subjects: str = "all",
    mode: str = "cot",
    record: str | Path | None = None,
    output: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    max_new_tokens: int | None = None,
    context: int | None = None,
    chat: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
) -> tuple[Path, dict[str, Any]]:
    """Ask a model MMLU-Pro's questions, or two models, and keep answers and figures.

    Args:
        target: run folder, adapter, model folder or hub id. compare: another one, or `base` for the run's own. data:
            see `load_benchmark`. subjects: `all`, or names separated by commas. mode: `cot` or `loglik`. record: CSV to
            which a row is added for each model. output: folder of the results; None for the run's own. limit: the first
            so many questions of each subject. context: most tokens of a prompt and its answer. chat: put the prompt
            into the format that the model was tuned in, as the turn of a user, in place of letting the model go on with
            it as text. seed: of the intervals.

    Returns:
        The JSON's path and content.

    Raises:
        ConfigError, DataError, ModelError, RunError: bad input; all but a model's own before any is loaded.
    """
    settings = _settings(mode, shots, max_new_tokens, context, chat)
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit: {limit}: at least 1 question of each subject, or leave it out")
    kind = _dtype(dtype)
    benchmark = load_benchmark(data, settings.shots)
    questions = Questions(benchmark, choose_subjects(subjects, benchmark), limit)
    _check_examples(benchmark, questions.subjects, settings.shots)
    table = Record.open(Path(record).expanduser(), KEY) if record is not None else None
    models = which_models(target, compare)
    for which in models if chat else ():
        if which.asking_format(raw=False)[1].type == "completion":
            why = "has no chat template, and its run trained on plain text" if which.run else "has no chat template"
            raise ConfigError(f"--chat: {which.name} {why}: leave it out")
    folder = ready(results_folder(target, Path(output).expanduser() if output is not None else None))
    where = choose_device(device) if isinstance(device, str) else device
    sides = [_ask(which, questions, settings, folder, where, kind) for which in models]
    figures = figures_of([side.rows for side in sides], seed)
    for side, role in zip(sides, ROLES, strict=False):
        _say_what_is_odd(side.which.name, figures["all"]["counts"][role], len(side.rows), settings)
    written = _write(folder, sides, questions, settings, figures, own=output is None)
    if table is not None:
        for side, role in zip(sides, ROLES, strict=False):
            _add_to(table, side, role, questions, settings, figures)
    return written


def _ask(
    which: Which,
    questions: Questions,
    settings: Settings,
    folder: Path,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> Side:
    """Open one model, ask it what it has not answered before, and let it go."""
    model = which.open(device, dtype)
    header = {
        "benchmark": "mmlu_pro",
        **identity(which, model),
        "mode": settings.mode,
        "chat": settings.chat,
        # It ends an answer; all else that an answer depends on is in its prompt, or in the weights.
        "max_new_tokens": settings.max_new_tokens if settings.mode == "cot" else None,
    }
    config, entry = which.asking_format(raw=not settings.chat)
    tokenizer = which.tokenizer
    encode = encoder_of(tokenizer, Renderer(tokenizer, config), entry, config.preference.rl, settings.chat)
    terminators = {*terminator_ids(tokenizer, which.run or config), *default_terminators(model)}
    model.generation_config = GenerationConfig()  # the model's own temperature and penalties have no part in this
    engine = Engine(model, tokenizer, sorted(terminators), max_cached_tokens=cached_tokens(model))
    runner = Runner(engine, settings, encode)
    store = Store(folder / f"mmlu_pro_{settings.mode}-{digest(header)[:8]}.jsonl", header)
    side = Side(which, header, store.path)
    asked: list[Asked] = []
    try:
        for name in questions.subjects:
            examples = questions.benchmark.validation.get(name, ())[: settings.shots]
            some = runner.prompts(questions.benchmark.test[name][: questions.limit], examples)
            runner.answer(name, some, store)
            asked += some
    except KeyboardInterrupt:
        log.warning("%d answers are in %s: the same command goes on from there", len(store.rows), store.path)
        raise
    finally:
        store.close()
    side.rows = [store.rows[one.key] for one in asked]
    place = model.get_input_embeddings().weight.device
    del model, engine, runner
    free_unused(place)
    return side


def _settings(mode: str, shots: int | None, max_new_tokens: int | None, context: int | None, chat: bool) -> Settings:
    settings = Settings(
        mode,
        SHOTS if shots is None else shots,
        NEW_TOKENS if max_new_tokens is None else max_new_tokens,
        CONTEXT if context is None else context,
        chat,
    )
    if mode not in MODES:
        raise ConfigError(f"--mode: {mode!r}: {' or '.join(MODES)}")
    if mode == "loglik" and chat:
        raise ConfigError("--chat: --mode loglik reads the letter right behind the prompt's own end: leave one out")
    if settings.shots < 0 or settings.max_new_tokens < 1 or settings.context < 2:
        raise ConfigError("--shots has to be at least 0, --max-new-tokens at least 1, --context at least 2")
    return settings


def _dtype(asked: torch.dtype | str | None) -> torch.dtype | None:
    if asked is None or isinstance(asked, torch.dtype):
        return asked
    if asked not in DTYPES:
        raise ConfigError(f"--dtype: {asked!r}: {', '.join(DTYPES)}")
    return DTYPES[asked]


def _check_examples(benchmark: Benchmark, subjects: Sequence[str], shots: int) -> None:
    for name in subjects:
        there = len(benchmark.validation.get(name, ()))
        if there < shots:
            log.warning("%s: %d worked examples in the validation split, for prompts of %d", name, there, shots)


def _say_what_is_odd(name: str, counts: Mapping[str, Any], questions: int, settings: Settings) -> None:
    fewer = {shots: count for shots, count in counts["shots"].items() if int(shots) < settings.shots}
    if fewer:
        log.warning(
            "%s: %d of %d prompts have fewer than %d worked examples, to fit the context: %s",
            name,
            sum(fewer.values()),
            questions,
            settings.shots,
            ", ".join(f"{count} with {shots}" for shots, count in fewer.items()),
        )
    if counts["skipped"]:
        log.warning("%s: %d questions do not fit the context at all: they count as wrong", name, counts["skipped"])
    if counts["cut_off"]:
        log.info("%s: %d outputs were cut off at the longest length; they count as they are", name, counts["cut_off"])


def _write(
    folder: Path,
    sides: Sequence[Side],
    questions: Questions,
    settings: Settings,
    figures: dict[str, Any],
    *,
    own: bool,
) -> tuple[Path, dict[str, Any]]:
    """`own`: whether the folder is the model's, so that a name needs to say of the setting only."""
    target, other = sides[0], sides[1] if len(sides) > 1 else None
    named = questions.named if isinstance(questions.named, str) else "+".join(questions.named).replace(" ", "_")
    parts = [] if own else [digest(target.header)[:8]]
    parts += [f"{settings.shots}shots", named if len(named) < 60 else digest(named)[:8]]
    parts += [f"context{settings.context}"] if settings.context != CONTEXT else []
    if settings.mode == "cot" and settings.max_new_tokens != NEW_TOKENS:
        parts.append(f"new{settings.max_new_tokens}")
    parts += ["chat"] if settings.chat else []
    parts += [f"first{questions.limit}"] if questions.limit is not None else []
    path, described = write_results(
        folder,
        "-".join([f"mmlu_pro_{settings.mode}", *parts]),
        kind="mmlu_pro",
        target=target.which.path,
        compare=None if other is None else other.which.path,
        figures=figures,
        rows=target.answers.name,
        rows_compare=None if other is None else other.answers.name,
        names={"target": target.which.name, "compare": None if other is None else other.which.name},
        data=questions.benchmark.source,
        settings={
            **vars(settings),
            "subjects": questions.named,
            "limit": questions.limit,
            "models": {side.which.name: {"path": side.which.path, "dtype": side.header["dtype"]} for side in sides},
        },
    )
    for side in sides:
        log.info("%s: every prompt, output and prediction: %s", side.which.name, side.answers)
    return path, described


def _add_to(
    table: Record,
    side: Side,
    role: str,
    questions: Questions,
    settings: Settings,
    figures: Mapping[str, Any],
) -> None:
    cot, path, whole = settings.mode == "cot", side.which.path, figures["all"]
    accuracy = whole[role]["accuracy"]
    by_category = figures["by"]["category"]
    replaced = table.add(
        {
            # One name for one folder, however its path was written.
            "model": os.path.normpath(path) if Path(path).expanduser().exists() else path,
            "mode": settings.mode,
            "subjects": questions.named if isinstance(questions.named, str) else "+".join(questions.named),
            "limit": questions.limit,
            "shots": settings.shots,
            "max_new_tokens": settings.max_new_tokens if cot else None,
            "context": settings.context,
            "chat": "yes" if settings.chat else "no",
            "dtype": side.header["dtype"],
            "questions": whole["rows"],
            "accuracy": f"{accuracy['value']:.4f}",
            "low": f"{accuracy['low']:.4f}",
            "high": f"{accuracy['high']:.4f}",
            "accuracy_with_guess": f"{whole[role]['accuracy_with_guess']['value']:.4f}" if cot else None,
            "no_answer": whole["counts"][role]["no_answer"],
            **{name: f"{group[role]['accuracy']['value']:.4f}" for name, group in by_category.items()},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )
    log.info("%s: %s", table.path, f"the row of {path} in this setting was replaced" if replaced else "one row more")


def recorded(path: Path) -> str:
    """The table of results as text: without other benchmarks' rows, with each further setting in which rows differ."""
    table = Record.open(path.expanduser(), KEY)
    rows = [row for row in table.rows if row.get("accuracy") or not row.get("benchmark")]
    columns = [column for column in SHOWN if column in table.columns]
    further = [name for name in KEY if name not in SHOWN and len({row.get(name, "") for row in rows} - {""}) > 1]
    where = columns.index("shots") + 1 if "shots" in columns else len(columns)
    columns[where:where] = further
    return f"{table.path}\n{as_table(columns, [[row.get(column, '') for column in columns] for row in rows])}"
