"""Peak memory as `luthier plan` predicts it, beside that of real training.

    python -m bench.memory                          # on a GPU: the allocator's peak
    python -m bench.memory --device cpu             # the bytes of all tensors alive, traced
    python -m bench.memory --shape 0.6b --only qlora,full

Each case trains three steps of two passes on random tokens, on a model with random weights that is made once in a
folder; the third step is measured, with the optimizer's state there. The result goes to bench/results/.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch starts threads

import torch
import transformers

from bench import machine
from bench.gpu.cases import GPU_SHAPES
from bench.shapes import SHAPES, Shape
from luthier.config import Config
from luthier.models.assemble import build_model
from luthier.models.device import choose_dtype
from luthier.models.fuse import fuse_policy
from luthier.models.isolation import build_policy
from luthier.models.kept import Allocations
from luthier.models.layers import Recomputation
from luthier.models.load import embeddings_of, read_model_config
from luthier.objectives.sft import sft
from luthier.plan.memory import Pass, memory_of
from luthier.plan.read import engine_of, training_shape
from luthier.train.optim import Masters
from luthier.train.optimizers import build_optimizer

RESULTS = Path(__file__).resolve().parent / "results"
ALL_SHAPES = SHAPES | GPU_SHAPES

_LORA = {"adapter": "lora", "lora_r": 16}
CASES: dict[str, dict[str, Any]] = {
    "lora": _LORA,
    "lora-mlp": {**_LORA, "gradient_checkpointing": "mlp"},
    "lora-layer": {**_LORA, "gradient_checkpointing": True},
    "lora-offload": {**_LORA, "gradient_checkpointing": "offload"},
    "qlora": {"adapter": "qlora", "lora_r": 16},
    "qlora-layer": {"adapter": "qlora", "lora_r": 16, "gradient_checkpointing": True},
    "lora-8bit": {**_LORA, "load_in_8bit": True},
    "full": {},
    "full-layer": {"gradient_checkpointing": True},
    "full-8bit-adam": {"optimizer": "adamw_bnb_8bit"},
}


@dataclass(frozen=True)
class Line:
    """One case: bytes, and their parts as predicted."""

    case: str
    tokens: int
    predicted: float
    measured: float
    parts: dict[str, object]

    @property
    def off(self) -> float:
        """The prediction's distance from what was measured, as a share of that."""
        return self.predicted / self.measured - 1


class _NoTokens:
    """A tokenizer as far as building a model looks at one: with nothing that the model lacks."""

    new_tokens: tuple[str, ...] = ()
    pad_token = None

    def __len__(self) -> int:
        return 0


