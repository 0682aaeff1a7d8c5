"""What this machine and this installation have: versions, devices, what they multiply fast, optional
packages.

Nothing here can take long: the multiplication speed is found by growing a small problem until it takes long
enough to be measured, and stops before the next size would take too long. That matters, since a CPU without
matrix units for bfloat16 can be a hundred times slower in it than in fp32.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import luthier

if TYPE_CHECKING:
    import torch

# Beside the name, what one gets with it.
OPTIONAL: dict[str, str] = {
    "tensorboard": "report_to: tensorboard",
    "wandb": "report_to: wandb",
    "trackio": "report_to: trackio",
    "mlflow": "report_to: mlflow",
    "bitsandbytes": "weights in 4 and 8 bits, optimizers with 8-bit or paged state",
    "lm-eval": "luthier evaluate --tasks",
    "fastapi": "luthier serve",
    "sentencepiece": "tokenizers that come as a sentencepiece model only",
    "flash-attn": "attn_implementation: flash_attention_2",
}
# Those that an extra of Luthier brings, by the extra's name.
EXTRAS = {name: name for name in ("tensorboard", "wandb", "trackio", "mlflow", "bitsandbytes", "sentencepiece")}
EXTRAS["lm-eval"] = "harness"
EXTRAS["fastapi"] = "serve"

_LONG_ENOUGH = 0.02  # seconds; shorter timings are mostly overhead
_TOO_LONG = 0.5  # seconds that one size may be expected to take
_LARGEST = {"cpu": 1024, "cuda": 8192, "mps": 4096}


def command(as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> int:
    """Say what this machine and this installation have."""
    report = examine()
    print(json.dumps(report, indent=2) if as_json else as_text(report))
    return 1 if report["problems"] else 0


def examine() -> dict[str, Any]:
    """Everything that the report says, as plain data."""
    problems: list[str] = []
    packages = _packages(problems)
    return {
        "luthier": luthier.__version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": packages,
        "devices": _devices(problems) if packages.get("torch") else [],
        "optional": {name: {"version": _version(name), "for": purpose} for name, purpose in OPTIONAL.items()},
        "cache": _cache(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "problems": problems,
    }


def as_text(report: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [
        f"Luthier {report['luthier']}, Python {report['python']} ({report['executable']})",
        report["system"],
        "",
        "Packages",
        *(f"  {name:<16} {version or 'missing'}" for name, version in report["packages"].items()),
        "",
        "Devices",
    ]
    for device in report["devices"]:
        memory = (
            f"{device['free_gib']:.1f} of {device['memory_gib']:.1f} GiB free" if device["memory_gib"] else ""
        )
        lines.append(f"  {device['device']:<8} {device['name']}{', ' if memory else ''}{memory}")
        lines.append(f"  {'':<8} matrix multiply: {_speeds(device['tflops'])}")
        lines.append(f"  {'':<8} `bf16: auto` computes in {device['auto_dtype']}")
    lines += ["", "Optional packages"]
    for name, found in report["optional"].items():
        if found["version"]:
            lines.append(f"  {name:<16} {found['version']:<12} {found['for']}")
        else:
            wanted = f'pip install "luthier[{EXTRAS[name]}]"' if name in EXTRAS else f"pip install {name}"
            lines.append(f"  {name:<16} {'missing':<12} {found['for']}  ({wanted})")
    cache = report["cache"]
    lines += ["", f"Prepared data is kept in {cache['folder']} ({cache['mib']:.0f} MiB now)"]
    if report["problems"]:
        lines += ["", "Problems", *(f"  {problem}" for problem in report["problems"])]
    return "\n".join(lines)


def _speeds(tflops: dict[str, float | None]) -> str:
    parts = []
    for name, speed in tflops.items():
        if speed is None:
            parts.append(f"{name} not supported")
            continue
        base = tflops["fp32"] or speed
        slower = f" ({base / speed:.0f} times slower)" if speed < 0.6 * base else ""
        shown = f"{speed:.0f} TFLOP/s" if speed >= 1 else f"{1000 * speed:.2g} GFLOP/s"
        parts.append(f"{name} {shown}{slower}")
    return ", ".join(parts)


def _packages(problems: list[str]) -> dict[str, str | None]:
    """Versions of what Luthier depends on; those missing or outside of its ranges are problems."""
    try:
        requirements = importlib.metadata.requires("luthier") or []
    except importlib.metadata.PackageNotFoundError:
        problems.append(
            "luthier itself is not installed, so its version ranges are unknown: pip install -e ."
        )
        requirements = ["torch", "transformers"]
    versions: dict[str, str | None] = {}
    for line in requirements:
        from packaging.requirements import Requirement

        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = versions[requirement.name] = _version(requirement.name)
        if version is None:
            problems.append(f"{requirement.name} is missing: pip install '{line}'")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(
                f"{requirement.name} {version} is outside of {requirement.specifier}: pip install '{line}'"
            )
    return versions


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices(problems: list[str]) -> list[dict[str, Any]]:
    import torch

    from luthier.models.device import WIDE, bf16_is_fast

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    if shutil.which("nvidia-smi") and len(devices) == 1:
        why = "its CUDA build finds no card" if torch.version.cuda else "this torch is a build without CUDA"
        problems.append(f"there is an NVIDIA driver, but {why}: see https://pytorch.org/get-started/locally")
    rows: list[dict[str, Any]] = []
    for device in devices:
        name, total, free = _about(device)
        auto = "bf16" if bf16_is_fast(device) else "fp16" if device.type == "cuda" else "fp32"
        if auto == "bf16" and device.type == "cpu":
            auto = f"bf16 from hidden size {WIDE} on, else fp32"
        kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        rows.append(
            {
                "device": str(device),
                "name": name,
                "memory_gib": total,
                "free_gib": free,
                "tflops": {kind: measure_tflops(device, dtype) for kind, dtype in kinds.items()},
                "auto_dtype": auto,
            }
        )
    return rows


def _about(device: torch.device) -> tuple[str, float, float]:
    """Name, memory and free memory in GiB (0 where the system does not say)."""
    import torch

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} (compute {major}.{minor})", total / 2**30, free / 2**30
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    page = os.sysconf("SC_PAGE_SIZE") if "SC_PAGE_SIZE" in names else 0
    total = page * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else 0
    free = page * os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in names else 0
    if device.type == "mps":
        return "Apple GPU, memory shared with the CPU", total / 2**30, free / 2**30
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' * (threads > 1)}", total / 2**30, free / 2**30


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def measure_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Speed of square matrix multiplies in TFLOP/s, in well under 2 s; None where the device cannot do them.

    All three products of a training step are made, since a backward product can be far slower than the
    forward one.
    """
    import torch

    speed: float | None = None
    size = 64
    while size <= _LARGEST[device.type]:
        try:
            x_TD = torch.ones(size, size, dtype=dtype, device=device)
            weight_VD = torch.ones(size, size, dtype=dtype, device=device)
            _three_products(x_TD, weight_VD)  # first call: libraries load and choose
            seconds = min(_seconds(x_TD, weight_VD) for _ in range(3))
        except (RuntimeError, TypeError):
            return speed
        speed = 3 * 2 * size**3 / seconds / 1e12
        if seconds >= _LONG_ENOUGH or 8 * seconds > _TOO_LONG:
            break
        size *= 2
    return speed


def _seconds(x_TD: torch.Tensor, weight_VD: torch.Tensor) -> float:
    began = time.perf_counter()
    _three_products(x_TD, weight_VD)
    return time.perf_counter() - began


def _three_products(x_TD: torch.Tensor, weight_VD: torch.Tensor) -> None:
    import torch

    y_TV = x_TD @ weight_VD.t()
    (y_TV @ weight_VD).sum()
    total = (y_TV.t() @ x_TD).sum()
    if total.device.type == "cuda":
        torch.cuda.synchronize(total.device)
    elif total.device.type == "mps":
        torch.mps.synchronize()


def _cache() -> dict[str, Any]:
    folder = Path(os.environ.get("LUTHIER_CACHE") or Path.home() / ".cache" / "luthier" / "datasets")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    return {"folder": str(folder), "mib": size / 2**20}
