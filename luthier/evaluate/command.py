"""`luthier evaluate`: what a run or a model is worth, on data of one's own and on benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.errors import ConfigError
from luthier.evaluate.page import draw_again

BENCHMARKS = ("mmlu_pro",)
DTYPES = ("auto", "fp32", "bf16", "fp16")
SHORT_ANSWER = 32  # `answers.SHORT_ANSWER`, which would bring torch with it


def command(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="Run folder, adapter, model folder, or hub id.")
    ],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="FILE", help="Further files of --data, where a pattern names several.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="A config, or data files (may be repeated). Default: the run's own validation data."),
    ] = None,
    type: Annotated[
        str | None,
        typer.Option(help="What the rows of data files are: alpaca, chat_template, ... Default: as in the run."),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="Another model beside it on the same rows; base: the run's base model.")
    ] = None,
    by: Annotated[
        list[str] | None, typer.Option(help="Column to group rows by; may be repeated.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="So many rows, drawn by the seed; of each subject or task, its first questions."),
    ] = None,
    short_answer: Annotated[
        int,
        typer.Option(min=0, help="Rows are asked whose answer has up to so many tokens; 0 asks none."),
    ] = SHORT_ANSWER,
    tokens_per_pass: Annotated[
        int | None, typer.Option(min=1, help="Most tokens in a forward pass. Default: found from memory.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. Default: the run's, or the best.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results. Default: RUN/evaluation.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of --limit and of the intervals.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, and no table.")] = False,
    benchmark: Annotated[str | None, typer.Option(help="A benchmark in place of data: mmlu_pro.")] = None,
    subjects: Annotated[str, typer.Option(help="For --benchmark: categories, comma-separated, or all.")] = "all",
    mode: Annotated[
        str, typer.Option(help="For --benchmark: cot (answers with reasoning) or loglik (letters).")
    ] = "cot",
    shots: Annotated[
        int | None,
        typer.Option(
            "--shots",
            "--num_fewshot",
            help="For --benchmark and --tasks: examples before a question. Default: 5, the task's own.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="For --benchmark: longest answer. Default: 2048.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="For --benchmark: most tokens of a prompt and its answer. Default: 4096.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="For --benchmark: ask in the format that the model was tuned in; for --tasks: in its chat template.",
        ),
    ] = False,
    record: Annotated[
        Path | None, typer.Option(help="For --benchmark and --tasks: a CSV to which the result is added.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness in place of data: gsm8k,arc_easy.")
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option("--include-path", "--include_path", help="For --tasks: a folder with tasks of your own."),
    ] = None,
    general: Annotated[
        bool,
        typer.Option(
            "--general", help="The shipped general set in place of data: what the run has forgotten, beside its base."
        ),
    ] = False,
) -> None:
    """Measure a run, an adapter or a model."""
    if more:
        # `--data rows-*.jsonl` comes here as several names: the shell has put those that match in the pattern's place.
        if not data or not all(Path(name).is_file() for name in more):
            raise ConfigError(
                f"{more[0]}: one run or model is measured at a time; another beside it is --compare, rows are --data"
            )
        data = [*data, *more]
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: it is one of {', '.join(DTYPES)}")
    of_benchmark: dict[str, Any] = {
        "subjects": subjects != "all",
        "mode": mode != "cot",
        "shots": shots is not None,
        "max-new-tokens": max_new_tokens is not None,
        "context": context is not None,
        "chat": chat,
        "record": record,
    }
    of_data: dict[str, Any] = {
        "compare": compare,
        "by": by,
        "type": type,
        "short-answer": short_answer != SHORT_ANSWER,
        "tokens-per-pass": tokens_per_pass,
        "json": as_json,
    }
    if general:
        others = {name: given for name, given in of_data.items() if name in ("by", "type", "short-answer")}
        others |= {"data": data, "benchmark": benchmark, "tasks": tasks, "include_path": include_path, **of_benchmark}
        _refuse(others, "does nothing with --general, which has rows of its own")
    if tasks is not None:
        of_tasks = ("shots", "chat", "record", "compare", "tokens-per-pass", "json")
        others = {**of_benchmark, **of_data, "benchmark": benchmark, "data": data}
        _refuse({name: given for name, given in others.items() if name not in of_tasks}, "does nothing with --tasks")
        _run_tasks(
            model,
            as_json,
            tasks=tasks,
            include_path=include_path,
            compare=compare,
            limit=limit,
            shots=shots,
            chat=chat,
            tokens_per_pass=tokens_per_pass,
            record=record,
            output=output,
            dtype=dtype,
            device=device,
            seed=seed,
        )
        draw_again(model, output)
        return
    _refuse({"include_path": include_path}, "goes with --tasks")
    if benchmark is None:
        _refuse(of_benchmark, "goes with --benchmark")
    else:
        others = {name: given for name, given in of_data.items() if name not in ("compare", "json")}
        _refuse(others, "does nothing with --benchmark")
        _run_benchmark(
            benchmark,
            model,
            as_json,
            compare=compare,
            data=data[0] if data and len(data) == 1 else data,
            subjects=subjects,
            mode=mode,
            record=record,
            output=output,
            limit=limit,
            shots=shots,
            max_new_tokens=max_new_tokens,
            context=context,
            chat=chat,
            device=device,
            dtype=dtype,
            seed=seed,
        )
        draw_again(model, output)
        return

    # As late as this, so that --help does not wait for torch.
    from luthier.evaluate.data_eval import evaluate_data
    from luthier.evaluate.table import lines_of

    path, result = evaluate_data(
        model,
        data=data or (),
        type=type,
        compare=compare,
        by=by or (),
        limit=limit,
        short_answer=short_answer,
        tokens_per_pass=tokens_per_pass,
        dtype=dtype,  # type: ignore[arg-type]
        device=device,
        output=output,
        seed=seed,
        general=general,
    )
    draw_again(model, output)
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    names = result["names"]
    print("\n".join(lines_of(result["figures"], names["target"], names["compare"])))
    print(f"\n{path}, and row by row in {result['rows']} beside it")


def _refuse(options: dict[str, Any], why: str) -> None:
    """An option that would have no effect is an error."""
    for option, given in options.items():
        if given:
            raise ConfigError(f"--{option} {why}: leave it out")


def _run_tasks(model: str, as_json: bool, **options: Any) -> None:
    from luthier.evaluate.harness.figures import shown
    from luthier.evaluate.harness.run import run_harness

    path, result = run_harness(model, **options)
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    print(f"{shown(result)}\n\n{path}, and question by question in {result['rows']} beside it")


def _run_benchmark(name: str, model: str, as_json: bool, **options: Any) -> None:
    if name not in BENCHMARKS:
        raise ConfigError(f"--benchmark {name}: there is {', '.join(BENCHMARKS)}")
    from luthier.evaluate.mmlu_pro.figures import shown
    from luthier.evaluate.mmlu_pro.run import recorded, run_mmlu_pro

    path, result = run_mmlu_pro(model, **options)
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    print(f"{shown(result)}\n\n{path}, and every prompt and answer in {result['rows']} beside it")
    if options["record"] is not None:
        print(f"\n{recorded(options['record'])}")
