"""A GGUF file beside the model that it was made of: llama.cpp reads the one, transformers the other.

Where llama-cpp-python is installed and both fit into memory, one after the other, the same texts are read by both:
token ids have to be the same, and logits may differ by what the file's format explains.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from luthier.config import Config
from luthier.errors import RunError
from luthier.export.check import TEXTS
from luthier.export.gguf import llama, pre_tokenizers
from luthier.export.gguf.quants import Quant
from luthier.export.opened import Opened
from luthier.export.quantised import stored_bits
from luthier.models.assemble import open_for_inference
from luthier.models.load import count_parameters
from luthier.models.memory import free_memory

log = logging.getLogger("luthier")

LONGEST = 256  # tokens of each text
# Share of the logits' spread (root mean square) beyond which something else than rounding is at work. The most that was
# seen: 5e-4 of f32 (with Gemma's activation, which ggml has in 16 bits; 1e-6 without), 5e-3 of 16 bits, 2e-2 of q8_0. A
# wrong rotation or norm shows as one half or more. Formats of fewer bits depend on the model too much.
_ALLOWED = {"f32": 2e-2, "f16": 2e-2, "bf16": 1e-1, "q8_0": 2e-1}


def compare(opened: Opened, run: Config | None, file: Path, quant: Quant) -> None:
    """Say how the file and its model differ, or why that is not known.

    Raises:
        RunError: llama.cpp cannot open it, or they are not the same model.
    """
    if not llama.is_installed():
        log.info("not compared with the model, which needs llama-cpp-python (pip install llama-cpp-python)")
        return
    parameters = count_parameters(opened.base.model)[1]
    whole = not opened.job.shares
    if not whole and opened.job.weights != [1.0]:
        log.info("not compared with the model: the adapter is not at its own strength")
        return
    if _other_weights(opened):
        log.info("not compared with the model: the adapter is put onto other weights than it is used with")
        return
    if 4.4 * parameters > free_memory(torch.device("cpu")):
        log.warning("not compared with the model, which does not fit into memory here")
        return
    source = opened.source if whole else opened.job.folders[0]
    model, tokenizer, _ = open_for_inference(str(source), device=torch.device("cpu"), dtype=torch.float32)
    ids = [list(tokenizer(text)["input_ids"])[:LONGEST] for text in TEXTS]
    with torch.no_grad():
        outputs = [model(input_ids=torch.tensor([one]), use_cache=False).logits[0].float().numpy() for one in ids]
    del model
    gc.collect()
    texts = [text for text in pre_tokenizers.TEXTS if text.strip()]
    found = llama.read(file, texts, ids)
    same = _same_ids(texts, found.ids, tokenizer)
    width = outputs[0].shape[-1]
    ours, read = np.concatenate(outputs), np.concatenate([one[:, :width] for one in found.logits])
    relative = _rms(ours - read) / _rms(ours - ours.mean(-1, keepdims=True))
    likeliest = float((ours.argmax(-1) == read.argmax(-1)).mean())
    log.info(
        "read by llama.cpp beside the model: the same token ids for %d of %d texts; largest difference of a logit %.1e "
        "(%.1e of their spread), the likeliest token the same at %.1f%% of %d places",
        same,
        len(texts),
        float(np.abs(ours - read).max()),
        relative,
        100 * likeliest,
        len(ours),
    )
    if relative > _ALLOWED.get(quant.name, 1.0):
        raise RunError(
            f"{file}: llama.cpp computes another model from it than transformers: the logits differ by "
            f"{relative:.1e} of their spread. Do not use it; report this"
        )


def _other_weights(opened: Opened) -> bool:
    """Whether a run on rounded weights is merged onto those before rounding; 8 bits round what they multiply, too."""
    config, rounding = opened.job.config, opened.base.rounding
    if rounding is not None:
        return rounding.bits == 8
    is_rounded = config is not None and bool(config.model.load_in_4bit or config.model.load_in_8bit)
    return stored_bits(opened.base.checkpoint) == 8 or (is_rounded and stored_bits(opened.base.checkpoint) is None)


def _same_ids(texts: Sequence[str], found: Sequence[list[int]], tokenizer: Any) -> int:
    same = 0
    for text, read in zip(texts, found, strict=True):
        ours = list(tokenizer(text)["input_ids"])
        same += ours == read
        if ours != read:
            log.warning("llama.cpp reads %r as other tokens: %s instead of %s", text, read[:12], ours[:12])
    return same


def _rms(values: npt.NDArray[Any]) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))
