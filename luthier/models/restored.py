"""A model put back as it was, whatever was changed on the instance in between.

Training replaces modules and forwards, freezes parameters and may hold weights in another dtype. All of that is in the
modules' own dictionaries and the parameters' `data`, so that a shallow copy of both, made before, is enough to undo
it; no weight is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel


@contextmanager
def restored(whole: nn.Module, model: PreTrainedModel) -> Iterator[None]:
    """On leaving, the modules of `whole` are what they were on entering: children, forwards, hooks, flags, dtypes and
    which parameters train.

    Values of parameters that trained in between stay, in the dtype that they had.

    Args:
        whole: the model with what is around it, such as PEFT's wrapper. model: the transformers model inside.
    """
    modules = [(module, _shallow(module)) for module in whole.modules()]
    tensors = [(t, t.data, t.requires_grad) for t in (*whole.parameters(), *whole.buffers())]
    attention = model.config._attn_implementation
    try:
        yield
    finally:
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        for module, kept in modules:
            _put_back(module, kept)
        for tensor, data, required in tensors:
            if id(tensor) in trained:
                tensor.data = tensor.data.to(data.dtype)
            else:
                tensor.data = data
            tensor.requires_grad_(required)
            tensor.grad = None


def _shallow(module: nn.Module) -> dict[str, tuple[Any, dict[Any, Any] | None]]:
    """Each attribute, and a copy of what is in it if it is a dictionary (children, parameters, hooks)."""
    return {name: (value, dict(value) if isinstance(value, dict) else None) for name, value in vars(module).items()}


def _put_back(module: nn.Module, kept: dict[str, tuple[Any, dict[Any, Any] | None]]) -> None:
    own = vars(module)
    for name in own.keys() - kept.keys():
        del own[name]
    for name, (value, inside) in kept.items():
        if inside is not None:
            # The same dictionary: handles of hooks refer to it.
            value.clear()
            value.update(inside)
        own[name] = value

