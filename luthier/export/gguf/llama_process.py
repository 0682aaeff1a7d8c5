"""What `llama` starts, by the Python that has llama-cpp-python and perhaps nothing of Luthier: one request as JSON on
standard input, one line of JSON as answer."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import llama_cpp
import numpy as np


def _opened(path: str, length: int) -> Any:
    default = llama_cpp.llama_cpp.llama_model_default_params

    def plain() -> Any:
        # Without weights in the order of single processors: that of Intel's AMX crashes on small matrices
        # (llama.cpp, issue 20824), and every order computes the same.
        params = default()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = plain
    # Keys and values in fp32 (0), which are in 16 bits otherwise.
    return llama_cpp.Llama(
        path, n_ctx=length, n_batch=length, logits_all=True, verbose=False, n_gpu_layers=0, type_k=0, type_v=0
    )


def _read(request: dict[str, Any]) -> dict[str, Any]:
    new = request["new"]
    length = max([64, *(len(ids) + new + 1 for ids in request["ids"])])
    model = _opened(request["read"], length)
    logits: dict[str, Any] = {}
    greedy = []
    for at, ids in enumerate(request["ids"]):
        model.reset()
        model.eval(ids)
        logits[f"logits{at}"] = np.array(model.scores[: len(ids)], dtype=np.float32)
        following: list[int] = []
        last = logits[f"logits{at}"][-1]
        for _ in range(new):
            following.append(int(last.argmax()))
            model.eval(following[-1:])
            last = model.scores[model.n_tokens - 1]
        greedy.append(following)
    np.savez(request["out"], **logits)
    texts = [model.tokenize(text.encode(), add_bos=True, special=True) for text in request["texts"]]
    return {"ids": texts, "greedy": greedy}


def _quantise(source: str, target: str, kind: int) -> dict[str, Any]:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = kind
    params.nthread = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), params)
    if status != 0:
        raise SystemExit(f"llama.cpp ended with status {status}")
    return {}


def main() -> None:
    request = json.load(sys.stdin)
    answer = _read(request) if "read" in request else _quantise(*request["quantise"])
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main()
