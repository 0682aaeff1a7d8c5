"""`luthier evaluate RUN --tasks ...`: the tasks of lm-evaluation-harness, asked of any run, adapter or model.

Tasks, prompts and scoring are the harness's; the model behind them is opened and run by Luthier (`model`).
The tasks are loaded before the model is, so that a name that is not there or data that cannot be had is said at once.
Two models are asked the same questions, one model after the other, and compared question by question.

Every answer is written to disk as it comes, under a hash of the request's ids and settings: the same command goes on
where it stopped, and what has been asked before, in whatever task, is not asked again. (The harness's own cache knows
the text of a request only, not the weights nor what became of it, and holds pickles in a database.)
"""

from __future__ import annotations

import importlib.util
import logging
import os
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.data.tokenizer import is_chat, terminator_ids
from luthier.errors import ConfigError, LuthierError, RunError
from luthier.evaluate.harness.figures import Side, figures_of, metrics_of, samples_of
from luthier.evaluate.harness.tasks import load_tasks, topmost, words_of
from luthier.evaluate.intervals import RESAMPLES
from luthier.evaluate.measure import DTYPES
from luthier.evaluate.opened import Which, identity, which_models
from luthier.evaluate.record import Record
from luthier.evaluate.results import digest, ready, results_folder, write_results
from luthier.evaluate.store import Store
from luthier.generate.engine import default_terminators
from luthier.models.device import choose_device
from luthier.models.memory import free_unused

log = logging.getLogger("luthier")

INSTALL = 'pip install "luthier[harness]"'

# Columns of the table of results that say what a row is of.
KEY = ("model", "benchmark", "limit", "shots", "chat", "dtype")
BENCHMARK = "lm-eval"


@dataclass(frozen=True)
class Asked:
    """What a result depends on, besides the model and the tasks."""

    limit: int | None
    shots: int | None
    chat: bool


