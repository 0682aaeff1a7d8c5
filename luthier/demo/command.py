"""`luthier demo`: a whole run on the shipped tiny model, with evidence that it learned.

The same steps as on a real model, and through the same code: ask the base model the held-out questions,
train a LoRA from a config (`demo.yml`, which `luthier train` takes as well), ask again, and compare. The
right answers are known, so an answer counts only if it is right to the last character and ends there.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from luthier.config import Config
from luthier.errors import RunError
from luthier.evaluate.exact_match import exact_match, is_exact

ANSWERS = "demo-answers.jsonl"
MAX_NEW_TOKENS = 24
"""Room for the longest right answer; the base model, which does not know when to stop, goes on to here."""


@dataclass(frozen=True)
class Question:
    """A held-out row."""

    task: str
    instruction: str
    input: str
    output: str


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
    with resources.as_file(resources.files("luthier.demo")) as home:
        questions = held_out(home / "data" / "test.jsonl")
        config = demo_config(home, folder, overwrite, seed)
        console.print("[bold]1/3[/bold] The base model answers the held-out questions.")
        before = answers(str(home / "base_model"), config, questions, console)
        console.print("[bold]2/3[/bold] LoRA training on other questions of the same kinds.")
        # Imported as late as this so that `luthier demo --help` does not wait for torch.
        from luthier.train.run import train

        result = train(config)
        run = Path(result.output_dir)
        if not result.finished:
            raise RunError(f"the training was stopped; what there is of it lies in {run}: start again")
        console.print("[bold]3/3[/bold] The tuned model answers the same questions.")
        after = answers(str(run), config, questions, console)
    write_answers(run / ANSWERS, questions, before, after)
    console.print()
    console.print(accuracy_table(questions, before, after))
    console.print(samples_table(questions, before, after))
    _closing(console, run, len(questions), time.perf_counter() - began)


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
        "output_dir": str(folder),
        "overwrite_output_dir": overwrite,
        "seed": seed,
    }
    # Values are read as YAML, of which JSON is a part: quoted, a path may hold any character.
    return Config.load(home / "demo.yml", [f"{key}={json.dumps(value)}" for key, value in changes.items()])


def held_out(path: Path) -> list[Question]:
    """The shipped rows that no training run of the demo sees."""
    with path.open(encoding="utf-8") as lines:
        return [Question(**json.loads(line)) for line in lines]


def answers(model_path: str, config: Config, questions: list[Question], console: Console) -> list[str]:
    """What the model at `model_path` answers, by greedy decoding from the training's own prompt."""
    from luthier.data.formats import prompt_example
    from luthier.data.render import Renderer
    from luthier.data.tokenizer import terminator_ids
    from luthier.evaluate.answers import greedy_answers
    from luthier.models.assemble import open_for_inference

    model, tokenizer, _ = open_for_inference(model_path)
    entry = config.data.datasets[0]
    renderer = Renderer(tokenizer, config)
    prompts = [
        renderer.prompt_ids(prompt_example(entry, question.instruction, question.input), entry)
        for question in questions
    ]
    columns = (TextColumn("    answering"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(prompts))
        found = greedy_answers(
            model,
            tokenizer,
            terminator_ids(tokenizer, config),
            prompts,
            max_new_tokens=MAX_NEW_TOKENS,
            on_done=lambda: progress.advance(bar),
        )
    return [answer.shown for answer in found]


def accuracy_table(questions: list[Question], before: list[str], after: list[str]) -> Table:
    """Exact-match accuracy per kind of task and over all questions."""
    expected, tasks = [q.output for q in questions], [q.task for q in questions]
    was, now = exact_match(before, expected, tasks), exact_match(after, expected, tasks)
    table = Table(title="Exactly right answers to held-out questions")
    table.add_column("task")
    for column in ("questions", "before", "after"):
        table.add_column(column, justify="right")
    for task in sorted(now.groups):
        old, new = was.groups[task], now.groups[task]
        table.add_row(task, str(new.total), f"{old.accuracy:.1%}", f"{new.accuracy:.1%}")
    table.add_section()
    shares = (f"[bold]{score.overall.accuracy:.1%}[/bold]" for score in (was, now))
    table.add_row("all", str(len(questions)), *shares)
    return table


def samples_table(questions: list[Question], before: list[str], after: list[str]) -> Table:
    """The first question of each kind with both answers."""
    table = Table(title="One question of each kind", show_lines=True)
    for column in ("question", "before", "after"):
        table.add_column(column, overflow="fold")
    shown: set[str] = set()
    for question, old, new in zip(questions, before, after, strict=True):
        if question.task in shown:
            continue
        shown.add(question.task)
        asked = f"{question.instruction}\n{question.input}".strip()
        colour = "green" if is_exact(new, question.output) else "red"
        table.add_row(escape(asked), escape(_one_line(old)), f"[{colour}]{escape(_one_line(new))}[/{colour}]")
    return table


def _one_line(text: str) -> str:
    return " ".join(text.split())


def write_answers(path: Path, questions: list[Question], before: list[str], after: list[str]) -> None:
    """Every held-out question with the right answer and both models' answers, a JSON line each."""
    with path.open("w", encoding="utf-8") as lines:
        for question, old, new in zip(questions, before, after, strict=True):
            lines.write(json.dumps(asdict(question) | {"before": old, "after": new}) + "\n")


def _closing(console: Console, run: Path, count: int, seconds: float) -> None:
    prompt = "Continue the Fibonacci sequence with two numbers."
    console.print(f"All of it took {seconds:.0f} seconds.")
    console.print(f"The adapter, its config and its log lie in [bold]{escape(str(run))}[/bold];")
    console.print(f"all {count} questions and answers in {escape(str(run / ANSWERS))}.")
    console.print("\nTry next:")
    for command in (
        f'luthier generate {run} --prompt "{prompt}" --input "21, 34, 55, 89"',
        f"luthier preview {run / 'config.yaml'}",
        f"luthier train {run / 'config.yaml'} --output_dir ./second-run --lora_r 4",
    ):
        console.print(f"    {escape(command)}", soft_wrap=True, highlight=False)
