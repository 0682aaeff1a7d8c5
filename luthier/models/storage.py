"""Frozen weights in the format of their checkpoint, where that is smaller than what is multiplied in.

Checkpoints are mostly in 16 bits, and a CPU computes in fp32. Widening a weight where it is used gives the same
numbers as widening all of them at load, takes half the memory, and spares the copy: what is not widened stays a
mapped file. All else (norms, biases, trained modules, anything whose readers are unknown) is widened at once.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from luthier.artifacts.source import local
from luthier.config import ModelConfig
from luthier.models.frozen import FrozenLinear
from luthier.models.kinds import one_of_each_layer
from luthier.models.load import decoder_of, embeddings_of

log = logging.getLogger("luthier")

# Reading at each use costs some per cent of a step, most where multiplies are small: not worth less than this.
WORTH_BYTES = 2**29
# Largest relative difference of a token's hidden state from that with widened weights; the multiplies are the same.
TOLERANCE = 1e-5

_16_BITS = {"BF16": torch.bfloat16, "F16": torch.float16}


def smaller_dtype(
    model: ModelConfig, model_config: Any, tokens: int, compute: torch.dtype
) -> torch.dtype | None:
    """The 16-bit dtype that all tensors of a checkpoint have, if leaving them in it is worth it.

    Args:
        tokens: size of the tokenizer; embeddings that have to grow are computed with.
        compute: what is multiplied in.
    """
    if compute != torch.float32 or tokens > (_vocabulary(model_config) or 0):
        return None
    found: Counter[str] = Counter()
    for path in checkpoint_files(model):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 -- it is no dict
                    part = file.get_slice(name)
                    found[part.get_dtype()] += math.prod(part.get_shape())
        except (SafetensorError, OSError):
            return None  # loading it will say what is wrong
    # One tensor that is stored more finely would lose by being loaded in 16 bits.
    if len(found) != 1 or 2 * found.total() < WORTH_BYTES:
        return None
    return _16_BITS.get(next(iter(found)))


def settle(model: PreTrainedModel, compute: torch.dtype) -> None:
    """Make a model that was loaded in 16 bits, adapter and all, compute in another dtype.

    The linear layers of the decoder, the embeddings and the head stay as they are stored, if they are frozen and
    plain; the numbers are proven to be those of a model that is widened as a whole.
    """
    restore_buffers(model, compute)
    kept: list[torch.Tensor] = _narrow_linears(model, compute)
    embeddings, head = embeddings_of(model), model.get_output_embeddings()
    # An adapter of the embeddings is their forward, and computes in the dtype of their weight.
    adapted = "forward" in vars(embeddings)
    plain = type(embeddings) is nn.Embedding and not adapted and not embeddings.weight.requires_grad
    plain_head = type(head) is nn.Linear and not head.weight.requires_grad and head.bias is None
    if plain and (plain_head or head is None or head.weight is not embeddings.weight):
        embeddings.register_forward_hook(lambda module, args, out: out.to(compute))
        kept.append(embeddings.weight)
    if plain_head and (plain or head.weight is not embeddings.weight):
        model.set_output_embeddings(FrozenLinear(head))
        kept.append(head.weight)
    ids = {id(parameter) for parameter in kept}
    for parameter in model.parameters():
        if id(parameter) not in ids and parameter.is_floating_point():
            parameter.data = parameter.data.to(compute)
    if any(isinstance(m, FrozenLinear) and m.storage != "dense" for m in model.modules()):
        # The rest of the mapped file was read once, for quantising it, and need not stay.
        for weight in {id(p): p for p in kept}.values():
            weight.data = weight.data.clone()
    if problem := _problem(model, compute):
        widen(model, compute)
        log.warning("frozen weights are widened to %s: %s", str(compute)[6:], problem)
        return
    stored = sum(parameter.nbytes for parameter in {id(p): p for p in kept}.values())
    log.info(
        "frozen weights stay in %s as the checkpoint has them, %.1f GiB, and are widened to %s where they are used: "
        "the same numbers",
        str(next(iter(kept)).dtype)[6:],
        stored / 2**30,
        str(compute)[6:],
    )


def widen(model: nn.Module, compute: torch.dtype) -> None:
    """All parameters in the compute dtype."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(compute)