def measure(name: str, folder: Path, device: torch.device, tokens: int, length: int) -> Line:
    """Train a case and plan it."""
    asked = CASES[name]
    mode = asked.get("gradient_checkpointing", False)
    values = {**asked, "gradient_checkpointing": False if mode == "mlp" else mode}
    config = Config.from_flat(
        {
            "base_model": str(folder),
            "datasets": [{"path": "none", "type": "completion"}],
            "sequence_len": length,
            "device_map": device.type,
            **values,
        }
    )
    dtype = choose_dtype(config, device)
    recompute = {True: "layer", False: "keep"}.get(mode, mode)
    measured = _train(config, device, dtype, recompute, tokens, length)
    gc.collect()
    model_config = read_model_config(config.model)
    shape = training_shape(config, model_config)
    engine = engine_of(config, model_config, shape, None, cpu=device.type == "cpu")
    modes = (recompute,) * len(shape.layers)
    engine = type(engine)(**{**vars(engine), "compute": dtype.itemsize, "modes": modes})
    one = Pass(tokens, tokens, length, tokens * length, tokens // length, several=True)
    found = memory_of(shape, engine, one)
    return Line(name, tokens, found.total, measured, found.as_json())


def _train(
    config: Config, device: torch.device, dtype: torch.dtype, recompute: Any, tokens: int, length: int
) -> float:
    """Peak bytes of the third of three steps."""
    tokenizer: Any = _NoTokens()
    model, dropout = build_model(config, tokenizer, device, dtype)
    policy = build_policy(model, dropout, config.data.sequence_len)
    policy.weighted_sum = True
    fuse_policy(policy)
    masters = Masters(model)
    optimizer = build_optimizer(masters, config.training)
    Recomputation(model).set_all(recompute)
    policy.train()
    batch = _batch(int(embeddings_of(model).weight.shape[0]), tokens, length, device)

    def step() -> None:
        masters.zero_grad()
        for _ in range(2):
            logps, _ = policy(batch)
            sft(logps, batch.weight_N, float(2 * tokens)).backward()
        optimizer.step()
        masters.publish()
        masters.zero_grad()

    step()
    step()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = float(torch.cuda.max_memory_allocated())
    else:
        there = _alive([*policy.parameters(), *policy.buffers(), *masters], optimizer)
        with Allocations(device.type) as trace:
            step()
        peak = float(there + trace.peak)
    return peak


def _alive(tensors: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of tensors and of the optimizer's state."""
    for held in optimizer.state.values():
        tensors += [t for t in held.values() if isinstance(t, torch.Tensor)]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())


def _batch(vocabulary: int, tokens: int, length: int, device: torch.device) -> Any:
    count = tokens // length
    return SimpleNamespace(
        input_ids=torch.randint(0, vocabulary, (tokens,), device=device),
        position_ids=torch.arange(length, device=device).repeat(count),
        lengths=(length,) * count,
        parents=(-1,) * count,
        cu_seqlens=torch.arange(0, tokens + 1, length, dtype=torch.int32, device=device),
        drawn=(length,) * count,
        seeds=tuple(range(count)),
        position_N=torch.arange(tokens, device=device),
        target_N=torch.randint(0, vocabulary, (tokens,), device=device),
        weight_N=torch.ones(tokens, device=device),
    )


def make_model(shape: Shape, folder: Path, device: torch.device) -> None:
    """A model folder with random weights in 16 bits (fp32 on a CPU), no tokenizer."""
    values = asdict(shape)
    values.pop("stored", None)
    described = transformers.AutoConfig.for_model(values.pop("family"), **values)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with device:
        model = transformers.AutoModelForCausalLM.from_config(described, dtype=dtype)
    model.save_pretrained(folder)


def as_text(result: dict[str, Any]) -> str:
    """The table for a terminal."""
    rows = [["case", "tokens a pass", "predicted", "measured", "off by", "at this moment"]]
    for line in (Line(**entry) for entry in result["lines"]):
        sizes = [f"{size / 2**30:.3f} GiB" for size in (line.predicted, line.measured)]
        rows.append([line.case, f"{line.tokens:,}", *sizes, f"{line.off:+.1%}", str(line.parts["moment"])])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    where = result["hardware"].get("gpu") or f"{result['hardware']['cpu']}, tensors traced"
    return "\n".join([f"{result['shape']}, {where}, torch {result['versions']['torch']}", "", *text])


def main(given: list[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--shape", choices=sorted(ALL_SHAPES), help="default: 0.6b, on a CPU tiny")
    parser.add_argument("--only", default=None, metavar="A,B", help="these cases: " + ", ".join(CASES))
    parser.add_argument("--tokens", type=int, help="of a pass; default: 8192, on a CPU 1024")
    parser.add_argument("--length", type=int, default=512, help="of a document")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the file goes")
    chosen = parser.parse_args(given)
    device = torch.device(chosen.device)
    on_gpu = device.type == "cuda"
    # A CPU has nowhere to offload to, and bitsandbytes' packing there takes its time.
    usual = list(CASES) if on_gpu else [name for name in CASES if "8bit" not in name and "offload" not in name]
    names = chosen.only.split(",") if chosen.only else usual
    if unknown := set(names) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    shape = chosen.shape or ("0.6b" if on_gpu else "tiny")
    tokens = chosen.tokens or (8192 if on_gpu else 1024)
    torch.manual_seed(0)
    lines = []
    with tempfile.TemporaryDirectory() as made:
        make_model(ALL_SHAPES[shape], Path(made), device)
        for name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            lines.append(measure(name, Path(made), device, tokens // chosen.length * chosen.length, chosen.length))
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()

    now = datetime.now(UTC)
    gpu = {"gpu": torch.cuda.get_device_name()} if on_gpu else {}
    result = {
        "date": now.isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "hardware": machine.hardware() | gpu,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "shape": shape,
        "lines": [asdict(line) for line in lines],
    }
    chosen.results.mkdir(parents=True, exist_ok=True)
    path = chosen.results / f"memory-{device.type}-{shape}-{now:%Y%m%d}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(as_text(result))
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
