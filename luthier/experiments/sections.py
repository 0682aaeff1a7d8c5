"""The parts of a run's page: from what its folder holds to what is shown.

Each function gives plain values, tables or drawings, and something empty where the run has nothing to show; the page
then leaves the part out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path
from typing import Any

from markupsafe import Markup

from luthier.experiments.charts import Chart, Mark, Series, line_chart, number, percent
from luthier.experiments.run_files import Row, Run
from luthier.experiments.verdict import overfitting, train_loss_between

# What is shown of a text, of the steps of samples, of prompts, and of evaluations in numbers.
MOST_TEXT, MOST_STEPS, MOST_PROMPTS, MOST_EVALUATIONS = 600, 7, 12, 60
# Characters of a prompt that are shown; one with fewer than the second is shown whole.
MOST_PROMPT, SHORT_PROMPT = 300, 100
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass
class Table:
    """A table of text. `numeric`: places of the columns whose cells are aligned as numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    numeric: frozenset[int] = frozenset()
    notes: list[str] = field(default_factory=list)


def base_name(run: Run) -> str:
    return short_path(str(run.config.get("base_model", "a model")))


def short_path(name: str) -> str:
    """An id on the hub as it is; of a path, its last part."""
    name, mark, part = name.partition("#")
    if not _HUB_ID.fullmatch(name):
        name = Path(name).name or name
    return name + mark + part


def method(run: Run) -> str:
    """What was trained: "a LoRA adapter (rank 16)"."""
    config = run.config
    adapter = config.get("adapter")
    if not adapter:
        part = config.get("train_last_n_layers") or config.get("unfrozen_parameters")
        return "some of the weights" if part else "all weights"
    kind = "DoRA" if config.get("peft_use_dora") else "LoRA"
    rank = f" of rank {config['lora_r']}" if config.get("lora_r") else ""
    bits = " in 4 bits" if adapter == "qlora" or config.get("load_in_4bit") else ""
    bits = " in 8 bits" if config.get("load_in_8bit") else bits
    return f"a {kind} adapter{rank}{' on a base' + bits if bits else ''}"


def lede(run: Run) -> str:
    """What was trained on what, in a sentence or two."""
    config, data = run.config, run.data
    names = [short_path(str(entry.get("path"))) for entry in config.get("datasets") or [] if isinstance(entry, dict)]
    count = data.get("train_documents")
    what = f"{count:,} {data.get('unit', 'documents')} of " if isinstance(count, int) else ""
    how = f" by {str(config['rl']).upper()}" if config.get("rl") else ""
    text = f"{method(run).capitalize() if not method(run).startswith('a ') else 'A' + method(run)[1:]}"
    text += f" for {base_name(run)}" if config.get("adapter") else f" of {base_name(run)}"
    text += f", trained{how} on {what}{_listed(names)}"
    epochs = run.epoch_of(run.steps)
    if run.steps:
        text += f", for {run.steps:,} steps" + (f" ({_epochs(epochs)})" if epochs else "")
    seconds = run.summary.get("seconds") or run.last("seconds")
    text += f", in {duration(seconds)}" if seconds else ""
    text += f" on {machine(run)}." if machine(run) else "."
    if run.finished and run.total_steps and run.steps < run.total_steps:
        text += f" It stopped early, before step {run.total_steps:,}."
    return text


def _epochs(count: float) -> str:
    number = f"{count:.3g}"
    return f"{number} epoch{'' if number == '1' else 's'}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.0f} s"


def figures(run: Run) -> list[tuple[str, str, str]]:
    """The figures of a run: name, value, and what stands small below."""
    found: list[tuple[str, str, str]] = []
    evaluated = run.points("eval_loss")
    if evaluated:
        step, best = min(evaluated, key=lambda point: point[1])
        found.append(("best eval loss", f"{best:.4f}", f"at step {step:,.0f}; {evaluated[-1][1]:.4f} at the end"))
    if (loss := run.last("loss")) is not None:
        found.append(("training loss", f"{loss:.4f}", "of the last logged steps"))
    if accuracy := run.last("eval_rewards/accuracies"):
        found.append(("preferred as labelled", f"{accuracy:.1%}", "of held-out data"))
    if tokens := run.last("tokens"):
        trained = run.last("trained_tokens")
        found.append(("tokens", number(tokens), f"{number(trained)} of them trained" if trained else ""))
    speeds = [value for _, value in run.points("tokens_per_second")]
    if speeds:
        found.append(("tokens a second", f"{sorted(speeds)[len(speeds) // 2]:,.0f}", "median"))
    measured, predicted = run.summary.get("measured_peak_gib"), run.summary.get("predicted_peak_gib")
    if measured is not None and predicted:
        off = f"{predicted:.2f} predicted ({measured / predicted - 1:+.1%})"
        found.append(("peak memory", f"{measured:.2f} GiB", off))
    elif peak := max((value for _, value in run.points("peak_memory_gib")), default=0.0):
        found.append(("peak memory", f"{peak:.2f} GiB", "so far" if not run.finished else ""))
    return found


