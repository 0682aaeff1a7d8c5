"""What memory is counted for: how a model is trained, and the largest pass that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from luthier.kernels.document_layout import layout_of
from luthier.models.attention import REMEMBERED_FLOATS
from luthier.models.recompute import TILE, Mode

Quantised = Literal["4bit", "8bit", "fp8"]

# Modes in which a layer keeps nothing but its input.
BY_LAYER: tuple[Mode, ...] = ("layer", "offload")


@dataclass(frozen=True)
class Sharding:
    """How a model's state lies on several devices, each of which has passes of its own.

    Under FSDP2 a model that is trained itself lies there as fp32 shards, which are the masters as well; beside an
    adapter only what is frozen is spread. ZeRO spreads what is trained, frozen weights in stage 3 only.

    Attributes:
        over: devices that share one copy of what is spread.
        stage: what is spread, as Rajbhandari et al. (2020) count it: 1 the optimizer's state with the fp32 copies of
            weights, 2 gradients too, 3 weights too.
        fsdp: by FSDP2, in stage 3.
        reshard: whether gathered layers are let go between forward and backward.
        offload: what is spread waits in host memory.
        live: weights that ZeRO-3 lets be gathered at a time before it lets go of any. bucket: gradients in each buffer
            that ZeRO sums in.
    """

    over: int = 1
    stage: int = 0
    fsdp: bool = False
    reshard: bool = True
    offload: bool = False
    live: int = 0
    bucket: int = 0

    @property
    def buckets(self) -> int:
        """Numbers in all buffers that ZeRO sums gradients in: in stages 1 and 2 one is filled while one is sent."""
        return self.bucket * (2 if self.stage < 3 else 1)


WHOLE = Sharding()


@dataclass(frozen=True)
class Engine:
    """How a model is trained, as far as memory goes.

    Attributes:
        compute: bytes of a number that is computed with. frozen: of a frozen weight that is not quantised.
        quantised: format of the decoder's frozen linear layers. double: whether NF4's scales are quantised too.
        optimizer: its name. momentum: of sgd. masters: whether trained 16-bit weights have fp32 copies.
            in_backward: steps are taken inside of the backward pass, so that gradients never exist together.
        recompute: what is computed again in backward, as `models.recompute` calls it. modes: of each layer, where they
            differ. tiled: MLPs keep their input only, whatever the mode. tile: tokens of an MLP's tile.
        slices: attention runs document by document rather than in one call. cpu: where all of it runs.
        weighted: what labels weigh in the loss is known in the forward pass, so that a trained head's gradient is
            formed there; otherwise its logits are computed again in backward.
        reference: each step asks a reference model about its rows. moved: its adapters begin where they change
            something, so that turning them off is not the reference, and it keeps a copy of them.
        sharding: how all of it lies on several devices.
    """

    compute: int = 2
    frozen: float = 2
    quantised: Quantised | None = None
    double: bool = True
    optimizer: str = "adamw_torch_fused"
    momentum: bool = False
    masters: bool = True
    in_backward: bool = False
    recompute: Mode = "keep"
    modes: tuple[Mode, ...] = ()
    tiled: bool = False
    tile: int = TILE["cuda"]
    slices: bool = False
    cpu: bool = False
    weighted: bool = True
    reference: bool = False
    moved: bool = False
    sharding: Sharding = WHOLE

    def share(self, stage: int) -> float:
        """The part of what is spread from this stage on that lies in a device's own memory."""
        sharding = self.sharding
        if sharding.over == 1 or sharding.stage < stage:
            return 1.0
        return 0.0 if sharding.offload else 1 / sharding.over

    def mode(self, index: int) -> Mode:
        """Of one layer."""
        return self.modes[index] if index < len(self.modes) else self.recompute

    def in_tiles(self, index: int) -> bool:
        """Whether gate and up of a layer's MLP are made again in backward, tile by tile."""
        return self.tiled or self.mode(index) in ("mlp", *BY_LAYER)


@dataclass(frozen=True)
class Pass:
    """The largest forward pass of a step.

    Attributes:
        tokens: in all, shared ones once. labels: of these trained. longest: of the longest document. documents: how
            many, or branches where they share beginnings. pairs: of tokens that attend to each other, the sum of the
            documents' squared lengths.
        several: whether its step has other passes too.
        gathered: where beginnings are shared, the keys of all branches, each with what it goes on from; else 0.
        masked_once, masked_each: of `pairs`, those in branches that go on from others, whose attention needs a mask
            where it runs in slices: small masks are made once, larger ones in each layer.
    """

    tokens: int
    labels: int
    longest: int
    pairs: int
    documents: int = 1
    several: bool = False
    gathered: int = 0
    masked_once: int = 0
    masked_each: int = 0

    @classmethod
    def of(cls, lengths: Sequence[int], parents: Sequence[int], labels: int, *, several: bool) -> Pass:
        """A pass of a loader's, from its segments and what they go on from."""
        layout = layout_of(tuple(lengths), tuple(parents))
        sizes = [queries * keys for queries, keys in zip(layout.queries, layout.keys, strict=True)]
        masked = [size for size, *both in zip(sizes, layout.queries, layout.keys, strict=True) if len(set(both)) > 1]
        return cls(
            tokens=sum(lengths),
            labels=labels,
            longest=max(layout.keys),
            pairs=sum(sizes),
            documents=len(sizes),
            several=several,
            gathered=sum(layout.keys) if layout.shared else 0,
            masked_once=sum(size for size in masked if size <= REMEMBERED_FLOATS),
            masked_each=sum(size for size in masked if size > REMEMBERED_FLOATS),
        )
