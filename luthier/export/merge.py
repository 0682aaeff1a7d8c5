"""An adapter merged into its base, tensor by tensor, from the base's files to new ones.

The model is never loaded. Its modules and shapes come from its config alone; each tensor of the checkpoint is
read, gets what the adapter adds to it in fp32, is rounded once and written, so that the host holds little more than
the largest of them. Names and layout stay the checkpoint's, and which parameter a name stands for is asked of
transformers, which renames some at load. Where it also computes parameters from several tensors (the experts of a
layer as one) and the adapter changes such a one, there is nothing to add to: those models are loaded whole.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from luthier.errors import ModelError
from luthier.export.adapters import Adapter
from luthier.export.quantised import Rounding, belongs_to_another, is_packed, rounded_modules, unpacked
from luthier.export.shards import Checkpoint, Written

log = logging.getLogger("luthier")


class CannotStreamError(Exception):
    """What the adapter changes is in no tensor of the checkpoint by itself; the text says what."""


@dataclass(frozen=True)
class Base:
    """What is merged into.

    Attributes:
        name: as the user calls it. model: without weights.
        rounding: how its linear layers are quantised first; None takes the tensors as they are.
        skip: modules that quantising leaves alone; None for transformers' own choice.
        tokens: size of the tokenizer, for which embeddings and head must have room.
    """

    name: str
    model: PreTrainedModel
    checkpoint: Checkpoint
    rounding: Rounding | None = None
    skip: list[str] | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Plan:
    """Attributes:
    tensors: what to write, in order. rows: of embeddings and head. untied: the head gets a weight of its own.
    grown: embeddings or head had to get rows that neither base nor adapter has. rounded: how many weights were
        quantised.
    """

    tensors: list[Written]
    rows: int
    untied: bool
    grown: bool
    rounded: int


def names_in_model(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """For each name in a checkpoint the parameter that transformers makes of it, and whether the tensor is that
    parameter (else transformers computes the parameter from this and others)."""
    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    prefix = model.base_model_prefix
    found = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        found[key] = (name, pattern is None)
    return found


def without_copies(base: Base, adapter: Adapter) -> Adapter:
    """The adapter without the base's own weights, which PEFT writes beside an adapter on embeddings."""
    places = names_in_model(base.model, base.checkpoint.stored)
    keys = {name: key for key, (name, plain) in places.items() if plain}
    copies = {
        name
        for name, tensor in adapter.whole.items()
        if name.removesuffix(".weight") in adapter.deltas
        and (key := keys.get(name)) is not None
        and base.checkpoint.stored[key].shape == tuple(tensor.shape)
        and torch.equal(base.checkpoint.read(key).float(), tensor.float())
    }
    whole = {name: tensor for name, tensor in adapter.whole.items() if name not in copies}
    return replace(adapter, whole=whole)


def plan_merge(base: Base, adapter: Adapter, dtype: torch.dtype) -> Plan:
    """What a merge writes; everything that does not fit is found here, before anything is written.

    Raises:
        ModelError: the adapter is not for this base, or the checkpoint is not whole.
        CannotStreamError: it fits, and cannot be merged tensor by tensor.
    """
    return _Planner(base, adapter, dtype).plan()


