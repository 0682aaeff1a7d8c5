"""`luthier demo`: a whole run on the shipped tiny model, with evidence that it learned.

The same steps as on a real model, and by the same code: train a LoRA from a config (`demo.yml`, which `luthier train`
takes as well), then put held-out questions to it and to its base, which is what `luthier evaluate RUN --compare base`
does. The right answers are known, so an answer counts only if it is right to the last character and ends there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from luthier.config import Config
from luthier.errors import RunError


def demo(
    output_dir: Annotated[
        Path, typer.Option(help="Folder for the run; where it exists, a numbered one beside it is made.")
    ] = Path("luthier-demo"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in that folder instead.")
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Seed of the adapter's first weights and of the order of rows.")
    ] = 42,
) -> None:
    """Fine-tune a tiny model on this machine, in about a minute, and compare it with what it was before."""
    began = time.perf_counter()
    console = Console()
    folder = output_dir if overwrite else unused(output_dir)
    # Imported as late as this so that `luthier demo --help` does not wait for torch.
    from luthier.evaluate.data_eval import evaluate_data
    from luthier.evaluate.page import draw_again
    from luthier.evaluate.table import lines_of
    from luthier.train.run import train

    with resources.as_file(resources.files("luthier.demo")) as home:
        console.print("[bold]1/2[/bold] LoRA training on a tiny base model.")
        result = train(demo_config(home, folder, overwrite, seed))
        run = result.output_dir
        if not result.finished:
            raise RunError(f"the training was stopped; what there is of it lies in {run}: start again")
        console.print("\n[bold]2/2[/bold] Both models answer questions of the same kinds that neither has seen.")
        path, found = evaluate_data(str(run), compare="base", by=["task"])
    draw_again(str(run))
    names = found["names"]
    print()
    print("\n".join(lines_of(found["figures"], names["target"], names["compare"], by_group=("exact_match",))))
    print()
    with path.with_name(found["rows"]).open(encoding="utf-8") as lines:
        console.print(samples_table(map(json.loads, lines)))
    _closing(console, run, path, time.perf_counter() - began)


def unused(folder: Path) -> Path:
    """`folder`, or the first of `folder-2`, `folder-3`, ... that does not exist: nothing is lost unasked."""
    if not folder.exists():
        return folder
    number = 2
    while (numbered := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return numbered


def demo_config(home: Path, folder: Path, overwrite: bool, seed: int) -> Config:
    """The shipped YAML, with its paths pointing into the installed package at `home`."""
    changes = {
        "base_model": str(home / "base_model"),
        "datasets.0.path": str(home / "data" / "train.jsonl"),
        "test_datasets.0.path": str(home / "data" / "test.jsonl"),
        "output_dir": str(folder),
        "overwrite_output_dir": overwrite,
        "seed": seed,
    }
    # Values are read as YAML, of which JSON is a part: quoted, a path may hold any character.
    return Config.load(home / "demo.yml", [f"{key}={json.dumps(value)}" for key, value in changes.items()])


def samples_table(rows: Iterable[dict[str, Any]]) -> Table:
    """The first question of each kind with both answers, from the rows of an evaluation by `task`."""
    table = Table(title="One question of each kind", show_lines=True)
    for column in ("question", "base", "tuned"):
        table.add_column(column, overflow="fold")
    shown: set[str] = set()
    for row in rows:
        if row["by"]["task"] in shown:
            continue
        shown.add(row["by"]["task"])
        answers = [
            f"[{'green' if row[side]['exact'] else 'red'}]{escape(' '.join(row[side]['answer'].split()))}[/]"
            for side in ("compare", "target")
        ]
        table.add_row(escape(question_of(row["prompt"])), *answers)
    return table


def question_of(prompt: str) -> str:
    """What is asked in a prompt of the Alpaca template: its instruction and its input, without their headings."""
    parts = [part.partition("\n")[2].strip() for part in prompt.split("### ")[1:]]
    return "\n".join(filter(None, parts))


def _closing(console: Console, run: Path, result: Path, seconds: float) -> None:
    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False)

    page = escape(str(run / "report.html"))
    say(f"All of it took {seconds:.0f} seconds. What the run did, as a page: [bold]{page}[/bold]")
    say(f"All questions and answers: {escape(str(result.with_suffix('.jsonl')))}\n\nTry next:")
    prompt = "Continue the Fibonacci sequence with two numbers."
    for command in (
        f'luthier generate {run} --prompt "{prompt}" --input "21, 34, 55, 89"',
        f"luthier evaluate {run} --by task --compare base",
        f"luthier train {run / 'config.yaml'} --output_dir ./second-run --lora_r 4",
        f"luthier report {run} second-run",
        f"luthier preview {run / 'config.yaml'}",
    ):
        say(f"    {escape(command)}")
