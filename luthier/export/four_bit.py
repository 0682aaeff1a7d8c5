"""The merged model in 4 bits (NF4, double quantisation), as bitsandbytes saves it: a folder that transformers opens as
it is, at a quarter of the size.

Merged tensor by tensor like the others, each quantised when its turn has come. What stands around the codes has a size
that is known beforehand, but for one line of JSON; that is filled up with spaces, so that the file's header can be
written first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

import luthier
from luthier.config import Config
from luthier.errors import ModelError
from luthier.export import folder as folders
from luthier.export.merge import CannotStreamError, Plan, describe, names_in_model, plan_merge
from luthier.export.opened import Opened, choose_target_dtype
from luthier.export.quantised import rounded_modules
from luthier.export.room import claim_room, in_words
from luthier.export.run import say_plan, write_generation_config
from luthier.export.shards import Written, write_shards

log = logging.getLogger("luthier")

_BLOCK, _BLOCK_OF_SCALES, _STATE_BYTES = 64, 256, 320


def export_four_bit(opened: Opened, run: Config | None, *, shard_bytes: int) -> Path:
    """Write the folder of the job.

    Raises:
        LuthierError: something does not fit; the folder is then as it was before.
    """
    functional = _bitsandbytes()
    job, base = opened.job, opened.base
    dtype = choose_target_dtype(None, opened.described, base.checkpoint)
    opened.say_weights()
    try:
        plan = plan_merge(base, opened.adapter, dtype)
    except CannotStreamError as error:
        raise ModelError(f"{base.name}: {error}; merge it first, with luthier export --to merged") from error
    say_plan(plan, base)
    tensors, count = _quantised(opened, plan, dtype, functional)
    claim_room(sum(tensor.bytes for tensor in tensors), job.out)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    described = describe(opened.described, plan, dtype, dequantised=True)
    with folders.new_folder(job.out) as partial:
        size = write_shards(partial, tensors, shard_bytes)
        folders.write_json(partial / "config.json", {**described, "quantization_config": settings.to_dict()})
        folders.copy_beside_weights(opened.source, partial)
        opened.tokens.write(partial)
        write_generation_config(opened.source, partial, run, opened.tokens.tokenizer, base)
        record = {
            "luthier": luthier.__version__,
            "base_model": job.base_model,
            "base_weights": opened.how,
            "adapters": [str(folder) for folder in job.folders],
            "dtype": "nf4",
        }
        folders.write_json(partial / folders.RECORD, record)
    log.info(
        "%d of %d tensors in 4 bits, the others in %s; %s", count, len(plan.tensors), str(dtype)[6:], in_words(size)
    )
    log.info("the model in 4 bits is in %s", job.out)
    return job.out


def _quantised(
    opened: Opened, plan: Plan, dtype: torch.dtype, functional: Any
) -> tuple[list[Written], int]:
    """The plan's tensors with linear layers in 4 bits, and how many these are."""
    model = opened.base.model
    modules = dict(model.named_modules())
    chosen = {f"{path}.weight" for path in rounded_modules(model, None)}
    places = names_in_model(model, [tensor.name for tensor in plan.tensors])
    tensors: list[Written] = []
    count = 0
    for tensor in plan.tensors:
        name, plain = places[tensor.name]
        if not plain or name not in chosen:
            tensors.append(tensor)
            continue
        count += 1
        turned = isinstance(modules[name.rpartition(".")[0]], Conv1D)
        tensors += _Packed(tensor, dtype, functional, turned=turned).parts()
    if not count:
        raise ModelError(f"{opened.base.name}: it has no linear layers that bitsandbytes would quantise")
    return tensors, count


class _Packed:
    """One weight as codes, scales and their description, quantised when the first of these is asked for and let go with
    the last."""

    def __init__(self, tensor: Written, dtype: torch.dtype, functional: Any, *, turned: bool) -> None:
        self.tensor, self.dtype, self.functional, self.turned = tensor, dtype, functional, turned
        self.made: dict[str, torch.Tensor] = {}

    def parts(self) -> list[Written]:
        count = math.prod(self.tensor.shape)
        blocks = -(-count // _BLOCK)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "": ((-(-count // 2), 1), torch.uint8),
            ".absmax": ((blocks,), torch.uint8),
            ".nested_absmax": ((-(-blocks // _BLOCK_OF_SCALES),), torch.float32),
            ".quant_map": ((16,), torch.float32),
            ".nested_quant_map": ((256,), torch.float32),
            ".quant_state.bitsandbytes__nf4": ((_STATE_BYTES,), torch.uint8),
        }
        name = self.tensor.name
        return [Written(name + part, shape, dtype, self._taker(part)) for part, (shape, dtype) in shapes.items()]

    def _taker(self, part: str) -> Callable[[], torch.Tensor]:
        return lambda: self._take(part)

    def _take(self, part: str) -> torch.Tensor:
        if not self.made:
            self._make()
        return self.made.pop(part)

    @torch.no_grad()
    def _make(self) -> None:
        value = self.tensor.make().to(self.dtype)
        value = value.T.contiguous() if self.turned else value.contiguous()
        codes, state = self.functional.quantize_4bit(
            value, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        self.made = {"": codes}
        for key, tensor in state.as_dict(packed=True).items():
            self.made[f".{key}"] = tensor
        described = ".quant_state.bitsandbytes__nf4"
        text = bytes(self.made[described].numpy()).ljust(_STATE_BYTES)
        self.made[described] = torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise ModelError('4 bits are written with bitsandbytes: pip install "luthier[bitsandbytes]"') from error
    return functional
