"""Safetensors, read and written one tensor at a time.

The format is a header (names, types, shapes, places) and then the bytes. Since all shapes are known before any
value is, the header is written first and each tensor behind it as soon as it is made: of a model of any size the
host holds one tensor, and never a whole file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from luthier.errors import ModelError

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: the file that holds it, and what its header says."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Written:
    """A tensor to be written; `make` gives its value when its turn has come."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class Checkpoint:
    """The weights of a model folder, whatever they are called and however many files they are in.

    Attributes:
        stored: name -> what is known of it without reading it, in the order of the files.
        pickled: the weights are PyTorch's pickles, which are read without running any code of theirs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pickled = False
        self.stored: dict[str, Stored] = {}
        self._open: tuple[Path, Any] | None = None
        for file in self._files():
            self._scan(file)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        found = self.stored[name]
        if self._open is None or self._open[0] != found.file:
            self._open = None  # the last file is let go before the next is opened
            self._open = (found.file, self._opened(found.file))
        tensors = self._open[1]
        tensor: torch.Tensor = tensors[name] if self.pickled else tensors.get_tensor(name)
        return tensor

    def _files(self) -> list[Path]:
        for one, index in ((ONE, INDEX), (PICKLED, PICKLED_INDEX)):
            self.pickled = one == PICKLED
            if (self.folder / index).is_file():
                try:
                    places = json.loads((self.folder / index).read_text(encoding="utf-8"))["weight_map"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ModelError(f"{self.folder / index}: no index of weights: {error}") from error
                files = [self.folder / name for name in dict.fromkeys(places.values())]
                if missing := [file.name for file in files if not file.is_file()]:
                    raise ModelError(f"{self.folder}: {index} names {', '.join(missing)}, missing here")
                return files
            if (self.folder / one).is_file():
                return [self.folder / one]
        raise ModelError(f"{self.folder}: no weights here ({ONE}, {PICKLED} or an index of several)")

    def _opened(self, file: Path) -> Any:
        try:
            if not self.pickled:
                return safe_open(file, framework="pt")
            try:
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format from before torch 1.6 cannot be mapped
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # safetensors and pickle raise many kinds for a damaged file
            raise ModelError(f"{file}: cannot be read: {' '.join(str(error).split())[:200]}") from error

    def _scan(self, file: Path) -> None:
        tensors = self._opened(file)
        if self.pickled:
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor):
                    self.stored[name] = Stored(file, tuple(tensor.shape), tensor.dtype)
            return
        for name in tensors.keys():  # noqa: SIM118 - not a dict, and not iterable
            found = tensors.get_slice(name)
            try:
                dtype = _DTYPES[found.get_dtype()]
            except (KeyError, SafetensorError) as error:
                raise ModelError(
                    f"{file}: {name} is of type {found.get_dtype()}, which cannot be copied"
                ) from error
            self.stored[name] = Stored(file, tuple(found.get_shape()), dtype)


def write_shards(folder: Path, tensors: Sequence[Written], shard_bytes: int, stem: str = "model") -> int:
    """Write tensors in this order, in files of at most `shard_bytes` (a larger tensor has one to itself), and an
    index if there are several.

    Returns:
        The bytes of all tensors.
    """
    shards: list[list[Written]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.bytes for t in shards[-1]) + tensor.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    names = (
        [f"{stem}.safetensors"]
        if len(shards) == 1
        else [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard)
    total = sum(tensor.bytes for tensor in tensors)
    if len(shards) > 1:
        places = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / f"{stem}.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
    return total


def _write_file(path: Path, tensors: Sequence[Written]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        places = [at, at + tensor.bytes]
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": places,
        }
        at = places[1]
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # so that every tensor begins where its type may
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            value = tensor.make()
            assert tuple(value.shape) == tensor.shape and value.dtype == tensor.dtype, tensor.name
            file.write(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del value
        file.flush()
        os.fsync(file.fileno())
