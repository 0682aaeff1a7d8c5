"""An adapter folder as what it changes: low-rank additions by module, and parameters that it replaces whole."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from luthier.errors import ConfigError, ModelError
from luthier.models import adapter_files
from luthier.models.adapter import pattern_of, scale_of
from luthier.models.deltas import adapted_weight

_LOW_RANK = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?")


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to the weight of one module.

    Attributes:
        a, b: (r, in) and (out, r). magnitude: (out,), of DoRA.
        embedding: the module looks up rows of its weight, which is (in, out) then: tokens and width.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None
    embedding: bool = False

    @property
    def r(self) -> int:
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight (out, in)."""
        return int(self.b.shape[0]), int(self.a.shape[1])

    def onto(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight (out, in) with this added, in fp32."""
        return adapted_weight(weight, self.a, self.b, self.scale, self.magnitude)


@dataclass(frozen=True)
class Adapter:
    """Attributes:
    source: where it is from, for messages. config: `adapter_config.json`.
    deltas: module path -> addition. whole: parameter name -> tensor in its place.
    """

    source: str
    config: Mapping[str, Any]
    deltas: Mapping[str, Delta]
    whole: Mapping[str, torch.Tensor] = field(default_factory=dict)


def read_adapter(folder: Path) -> Adapter:
    """An adapter in PEFT's format.

    Raises:
        ModelError: no adapter, no weights, or tensors that do not belong together.
    """
    config = adapter_files.read_adapter_config(folder)
    tensors = adapter_files.read_adapter_tensors(folder)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        path = name.removeprefix(adapter_files.PREFIX)
        if match := _LOW_RANK.fullmatch(path):
            parts.setdefault(match[1], {})[match[2]] = tensor
        elif ".original_module." not in path:
            # Embeddings that were resized PEFT writes from inside of what it has wrapped them in.
            whole[re.sub(r"\.(base_layer|modules_to_save(\.default)?)\.", ".", path)] = tensor
    if not parts and not whole:
        raise ModelError(f"{folder}: the adapter's file has no tensors in it")
    deltas = {path: _delta(folder, config, path, found) for path, found in parts.items()}
    return Adapter(str(folder), config, deltas, whole)


def _delta(
    folder: Path, config: Mapping[str, Any], path: str, found: Mapping[str, torch.Tensor]
) -> Delta:
    embedding = "lora_embedding_A" in found
    first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if missing := {first, second} - found.keys():
        raise ModelError(f"{folder}: {path} has no {' and no '.join(sorted(missing))}: the file is not whole")
    a, b = found[first], found[second]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise ModelError(
            f"{folder}: A and B of {path} do not fit each other: {tuple(a.shape)}, {tuple(b.shape)}"
        )
    magnitude = found.get("lora_magnitude_vector")
    return Delta(
        a, b, _scale(config, path, int(a.shape[0])), None if magnitude is None else magnitude.flatten(), embedding
    )


def _scale(config: Mapping[str, Any], path: str, r: int) -> float:
    """The factor on B A of a module, with its own alpha where `alpha_pattern` has one."""
    own: Mapping[str, float] = config.get("alpha_pattern") or {}
    pattern = pattern_of(own, path)
    alpha = float(config["lora_alpha"] if pattern is None else own[pattern])
    return scale_of(alpha, r, bool(config.get("use_rslora")))


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """The two files of PEFT's format, into an existing folder; modules replaced whole are named in the config."""
    tensors: dict[str, torch.Tensor] = {}
    for path, delta in adapter.deltas.items():
        names = (
            {f"{path}.lora_embedding_A": delta.a, f"{path}.lora_embedding_B": delta.b}
            if delta.embedding
            else {f"{path}.lora_A.weight": delta.a, f"{path}.lora_B.weight": delta.b}
        )
        tensors |= names
        if delta.magnitude is not None:
            tensors[f"{path}.lora_magnitude_vector"] = delta.magnitude
    tensors |= adapter.whole
    named_whole = list(adapter.config.get("modules_to_save") or ())
    for module in sorted({name.rpartition(".")[0] for name in adapter.whole}):
        if not any(module == name or module.endswith(f".{name}") for name in named_whole):
            named_whole.append(module)
    config = {**adapter.config, "modules_to_save": named_whole or None}
    named = {adapter_files.PREFIX + name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / adapter_files.WEIGHTS, metadata={"format": "pt"})
    (folder / adapter_files.CONFIG).write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )


@dataclass(frozen=True)
class Share:
    """An adapter's folder, and how much of it is wanted."""

    folder: Path
    weight: float | None = None


def parse_share(text: str) -> Share:
    """`DIR` or `DIR:WEIGHT`. Raises ConfigError for a folder that is not there."""
    whole = Path(text).expanduser()
    name, _, number = text.rpartition(":")
    if whole.exists() or not name:
        return Share(whole)
    try:
        weight = float(number)
    except ValueError:
        return Share(whole)
    if not math.isfinite(weight):
        raise ConfigError(f"{text}: {number} is no weight")
    return Share(Path(name).expanduser(), weight)
