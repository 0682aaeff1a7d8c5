"""What a run leaves behind besides its weights: where it was made, what it is, how it went.

    environment.json   versions, hardware, and what the caller adds (hashes of the data)
    README.md          a model card that the Hub understands
    loss.png           losses and learning rate over the steps, from metrics.jsonl

Each file is written whole or not at all. The card says what is known and nothing else: no figure is in it
that this run did not measure.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData

import luthier
from luthier.config import Config
from luthier.config.artifact_names import is_artifact
from luthier.train.files import write_atomic, write_json_atomic, write_text_atomic

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "numpy",
    "peft",
    "bitsandbytes",
    "flash-attn",
)
# Settings in the card even where they are defaults, and beginnings of those that are not for others.
ALWAYS_SHOWN = {
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler",
    "micro_batch_size",
    "num_epochs",
    "optimizer",
    "seed",
    "sequence_len",
}
NEVER_SHOWN = (
    "base_model",
    "chat_template_jinja",
    "dataset",
    "lora_model_dir",
    "output_dir",
    "overwrite_output_dir",
    "report_to",
    "resume_from_checkpoint",
    "test_datasets",
    "tokenizer_config",
    "wandb_",
)
# An id on the Hub: at most one slash, and nothing that only a path has.
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def write_environment(folder: Path, extra: Mapping[str, Any]) -> None:
    """`environment.json`: what is needed to run it again. `extra` is added as it is."""
    versions = {"luthier": luthier.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    environment = {
        "versions": versions,
        "hardware": hardware(),
        "system": platform.platform(),
        "command": sys.argv,
        **extra,
    }
    write_json_atomic(folder / "environment.json", environment)


def hardware() -> dict[str, Any]:
    """Cores, memory and accelerators of this machine, in GiB."""
    found: dict[str, Any] = {
        "cpu": _processor(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        found["accelerators"] = [
            {"name": device.name, "memory_gib": round(device.total_memory / 2**30, 1)} for device in devices
        ]
        found["cuda"] = torch.version.cuda
    elif torch.backends.mps.is_available():
        found["accelerators"] = [{"name": "Apple MPS"}]
    return found


def figures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a run's summary."""
    return {key: value for key, value in summary.items() if isinstance(value, (int, float))}


def write_model_card(folder: Path, config: Config, summary: Mapping[str, Any]) -> None:
    """`README.md` of the run folder.

    `summary`: figures of the run, shown where they are there and not None: steps, kept_step, examples,
    tokens, trained_tokens, seconds, final_loss, best_eval_loss, best_step, overfitting_since, measured_peak_gib,
    predicted_peak_gib.
    """
    name = Path(config.output.output_dir).expanduser().resolve().name
    lora = config.adapter.adapter is not None
    base = config.model.base_model
    named = base if _hub_id(base) or is_artifact(base) else f"{Path(base).expanduser().resolve().name} (a local model)"
    what = "A LoRA adapter for" if lora else "A fine-tuned version of"
    parts = [
        f"---\n{_front_matter(config).to_yaml()}\n---\n\n# {name}\n",
        f"{what} {named}, made with Luthier {luthier.__version__}.\n",
        "## Data\n",
        _table(("dataset", "type"), _dataset_rows(config)),
        *([f"{summary['examples']:,} documents in the training data.\n"] if summary.get("examples") else []),
        "## Result\n",
        _table(("", ""), _result_rows(summary)),
        "![Losses over the steps](loss.png)\n",
        "## How to use it\n",
        _usage(name, lora, config),
        "## Settings\n",
        _table(("key", "value"), _setting_rows(config)),
        "All settings, with where each came from, are in `config.yaml`; versions and hardware in "
        "`environment.json`; every logged step in `metrics.jsonl`.\n",
    ]
    write_text_atomic(folder / "README.md", "\n".join(parts))


