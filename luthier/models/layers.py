"""How a model's layers recompute: set for each layer by itself, and changed between two passes where memory asks.

`models.recompute` has the modes and how they work; here they are put on the layers of a model: fused ones take any,
others go through transformers' own switch (`gradient_checkpointing` of a layer) or, where only the whole decoder has
one, through that.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from luthier.config import PrecisionConfig
from luthier.errors import ModelError
from luthier.models.fused import FusedLayer, FusedMLP
from luthier.models.load import decoder_of, embeddings_of
from luthier.models.recompute import MODES, TILE, TILE_ELSEWHERE, Getter, Host, Mode, kept_here, recomputed

log = logging.getLogger("luthier")

_SAYS: dict[Mode, str] = {
    "norms": "make their norms again",
    "mlp": "make norms, gate and up again",
    "layer": "keep their input only",
    "offload": "keep their input only, in the host's memory",
}


class Recomputation:
    """The modes of a model's layers.

    Args:
        tiled: whether fused MLPs run in tiles: always, never, or where gate and up are made again anyway.
        free: whether modes may be chosen by memory (`gradient_checkpointing: auto`).

    Attributes:
        tile: tokens of a tile.
    """

    def __init__(
        self, model: PreTrainedModel, *, tiled: bool | Literal["auto"] = "auto", free: bool = False
    ) -> None:
        self.decoder: Any = decoder_of(model)
        self.layers = layers_of(self.decoder)
        self.device = embeddings_of(model).weight.device
        self.tiled, self.free = tiled, free
        self.tile = TILE.get(self.device.type, TILE_ELSEWHERE)
        self.modes: list[Mode] = ["keep"] * len(self.layers)
        self._host = Host()
        self._rough: bool | None = None

    def knows(self, index: int, mode: Mode) -> bool:
        """Whether a layer has a mode of its own by that name, rather than that of the mode before."""
        layer = self.layers[index]
        if isinstance(layer.__dict__.get("forward"), FusedLayer):
            return True
        if mode == "mlp":
            return bool(fused_mlps(layer))
        return mode == "keep" or (mode in ("layer", "offload") and self._switches())

    def set(self, modes: Sequence[Mode]) -> None:
        """Put a mode on each layer; one that a layer does not know becomes the one before it.

        Raises:
            ModelError: whole layers are to be recomputed, and the family has no switch for it.
        """
        assert len(modes) == len(self.layers)
        for index, (layer, asked) in enumerate(zip(self.layers, modes, strict=True)):
            below = [mode for mode in MODES[: MODES.index(asked) + 1] if self.knows(index, mode)]
            mode = below[-1]
            if asked in ("layer", "offload") and mode not in ("layer", "offload"):
                raise ModelError(
                    f"gradient_checkpointing: {type(self.decoder).__name__} does not support it, and its layers are "
                    "not fused; leave it out"
                )
            self.modes[index] = mode
            keep: Callable[[torch.Tensor], Getter] = self._host if mode == "offload" else kept_here
            forward = layer.__dict__.get("forward")
            if isinstance(forward, FusedLayer):
                forward.mode, forward.keep = mode, keep
            elif hasattr(layer, "gradient_checkpointing"):
                layer.gradient_checkpointing = mode in ("layer", "offload")  # type: ignore[assignment]
                layer._gradient_checkpointing_func = partial(_run_again, keep)  # type: ignore[assignment]
            elif self._rough:  # all of its layers or none
                self.decoder.gradient_checkpointing = mode in ("layer", "offload")
                self.decoder._gradient_checkpointing_func = partial(_run_again, keep)
            again = mode == "mlp" or (mode in ("layer", "offload") and isinstance(forward, FusedLayer))
            for mlp in fused_mlps(layer):
                mlp.tile = None
                if self.tiled is True or again:
                    mlp.tile = self.tile if self.tiled else sys.maxsize

    def set_all(self, mode: Mode) -> None:
        self.set([mode] * len(self.layers))

    def more(self) -> str:
        """Recompute more than now, as far as that goes without the host's memory; says what, or nothing."""
        if not self.free:
            return ""
        before = list(self.modes)
        for mode in MODES[1:4]:
            if mode == "layer" and not self.knows(0, mode):
                break
            self.set([max(mode, now, key=MODES.index) for now in self.modes])
            if self.modes != before:
                return str(self)
        return ""

    def __str__(self) -> str:
        counted = Counter(self.modes)
        parts = [
            f"{counted[mode]} of {len(self.modes)} layers {says}"
            for mode, says in _SAYS.items()
            if counted[mode]
        ]
        return "recomputation: " + (", ".join(parts) or "none")

    def _switches(self) -> bool:
        """Whether transformers can recompute the layers that are not fused. Asked once, since it sets something."""
        if self._rough is None:
            self._rough = all(hasattr(layer, "gradient_checkpointing") for layer in self.layers)
            if not self._rough and hasattr(self.decoder, "gradient_checkpointing"):
                self._rough = bool(getattr(self.decoder, "supports_gradient_checkpointing", False))
        return self._rough


def recomputation_of(
    model: PreTrainedModel, precision: PrecisionConfig, before: Sequence[str] = ()
) -> Recomputation:
    """What a config asks for, set on the layers; says what of it does nothing.

    Args:
        before: the modes that an earlier part of the run found, which are kept where memory may choose.

    Raises:
        ModelError: see `Recomputation.set`.
    """
    asked = precision.gradient_checkpointing
    recomputation = Recomputation(model, tiled=precision.tiled_mlp, free=asked == "auto")
    whole = sum(not fused_mlps(layer) for layer in recomputation.layers)
    if precision.tiled_mlp is True and whole:
        log.warning("tiled_mlp: %d of %d layers have no fused MLP and run it whole", whole, len(recomputation.layers))
    if recomputation.free and len(before) == len(recomputation.layers):
        recomputation.set(cast("Sequence[Mode]", before))
        log.info("%s, as before", recomputation)
    else:
        recomputation.set_all("offload" if asked == "offload" else "layer" if asked is True else "keep")
    if asked == "offload" and recomputation.device.type != "cuda":
        log.info("offload: the model is in the host's memory already, so layer inputs stay where they are")
    return recomputation


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    """The decoder's layers; where they are not in one list, the decoder as a single one."""
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    return list(lists[0]) if len(lists) == 1 else [decoder]


def fused_mlps(layer: nn.Module) -> list[FusedMLP]:
    """The fused forwards of the MLPs inside a layer."""
    return [
        forward for part in layer.modules() if isinstance(forward := part.__dict__.get("forward"), FusedMLP)
    ]


def _run_again(keep: Callable[[torch.Tensor], Getter], function: Callable[..., Any], *args: Any) -> Any:
    """What transformers calls in place of `torch.utils.checkpoint`: a layer's forward and its positional arguments."""
    if not torch.is_grad_enabled():
        return function(*args)
    if not args or not isinstance(args[0], torch.Tensor):
        return recomputed(lambda _: function(*args), torch.empty(0), kept_here)
    return recomputed(lambda x: function(x, *args[1:]), args[0], keep)
