"""What all contenders share, made once: facts, tokenizer and rows in one process, a model and its peak in another.

    python -m bench.gpu.prepare shared DEVICE FOLDER VOCABULARY CASE...
    python -m bench.gpu.prepare model DEVICE FOLDER SHAPE MODEL_FOLDER

A case is SHAPE:WORKLOAD:TASK. The weights are drawn on the GPU in bf16, so that 8B of them take seconds, and written
as a checkpoint's files: everybody loads them as any other model's.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from bench import rows, shapes
from bench.gpu import peak
from bench.gpu.cases import CONTENDERS, GPU_SHAPES, Case

SHARD_BYTES = 4 * 2**30


def facts() -> dict[str, Any]:
    """Of the GPU, the installed packages, and whether Luthier knows 4-bit weights; nothing is trained."""
    import torch

    needed = {package for contender in CONTENDERS.values() for package in contender.needs}
    found: dict[str, Any] = {
        "installed": sorted(name for name in needed if importlib.util.find_spec(name) is not None),
        "torch": torch.__version__,
        "gpu": None,
        "knows_4bit": False,
    }
    if {"pydantic", "bitsandbytes"} <= {*found["installed"], *_present("bitsandbytes")}:
        from luthier.config import AdapterConfig, ModelConfig, PrecisionConfig

        sections = (AdapterConfig, ModelConfig, PrecisionConfig)
        found["knows_4bit"] = any("load_in_4bit" in section.model_fields for section in sections)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def _present(name: str) -> set[str]:
    return {name} if importlib.util.find_spec(name) is not None else set()


def write_rows(tokenizer_folder: Path, task: str, count: int, limit: int, rows_file: Path) -> list[list[int]]:
    """The first rows whose texts have fewer than `limit` tokens; returns each one's lengths, their ends counted in."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    found = list(islice(rows.all_rows(task), count + count // 4))
    texts = [text for row in found for text in rows.texts(row)]
    each = iter(len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    lengths = [list(islice(each, len(rows.texts(row)))) for row in found]
    kept = [(row, length) for row, length in zip(found, lengths, strict=True) if max(length) < limit][:count]
    with rows_file.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row, _ in kept)
    return [length for _, length in kept]


def write_model(shape: shapes.Shape, tokenizer_folder: Path, device: str, folder: Path) -> None:
    """Config, random weights in shards, tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    partial = folder.with_name(folder.name + ".partial")
    shutil.copytree(tokenizer_folder, partial)
    special = json.loads((partial / "special.json").read_text(encoding="utf-8"))
    (partial / "special.json").unlink()
    values: dict[str, Any] = asdict(shape)
    config = AutoConfig.for_model(values.pop("family"), **values, bos_token_id=None, **special)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.save_pretrained(partial)

    generator = torch.Generator(device).manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    names: dict[str, int] = {}

    def flush() -> None:
        save_file(shards[-1], partial / f"model-{len(shards):05d}.safetensors", metadata={"format": "pt"})
        shards[-1] = {}

    tied = {"lm_head.weight"} if shape.tie_word_embeddings else set()
    for name, like in model.state_dict().items():
        if name in tied:
            continue
        tensor = torch.empty(like.shape, dtype=dtype, device=device)
        if tensor.dim() > 1:
            tensor.normal_(0.0, 0.02, generator=generator)
        else:
            tensor.fill_(1.0)  # norms
        names[name] = len(shards)
        shards[-1][name] = tensor.cpu()
        size += tensor.nbytes
        if sum(each.nbytes for each in shards[-1].values()) > SHARD_BYTES:
            flush()
            shards.append({})
    flush()
    index = {
        "metadata": {"total_size": size},
        "weight_map": {n: f"model-{i:05d}.safetensors" for n, i in names.items()},
    }
    (partial / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    os.rename(partial, folder)


def write_tokenizer(folder: Path, size: int) -> None:
    """The tokenizer, and beside it the ids that a config names."""
    tokenizer = shapes.build_tokenizer(size)
    tokenizer.save_pretrained(folder)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (folder / "special.json").write_text(json.dumps(special), encoding="utf-8")


def shared(device: str, folder: Path, vocabulary: int, *cases: str) -> None:
    """Facts, and unless they say that there is no GPU for this run, the tokenizer and each workload's rows."""
    found = facts()
    (folder / "facts.json").write_text(json.dumps(found), encoding="utf-8")
    if device == "cuda" and not found["gpu"]:
        return
    write_tokenizer(folder / "tokenizer", vocabulary)
    for shape, workload, task in (name.split(":") for name in cases):
        case = Case(shape, workload, "", task)
        rows_file, work = rows_of(folder, case), case.work()
        if not rows_file.exists():
            lengths = write_rows(folder / "tokenizer", task, work.rows, work.sequence_len, rows_file)
            rows_file.with_suffix(".lengths").write_text(json.dumps(lengths), encoding="utf-8")


def rows_of(folder: Path, case: Case) -> Path:
    """Where the rows of a case are; their texts' lengths are beside them, in `.lengths`."""
    size = "micro-" if case.shape == "micro" else ""
    task = "" if case.task == "sft" else f"{case.task}-"
    return folder / f"rows-{size}{task}{case.workload}.jsonl"


def model(device: str, folder: Path, shape: str, model_folder: Path) -> None:
    """The model, then the machine's speed at its shapes."""
    write_model(GPU_SHAPES[shape], folder / "tokenizer", device, model_folder)
    measured = peak.measure(shape, 256 if shape == "micro" else 8192, device)
    (folder / f"peak-{shape}.json").write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    what, device, folder, third, *rest = sys.argv[1:]
    if what == "shared":
        shared(device, Path(folder), int(third), *rest)
    else:
        model(device, Path(folder), third, Path(rest[0]))
