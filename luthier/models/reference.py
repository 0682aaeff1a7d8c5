"""The reference of preference tuning: the model as the run begins, without a second copy of it.

An adapter mostly begins where it changes nothing (B = 0, or a part that was taken out of the base weight), and the
model with its adapters off then is the model as it began. Whatever begins elsewhere keeps a copy of its starting
values, and of nothing else: an adapter that is trained further, LoftQ's, modules that are trained as a whole, the
weights of full fine-tuning. While the reference is active those copies stand in the parameters' place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from luthier.models.adapter import Adapter
from luthier.models.lora import adapters

# Bytes of a tensor that are hashed at a time; what is made of them takes a few times as much.
_CHUNK = 2**24
# Large odd numbers for `_mixed`: those of splitmix64 and xxHash64, as signed integers.
_ODD = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x3D4D51C2D82B14B1)
# What of a config says where a model came from or how it is run, and not what it computes.
_NOT_COMPUTED = (
    "_name_or_path",
    "architectures",
    "dtype",
    "transformers_version",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


class Reference:
    """The model as it was when this was made.

    Made by `Reference.of`, once the model is built and before a checkpoint is loaded into it. Where parameters are
    swapped, a forward pass of the policy must not have its backward pass still to come.

    Attributes:
        off: the adapters that are off while the reference is active.
        starts: each parameter whose starting values are kept, with them, in the parameter's dtype, on its device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        off: Sequence[Adapter],
        starts: Sequence[tuple[nn.Parameter, torch.Tensor]],
    ) -> None:
        self.model, self.off, self.starts = model, tuple(off), tuple(starts)

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, *, copies: bool = True) -> Reference:
        """The reference that a model with its present values is.

        Args:
            copies: false keeps no starting values, for a reference that is asked before anything is trained only.
        """
        off = [adapter for adapter in adapters(model).values() if adapter.idle()]
        starts = [(p, _live(p).detach().clone()) for p in needed(model, off)] if copies else []
        return cls(model, off, starts)

    @property
    def nbytes(self) -> int:
        """Bytes of the starting values that are kept."""
        return sum(start.nbytes for _, start in self.starts)

    def describe(self) -> str:
        """What the reference is, for the log."""
        if not self.starts:
            return "reference: the base model, adapters off" if self.off else "reference: the model as it begins"
        count = sum(start.numel() for _, start in self.starts)
        size = self.nbytes / 2**20
        size_text = f"{size / 1024:.1f} GiB" if size >= 1024 else f"{size:.1f} MiB"
        others = ", other adapters off" if self.off else ""
        return f"reference: a copy of the {count:,} starting values that training changes ({size_text}){others}"

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the model computes the reference: no dropout, no gradients. Afterwards it is as it was before, to
        the last bit, also if something is raised."""
        training = [module for module in self.model.modules() if module.training]
        enabled = [adapter.enabled for adapter in self.off]
        live = [_live(parameter) for parameter, _ in self.starts]
        try:
            for module in training:
                module.training = False
            for adapter in self.off:
                adapter.enabled = False
            self._put([start for _, start in self.starts])
            with torch.no_grad():
                yield
        finally:
            self._put(live)
            for adapter, was in zip(self.off, enabled, strict=True):
                adapter.enabled = was
            for module in training:
                module.training = True

    def _put(self, values: Sequence[torch.Tensor]) -> None:
        """Other storage into the parameters; copies that are kept of them by their version are made anew."""
        parameters = [parameter for parameter, _ in self.starts]
        for parameter, value in zip(parameters, values, strict=True):
            share = _share(parameter)
            if share is None:
                parameter.data = value
                continue
            if hasattr(parameter, "ds_tensor"):
                cast(Any, parameter).partition()  # what is gathered of it has the other values
            share.copy_(value)
        torch.autograd.graph.increment_version(parameters)

    def fingerprint(self) -> str:
        """A hash of all that the reference computes with: the same in a run with other adapters on the same base."""
        with self.active():
            return fingerprint(self.model, self.off)


def _share(parameter: Any) -> torch.Tensor | None:
    """Where this process's share of a parameter lies, if it has a share of it only (a DTensor, or what DeepSpeed keeps
    beside it): what gathers it knows that memory."""
    if hasattr(parameter, "ds_tensor"):
        return cast(torch.Tensor, parameter.ds_tensor)
    return cast(torch.Tensor, parameter.detach()) if hasattr(parameter, "placements") else None


def _live(parameter: torch.Tensor) -> torch.Tensor:
    share = _share(parameter)
    return parameter.data if share is None else share.clone()


def needed(model: nn.Module, off: Collection[Adapter]) -> list[nn.Parameter]:
    """The trained parameters whose starting values a reference needs, beside the base: those of no adapter in
    `off`."""
    without = {id(tensor) for adapter in off for tensor in adapter.tensors().values()}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in without]


@torch.no_grad()
def fingerprint(model: PreTrainedModel, without: Collection[Adapter] = ()) -> str:
    """A hash of what a model computes with: names, shapes, dtypes and bits of all weights and buffers, and its config.

    Where its files lie makes no difference. Weights are read once, on their device, two integers of each are brought
    to the host.
    Of weights that are shared out over processes it is of this one's shares.

    Args:
        without: adapters that are left out, since they are off.
    """
    left_out = {id(tensor) for adapter in without for tensor in adapter.tensors().values()}
    names: list[Any] = [_computed(model.config.to_dict())]
    sums: list[torch.Tensor] = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) in left_out:
            continue
        for part, stored in _stored(tensor).items():
            names.append((name, part, str(stored.dtype), tuple(stored.shape)))
            sums.append(_two_sums(stored))
    # What is added stands with a factor, which is in no tensor.
    for path, adapter in adapters(model).items():
        if adapter not in without or getattr(adapter, "start_A", None) is not None:
            names.append((path, {key: found for key, found in vars(adapter).items() if key in ("scale", "scales")}))
    device = sums[0].device
    found = torch.stack([one.to(device, non_blocking=True) for one in sums]).tolist()
    text = json.dumps([names, found], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _computed(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {str(key): _computed(value) for key, value in values.items() if key not in _NOT_COMPUTED}


def _stored(tensor: Any) -> dict[str, torch.Tensor]:
    """A parameter's own numbers, and those that bitsandbytes keeps beside it."""
    own: Any = _filled(tensor) if hasattr(tensor, "ds_tensor") else tensor.data
    found: dict[str, Any] = {"": own.to_local() if hasattr(own, "placements") else own}
    states = {"": getattr(tensor, "quant_state", None)}
    if states[""] is not None:
        states["second "] = states[""].state2
    for which, state in states.items():
        if state is not None:
            found |= {f"{which}{key}": getattr(state, key) for key in ("absmax", "code", "offset")}
    found["scales"] = getattr(tensor, "SCB", None)
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _filled(parameter: Any) -> torch.Tensor:
    """What DeepSpeed keeps of a parameter in this process, without what fills it up behind the parameter's end."""
    share = parameter.ds_tensor.view(-1)
    start = torch.distributed.get_rank() * share.numel()
    return cast(torch.Tensor, share[: max(0, parameter.ds_numel - start)])


def _two_sums(tensor: torch.Tensor) -> torch.Tensor:
    """(2,) int64 of a tensor's bits, in which every place counts otherwise; whole numbers add up alike everywhere."""
    data = tensor.detach().as_subclass(torch.Tensor).contiguous().view(-1).view(torch.uint8)
    sums = torch.zeros(2, dtype=torch.int64, device=data.device)
    for start in range(0, data.numel(), _CHUNK):
        part = data[start : start + _CHUNK]
        whole = part.numel() // 8 * 8
        words = part[:whole]
        if words.storage_offset() % 8:
            words = words.clone()
        # What is left of a last word, each byte as a word of its own.
        numbers = torch.cat([words.view(torch.int64), part[whole:].long()])
        places = torch.arange(start, start + numbers.numel(), device=data.device)
        mixed = _mixed(numbers + places * _ODD[0])
        sums += torch.stack([mixed.sum(), _mixed(mixed).sum()])
    return sums


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """int64, each well spread over all its bits."""
    numbers = (numbers ^ (numbers >> 30)) * _ODD[1]
    numbers = (numbers ^ (numbers >> 27)) * _ODD[2]
    return numbers ^ (numbers >> 31)
