"""`luthier generate`: one prompt to a run, an adapter or a model, and the answer as it comes.

A tuned model is asked in the format that it was trained in, which its run folder remembers: whoever asks
writes an instruction and not a template. The answer goes to standard output and everything else to standard
error.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.errors import ConfigError

if TYPE_CHECKING:
    from luthier.config import Config, DatasetEntry

log = logging.getLogger("luthier")

LONGEST = 512  # new tokens where neither the command nor the model says


def command(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="Run folder, adapter, model folder, or hub id.")
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to ask; - reads standard input.")],
    input: Annotated[
        str, typer.Option(help="The input beside the instruction, for formats that have one.")
    ] = "",
    system: Annotated[str | None, typer.Option(help="System text, for formats that have one.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, in no format.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(help=f"Longest answer. Default: the model's own, else {LONGEST}.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. Default: the model's own.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this much probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from so many tokens; 0: from all.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")
    ] = None,
) -> None:
    """Let a model or a run answer a prompt."""
    if greedy and (temperature, top_p, top_k) != (None, None, None):
        raise ConfigError("--greedy leaves nothing to sample: drop it, or --temperature, --top-p and --top-k")
    if raw and (input or system is not None):
        raise ConfigError("--raw takes the prompt as it is: put --input and --system into it yourself")
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt

    # As late as this, so that --help does not wait for torch.
    from luthier.data.formats import prompt_example
    from luthier.data.hub import notice_missing_network
    from luthier.data.render import Renderer
    from luthier.data.tokenizer import terminator_ids
    from luthier.generate.engine import Engine, default_terminators
    from luthier.generate.sampling import Sampling
    from luthier.models.assemble import open_for_inference

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        do_sample=False if greedy else None,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
    )
    if not Path(model).expanduser().exists():
        notice_missing_network()
    opened, tokenizer, own = open_for_inference(model)
    config, entry = asking_format(model, tokenizer, own, raw=raw)
    example = prompt_example(entry, text, input, system, config.preference.rl)
    prompt_ids = Renderer(tokenizer, config).prompt_ids(example, entry)
    terminators = {*terminator_ids(tokenizer, config), *default_terminators(opened)}
    engine = Engine(opened, tokenizer, sorted(terminators), default_new_tokens=LONGEST)
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


def asking_format(
    path: str, tokenizer: Any, run: Config | None, *, raw: bool = False
) -> tuple[Config, DatasetEntry]:
    """The config and dataset entry whose format a prompt is put into.

    A run's own, for its checkpoints and its merged model too: that of its first dataset. Without a run: the chat
    template of the tokenizer, and where there is none, or if `raw`, the text as it is.
    """
    from luthier.config import Config

    above = Path(path).expanduser().resolve().parent / "config.yaml"
    own_folder = Path(path).name.startswith("checkpoint-") or Path(path).name == "merged"
    if run is None and own_folder and above.is_file():
        run = Config.load(above)
    if run is not None and not raw:
        return run, run.data.datasets[0]
    kind = "chat_template" if tokenizer.chat_template and not raw else "completion"
    if kind == "completion" and not raw:
        log.info("%s has no chat template and no run's config: the prompt is continued as raw text", path)
    config = Config.from_flat({"base_model": path, "datasets": [{"path": path, "type": kind}]})
    return config, config.data.datasets[0]
