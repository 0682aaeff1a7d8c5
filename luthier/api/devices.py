"""Devices that a notebook asks for and this machine has not: one message with the change to make."""

from __future__ import annotations

import contextlib
import copyreg
from functools import cache
from typing import Any

import torch
from transformers import BatchEncoding

from luthier.errors import ConfigError
from luthier.models.device import bf16_is_fast


def is_bfloat16_supported() -> bool:
    """Whether this machine's accelerator computes in bfloat16 (Unsloth's function of this name)."""
    return torch.cuda.is_available() and bf16_is_fast(torch.device("cuda"))


def check_device(call: str, device: Any) -> None:
    """Refuse a device that this machine lacks.

    Args:
        call: how the notebook wrote it, such as `model.to("cuda")`.

    Raises:
        ConfigError: it is not there; says what to write instead.
    """
    if isinstance(device, int):
        device = f"cuda:{device}"
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        return  # a dtype, or something that torch has a message for
    lacks = (wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count()) or (
        wanted.type == "mps" and not torch.backends.mps.is_available()
    )
    if lacks:
        raise ConfigError(
            f"{call}: this machine has no {wanted}; leave it out, or write .to(model.device), which is right everywhere"
        )


def read_on_cpu(model: Any) -> Any:
    """The same model; its 4-bit layers are read on a CPU whatever their shape.

    On processors with AVX512-BF16, bitsandbytes (0.50) repacks a 4-bit weight in its first forward pass without
    gradients, and ends in a traceback where a block of scales goes over the end of a row, or the rows are no multiple
    of 32. Such layers keep its general way.
    """
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is None or not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        rows, columns = state.shape
        if rows % 32 or columns % state.blocksize:
            module.support_avx512bf16_for_cpu = False
    return model


class Inputs(BatchEncoding):
    """What a tokenizer returns, with a message where it is sent to a device that is not there."""

    def to(self, device: Any, *, non_blocking: bool = False) -> BatchEncoding:
        check_device(f'inputs.to("{device}")', device)
        return super().to(device, non_blocking=non_blocking)


def _checked(result: Any) -> Any:
    if type(result) is BatchEncoding:
        result.__class__ = Inputs
    return result


class Added:
    """What `become` puts before a class. A copy, and what was pickled, become the same again."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        if not isinstance(made, tuple) or made[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return made
        own = type(self)
        mixin, plain = own.__mro__[1], own.__mro__[own.__mro__.index(Added) + 1]
        return (_new, (mixin, plain), *made[2:])


def _new(mixin: Any, cls: Any) -> Any:
    found = _subclass(mixin, cls)
    return found.__new__(found)


class _Tokenizes(Added):
    """Before a tokenizer's own class, of which it becomes a subclass of the same name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _checked(super().__call__(*args, **kwargs))  # type: ignore[misc]

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        return _checked(super().apply_chat_template(*args, **kwargs))  # type: ignore[misc]

    def pad(self, *args: Any, **kwargs: Any) -> Any:
        return _checked(super().pad(*args, **kwargs))  # type: ignore[misc]


def with_checked_inputs(tokenizer: Any) -> Any:
    """The same tokenizer; what it returns knows this machine's devices."""
    return become(tokenizer, _Tokenizes)


@cache
def _subclass(mixin: Any, cls: Any) -> Any:
    # Of the same name and module: both are written into files, and are looked up by name.
    own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (mixin, cls), own)


def become(thing: Any, mixin: type) -> Any:
    """The same object, with the methods of `mixin` before those of its own class; no class is changed."""
    if not isinstance(thing, mixin):
        with contextlib.suppress(TypeError):  # a class that fixes its layout has no room for it
            thing.__class__ = _subclass(mixin, type(thing))  # type: ignore[arg-type]
    return thing
