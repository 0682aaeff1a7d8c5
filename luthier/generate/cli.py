"""`luthier generate`: one prompt to a run, an adapter or a model, and the answer as it comes; or a file of prompts, and
a file of answers.

A tuned model is asked in the format that it was trained in, which its run folder remembers: whoever asks
writes an instruction and not a template. The answer goes to standard output and everything else to standard
error.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.errors import ConfigError
from luthier.generate.asking import LONGEST, asking_format

if TYPE_CHECKING:
    from luthier.generate.sampling import Sampling

__all__ = ["LONGEST", "asking_format", "command"]

log = logging.getLogger("luthier")


def command(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="Run folder, adapter, model folder, or hub id.")
    ],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="What to ask; - reads standard input.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Prompts: JSONL, JSON, CSV, Parquet or Arrow rows, or text, one a line.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSONL of answers, with --data.")] = None,
    field: Annotated[str | None, typer.Option(help="Column of the prompt. Default: by the model's format.")] = None,
    input: Annotated[
        str, typer.Option(help="The input beside the instruction, for formats that have one.")
    ] = "",
    system: Annotated[
        str | None, typer.Option(help="System text, for formats that have one, and for rows without their own.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, in no format.")] = False,
    num_samples: Annotated[int, typer.Option(min=1, help="Answers to each prompt of --data.")] = 1,
    max_new_tokens: Annotated[
        int | None, typer.Option(help=f"Longest answer. Default: the model's own, else {LONGEST}.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. Default: the model's own.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this much probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from so many tokens; 0: from all.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1, what is there already gets less likely.")
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start --output anew, whatever is in it.")] = False,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave rows of --data out that cannot be read.")
    ] = False,
    engine: Annotated[
        str, typer.Option(metavar="luthier|vllm", help="What answers --data; vllm where it is installed.")
    ] = "luthier",
) -> None:
    """Let a model or a run answer a prompt, or every row of a file.

    The same command goes on with an --output that is not whole. The page on generating says what is in it.
    """
    if (prompt is None) == (data is None):
        raise ConfigError("give one of --prompt TEXT and --data FILE")
    if greedy and (temperature, top_p, top_k) != (None, None, None):
        raise ConfigError("--greedy leaves nothing to sample: drop it, or --temperature, --top-p and --top-k")
    if raw and (input or system is not None):
        raise ConfigError("--raw takes the prompt as it is: put --input and --system into it yourself")
    if engine not in ("luthier", "vllm"):
        raise ConfigError(f"--engine {engine}: it is luthier or vllm")
    if data is not None:
        if output is None:
            raise ConfigError("--data needs --output FILE.jsonl, for the answers")
        if input:
            raise ConfigError("--input is that of a single prompt: rows of --data have their own")
    else:
        of_files = {"--output": output, "--field": field, "--num-samples": num_samples > 1, "--overwrite": overwrite,
                    "--skip-bad-rows": skip_bad_rows, "--engine vllm": engine != "luthier"}  # fmt: skip
        if given := [name for name, value in of_files.items() if value]:
            raise ConfigError(f"{', '.join(given)}: only with --data FILE")

    # As late as this, so that --help does not wait for torch.
    from luthier.generate.sampling import Sampling

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        do_sample=False if greedy else None,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    )
    if data is None:
        text = sys.stdin.read().removesuffix("\n") if prompt == "-" else str(prompt)
        _answer_one(model, text, input, system, raw, sampling)
        return
    from luthier.generate.files import Task, answer_file
    from luthier.generate.questions import Place

    assert output is not None
    place = Place(field, raw, system or None)
    answer_file(Task(model, data, output, place, sampling, num_samples, overwrite, skip_bad_rows, engine))


def _answer_one(model: str, text: str, input: str, system: str | None, raw: bool, sampling: Sampling) -> None:
    from luthier.generate.asking import open_engine

    engine, asking = open_engine(model, raw=raw)
    prompt_ids = asking.ids(asking.example(text, input, system))
    began = time.perf_counter()
    deltas = engine.stream(prompt_ids, sampling)
    for piece in deltas:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print(flush=True)
    assert deltas.completion is not None
    count, seconds = len(deltas.completion.token_ids), time.perf_counter() - began
    ended = "" if deltas.completion.finish_reason == "stop" else "; cut off, see --max-new-tokens"
    log.info("%d tokens, %.1f per second%s", count, count / seconds, ended)