def _narrow_linears(model: PreTrainedModel, compute: torch.dtype) -> list[torch.Tensor]:
    """Frozen linear layers of the decoder read their weights from now on; returns those weights."""
    kept: list[torch.Tensor] = []
    decoder = decoder_of(model)
    for name, module in list(decoder.named_modules()):
        if type(module) in (nn.Linear, Conv1D) and not any(p.requires_grad for p in module.parameters()):
            narrow = FrozenLinear(module).train(module.training)
            decoder.set_submodule(name, narrow)
            kept.append(narrow.weight)
        elif isinstance(module, FrozenLinear) and module.storage == "dense":
            kept.append(module.weight)
        elif isinstance(module, FrozenLinear) and module.storage == "4bit":
            # Codes times scales, not rounded again to what they were quantised from.
            cast(Any, module.weight).quant_state.dtype = compute
    return kept


def _problem(model: PreTrainedModel, compute: torch.dtype) -> str:
    """Empty if the decoder's first layers, as many as show every kind, give what they give when widened."""
    device = embeddings_of(model).weight.device
    ids = torch.randint(
        embeddings_of(model).weight.shape[0], (1, 24), generator=torch.Generator().manual_seed(4)
    )
    was_training = model.training
    model.eval()
    with torch.no_grad(), one_of_each_layer(model):
        decoder = decoder_of(model)
        try:
            found = decoder(input_ids=ids.to(device), use_cache=False).last_hidden_state
        except RuntimeError as error:
            return f"{type(model).__name__} reads weights past their layers ({' '.join(str(error).split())[:100]})"
        linears = [m for m in decoder.modules() if isinstance(m, FrozenLinear) and m.storage == "dense"]
        narrow = [(m, m.weight.data) for m in linears]
        for layer, data in narrow:
            layer.weight.data = data.to(compute)
        expected = decoder(input_ids=ids.to(device), use_cache=False).last_hidden_state
        for layer, data in narrow:
            layer.weight.data = data
    model.train(was_training)
    if found.dtype != compute:
        return f"{type(model).__name__} takes its dtype from a weight"
    worst = float(((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)).max())
    return "" if worst <= TOLERANCE else f"hidden states differ by {worst:.0e}"


def restore_buffers(model: PreTrainedModel, compute: torch.dtype) -> None:
    """Buffers that a model computes for itself are rounded when it is made in 16 bits: take those of a model that is
    made in the compute dtype, without its weights. Buffers of the checkpoint are widened."""
    rounded = [
        (f"{path}.{name}".lstrip("."), module, name)
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_floating_point() and buffer.element_size() < compute.itemsize
    ]
    if not rounded:
        return
    with init_empty_weights(include_buffers=False), no_init_weights():
        exact = dict(type(model)._from_config(model.config, dtype=compute).named_buffers())
    for path, module, name in rounded:
        buffer = getattr(module, name)
        own = name in module._non_persistent_buffers_set
        buffer.data = (exact[path] if own else buffer.data).to(buffer.device, compute)


def _vocabulary(model_config: Any) -> int | None:
    return getattr(model_config.get_text_config(decoder=True), "vocab_size", None)


def checkpoint_files(model: ModelConfig) -> list[Path]:
    """The checkpoint's safetensors files; none where it has others. Loading will need them all anyway."""

    def find(name: str) -> str | None:
        return cached_file(
            local(model.base_model),
            name,
            revision=model.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )

    if index := find("model.safetensors.index.json"):
        names = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    else:
        names = {"model.safetensors"}
    found = [find(name) for name in sorted(names)]
    return [Path(path) for path in found if path is not None] if all(found) else []