@dataclass
class _Planner:
    base: Base
    adapter: Adapter
    dtype: torch.dtype
    shapes: dict[str, tuple[int, ...]] = field(init=False)
    keys: dict[str, str] = field(init=False, default_factory=dict)  # parameter -> the tensor that is it
    computed: set[str] = field(init=False, default_factory=set)  # parameters that transformers computes
    rounded: set[str] = field(init=False, default_factory=set)  # parameters that are quantised first

    def plan(self) -> Plan:
        base, model = self.base, self.base.model
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.modules = dict(model.named_modules())
        self.tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        stored = [key for key in base.checkpoint.stored if not belongs_to_another(base.checkpoint, key)]
        self.places = names_in_model(model, stored)
        for key, (name, plain) in self.places.items():
            if not plain:
                self.computed.add(name)
            elif name in self.shapes:
                self.keys[name] = key
        self.vocabulary, self.rows = self._vocabulary()
        self._check_base()
        self._check_adapter()
        if base.rounding is not None:
            self._choose_rounded()
        untied = self._unties()
        main = self._main_dtype(stored)
        tensors = [self._copied_or_changed(key, main) for key in stored]
        if untied:
            missing = [name for name in (*self.tied, *self.tied.values()) if name not in self.keys]
            for name in dict.fromkeys(missing):
                if names_in_model(model, [name])[name] != (name, True):
                    raise CannotStreamError(f"{name} has no name of its own in this checkpoint")
                tensors.append(self._changed(name, name, self.dtype))
        return Plan(tensors, self.rows, untied, self._grows(), len(self.rounded))

    # --- what there is ------------------------------------------------------------------------------------

    def _vocabulary(self) -> tuple[set[str], int]:
        """Parameters with a row for each token, and how many rows they get."""
        ends = (self.base.model.get_input_embeddings(), self.base.model.get_output_embeddings())
        paths = [path for path, module in self.modules.items() if any(module is end for end in ends)]
        names = {f"{path}.{part}" for path in paths for part in ("weight", "bias")} & self.shapes.keys()
        rows = [self.shapes[name][0] for name in names]
        rows += [tensor.shape[0] for name, tensor in self.adapter.whole.items() if name in names]
        rows += [d.shape[d.embedding] for path, d in self.adapter.deltas.items() if path in paths]
        return names, max([*rows, self.base.tokens])

    def _shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter in the result."""
        shape = self.shapes[name]
        return (self.rows, *shape[1:]) if name in self.vocabulary else shape

    def _grows(self) -> bool:
        return any(
            (self.adapter.whole[name].shape[0] if name in self.adapter.whole else self.shapes[name][0]) < self.rows
            for name in self.vocabulary
        )

    def _source(self, name: str) -> str:
        """The tensor that a parameter begins as: its own, or that of one it is tied to."""
        if name in self.keys:
            return self.keys[name]
        group = {self.tied.get(name, name), *(t for t, s in self.tied.items() if s == self.tied.get(name, name))}
        return next(self.keys[other] for other in sorted(group) if other in self.keys)

    def _main_dtype(self, stored: list[str]) -> torch.dtype:
        """The format of most of the checkpoint; what is kept in another one is kept so on purpose."""
        found: Counter[torch.dtype] = Counter()
        for key in stored:
            tensor = self.base.checkpoint.stored[key]
            if tensor.dtype.is_floating_point:
                found[tensor.dtype] += torch.Size(tensor.shape).numel()
        return found.most_common(1)[0][0] if found else torch.float32

    # --- whether it fits ----------------------------------------------------------------------------------

    def _check_base(self) -> None:
        there = self.keys.keys() | self.computed
        missing = [
            name
            for name in self.shapes
            if name not in there
            and self.tied.get(name) not in there
            and not any(source == name and target in there for target, source in self.tied.items())
        ]
        wrong = [
            f"{key} is {found}, and its config says {self.shapes[name]}"
            for name, key in self.keys.items()
            if not is_packed(self.base.checkpoint, key)
            and (found := self.base.checkpoint.stored[key].shape) != self.shapes[name]
        ]
        if missing or wrong:
            says = [f"{len(missing)} weights are missing ({_listed(missing)})"] if missing else []
            raise ModelError(f"{self.base.name}: the checkpoint is not whole: {'; '.join([*says, *wrong[:3]])}")

    def _check_adapter(self) -> None:
        adapter = self.adapter
        unknown = sorted(name for name in adapter.whole if name not in self.shapes)
        wrong, elsewhere = [], []
        for path, delta in adapter.deltas.items():
            # PEFT writes the second of a layer's parameters with adapters as the inside of the first.
            module, name = self.modules.get(path.split(".base_layer")[0]), f"{path}.weight"
            if module is None:
                unknown.append(path)
                continue
            if not isinstance(module, nn.Linear | Conv1D | nn.Embedding):
                elsewhere.append(path)
                continue
            expected = self._shape(name)[::-1] if _is_turned(module) else self._shape(name)
            if delta.embedding != isinstance(module, nn.Embedding):
                kind = "embeddings" if delta.embedding else "a linear layer"
                wrong.append(f"{path}: the adapter is for {kind}, the base has {type(module).__name__}")
            elif delta.shape != expected:
                wrong.append(f"{path}: the adapter is for {delta.shape}, the base has {expected}")
            elif name in self.computed:
                elsewhere.append(path)
        for name, tensor in adapter.whole.items():
            if name not in self.shapes:
                continue
            shape, found = self.shapes[name], tuple(tensor.shape)
            if found[1:] != shape[1:] or (name not in self.vocabulary and found != shape):
                wrong.append(f"{name}: the adapter has {found}, the base {shape}")
            elif name in self.computed:
                elsewhere.append(name)
        if unknown or wrong:
            says = [f"{len(unknown)} of its modules are not in the base ({_listed(unknown)})"] if unknown else []
            says += [f"{len(wrong)} have another shape ({'; '.join(wrong[:3])})"] if wrong else []
            raise ModelError(
                f"{adapter.source}: the adapter does not fit {self.base.name}: {'; '.join(says)}. Name the model "
                "that it was trained on with --base-model"
            )
        if elsewhere:
            raise CannotStreamError(
                f"{_listed(elsewhere)}: transformers makes these of several tensors of the checkpoint"
            )

    def _unties(self) -> bool:
        """Whether parameters that are one in the base are several in the result."""
        changed = {f"{path}.weight" for path in self.adapter.deltas} | self.adapter.whole.keys()
        for source in set(self.tied.values()):
            group = [source, *(target for target, other in self.tied.items() if other == source)]
            touched = [name for name in group if name in changed]
            same = all(name in self.adapter.whole for name in group) and all(
                torch.equal(self.adapter.whole[name], self.adapter.whole[source]) for name in group
            )
            if touched and not same:
                return True
        return False

    def _choose_rounded(self) -> None:
        for path in rounded_modules(self.base.model, self.base.skip):
            name = f"{path}.weight"
            if name in self.computed:
                raise CannotStreamError(f"{name} is quantised, and made of several tensors of the checkpoint")
            self.rounded.add(name)

    # --- values -------------------------------------------------------------------------------------------

    def _copied_or_changed(self, key: str, main: torch.dtype) -> Written:
        name, plain = self.places[key]
        stored = self.base.checkpoint.stored[key]
        packed = is_packed(self.base.checkpoint, key)
        changed = f"{name.removesuffix('.weight')}" in self.adapter.deltas or name in self.adapter.whole
        dtype = self.dtype if packed or changed or stored.dtype == main else stored.dtype
        if plain and name in self.shapes:
            return self._changed(key, name, dtype)
        return Written(key, stored.shape, dtype, lambda: self._rounded_once(key, self._read(key), dtype))

    def _changed(self, key: str, name: str, dtype: torch.dtype) -> Written:
        return Written(key, self._shape(name), dtype, lambda: self._value(name, dtype))

    def _value(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        path, _, part = name.rpartition(".")
        module = self.modules[path]
        value = self.adapter.whole[name] if name in self.adapter.whole else self._base_value(name, module)
        if name in self.vocabulary and value.shape[0] < self.rows:
            value = _grown(value, self.rows)
        delta = self.adapter.deltas.get(path)
        if delta is not None and part == "weight":
            value = delta.onto(value.T).T if _is_turned(module) else delta.onto(value)
        return self._rounded_once(name, value, dtype)

    def _base_value(self, name: str, module: nn.Module) -> torch.Tensor:
        source = self._source(name)
        if is_packed(self.base.checkpoint, source):  # bitsandbytes keeps that of a Conv1D as (out, in) too
            value = unpacked(self.base.checkpoint, source)
            return value.T if isinstance(module, Conv1D) else value
        value = self._read(source)
        if name not in self.rounded or self.base.rounding is None:
            return value
        return self.base.rounding(value.T).T if isinstance(module, Conv1D) else self.base.rounding(value)

    def _read(self, key: str) -> torch.Tensor:
        return self.base.checkpoint.read(key)

    def _rounded_once(self, name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        result = value.to(dtype)
        if dtype == torch.float16 and value.dtype != dtype and not torch.isfinite(result).all():
            raise ModelError(f"{name}: float16 cannot hold its largest entries; merge with --dtype bfloat16")
        return result


def _is_turned(module: nn.Module) -> bool:
    """Whether a module's weight is (in, out)."""
    return isinstance(module, Conv1D | nn.Embedding)


def _grown(value: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows for added tokens: the mean of the others, as `load_model` begins them."""
    mean = value.float().mean(0, keepdim=True).to(value.dtype)
    return torch.cat([value, mean.expand(rows - value.shape[0], *mean.shape[1:])])


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def describe(config: Mapping[str, Any], plan: Plan, dtype: torch.dtype, *, dequantised: bool) -> dict[str, Any]:
    """The base's `config.json` as it is true of the result."""
    described = dict(config)
    sections = [described]
    for name, inner in described.items():
        if name == "text_config" and isinstance(inner, dict):
            described[name] = dict(inner)
            sections.append(described[name])
    if dequantised:
        described.pop("quantization_config", None)
    for section in sections:
        for key in ("dtype", "torch_dtype"):
            if key in section or (key == "dtype" and section is described and "torch_dtype" not in section):
                section[key] = str(dtype)[6:]
        if plan.untied and ("tie_word_embeddings" in section or section is described):
            section["tie_word_embeddings"] = False
        if section.get("vocab_size", plan.rows) < plan.rows:
            section["vocab_size"] = plan.rows
    return described
