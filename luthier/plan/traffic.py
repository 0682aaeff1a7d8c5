"""What several devices send each other in a training step, and how much of it computation does not hide.

Counted is the time of large messages, bytes over bandwidth (`plan.links`); what a collective takes to begin is not, nor
is waiting for a slower device. Hidden is what may run beside the computation: the next layer's weights are gathered,
and the last layer's gradients summed, while a layer computes. So a pass of layers that take c each, with g for a
gather and r for a sum, waits

    g_first + sum of max(0, g_next + r_last - c) + r_last

and for the group outside of the layers before the first and behind the last. Replicas sum once, behind a step's last
pass, and hide nothing; collectives between CPUs hide nothing either.

Sources: Rajbhandari et al. 2020, section 7 (volumes of the stages); Zhao et al. 2023, sections 3.3 and 4.3 (gathering
ahead); Thakur et al. 2005 (rings).
"""

from __future__ import annotations

from dataclasses import dataclass

from luthier.plan.engine import Engine
from luthier.plan.links import Links
from luthier.plan.shape import Layer, Shape
from luthier.plan.weights import layer_bytes, root_bytes, trained_outside, trained_stays_whole


@dataclass(frozen=True)
class Compute:
    """Seconds of one pass in the decoder's layers, forward and backward, and how often it runs forward without a
    gradient beside that; the head's time hides nothing."""

    forward: float = 0.0
    backward: float = 0.0
    forward_only: float = 0.0


@dataclass(frozen=True)
class Traffic:
    """Of a step, on each device.

    Attributes:
        sent: bytes to other devices. seconds: of all communication, with the host too. exposed: what of it computation
            waits for.
    """

    sent: float
    seconds: float
    exposed: float

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent + other.sent, self.seconds + other.seconds, self.exposed + other.exposed)

    def times(self, number: float) -> Traffic:
        """The same so many times."""
        return Traffic(self.sent * number, self.seconds * number, self.exposed * number)


NONE = Traffic(0.0, 0.0, 0.0)


def traffic(shape: Shape, engine: Engine, links: Links, gpus: int, passes: int, compute: Compute) -> Traffic:
    """Of a step in so many passes on each of `gpus` devices."""
    sharding = engine.sharding
    trained = shape.adapters + shape.trained_16
    if gpus == 1:
        return NONE
    whole = trained_stays_whole(shape, engine)
    step, each = NONE, NONE
    if sharding.over == 1 or (sharding.fsdp and whole):
        step = _all_reduce(4 * trained, links, gpus)
    elif sharding.stage == 1:  # in the last pass
        step = _backward(shape, engine, links, gpus, compute)
    if not sharding.fsdp and sharding.over > 1:
        # What each device has stepped, for all others; weights that are shared as they are used.
        stepped = engine.compute * shape.trained_16 if sharding.stage < 3 else 0
        step += _ring(stepped + 4 * shape.adapters, links, sharding.over)
    if sharding.stage == 3:
        each = _forward(shape, engine, links, gpus, compute).times(1 + compute.forward_only)
    if sharding.stage >= 2:
        each += _backward(shape, engine, links, gpus, compute)
    return step + each.times(passes)


def _forward(shape: Shape, engine: Engine, links: Links, gpus: int, compute: Compute) -> Traffic:
    """Weights gathered for a forward pass."""
    gathers = [_gather(layer_bytes(layer, shape, engine), engine, links) for layer in shape.layers]
    return _gather(root_bytes(shape, engine), engine, links) + _beside(gathers, [], compute.forward, engine)


def _backward(shape: Shape, engine: Engine, links: Links, gpus: int, compute: Compute) -> Traffic:
    """Weights gathered again, if they have been let go, and gradients summed."""
    sharding, order = engine.sharding, tuple(reversed(shape.layers))
    root, gathers = NONE, []
    if sharding.stage == 3:
        # What ZeRO has not let go of since the forward pass is there still; FSDP2 gathers the outer group anyhow.
        live = float(sharding.live * engine.compute)
        sizes = [root_bytes(shape, engine), *(layer_bytes(layer, shape, engine) for layer in order)]
        kept = [sum(sizes[: index + 1]) <= live for index in range(len(sizes))]
        found = [NONE if there else _gather(size, engine, links) for size, there in zip(sizes, kept, strict=True)]
        root, gathers = found[0], found[1:] if sharding.reshard else []
    if sharding.fsdp and trained_stays_whole(shape, engine):
        return root + _beside(gathers, [], compute.backward, engine)
    sums = [_reduce(4 * _trained(layer, sharding.fsdp), engine, links, gpus) for layer in order]
    outside = trained_outside(shape)
    if not sharding.fsdp:
        outside += shape.adapters - sum(layer.adapters for layer in shape.layers)
    return root + _beside(gathers, sums, compute.backward, engine) + _reduce(4 * outside, engine, links, gpus)


def _trained(layer: Layer, fsdp: bool) -> int:
    return layer.trained + (0 if fsdp else layer.adapters)


def _beside(gathers: list[Traffic], sums: list[Traffic], seconds: float, engine: Engine) -> Traffic:
    """Of the layers of a pass, in the order in which they compute, which takes `seconds` for all of them."""
    total = sum([*gathers, *sums], NONE)
    number = max(len(gathers), len(sums), 1)
    if engine.cpu or total.seconds == 0:
        return total
    waits = gathers[0].seconds if gathers else 0.0
    for index in range(number):
        ahead = gathers[index + 1].seconds if index + 1 < len(gathers) else 0.0
        behind = sums[index - 1].seconds if sums and index > 0 else 0.0
        waits += max(0.0, ahead + behind - seconds / number)
    waits += sums[-1].seconds if sums else 0.0
    return Traffic(total.sent, total.seconds, waits)


def _gather(size: float, engine: Engine, links: Links) -> Traffic:
    """All devices of a group get `size` bytes, of which each has its part, in its own memory or in the host's."""
    over = engine.sharding.over
    return _ring(size, links, over) + _from_host(size / over, engine, links)


def _reduce(size: float, engine: Engine, links: Links, gpus: int) -> Traffic:
    """A group's sum of `size` bytes of gradients, each device its part of it; then over all groups."""
    over = engine.sharding.over
    part = size / over
    return (
        _ring(size, links, over)
        + _all_reduce(part, links, gpus // over, stride=over)
        + _from_host(part, engine, links)
    )


def _ring(size: float, links: Links, ranks: int, stride: int = 1) -> Traffic:
    """A reduce-scatter or an all-gather of `size` bytes in all."""
    sent = size * (ranks - 1) / ranks
    seconds = sent / links.speed(ranks, stride) if sent else 0.0
    return Traffic(sent, seconds, seconds)


def _all_reduce(size: float, links: Links, ranks: int, stride: int = 1) -> Traffic:
    return _ring(size, links, ranks, stride).times(2)


def _from_host(size: float, engine: Engine, links: Links) -> Traffic:
    seconds = size / links.host if engine.sharding.offload else 0.0
    return Traffic(0.0, seconds, seconds)