def run_harness(
    target: str,
    *,
    tasks: str,
    include_path: str | Path | None = None,
    compare: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    tokens_per_pass: int | None = None,
    record: str | Path | None = None,
    output: str | Path | None = None,
    dtype: str = "auto",
    device: str | None = None,
    seed: int = 0,
) -> tuple[Path, dict[str, Any]]:
    """Ask a model the questions of some tasks, and write figures and answers.

    Args:
        target: run folder, adapter, model folder or hub id. tasks: names, patterns or YAML files, separated by commas.
        include_path: a folder with tasks of one's own. compare: another model, or `base` for the run's own. limit: the
            first so many questions of each task. shots: worked examples before a question; None for the task's own
            number. chat: ask in the model's chat template. record: CSV to which a row is added.

    Returns:
        The JSON's path and content.

    Raises:
        ConfigError, DataError: before a model is loaded. ModelError, RunError.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"--tasks needs lm-evaluation-harness, which is not installed: {INSTALL}")
    asked = Asked(limit, shots, chat)
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit}: at least 1 question of each task, or leave it out")
    if shots is not None and shots < 0:
        raise ConfigError(f"--shots {shots}: 0 or more worked examples")
    table = Record.open(Path(record).expanduser(), KEY) if record is not None else None
    models = which_models(target, compare)
    for which in models if chat else ():
        if not which.tokenizer.chat_template:
            raise ConfigError(f"--chat: {which.name} has no chat template: leave it out")
    names, loaded = load_tasks(tasks, include_path)
    folder = ready(results_folder(target, Path(output).expanduser() if output is not None else None))
    where = choose_device(device) if device is not None else None
    sides = [_ask(which, loaded, asked, folder, where, dtype, tokens_per_pass, seed) for which in models]
    figures = figures_of(sides, loaded["tasks"], seed)
    written = write_results(
        folder,
        _file_name(names, asked, include_path),
        kind="harness",
        target=target,
        compare=sides[1].described["path"] if compare is not None else None,
        figures=figures,
        rows=_rows(sides),
        names={"target": sides[0].name, "compare": sides[1].name if compare is not None else None},
        settings={
            "tasks": names,
            "include_path": None if include_path is None else str(include_path),
            **vars(asked),
            "seed": seed,
            "lm_eval": _version(),
            "models": {side.name: side.described for side in sides},
        },
    )
    if table is not None:
        for side in sides:
            _add_to(table, side, asked)
    return written


# --- a model -----------------------------------------------------------------------------------------------


def _ask(
    which: Which,
    loaded: Mapping[str, Any],
    asked: Asked,
    folder: Path,
    device: torch.device | None,
    dtype: str,
    tokens_per_pass: int | None,
    seed: int,
) -> Side:
    """Open one model, ask it what it has not answered before, and let it go."""
    from lm_eval.evaluator import simple_evaluate

    from luthier.evaluate.harness import model as harness_model

    model = which.open(device, DTYPES[dtype])
    config, entry = which.asking_format(raw=not asked.chat)
    own = which.run or config
    if asked.chat and which.run is not None and not is_chat(entry.type):
        log.warning("%s was trained on rows of type %s, and is asked in its chat template", which.name, entry.type)
    header = {"benchmark": BENCHMARK, **identity(which, model)}
    store = Store(folder / f"harness-answers-{digest(header)[:8]}.jsonl", header)
    lm = harness_model.HarnessModel(
        model,
        which.tokenizer,
        sorted({*terminator_ids(which.tokenizer, own), *default_terminators(model)}),
        store,
        tokens_per_pass=tokens_per_pass,
        template_options=dict(own.data.chat_template_kwargs or {}),
        label=which.name,
        seed=seed,
    )
    try:
        results = simple_evaluate(
            model=lm,
            tasks=topmost(loaded),
            num_fewshot=asked.shots,
            limit=asked.limit,
            apply_chat_template=asked.chat,
            fewshot_as_multiturn=asked.chat,
            bootstrap_iters=RESAMPLES,
        )
    except KeyboardInterrupt:
        log.warning("%d answers are in %s: the same command goes on from there", len(store.rows), store.path)
        raise
    except LuthierError:
        raise
    except Exception as error:
        # What goes wrong in a task is its author's to mend; what goes wrong in the model's class is ours.
        files = {frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)}
        if harness_model.__file__ in files:
            raise
        raise RunError(f"--tasks: lm-evaluation-harness could not run them: {words_of(error)}") from error
    finally:
        store.close()
    described = {"path": which.path, "dtype": header["dtype"], "device": str(lm.device), "answers": store.path.name}
    place = lm.device
    del lm, model
    free_unused(place)
    return Side(which.name, metrics_of(results["results"]), samples_of(results["samples"]), described)


# --- what is written ---------------------------------------------------------------------------------------


def _rows(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """A line for each question (and filter): its prompt, the expected answer, and what each model made of it."""
    lines = []
    for (task, filter_), rows in sides[0].samples.items():
        for number, row in rows.items():
            line: dict[str, Any] = {
                "task": task,
                "filter": filter_,
                "question": number,
                "arguments": [list(each) for each in row["arguments"]],
                "expected": row["target"],
            }
            for role, side in zip(("target", "compare"), sides, strict=False):
                said = side.samples[task, filter_][number]
                line[role] = {
                    "responses": said["resps"],
                    "read": said["filtered_resps"],
                    **{metric: said[metric] for metric in said["metrics"]},
                }
            lines.append(_plain(line))
    return lines


def _plain(value: Any) -> Any:
    """What JSON can hold: tasks give numpy's numbers, tuples and types of their own."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _file_name(names: Sequence[str], asked: Asked, include_path: str | Path | None) -> str:
    tasks = "+".join(Path(name).stem if name.endswith((".yaml", ".yml")) else name for name in names)
    parts = ["harness", tasks if len(tasks) <= 60 else digest([*names, str(include_path)])[:8]]
    parts += [f"{asked.shots}shots"] if asked.shots is not None else []
    parts += [f"first{asked.limit}"] if asked.limit is not None else []
    return "-".join([*parts, *(["chat"] if asked.chat else [])])


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def _add_to(table: Record, side: Side, asked: Asked) -> None:
    """A row for a model and a setting, a column for each metric of each task; other tasks' stay."""
    path = side.described["path"]
    replaced = table.add(
        {
            "model": os.path.normpath(path) if Path(path).expanduser().exists() else path,
            "benchmark": BENCHMARK,
            "limit": asked.limit,
            "shots": asked.shots,
            "chat": "yes" if asked.chat else "no",
            "dtype": side.described["dtype"],
            **{
                f"{task} {metric}": f"{value:.4f}"
                for task, metrics in side.metrics.items()
                for metric, (value, _) in metrics.items()
            },
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )
    log.info("%s: %s", table.path, "the row of this model and setting was replaced" if replaced else "one row more")
