"""`luthier evaluate RUN --benchmark mmlu_pro`: MMLU-Pro as it is published, on any run, adapter or model.

Every answer is written to disk as it comes, under a hash of its prompt. So a run that was killed goes on where it
stopped, `--subjects all` after `--subjects math` asks the other subjects only, and what was measured with other weights
or settings, which has a file of its own, never mixes in.

Two measures. `cot` is the benchmark's own: worked examples, the model reasons, the letter is read out of its text.
`loglik` is quick, one pass for each question: the letter that the model finds likeliest behind "Answer:", without any
reasoning. It is another measure, and its figures are not comparable with published ones.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from luthier.data.hub import notice_missing_network
from luthier.data.render import Renderer
from luthier.data.tokenizer import terminator_ids
from luthier.errors import ConfigError
from luthier.evaluate.batches import cached_tokens
from luthier.evaluate.measure import DTYPES
from luthier.evaluate.mmlu_pro.ask import Asked, Runner, Settings, Store, encoder_of
from luthier.evaluate.mmlu_pro.data import Benchmark, choose_subjects, figures_of, load_benchmark
from luthier.evaluate.record import Record, as_table
from luthier.evaluate.results import digest, results_folder, write_results
from luthier.generate.cli import asking_format
from luthier.generate.engine import Engine, default_terminators
from luthier.models.adapter_files import CONFIG as ADAPTER_CONFIG
from luthier.models.adapter_files import read_adapter_config
from luthier.models.assemble import open_for_inference
from luthier.models.device import choose_device

log = logging.getLogger("luthier")

MODES = ("cot", "loglik")

# As in the published script: no model saw more context than this, so that long prompts have fewer examples.
SHOTS, NEW_TOKENS, CONTEXT = 5, 2048, 4096

# Columns of the table of results; the first ones say what a row is of.
KEY = ("model", "mode", "subjects", "limit", "shots", "max_new_tokens", "context", "chat")
SHOWN = ("model", "mode", "subjects", "questions", "shots", "accuracy", "accuracy_with_guess", "no_answer")


def run_mmlu_pro(
    target: str,
    *,
    data: str | None = None,
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
) -> dict[str, Any]:
    """Ask a model MMLU-Pro's questions, print accuracies, and keep answers and figures.

    Args:
        target: run folder, adapter, model folder or hub id. data: see `load_benchmark`. subjects: `all`, or names
            separated by commas. mode: `cot` or `loglik`. record: CSV to which a row is added. output: folder of the
            results; None for the run's own. limit: the first so many questions of each subject. context: most tokens of
            a prompt and its answer. chat: put the prompt into the format that the model was tuned in, as the turn of a
            user, in place of letting the model go on with it as text. seed: of the intervals.

    Returns:
        What the JSON of the results holds.

    Raises:
        ConfigError, DataError, ModelError, RunError: bad input; all but the model's own before it is loaded.
    """
    settings = _settings(mode, shots, max_new_tokens, context, chat)
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit: {limit}: at least 1 question of each subject, or leave it out")
    benchmark = load_benchmark(data, settings.shots)
    chosen = choose_subjects(subjects, benchmark)
    _check_examples(benchmark, chosen, settings.shots)
    table = Record.open(Path(record).expanduser(), KEY) if record is not None else None
    folder = results_folder(target, Path(output).expanduser() if output is not None else None)
    if not Path(target).expanduser().exists():
        notice_missing_network()
    where = choose_device(device) if isinstance(device, str) else device
    model, tokenizer, run = open_for_inference(target, device=where, dtype=_dtype(dtype))
    header = {
        "benchmark": "mmlu_pro",
        "weights": weights_of(target, model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "mode": mode,
        "chat": chat,
        # It ends an answer; all else that an answer depends on is in its prompt, or in the weights.
        "max_new_tokens": settings.max_new_tokens if mode == "cot" else None,
    }
    config, entry = asking_format(target, tokenizer, run, raw=not chat)
    if chat and entry.type == "completion":
        raise ConfigError(f"--chat: {target} has no chat template, and its run trained on plain text: leave it out")
    encode = encoder_of(tokenizer, Renderer(tokenizer, config), entry, config.preference.rl, chat)
    terminators = {*terminator_ids(tokenizer, run or config), *default_terminators(model)}
    model.generation_config = GenerationConfig()  # the model's own temperature and penalties have no part in this
    engine = Engine(model, tokenizer, sorted(terminators), max_cached_tokens=cached_tokens(model))
    runner = Runner(engine, settings, encode)
    store = Store(folder / f"mmlu_pro_{mode}-{digest(header)[:8]}.jsonl", header)
    try:
        asked: list[Asked] = []
        for name in chosen:
            examples = benchmark.validation.get(name, ())[: settings.shots]
            some = runner.prompts(benchmark.test[name][:limit], examples)
            runner.answer(name, some, store)
            asked += some
    except KeyboardInterrupt:
        log.warning("%d answers are in %s: the same command goes on from there", len(store.rows), store.path)
        raise
    finally:
        store.close()
    rows = [store.rows[one.key] for one in asked]
    figures = figures_of(rows, seed)
    _say_what_is_odd(figures, settings)
    said = {"target": target, "subjects": chosen if len(chosen) < len(benchmark.test) else "all", "limit": limit}
    described = _write(folder, store.path, said, settings, figures, header, benchmark.source)
    print(_shown(figures, settings, target))
    if table is not None:
        _add_to(table, said, settings, figures, header)
    return described


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


def weights_of(target: str, model: Any) -> str:
    """A short name for what a model's weights are: the hub's commit, or names, sizes and times of the files; an
    adapter's base is part of it."""
    folder = Path(target).expanduser()
    if not folder.is_dir():
        return f"{target}@{getattr(model.config, '_commit_hash', None)}"
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json"))
    weights = [path for path in files if path.suffix != ".json" or path.name in ("config.json", ADAPTER_CONFIG)]
    found: list[Any] = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
    if (folder / ADAPTER_CONFIG).is_file():
        found.append(weights_of(str(read_adapter_config(folder).get("base_model_name_or_path")), model))
    return digest(found)[:16]