def plot_losses(folder: Path) -> None:
    """`loss.png` from `metrics.jsonl`: training and evaluation loss, and the learning rate below. Nothing to
    draw: no file.
    """
    rows = list(_rows(folder / "metrics.jsonl"))
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    evaluated = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    rates = [(row["step"], row["learning_rate"]) for row in rows if "learning_rate" in row]
    if not train and not evaluated:
        return
    # Not pyplot: it keeps figures in a global list and picks a window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, rate = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    if train:
        losses.plot(*zip(*train, strict=True), label="training loss", color="#4878a8", linewidth=1.2)
    if evaluated:
        losses.plot(
            *zip(*evaluated, strict=True), label="evaluation loss", color="#c05a2c", marker="o", markersize=4
        )
    losses.set_ylabel("loss per trained token")
    losses.legend()
    losses.grid(alpha=0.3)
    if rates:
        rate.plot(*zip(*rates, strict=True), color="#666666", linewidth=1)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    rate.xaxis.get_major_locator().set_params(integer=True)
    rate.grid(alpha=0.3)
    write_atomic(folder / "loss.png", lambda partial: figure.savefig(partial, dpi=120))


def _front_matter(config: Config) -> ModelCardData:
    """What the Hub reads. A local path means nothing there, so it stays out."""
    lora = config.adapter.adapter is not None
    on_hub = [path for path in (_hub_id(entry.path) for entry in config.data.datasets) if path]
    base = _hub_id(config.model.base_model)
    return ModelCardData(
        base_model=base,
        datasets=list(dict.fromkeys(on_hub)) or None,
        library_name="peft" if lora else "transformers",
        pipeline_tag="text-generation",
        tags=["luthier", "sft", *(["lora"] if lora else [])],
    )


def _hub_id(name: str) -> str | None:
    """`name` if it can only be an id on the Hub, else None."""
    name = name.split("#")[0]
    return name if _HUB_ID.fullmatch(name) and not Path(name).expanduser().exists() else None


def _dataset_rows(config: Config) -> Iterable[tuple[str, str]]:
    for entry in config.data.datasets:
        kind = entry.type if isinstance(entry.type, str) else "tokens" if entry.type is None else "own prompt"
        # Where a file lay on this machine is nobody's business.
        named = _hub_id(entry.path) or is_artifact(entry.path)
        yield f"`{entry.path if named else Path(entry.path).name}`", f"`{kind}`"


def _result_rows(summary: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    def shown(label: str, key: str, form: str) -> Iterable[tuple[str, str]]:
        if summary.get(key) is not None:
            yield label, format(summary[key], form)

    yield from shown("steps", "steps", ",")
    if summary.get("kept_step") != summary.get("steps"):
        yield from shown("weights of step", "kept_step", ",")
    yield from shown("training loss at the end", "final_loss", ".4f")
    yield from shown("best evaluation loss", "best_eval_loss", ".4f")
    yield from shown("at step", "best_step", ",")
    yield from shown("overfitting since step", "overfitting_since", ",")
    yield from shown("tokens", "tokens", ",")
    yield from shown("trained tokens", "trained_tokens", ",")
    yield from shown("seconds", "seconds", ",.0f")
    yield from shown("peak memory, GiB", "measured_peak_gib", ".2f")
    yield from shown("peak memory as predicted, GiB", "predicted_peak_gib", ".2f")


def _setting_rows(config: Config) -> Iterable[tuple[str, str]]:
    """Settings that somebody chose or that follow from such a choice, without paths and account names."""
    chosen = {key.split(".")[0] for key, origin in config.origins.items() if origin != "default"}
    for key, value in config.flat().items():
        if key in chosen | ALWAYS_SHOWN and value is not None and not key.startswith(NEVER_SHOWN):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            yield f"`{key}`", f"`{text}`"


def _usage(name: str, lora: bool, config: Config) -> str:
    module, cls = ("peft", "AutoPeftModelForCausalLM") if lora else ("transformers", "AutoModelForCausalLM")
    scaled = ""
    if lora and config.model.rope_parameters:
        scaled = (
            "\nThe adapter was trained with a scaled rotary embedding and is right with that only: the base has to be "
            "loaded with these `rope_parameters`, in its `config.json` or as an argument of `from_pretrained`, and the "
            f"adapter put on it afterwards:\n\n```json\n{json.dumps(config.model.rope_parameters)}\n```\n"
        )
    return scaled + f"""With Luthier, which puts the prompt into the format of the training:

```bash
luthier generate {name} --prompt "..."
```

With {"PEFT" if lora else "transformers"}:

```python
from {module} import {cls}
from transformers import AutoTokenizer

model = {cls}.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(head), line("---" for _ in head), *(line(row) for row in rows)]) + "\n"


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    """Rows of a JSONL file; none if it is not there. A last line cut off by a kill is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            yield row


def _processor() -> str:
    """The processor's name, which Linux keeps in a file of its own."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.machine()
