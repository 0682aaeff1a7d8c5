"""The share of time in communication as `luthier plan --num-gpus 2` predicts it, beside that of real runs.

    python -m bench.scaling                        # two processes on this machine's CPU, over Gloo
    python -m bench.scaling --shape 135m --only lora,full

First the bandwidth of each collective between the two processes is measured, then the speed of a single one; both go
into the plan. Then two processes train, each on as many equally long documents as the single one, with a clock at
what they send. Every process has one thread. The result goes to bench/results/.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from math import log
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import yaml

from bench import machine, process
from bench.shapes import SHAPES

if TYPE_CHECKING:
    from luthier.plan.strategies import Row

RESULTS = Path(__file__).resolve().parent / "results"
PROCESSES, ROWS, LENGTH, WARM = 2, 4, 256, 2
_LORA = {"adapter": "lora", "lora_r": 16}
CASES: dict[str, dict[str, Any]] = {
    "lora": _LORA,
    "full": {},
    "lora-fsdp": {**_LORA, "fsdp_version": 2},
    "full-fsdp": {"fsdp_version": 2},
}
# Of these collectives is what a case sends; the plan gets the mean of their bandwidths.
_COLLECTIVES = {"replicas": ("all_reduce",), "fsdp": ("all_gather", "reduce_scatter")}


@dataclass(frozen=True)
class Line:
    """One case.

    Attributes:
        step_alone, step: seconds of a step in one process, and in two with as much for each. bandwidth: bytes a second,
            of messages of nearest size. sent, sent_predicted: bytes of a step.
        predicted, measured: share of a step's time in collectives. waiting: share for the other process, before
            anything is sent. by_clock: what two processes take longer, as a share.
    """

    case: str
    step_alone: float
    step: float
    bandwidth: float
    sent_predicted: float
    sent: float
    predicted: float
    measured: float
    waiting: float
    by_clock: float


class Failed(Exception):
    """A process that did not end well; the message has the end of its log."""


def measure(shape: str, names: list[str], steps: int, folder: Path, timeout: float) -> dict[str, Any]:
    """Links, a line for each case, and why others failed.

    Raises:
        Failed: the links cannot be measured.
    """
    model = folder / "model"
    make_model(shape, model)
    rows = folder / "rows.jsonl"
    write_rows(rows, SHAPES[shape].vocab_size, (steps + WARM) * ROWS * PROCESSES)
    links = _run(["links"], folder, "links", PROCESSES, timeout)
    lines, failed = [], {}
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        values = {
            "base_model": str(model),
            "datasets": [{"path": str(rows)}],
            "sequence_len": LENGTH,
            "micro_batch_size": ROWS,
            "max_steps": steps + WARM,
            "num_epochs": 9,
            "device_map": "cpu",
            "bf16": False,
            **CASES[name],
        }
        times = {}
        try:
            for processes in (1, PROCESSES):
                file = folder / f"{name}-{processes}.yml"
                file.write_text(yaml.safe_dump({**values, "output_dir": str(folder / f"{name}-{processes}")}))
                times[processes] = _run(["train", str(file)], folder, f"{name}-{processes}", processes, timeout)
        except Failed as error:
            failed[name] = machine.without_places(str(error), folder)
            print(failed[name], file=sys.stderr)
            continue
        lines.append(line_of(name, file, times, links))
    return {"links": links, "lines": [asdict(line) for line in lines], "failed": failed}


def line_of(name: str, config: Path, times: dict[int, dict[str, list[float]]], links: dict[str, Any]) -> Line:
    """What was measured, and what the plan says of it."""
    alone, step = (median(times[processes]["step"][WARM:]) for processes in (1, PROCESSES))
    both = {part: sum(values[WARM:]) for part, values in times[PROCESSES].items()}
    message = both["sent"] / both["number"]
    kinds = _COLLECTIVES["fsdp" if "fsdp" in name else "replicas"]
    nearest = [min(links[kind].items(), key=lambda entry: abs(log(int(entry[0]) / message)))[1] for kind in kinds]
    bandwidth = sum(nearest) / len(nearest)
    planned = prediction(config, ROWS * LENGTH / alone, bandwidth)
    assert planned.share is not None
    return Line(
        case=name,
        step_alone=alone,
        step=step,
        bandwidth=bandwidth,
        sent_predicted=planned.sent,
        sent=both["sent"] / len(times[PROCESSES]["sent"][WARM:]),
        predicted=planned.share,
        measured=both["collectives"] / both["step"],
        waiting=both["waiting"] / both["step"],
        by_clock=1 - alone / step,
    )


def prediction(config: Path, tokens_per_second: float, bandwidth: float) -> Row:
    """As `luthier plan config --num-gpus 2 --tokens-per-second ... --interconnect ...` has it."""
    from luthier.config import Config
    from luthier.plan.command import plan_of
    from luthier.plan.links import links_of
    from luthier.plan.strategies import compare
    from luthier.plan.work import flops_per_token

    loaded = Config.load(config)
    plan = plan_of(loaded, None, gpus=PROCESSES)
    links = links_of(f"{bandwidth / 1e9:.6f}GB/s", None, PROCESSES, None, cpu=True)
    rate = tokens_per_second * flops_per_token(plan.shape, plan.work, plan.engine)
    return compare(loaded, plan.shape, plan.engine, plan.work, None, links, PROCESSES, rate).chosen


def _run(arguments: list[str], folder: Path, name: str, processes: int, timeout: float) -> Any:
    """What the worker wrote, started alone or by torchrun."""
    out, module = folder / f"{name}.json", "bench.scaling_worker"
    if processes > 1:
        launcher = ["--standalone", "--nproc_per_node", str(processes), "-m", module]
        module, arguments = "torch.distributed.run", [*launcher, *arguments]
    said, one = folder / f"{name}.log", {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = process.run(
        sys.executable, module, [*arguments, str(out)], scratch=folder, log=said, extra=one, timeout=timeout
    )
    if done.status != 0:
        raise Failed(f"{name}: {'its time was up' if done.timed_out else process.tail(said, 60)}")
    return json.loads(out.read_text(encoding="utf-8"))


def make_model(shape: str, folder: Path) -> None:
    """Random weights, and a tokenizer that names its tokens by number."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    values = asdict(SHAPES[shape])
    values.pop("stored")
    described = transformers.AutoConfig.for_model(values.pop("family"), **values)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(described, dtype=torch.float32).save_pretrained(folder)
    words = {"<end>": 0, **{str(number): number for number in range(1, SHAPES[shape].vocab_size)}}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<end>")), eos_token="<end>", pad_token="<end>"
    )
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, vocabulary: int, count: int) -> None:
    """Ready-made tokens, as many in each row, so that no process has more to do than another."""
    rows = ([(row * 7919 + place * 31) % (vocabulary - 1) + 1 for place in range(LENGTH)] for row in range(count))
    path.write_text("".join(json.dumps({"input_ids": ids, "labels": ids}) + "\n" for ids in rows), encoding="utf-8")


