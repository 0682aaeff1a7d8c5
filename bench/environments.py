"""A virtual environment for every contender, with the versions that were measured.

torch comes first and by pip: with it in place no later package pulls in another build of it. Some contenders
pin packages that exist for GPUs only, or that contradict one another on a CPU; those are installed without
their dependencies, and what they need is named here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"


class SetupError(Exception):
    """An environment could not be made; the message says where its log is."""


@dataclass(frozen=True)
class Environment:
    """What one environment holds.

    Attributes:
        installs: the arguments of each `pip install`, in order, after torch.
        variables: set for every run in it. modules: empty modules, for imports of what no CPU run uses.
    """

    installs: tuple[tuple[str, ...], ...]
    variables: dict[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    torch: str = TORCH


ENVIRONMENTS = {
    "luthier": Environment(installs=(("-c", str(ROOT / "constraints.txt"), "-e", str(ROOT)),)),
    "trl": Environment(
        installs=(
            ("trl==1.16.0", "peft==0.21.2", "transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0"),
        )
    ),
    "unsloth": Environment(
        installs=(
            ("--no-deps", "unsloth==2026.10.9", "unsloth_zoo==2026.10.9"),
            (
                "transformers==5.17.0",
                "datasets==4.8.5",
                "trl==1.15.0",
                "peft",
                "accelerate",
                "bitsandbytes==0.50.2",
            ),
            ("torchao==0.17.0", "tyro", "sentencepiece", "protobuf", "psutil", "einops", "msgspec", "pillow"),
            ("--no-deps", "cut_cross_entropy"),
        )
    ),
    "axolotl": Environment(
        installs=(
            ("--no-deps", "axolotl==0.19.0", "axolotl-contribs-lgpl==0.0.7", "axolotl-contribs-mit==0.0.6"),
            ("transformers==5.16.1", "peft==0.20.0", "accelerate==1.13.0", "datasets==4.8.4", "trl==1.9.0"),
            ("tokenizers==0.23.1", "huggingface_hub==1.17.0", "kernels==0.16.2", "torchao==0.17.0"),
            (
                "pydantic==2.12.5",
                "typer==0.25.1",
                "addict",
                "fire",
                "colorama",
                "einops",
                "scipy",
                "art",
                "numba",
            ),
            ("python-dotenv", "posthog", "tensorboard", "schedulefree==1.4.1", "sentencepiece", "requests"),
            # Imported whatever the run is.
            ("bitsandbytes==0.50.2", "triton==3.9.0", "evaluate", "wandb", "fastcore"),
        ),
        variables={"AXOLOTL_DO_NOT_TRACK": "1"},
    ),
    "litgpt": Environment(installs=(("litgpt==0.5.13", "requests"),)),
    "llamafactory": Environment(
        installs=(
            ("--no-deps", "llamafactory==0.9.5"),
            ("transformers==5.6.0", "trl==0.24.0", "peft==0.18.1", "accelerate==1.11.0", "datasets==4.0.0"),
            ("av==16.0.0", "torchdata==0.11.0", "torchvision", "einops", "omegaconf", "pyyaml", "tyro<0.9"),
            (
                "sentencepiece",
                "tiktoken",
                "scipy",
                "matplotlib",
                "pandas",
                "fire",
                "fastapi",
                "sse-starlette",
            ),
            ("uvicorn", "modelscope", "protobuf", "pydantic"),
        ),
        variables={"DISABLE_VERSION_CHECK": "1"},
        modules=("torchaudio",),
    ),
    "torchtune": Environment(installs=(("torchtune==0.6.1", "torchao==0.10.0"),)),
}


def interpreter(work: Path, name: str) -> Path:
    """Where the Python of an environment is, or would be."""
    inside = Path("Scripts/python.exe") if os.name == "nt" else Path("bin/python")
    return work / "environments" / name / inside


def set_up(work: Path, name: str) -> None:
    """Make an environment, anew if one was left unfinished; one that is finished is kept.

    Raises:
        SetupError: pip failed.
    """
    environment, folder = ENVIRONMENTS[name], work / "environments" / name
    finished = folder / "finished"
    if finished.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    log = work / f"setup-{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    python = str(interpreter(work, name))
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    commands = [[sys.executable, "-m", "venv", str(folder)], [*pip, environment.torch]]
    commands += [[*pip, *packages] for packages in environment.installs]
    with log.open("w", encoding="utf-8") as file:
        for command in commands:
            if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode:
                raise SetupError(f"{name}: `{' '.join(command[1:])}` failed; {log} has its output")
    for module in environment.modules:
        target = next((folder / "lib").glob("python*/site-packages"), folder / "Lib" / "site-packages")
        (target / f"{module}.py").write_text('"""Nothing here is used without a GPU."""\n', encoding="utf-8")
    finished.touch()
