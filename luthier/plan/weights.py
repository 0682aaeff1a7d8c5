"""Bytes of a model's weights: where they rest, and gathered for the time of a pass where several devices share them.

What FSDP2 and ZeRO-3 gather at once is a decoder layer, and the next one ahead of its turn. Embeddings, head, and the
norm before it make a group of their own, which is there from the beginning of a pass to its end.
"""

from __future__ import annotations

from luthier.plan.engine import Engine
from luthier.plan.shape import Layer, Shape

# Bytes of a number in NF4 with double quantisation: half a byte, an 8-bit scale for each block of 64, and an fp32
# scale for each 256 of those (Dettmers et al. 2023, section 3). Without the second step the scales are fp32.
NF4_BYTES, NF4_SINGLE_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256), 0.5 + 4 / 64
# Layers that are gathered at a time: one in use, one on its way.
GATHERED = 2


def weight_bytes(shape: Shape, engine: Engine) -> float:
    """The model's own weights as they lie on the device between passes."""
    frozen = shape.total - shape.adapters - shape.linear - shape.trained_16
    resting = frozen * engine.frozen + _stored(shape.linear, shape.linear_rows, engine)
    trained = shape.trained_16 * (4 if masters_are_shards(shape, engine) else engine.compute)
    whole = trained_stays_whole(shape, engine)
    return engine.share(3) * (resting + (0 if whole else trained)) + (trained if whole else 0)


def trained_stays_whole(shape: Shape, engine: Engine) -> bool:
    """Whether each device has all that is trained: an adapter, and what is trained beside it, under FSDP2."""
    sharding = engine.sharding
    return sharding.over == 1 or sharding.stage < 3 or (sharding.fsdp and shape.adapters > 0)


def masters_are_shards(shape: Shape, engine: Engine) -> bool:
    """Whether trained weights lie there in fp32 only, and are cast as they are gathered."""
    return engine.sharding.over > 1 and engine.sharding.fsdp and shape.adapters == 0


def gathered_bytes(shape: Shape, engine: Engine, *, after_forward: bool) -> float:
    """Weights that a pass has gathered from all devices.

    Args:
        after_forward: at its middle, where layers that are kept for backward are all there.
    """
    if engine.sharding.over == 1 or engine.sharding.stage < 3:
        return 0.0
    layers = sorted((layer_bytes(layer, shape, engine) for layer in shape.layers), reverse=True)
    kept = layers if after_forward and not engine.sharding.reshard else layers[:GATHERED]
    root = root_bytes(shape, engine)
    return root + max(sum(kept), min(sum(layers), engine.sharding.live * engine.compute - root))


def layer_bytes(layer: Layer, shape: Shape, engine: Engine) -> float:
    """Of a decoder layer, what is gathered of it."""
    whole = trained_stays_whole(shape, engine)
    others = layer.parameters - layer.adapters - layer.linear - layer.trained
    trained = 0 if whole else layer.trained
    return _stored(layer.linear, layer.linear_rows, engine) + others * engine.frozen + trained * engine.compute


def root_bytes(shape: Shape, engine: Engine) -> float:
    """Of what is outside the decoder layers: embeddings, head, the last norm."""
    own = sum(layer.parameters - layer.adapters for layer in shape.layers)
    trained = trained_outside(shape)
    frozen = shape.total - shape.adapters - own - trained
    whole = trained_stays_whole(shape, engine)
    return frozen * engine.frozen + (0 if whole else trained * engine.compute)


def trained_outside(shape: Shape) -> int:
    """Trained parameters outside the decoder layers that are no adapters."""
    return shape.trained_16 - sum(layer.trained for layer in shape.layers)


def _stored(linear: int, rows: int, engine: Engine) -> float:
    """Bytes of frozen linear layers as they are stored."""
    if engine.quantised is None:
        return linear * engine.frozen
    if engine.quantised == "4bit":
        return linear * (NF4_BYTES if engine.double else NF4_SINGLE_BYTES)
    return linear + 4 * rows  # a byte each, and a scale for each output