def curves(run: Run) -> list[Markup]:
    """Losses first and large, then rewards, then the rest."""
    steps = run.points
    evaluated = steps("eval_loss")
    marks: list[Mark] = []
    found = overfitting(run)
    if found is not None and found.kind != "falling":
        marks = [Mark(found.step, f"best eval loss, step {found.step:,.0f}")]
    loss = Chart(
        "Loss",
        [Series("training", steps("loss"), "c1"), Series("evaluation", evaluated, "c2", dots=True)],
        marks=marks,
        log=None,
    )
    pairs = bool(run.config.get("rl"))
    charts = [loss, *(_preference_charts(run) if pairs else [])]
    if not pairs:
        accuracy = [
            Series("training", steps("token_accuracy"), "c1"),
            Series("evaluation", steps("eval_token_accuracy"), "c2", dots=True),
        ]
        charts.append(Chart("Tokens predicted right", accuracy, form=percent))
    charts += [
        Chart("Learning rate", [Series("learning rate", steps("learning_rate"), "c1")], from_zero=True),
        Chart("Gradient norm", [Series("gradient norm", steps("grad_norm"), "c1")], log=None),
        Chart("Tokens a second", [Series("tokens a second", steps("tokens_per_second"), "c1")], from_zero=True),
        _memory_chart(run),
        Chart(
            "Samples that ended by themselves",
            [Series("share", steps("samples_stopped"), "c2", dots=True)],
            form=percent,
            from_zero=True,
        ),
    ]
    return [drawn for chart in charts if (drawn := line_chart(chart))]


def _preference_charts(run: Run) -> Iterable[Chart]:
    steps = run.points
    for prefix, where in (("", "training"), ("eval_", "held-out")):
        sides = [
            Series("chosen", steps(f"{prefix}rewards/chosen"), "c1", dots=bool(prefix)),
            Series("rejected", steps(f"{prefix}rewards/rejected"), "c2", dots=bool(prefix)),
        ]
        yield Chart(f"Rewards, {where}", sides)
    for name, title, form in (
        ("rewards/margins", "Margin of rewards", number),
        ("rewards/accuracies", "Preferred as labelled", percent),
        ("kl", "KL to the reference, nats", number),
    ):
        both = [
            Series("training", steps(name), "c1"),
            Series("held-out", steps(f"eval_{name}"), "c2", dots=True),
        ]
        yield Chart(title, both, form=form)


def _memory_chart(run: Run) -> Chart:
    measured = run.points("peak_memory_gib")
    predicted = run.summary.get("predicted_peak_gib")
    series = [Series("measured", measured, "c1")]
    if predicted and len(measured) > 1:
        series.append(Series("predicted", [(measured[0][0], predicted), (measured[-1][0], predicted)], "c2"))
    return Chart("Peak memory, GiB", series, from_zero=True)


def evaluation_table(run: Run) -> Table | None:
    """Every evaluation in numbers."""
    rows = [row for row in run.metrics if "eval_loss" in row]
    if not rows:
        return None
    shown = _evenly(rows, MOST_EVALUATIONS)
    names = [name for name in rows[-1] if name.startswith("eval_") and isinstance(rows[-1][name], int | float)]
    train = dict(train_loss_between(run))
    body = [
        [
            f"{row['step']:,.0f}",
            _rounded(run.epoch_of(row["step"]), 2),
            _rounded(train.get(row["step"]), 4),
            *(_rounded(row.get(name), 4) for name in names),
        ]
        for row in shown
    ]
    head = ["step", "epoch", "training loss since", *(name.removeprefix("eval_").replace("_", " ") for name in names)]
    notes = _left_out(len(shown), len(rows), "evaluations", "metrics.jsonl")
    return Table(head, body, "Held-out figures", frozenset(range(len(head))), notes)