def as_text(result: dict[str, Any]) -> str:
    """The tables for a terminal, in Markdown."""
    heads = ["case", "MB sent a step", "as counted", "GB/s", "a step alone", "of two", "predicted share", "measured"]
    heads += ["waiting", "longer than alone"]
    text = [f"{result['shape']}, {PROCESSES} processes with one thread each, {result['hardware']['cpu']}", ""]
    text += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for line in (Line(**entry) for entry in result["lines"]):
        cells = [line.case, *(f"{size / 1e6:.2f}" for size in (line.sent_predicted, line.sent))]
        cells += [f"{line.bandwidth / 1e9:.2f}", f"{line.step_alone:.2f} s", f"{line.step:.2f} s"]
        shares = (line.predicted, line.measured, line.waiting, line.by_clock)
        text.append(f"| {' | '.join([*cells, *(f'{share:.1%}' for share in shares)])} |")
    text.append("")
    for kind, by in result["links"].items():
        speeds = [f"{speed / 1e9:.2f} GB/s at {int(size) // 2**20} MiB" for size, speed in by.items()]
        text.append(f"{kind}: {', '.join(speeds)}")
    return "\n".join(text)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--only", default=",".join(CASES), metavar="A,B", help="these cases: " + ", ".join(CASES))
    parser.add_argument("--steps", type=int, default=12, help=f"measured ones; {WARM} more come before")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that each run may take")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the file goes")
    chosen = parser.parse_args(given)
    names = chosen.only.split(",")
    if unknown := set(names) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    busy, began = process.busy_seconds(), datetime.now(UTC)
    with tempfile.TemporaryDirectory() as made:
        try:
            measured = measure(chosen.shape, names, chosen.steps, Path(made), chosen.timeout)
        except Failed as error:
            print(f"error: {machine.without_places(str(error), Path(made))}", file=sys.stderr)
            return 1
    import torch

    now, after = datetime.now(UTC), process.busy_seconds()
    result = {
        "date": now.isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "hardware": machine.hardware(),
        "versions": {"torch": torch.__version__},
        "shape": chosen.shape,
        "rows": ROWS,
        "length": LENGTH,
        "steps": chosen.steps,
        # Of all cores' time while it ran; two cores are what it needs itself.
        "busy": None if busy is None or after is None else (after - busy) / (now - began).total_seconds(),
        **measured,
    }
    chosen.results.mkdir(parents=True, exist_ok=True)
    path = chosen.results / f"scaling-cpu-{chosen.shape}-{now:%Y%m%d}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(as_text(result))
    print(f"\nwritten to {path.name}")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