def _say_what_is_odd(figures: Mapping[str, Any], settings: Settings) -> None:
    fewer = {shots: count for shots, count in figures["shots"].items() if int(shots) < settings.shots}
    if fewer:
        log.warning(
            "%d of %d prompts have fewer than %d worked examples, to fit the context: %s",
            sum(fewer.values()),
            figures["questions"],
            settings.shots,
            ", ".join(f"{count} with {shots}" for shots, count in fewer.items()),
        )
    if figures["skipped"]:
        log.warning("%d questions do not fit the context at all: they count as wrong", figures["skipped"])
    if figures["cut_off"]:
        log.info("%d outputs were cut off at the longest length; they count as they are", figures["cut_off"])


def _write(
    folder: Path,
    rows: Path,
    said: Mapping[str, Any],
    settings: Settings,
    figures: dict[str, Any],
    header: Mapping[str, Any],
    source: str,
) -> dict[str, Any]:
    subjects = said["subjects"] if said["subjects"] == "all" else "+".join(said["subjects"]).replace(" ", "_")
    asked = [digest(header)[:8], f"{settings.shots}shots", subjects if len(subjects) < 60 else digest(subjects)[:8]]
    asked += [f"context{settings.context}"] if settings.context != CONTEXT else []
    asked += [f"first{said['limit']}"] if said["limit"] is not None else []
    path, described = write_results(
        folder,
        "-".join([f"mmlu_pro_{settings.mode}", *asked]),
        kind="mmlu_pro",
        target=said["target"],
        compare=None,
        figures=figures,
        rows=rows.name,
        data=source,
        settings={**vars(settings), "subjects": said["subjects"], "limit": said["limit"], "dtype": header["dtype"]},
    )
    log.info("figures: %s; every prompt, output and prediction: %s", path, rows)
    return described


def _name(target: str) -> str:
    """What the table calls a model: one name for one folder, however its path was written."""
    return os.path.normpath(target) if Path(target).expanduser().exists() else target


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _shown(figures: Mapping[str, Any], settings: Settings, target: str) -> str:
    cot = settings.mode == "cot"
    columns = ["subject", "questions", "accuracy", "95% interval"] + (["with guess", "no answer"] if cot else [])
    rows = []
    for name, found in [*figures["categories"].items(), ("all", figures)]:
        low, high = found["interval"]
        row = [name, str(found["questions"]), _percent(found["accuracy"]), f"{_percent(low)} to {_percent(high)}"]
        rows.append(row + ([_percent(found["accuracy_with_guess"]), str(found["no_answer"])] if cot else []))
    if cot:
        how = f"{settings.shots} worked examples, chain of thought, greedy"
        note = "accuracy: no answer is wrong; with guess: a seeded guess in its place, as in the published tables"
    else:
        how = f"{settings.shots} examples, likeliest letter"
        note = "the likeliest letter without reasoning: another measure than the published one, do not compare the two"
    return f"MMLU-Pro, {how}: {target}\n{as_table(columns, rows)}\n({note})"


def _add_to(
    table: Record,
    said: Mapping[str, Any],
    settings: Settings,
    figures: Mapping[str, Any],
    header: Mapping[str, Any],
) -> None:
    cot = settings.mode == "cot"
    low, high = figures["interval"]
    replaced = table.add(
        {
            "model": _name(said["target"]),
            "mode": settings.mode,
            "subjects": said["subjects"] if said["subjects"] == "all" else "+".join(said["subjects"]),
            "limit": said["limit"],
            "shots": settings.shots,
            "max_new_tokens": settings.max_new_tokens if cot else None,
            "context": settings.context,
            "chat": "yes" if settings.chat else "no",
            "dtype": header["dtype"],
            "questions": figures["questions"],
            "accuracy": f"{figures['accuracy']:.4f}",
            "low": f"{low:.4f}",
            "high": f"{high:.4f}",
            "accuracy_with_guess": f"{figures['accuracy_with_guess']:.4f}" if cot else None,
            "no_answer": figures["no_answer"],
            **{name: f"{found['accuracy']:.4f}" for name, found in figures["categories"].items()},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )
    log.info("%s: %s", table.path, "the row of this model and setting was replaced" if replaced else "one row more")
    shown = [column for column in SHOWN if column in table.columns]
    rows = [[row.get(column, "") for column in shown] for row in table.rows]
    print(f"\n{table.path}\n{as_table(shown, rows)}")
