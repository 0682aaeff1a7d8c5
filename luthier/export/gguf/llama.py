"""llama.cpp at work, in a process of its own: a crash in there ends that process and not this one.

The binding (llama-cpp-python) is that of this Python, or of the one that `LUTHIER_LLAMA_PYTHON` names: it is built for
each machine, and may have been built elsewhere.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from luthier.errors import ConfigError, RunError

PYTHON = "LUTHIER_LLAMA_PYTHON"
_SCRIPT = Path(__file__).with_name("llama_process.py")


@dataclass(frozen=True)
class Read:
    """Attributes:
    ids: tokens of each text, with what the file puts before it. logits: (tokens, vocabulary) for each list of ids.
    greedy: what follows each list of ids.
    """

    ids: list[list[int]]
    logits: list[npt.NDArray[np.float32]]
    greedy: list[list[int]]


def is_installed() -> bool:
    """Whether there is a binding; a broken one is noticed when it is used.

    Raises:
        ConfigError: the Python that is named is not there.
    """
    if named := os.environ.get(PYTHON):
        if not Path(named).is_file():
            raise ConfigError(f"{PYTHON}: {named} is no file: name a Python that has llama-cpp-python, or unset it")
        return True
    return importlib.util.find_spec("llama_cpp") is not None


def quantise(source: Path, target: Path, kind: int) -> None:
    """One GGUF file from another, in llama.cpp's format of this number. Raises RunError if it could not."""
    _run({"quantise": [str(source), str(target), kind]}, f"{target.name} could not be quantised")


def read(file: Path, texts: Sequence[str], ids: Sequence[Sequence[int]], *, new: int = 0) -> Read:
    """What llama.cpp makes of texts and of token ids, with everything in fp32 that is not in the file.

    Args:
        new: tokens to add to each list of ids, the likeliest each time.

    Raises:
        RunError: it cannot open the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "read.npz"
        request = {"read": str(file), "texts": list(texts), "ids": [*map(list, ids)], "new": new, "out": str(out)}
        answer = _run(request, f"{file} cannot be read by llama.cpp")
        with np.load(out) as found:
            logits = [found[f"logits{at}"] for at in range(len(ids))]
    return Read(answer["ids"], logits, answer["greedy"])


def _run(request: dict[str, Any], what: str) -> Any:
    python = os.environ.get(PYTHON) or sys.executable
    done = subprocess.run(
        [python, str(_SCRIPT)], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    last = done.stdout.strip().splitlines()[-1:] or [""]
    if done.returncode == 0 and last[0].startswith("{"):
        return json.loads(last[0])
    why = done.stderr.strip().splitlines()[-1:] or [""]
    ended = f"signal {-done.returncode}" if done.returncode < 0 else why[0][:300]
    raise RunError(f"{what}: {ended or f'exit status {done.returncode}'}")
