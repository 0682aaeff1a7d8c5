"""Writing with an adapter: Luthier's engine beside PEFT and `model.generate`, in turn.

    python -m bench.generate                         # a 9M shape; needs peft beside luthier
    python -m bench.generate --shape 135m --rounds 2
    python -m bench.generate --shape 135m --device cuda   # in bf16; says whether steps were replayed as CUDA graphs

The same base, adapter (r=16 on all linear layers, random) and prompts for everybody, greedy, so many new tokens each.
Every contender has a process of its own, which loads, answers once unmeasured, then answers the prompts measured: one
after another, and all at once. Ratios are taken within rounds; a result says how many answers are the same ids. It
goes to bench/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from bench import machine, process
from bench.rows import all_rows, source_name
from bench.shapes import SHAPES

RESULTS = Path(__file__).resolve().parent / "results"
CONTENDERS = ("peft", "luthier")
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
# Prompts that are answered one after another; all of them are answered at once.
ONE_BY_ONE = 8

Ids = list[list[int]]
# Answers one after another, answers all at once, and what there is to tell of it afterwards.
Ways = tuple[Callable[[Ids], Ids], Callable[[Ids], Ids], Callable[[], dict[str, Any]]]


def main(given: list[str] | None = None) -> int:
    """Measure; or, as a contender's own process, answer."""
    parser = argparse.ArgumentParser(prog="python -m bench.generate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=[name for name in SHAPES if name != "0.6b-vocab"], default="tiny")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=DTYPES, default="cpu", help="cpu computes in fp32, cuda in bf16")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "luthier-bench", metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(given)
    work: Path = chosen.work.expanduser().resolve()
    job = work / "generate" / f"{chosen.shape}-{chosen.prompts}"
    if chosen.prepare:
        prepare(chosen.shape, chosen.prompts, work / "models" / chosen.shape, job)
        return 0
    if chosen.contender:
        answer(chosen.contender, job, chosen.new_tokens, chosen.device)
        return 0
    options = ["--shape", chosen.shape, "--prompts", str(chosen.prompts), "--new-tokens", str(chosen.new_tokens)]
    options += ["--work", str(work), "--device", chosen.device]
    job.mkdir(parents=True, exist_ok=True)
    if in_own_process(["--prepare", *options], job) is None:
        return 1
    rounds: list[dict[str, Any]] = []
    for number in range(1, chosen.rounds + 1):
        found: dict[str, dict[str, Any]] = {}
        for name in CONTENDERS:
            if (done := in_own_process(["--contender", name, *options], job)) is None:
                return 1
            found[name] = json.loads((job / f"{name}.json").read_text(encoding="utf-8")) | done
        ids = [measured.pop("ids") for measured in found.values()]
        rounds.append(found | {"same_ids": sum(one == other for one, other in zip(*ids, strict=True))})
        print(f"round {number} of {chosen.rounds}", file=sys.stderr)
    result = {
        "benchmark": "generate",
        "shape": chosen.shape,
        "device": chosen.device,
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": machine.commit(),
        "hardware": machine.hardware(),
        "prompts": {"source": source_name(), "count": chosen.prompts, "one_by_one": min(ONE_BY_ONE, chosen.prompts)},
        "new_tokens": chosen.new_tokens,
        "rounds": rounds,
    }
    name = f"generate-{chosen.device}-{chosen.shape}-{result['date'][:10]}.json"
    chosen.results.mkdir(parents=True, exist_ok=True)
    (chosen.results / name).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    return 0


def in_own_process(options: list[str], job: Path) -> dict[str, Any] | None:
    """Run this module with these options; None, and the log's end is shown, if it fails."""
    log = job / "log.txt"
    # How threads wait is left to everybody's own: a token is many small operations, and sleeping costs each of them.
    extra = {"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": ""}
    if "cuda" in options:
        extra["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    done = process.run(sys.executable, "bench.generate", options, scratch=job / "scratch", log=log, extra=extra)
    if done.status:
        print(log.read_text(encoding="utf-8")[-3000:], file=sys.stderr)
        return None
    return {"peak_memory_gib": done.peak_memory_gib, "elsewhere": done.elsewhere}


def lines(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Case, tokens per second of both, the ratio by the clock and by the processor's seconds: medians over the rounds,
    with the least and the most."""
    cases = (
        ("one prompt after another", "one_by_one", "one_by_one"),
        (f"{result['prompts']['count']} prompts at once, PEFT in one padded batch", "at_once", "at_once"),
        (f"{result['prompts']['count']} prompts at once, PEFT one after another", "at_once", "one_by_one"),
    )
    found = []
    for label, ours, theirs in cases:
        cells = []
        for clock in ("seconds", "cpu_seconds"):
            pairs = [(rate(r["luthier"][ours], clock), rate(r["peft"][theirs], clock)) for r in result["rounds"]]
            ratios = [one / other for one, other in pairs]
            if clock == "seconds":
                cells.append(" and ".join(f"{statistics.median(side):.0f}" for side in zip(*pairs, strict=True)))
            cells.append(f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})")
        found.append((label, *cells))
    return found


def rate(measured: dict[str, float], clock: str) -> float:
    return measured["tokens"] / measured[clock]


def caption(result: dict[str, Any]) -> str:
    hardware, rounds, prompts = result["hardware"], result["rounds"], result["prompts"]
    memory = " and ".join(f"{max(r[name]['peak_memory_gib'] for r in rounds):.2f}" for name in CONTENDERS[::-1])
    taken = max(r[name]["elsewhere"] or 0 for r in rounds for name in CONTENDERS)
    same = min(r["same_ids"] for r in rounds)
    device, dtype, graphs = "", "fp32", ""
    if on_gpu(result):
        ours = rounds[-1]["luthier"]
        device, dtype, found = f"{ours['gpu']}, ", "bf16", ours["graphs"]
        graphs = f"; CUDA graphs: {found['captured']} steps captured, {found['replayed']} replayed"
        if found["why_off"]:
            graphs = f"; no CUDA graphs: {found['why_off']}"
    return (
        f"{result['shape']}: {device}{hardware['cpu']}, {hardware['cores']} cores; {result['date'][:10]}, commit "
        f"{result['commit']}; {len(rounds)} rounds, {prompts['count']} prompts ({prompts['source']}), "
        f"{result['new_tokens']} new tokens each, {dtype}; the same ids: {same} of {prompts['count']}; memory "
        f"{memory} GiB; other programs had up to {taken:.0%} of the cores{graphs}"
    )


def on_gpu(result: dict[str, Any]) -> bool:
    return bool(result.get("device", "cpu") == "cuda")


def table(result: dict[str, Any]) -> str:
    """As text."""
    head = ("", "tokens/s, Luthier and PEFT", "Luthier is", "by CPU seconds")
    rows = [head, *lines(result)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    shown = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join([caption(result), *shown])


def section(results: list[dict[str, Any]]) -> str:
    """The part of docs/benchmarks.md: the newest result of each shape, on a CPU and on a GPU."""
    by_date = sorted(results, key=lambda result: result["date"])
    newest = {(on_gpu(result), result["shape"]): result for result in by_date}
    if not newest:
        return ""
    parts = [
        "## Writing with an adapter",
        "LoRA of rank 16 on all linear maps, greedy. PEFT keeps the adapter beside its base and writes by\n"
        "`model.generate`; Luthier merges it in memory. Tokens are new ones; ratios are within rounds, the median and\n"
        "the extremes.",
    ]
    for _, result in sorted(newest.items()):
        body = ["| " + " | ".join(line) + " |" for line in lines(result)]
        head = "| | tokens/s, Luthier and PEFT | Luthier is | by CPU seconds |\n| --- | --- | --- | --- |"
        parts += [caption(result) + ".", "\n".join([head, *body])]
    return "\n\n".join(parts) + "\n"


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The results that are there."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("generate-*.json"))]


# --- in processes of their own --------------------------------------------------------------------------------------


def prepare(shape: str, count: int, model: Path, job: Path) -> None:
    """Base, adapter and prompts, once."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bench import shapes

    if not model.exists():
        shapes.build(SHAPES[shape], model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] for row in islice(all_rows(), count)]
    (job / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    adapted.save_pretrained(job / "adapter")
    tokenizer.save_pretrained(job / "adapter")


def answer(name: str, job: Path, new_tokens: int, device: str) -> None:
    """Load, answer once unmeasured, then measured; writes NAME.json."""
    prompts: Ids = json.loads((job / "prompts.json").read_text(encoding="utf-8"))
    one, many, told = {"peft": with_peft, "luthier": with_luthier}[name](job / "adapter", new_tokens, device)
    one(prompts[:1])
    many(prompts[:2])
    some, _ = measured(one, prompts[:ONE_BY_ONE])
    everything, ids = measured(many, prompts)
    found = {"one_by_one": some, "at_once": everything, "ids": ids, **told()}
    (job / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")


def measured(answers: Callable[[Ids], Ids], prompts: Ids) -> tuple[dict[str, float], Ids]:
    began, cpu = time.perf_counter(), time.process_time()
    ids = answers(prompts)
    seconds, used = time.perf_counter() - began, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": used, "tokens": sum(map(len, ids))}, ids


def with_peft(adapter: Path, new_tokens: int, device: str) -> Ways:
    """As its users do: the adapter beside its base, prompts padded on the left."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    dtype = getattr(torch, DTYPES[device])
    model: Any = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter, padding_side="left")
    model.generation_config.eos_token_id = None  # for everybody the same number of tokens
    settings = {"max_new_tokens": new_tokens, "do_sample": False}

    def many(prompts: Ids) -> Ids:
        padded = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(device)
        with torch.no_grad():
            out = model.generate(**padded, **settings, pad_token_id=tokenizer.pad_token_id)
        return [row.tolist() for row in out[:, padded["input_ids"].shape[1] :]]

    return lambda prompts: [many([prompt])[0] for prompt in prompts], many, dict


def with_luthier(adapter: Path, new_tokens: int, device: str) -> Ways:
    import torch

    from luthier.generate import graphs
    from luthier.generate.engine import Engine
    from luthier.generate.sampling import Sampling
    from luthier.models.assemble import open_for_inference

    dtype = getattr(torch, DTYPES[device])
    model, tokenizer, _ = open_for_inference(str(adapter), device=torch.device(device), dtype=dtype)
    engine, sampling = Engine(model, tokenizer, []), Sampling(max_new_tokens=new_tokens, do_sample=False)

    def many(prompts: Ids) -> Ids:
        return [completion.token_ids for completion in engine.generate(prompts, sampling)]

    def told() -> dict[str, Any]:
        if device == "cpu":
            return {}
        return {"gpu": torch.cuda.get_device_name(), "graphs": asdict(graphs.state_of(model))}

    return lambda prompts: [many([prompt])[0] for prompt in prompts], many, told


if __name__ == "__main__":
    raise SystemExit(main())
