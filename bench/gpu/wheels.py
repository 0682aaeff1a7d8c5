"""Collects what a GPU machine without a network lacks, for `python -m bench.gpu --wheels FOLDER`.

    python -m bench.gpu.wheels FOLDER

It is meant for a machine with torch, transformers, accelerate, PEFT and the usual numeric packages on Python
3.12. Luthier itself needs pydantic and datasets there; the rest is the neighbours'. bitsandbytes brings its
code for eight versions of CUDA and Unsloth an application with a web page, none of which is used: those files
are taken out, so that the whole is small enough to carry anywhere.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGES = [
    # Luthier's, and TRL's
    "pydantic==2.12.5", "pydantic-core==2.41.5", "annotated-types", "typing-inspection",
    "datasets==4.8.5", "dill==0.4.1", "multiprocess==0.70.19",
    "trl==1.15.0", "liger-kernel==0.8.5",
    # Unsloth's
    "unsloth==2026.10.9", "unsloth_zoo==2026.10.9", "bitsandbytes==0.50.2", "torchao==0.17.0",
    "cut_cross_entropy", "tyro", "docstring-parser", "typeguard", "msgspec", "hf_transfer",
]  # fmt: skip

# Beginnings of the names of files that nobody needs, by wheel.
UNUSED = {
    "unsloth-": ("studio/",),
    "bitsandbytes-": tuple(
        f"bitsandbytes/libbitsandbytes_{version}"
        for version in ("cuda118", "cuda12", "cuda132", "rocm", "xpu")
    ),
}
PLATFORMS = (
    "manylinux_2_28",
    "manylinux_2_27",
    "manylinux_2_24",
    "manylinux_2_17",
    "manylinux2014",
    "manylinux1",
)


def download(folder: Path) -> None:
    """Everything, for Python 3.12 on 64-bit Intel and AMD."""
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [part for name in PLATFORMS for part in ("--platform", f"{name}_x86_64")]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"),
            *("--python-version", "3.12", "--implementation", "cp", *platforms, "-d", str(folder)),
            *PACKAGES,
        ],
        check=True,
    )


def slim(wheel: Path, unused: tuple[str, ...]) -> None:
    """Take files out of a wheel."""
    smaller = wheel.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as target:
        for item in source.infolist():
            if not item.filename.startswith(unused):
                target.writestr(item, source.read(item))
    smaller.replace(wheel)


def main(folder: Path) -> None:
    download(folder)
    for wheel in folder.glob("*.whl"):
        for beginning, unused in UNUSED.items():
            if wheel.name.startswith(beginning):
                slim(wheel, unused)
    total = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    print(f"{len(list(folder.glob('*.whl')))} wheels, {total / 2**20:.0f} MiB, in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
