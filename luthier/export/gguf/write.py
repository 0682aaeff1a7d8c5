"""A GGUF file, written tensor by tensor: each is merged, turned as llama.cpp wants it, quantised once, and let go."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from luthier.errors import ModelError
from luthier.export.gguf import families, quants
from luthier.export.gguf.families import Array, Family
from luthier.export.gguf.quants import Quant
from luthier.export.gguf.vocabulary import Vocabulary
from luthier.export.merge import Base, Plan, names_in_model
from luthier.export.shards import Written

log = logging.getLogger("luthier")

# Of a Gemma 3 that sees: its text model is what is exported.
_EYES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


@dataclass(frozen=True)
class Entry:
    """A tensor of the file; `make` gives its values when its turn has come."""

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], Array]

    @property
    def bytes(self) -> int:
        return quants.bytes_of(self.shape, self.kind)


@dataclass(frozen=True)
class Document:
    """What a file will hold, all of it checked. `config` is that of the text model."""

    name: str
    config: Any
    family: Family
    vocabulary: Vocabulary
    entries: list[Entry]
    rows: int
    about: Mapping[str, Any]

    def size(self, quant: Quant) -> int:
        """Bytes, nearly: metadata are counted by their texts."""
        texts = sum(len(text) + 24 for text in (*self.vocabulary.tokens, *self.vocabulary.merges))
        chosen = (quants.bytes_of(e.shape, self._kind(e, quant)) for e in self.entries)
        return texts + sum(chosen)

    def _kind(self, entry: Entry, quant: Quant) -> str:
        if entry.kind == "F32" and len(entry.shape) < 2:
            return "F32"
        ends = {"output.weight"} if any(e.name == "output.weight" for e in self.entries) else {"token_embd.weight"}
        return quants.format_of(entry.name, entry.shape, quant, head=entry.name in ends)


def text_config(base: Base) -> Any:
    return base.model.config.get_text_config(decoder=True)


def list_tensors(base: Base, plan: Plan, config: Any, family: Family) -> list[Entry]:
    """The tensors of a plan under the names of GGUF, in llama.cpp's rows, as fp32.

    Raises:
        ModelError: the model has weights that llama.cpp's family has no place for.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    arch = next(each for each in MODEL_ARCH if each.name.lower() == family.arch)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    tied = bool(config.tie_word_embeddings) and not plan.untied
    places = names_in_model(base.model, [tensor.name for tensor in plan.tensors])
    entries, unknown, left = [], [], 0
    for tensor in plan.tensors:
        name = places[tensor.name][0]
        if name.startswith(_EYES):
            left += 1
            continue
        name = re.sub(r"^(model\.)?language_model\.", "model.", name).replace("model.model.", "model.")
        if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            unknown.append(name)
            continue
        make = _maker(tensor, families.changed(name, config, family))
        entries.append(Entry(found, tensor.shape, "" if len(tensor.shape) > 1 else "F32", make))
    if unknown:
        raise ModelError(
            f"{base.name}: llama.cpp's {family.arch} has no place for {', '.join(unknown[:3])}"
            + (": embeddings and head have to be one tensor there" if unknown == ["lm_head.weight"] else "")
        )
    if left:
        log.warning("%d tensors of what sees pictures are left out: the file holds the text model", left)
    return sorted(entries, key=_order)


def write(document: Document, quant: Quant, target: Path) -> int:
    """The file, under another name until it is whole; its bytes.

    Raises:
        OSError: the disk refuses. ModelError: a value that the format cannot hold.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(target, document.family.arch)
    try:
        writer.add_type("model")
        for key, value in document.about.items():
            getattr(writer, f"add_{key}")(value)
        writer.add_file_type(quant.kind)
        writer.add_quantization_version(2)
        families.describe(writer, document.config, document.family, document.rows)
        extra = families.describe_rope(writer, document.config, document.family, document.name)
        document.vocabulary.describe(writer)
        entries = [
            *(Entry(name, value.shape, "F32", _constant(value)) for name, value in extra.items()),
            *(Entry(e.name, e.shape, document._kind(e, quant), e.make) for e in document.entries),
        ]
        for entry in entries:
            which = GGMLQuantizationType[entry.kind]
            # Formats in blocks are told by their bytes.
            writer.add_tensor_info(entry.name, entry.shape, _float32(), entry.bytes, raw_dtype=which)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(quants.quantised(entry.make(), entry.kind, entry.name))
        writer.flush()
    finally:
        writer.close()
    with target.open("rb+") as file:
        os.fsync(file.fileno())
        return file.seek(0, os.SEEK_END)


def _float32() -> Any:
    import numpy as np

    return np.dtype(np.float32)


def _constant(value: Array) -> Callable[[], Array]:
    return lambda: value


def _maker(tensor: Written, change: Callable[[Array], Array]) -> Callable[[], Array]:
    def make() -> Array:
        value: npt.NDArray[Any] = tensor.make().detach().float().contiguous().numpy()
        return change(value)

    return make


def _order(entry: Entry) -> tuple[int, str]:
    """Embeddings, layers, what is behind them."""
    layer = re.match(r"blk\.(\d+)\.", entry.name)
    if layer is None:
        return (-1 if entry.name == "token_embd.weight" else 1 << 30), entry.name
    return int(layer[1]), entry.name