def sample_table(run: Run) -> tuple[Table, list[list[Any]]] | None:
    """Prompts as rows, steps as columns: the table without its cells, and the cells as (text, state)."""
    by_prompt: dict[str, dict[float, Row]] = {}
    for row in run.samples:
        by_prompt.setdefault(str(row.get("prompt", "")), {})[row["step"]] = row
    if not by_prompt:
        return None
    steps = sorted({row["step"] for row in run.samples})
    shown = _evenly(steps, MOST_STEPS)
    prompts = list(by_prompt)[:MOST_PROMPTS]
    names = without_template(prompts)
    expects = any(row.get("expected") for row in run.samples)
    rows = []
    for prompt, name in zip(prompts, names, strict=True):
        answers = by_prompt[prompt]
        expected = next((row["expected"] for row in answers.values() if row.get("expected")), None)
        cells: list[Any] = [(name, "prompt")]
        cells += [(clipped(str(expected)) if expected else "", "expected")] if expects else []
        cells += [_sample_cell(answers.get(step)) for step in shown]
        rows.append(cells)
    notes = _left_out(len(shown), len(steps), "steps", "samples.jsonl")
    notes += _left_out(len(prompts), len(by_prompt), "prompts", "samples.jsonl")
    head = ["prompt", *(["expected"] if expects else []), *(f"step {step:,.0f}" for step in shown)]
    return Table(head, [], notes=notes), rows


def _sample_cell(row: Row | None) -> tuple[str, str]:
    if row is None:
        return "", "none"
    if row.get("skipped"):
        return str(row["skipped"]), "skipped"
    text, expected = str(row.get("text", "")).strip(), row.get("expected")
    if not row.get("stopped"):
        return clipped(text), "cut"
    return answer_cell(text, str(expected or ""))


def answer_cell(text: str, expected: str) -> tuple[str, str]:
    """An answer that has ended, and its state: right, empty, or neither."""
    text, expected = text.strip(), expected.strip()
    return clipped(text), "right" if expected and text == expected else "ended" if text else "empty"


def machine(run: Run) -> str:
    hardware = run.environment.get("hardware")
    if not isinstance(hardware, dict):
        return ""
    device = str(run.environment.get("device", ""))
    cards = [str(card.get("name")) for card in hardware.get("accelerators") or [] if isinstance(card, dict)]
    if cards and device != "cpu":
        same = f"{len(cards)} x {cards[0]}" if len(cards) > 1 else cards[0]
        return same if len(set(cards)) == 1 else _listed(cards)
    cores = hardware.get("cpu_cores")
    return f"{hardware.get('cpu', 'a CPU')}" + (f" ({cores} cores)" if cores else "")


def clipped(text: str, most: int = MOST_TEXT) -> str:
    return text if len(text) <= most else text[:most].rstrip() + " …"


def without_template(prompts: Sequence[str]) -> list[str]:
    """Prompts as they are shown: a long beginning that one has in common with another, and the lines that they end with
    alike, a template mostly, are cut off; and of what is long still, the beginning.

    Prompts that share more than a template share the template with others too: the least that counts is the template.
    """
    found = []
    for place, prompt in enumerate(prompts):
        others = [*prompts[:place], *prompts[place + 1 :]]
        beginnings = (commonprefix([prompt, other]) for other in others)  # noqa: RUF071
        shared = min((each for each in beginnings if SHORT_PROMPT < len(each) < len(prompt)), key=len, default="")
        line, word = shared.rfind("\n") + 1, shared.rfind(" ") + 1
        start = line if line > SHORT_PROMPT else max(line, word)  # not within a line, if it need not be, nor a word
        # Only of what has a beginning in common: what people type ends alike by chance.
        endings = (_common_lines(prompt, other) for other in others if start and other.startswith(prompt[:start]))
        body = prompt[start:].removesuffix(min(endings, key=len, default=""))
        body = body if len(body) <= MOST_PROMPT else body[-MOST_PROMPT:]
        found.append(body.strip() if len(body) == len(prompt) else "… " + body.strip())
    return found


def _common_lines(one: str, other: str) -> str:
    """The whole lines that two texts end with, from a line break on."""
    shared = commonprefix([one[::-1], other[::-1]])[::-1]  # noqa: RUF071
    place = shared.find("\n")
    return shared[place:] if place >= 0 else ""


def _evenly(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many, evenly spaced, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(place * (len(values) - 1) / (most - 1))] for place in range(most)]


def _left_out(shown: int, there: int, what: str, file: str) -> list[str]:
    return [f"{shown} of {there:,} {what} are shown; all are in {file}."] if shown < there else []


def _rounded(value: Any, places: int) -> str:
    return f"{value:.{places}f}" if isinstance(value, int | float) else ""


def _listed(names: Sequence[str]) -> str:
    if len(names) > 4:
        return f"{', '.join(names[:3])} and {len(names) - 3} more"
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
