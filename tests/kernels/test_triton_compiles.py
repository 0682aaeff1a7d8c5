"""What the interpreter lets pass and the compiler does not: types of loop variables, branches, shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_every_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    root = Path(__file__).resolve().parents[2]
    script = Path(__file__).with_name("compile_kernels.py")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    kernels = {
        f"{path.stem}.{line.split('(')[0].removeprefix('def ')}"
        for path in (root / "luthier" / "kernels").glob("triton_*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def _") and "kernel(" in line
    }
    assert kernels and set(done.stdout.split()) == kernels
