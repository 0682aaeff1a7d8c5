"""Which parts of a model are of one kind, so that what holds for one of them holds for all.

Proofs at load run on the model at hand, and a model mostly repeats one layer, or two or three: the first layers up
to the first of the last kind show all there is to see, in a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from luthier.models.load import decoder_of

# What tells layers of one kind apart: their place, and the number that seeds their dropout.
_PLACES = ("training", "layer_idx", "layer", "layer_index")
# And an adapter's size and strength, which are numbers that its one function is computed with.
_OF_ADAPTER = ("r", "alpha", "scale")


def looks(module: nn.Module) -> Any:
    """All that may make two modules compute differently: classes, settings, shapes and formats of every part."""
    found = []
    for name, part in module.named_modules():
        settings = tuple(
            sorted(
                (key, value)
                for key, value in vars(part).items()
                if isinstance(value, int | float | str | bool)
                and not key.startswith("_")
                and key not in _PLACES
                and not (key in _OF_ADAPTER and hasattr(part, "lora_A"))
            )
        )
        tensors = tuple(
            (key, tuple(p.shape) if key[:5] != "lora_" else (), p.dtype, p.requires_grad)
            for key, p in part.named_parameters(recurse=False)
        )
        found.append((name, type(part), settings, tensors))
    return tuple(found)


@contextmanager
def one_of_each_layer(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the decoder has its first layers only, as many as show every kind; all of them where they are not
    kept in one list.
    """
    decoder = decoder_of(model)
    lists = [name for name, child in decoder.named_children() if isinstance(child, nn.ModuleList)]
    if len(lists) != 1:
        yield
        return
    layers = getattr(decoder, lists[0])
    kinds = [looks(layer) for layer in layers]
    enough = 1 + max((kinds.index(kind) for kind in set(kinds)), default=-1)
    setattr(decoder, lists[0], nn.ModuleList(list(layers)[:enough]))
    try:
        yield
    finally:
        setattr(decoder, lists[0], layers)
