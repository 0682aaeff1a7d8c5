"""Peak memory of a training step, from a model's shape: what lies there at each of the moments that can be the peak.

    forward done    weights, adapters, optimizer, activations of the whole pass, a chunk of logits
    backward        the same, less the last layer's, and what one layer's backward needs beside what was kept
    backward done   all gradients, what the first layer and the embeddings' gradient need
    optimizer step  all gradients, what the optimizer makes on the way

Gradients are there from the first pass of a step on, so with several passes a step they stand beside the
activations. The peak is the largest of the four, and its parts are what is reported: they add up.

Preference tuning has a fifth: the reference's forward pass, which comes before the policy's and keeps nothing. Where
no adapter can be turned off for it, a copy of the starting values is there at every moment (`models.reference`).

Kept tensors are counted exactly where the engine's fused modules run (`plan.shape`), what backward needs beside them
as its largest temporaries. Not counted: the CUDA context and the allocator's gaps (`plan.cards` sets room aside for
both), and dequantised copies that are kept only while there is room.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from luthier.kernels.cross_entropy import BLOCK_FLOATS as BLOCK_FLOATS_CPU
from luthier.kernels.linear_ce import BLOCK_FLOATS, CHUNK_FLOATS
from luthier.models.attention import REMEMBERED_FLOATS
from luthier.plan.engine import BY_LAYER, Engine, Pass
from luthier.plan.optimizers import state_bytes, temporary_bytes
from luthier.plan.shape import Layer, Shape
from luthier.plan.weights import (
    gathered_bytes,
    masters_are_shards,
    trained_outside,
    trained_stays_whole,
    weight_bytes,
)

# Layers' inputs on the device while the others wait in host memory: one in use, one on its way.
IN_FLIGHT = 2
# Most tokens that a search looks at.
_MOST_TOKENS = 2**27


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment of the peak; `total` is their sum."""

    weights: float
    adapters: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    workspace: float
    reference: float
    moment: str

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Name -> bytes, in the order of the table."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "moment"}

    def as_json(self) -> dict[str, object]:
        return {**{k: round(v) for k, v in self.parts().items()}, "total": round(self.total), "moment": self.moment}


def memory_of(shape: Shape, engine: Engine, one: Pass) -> Memory:
    """The peak of a training step whose largest pass is `one`, once the optimizer has its state."""
    moments = [_forward(shape, engine, one), _head_backward(shape, engine, one), _backward(shape, engine, one)]
    moments += [_backward_done(shape, engine, one), _step(shape, engine)]
    moments += [_reference(shape, engine, one)] if engine.reference else []
    return max(moments, key=lambda memory: memory.total)


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number of tokens that fits, by bisection; 0 if not even one does."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high < _MOST_TOKENS and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _base(shape: Shape, engine: Engine, *, gathered: float = 0.0) -> Memory:
    """What is there at every moment; `gathered`: bytes of weights beside the device's own."""
    narrow = engine.compute < 4
    copies = engine.compute * shape.adapters if narrow else 0
    masters = 4 * shape.trained_16 if narrow and engine.masters and not masters_are_shards(shape, engine) else 0
    if engine.sharding.stage and not engine.sharding.fsdp:  # DeepSpeed steps on fp32 copies of whatever is trained
        masters = 4 * (shape.trained_16 + shape.adapters)
    state = state_bytes(engine.optimizer, shape, momentum=engine.momentum)
    reading = engine.quantised is not None or engine.frozen < engine.compute
    unpacked = engine.compute * shape.largest_linear if reading else 0
    return Memory(
        weights=weight_bytes(shape, engine) + gathered,
        adapters=4 * shape.adapters + copies + engine.compute * shape.stacked,
        gradients=0.0,
        optimizer=_spread(shape, engine, 1) * (masters + state),
        activations=0.0,
        head=0.0,
        workspace=unpacked + _buckets(engine, 3),
        reference=starting_values(shape, engine),
        moment="",
    )


def _in_pass(shape: Shape, engine: Engine, *, after_forward: bool = True) -> Memory:
    return _base(shape, engine, gathered=gathered_bytes(shape, engine, after_forward=after_forward))


def _spread(shape: Shape, engine: Engine, stage: int) -> float:
    """The part of a device's own of what is made for trained parameters."""
    return 1.0 if engine.sharding.fsdp and trained_stays_whole(shape, engine) else engine.share(stage)


def _buckets(engine: Engine, *stages: int) -> float:
    """Bytes of the fp32 buffers that ZeRO in one of these stages sums gradients in; stage 3 always has its own."""
    return 4 * engine.sharding.buckets if engine.sharding.stage in stages else 0.0


def starting_values(shape: Shape, engine: Engine) -> float:
    """Bytes that the reference keeps: of trained weights, and of adapters that do not begin where they add nothing."""
    if not engine.reference:
        return 0.0
    adapters = 4 * shape.adapters if engine.moved else 0
    return _spread(shape, engine, 3) * (engine.compute * shape.trained_16 + adapters)


def _gradients(shape: Shape, engine: Engine) -> float:
    together = shape.largest_trained if engine.in_backward else shape.adapters + shape.trained_16
    return 4 * together * _spread(shape, engine, 2)


def _unreduced(shape: Shape, engine: Engine, *, at_end: bool = False) -> float:
    """Bytes of gradients in backward before they are summed over devices and each keeps its part. FSDP2 holds those of
    the layer that is due in the compute dtype and, on their way, in fp32; those outside of layers wait for the end."""
    if not engine.sharding.fsdp or trained_stays_whole(shape, engine):
        return _buckets(engine, 1, 2)
    outside = trained_outside(shape)
    if at_end:
        return (engine.compute + 4) * outside
    return engine.compute * outside + (engine.compute + 4) * max(layer.trained for layer in shape.layers)


def activations(shape: Shape, engine: Engine, one: Pass) -> float:
    """Bytes of all that a pass keeps for its backward, up to the head."""
    row = one.tokens * shape.hidden * engine.compute
    kept, away = 0.0, 0
    for index in range(len(shape.layers)):
        mode = engine.mode(index)
        kept += row if mode == "layer" else 0.0 if mode == "offload" else _kept(shape, engine, one, index)
        away += mode == "offload"
    return kept + min(IN_FLIGHT, away) * row + _outside_layers(shape, engine, one)


def _outside_layers(shape: Shape, engine: Engine, one: Pass) -> float:
    """The last norm's input, the cosines and sines, and the batch itself."""
    rows = _last_rows(shape, one)
    batch = 16 * one.tokens + 20 * one.labels  # ids and positions; place, id and weight of each label
    turning = one.tokens * shape.rotary * engine.compute
    return rows * (shape.hidden * engine.compute + 4) + turning + batch


def _last_rows(shape: Shape, one: Pass) -> int:
    return one.labels if shape.exact and not _drops(shape) else one.tokens


def _drops(shape: Shape) -> bool:
    return any(layer.dropped for layer in shape.layers)


def _kept(shape: Shape, engine: Engine, one: Pass, index: int, *, whole: bool = False) -> float:
    """Bytes that one layer keeps; `whole`: its input apart, which recomputation keeps in any case."""
    layer: Layer = shape.layers[index]
    last = index == len(shape.layers) - 1
    rows = _last_rows(shape, one) if last else one.tokens
    numbers = one.tokens * layer.tokens + rows * layer.rows
    if engine.in_tiles(index):
        numbers -= rows * layer.wide
    if engine.mode(index) in ("norms", "mlp"):
        numbers -= one.tokens * layer.normed_tokens + rows * layer.normed_rows
    if not whole and (index > 0 or shape.input_trained):
        numbers += one.tokens * layer.input
    if (engine.slices and one.documents > 1) or (last and rows < one.tokens):
        numbers += rows * layer.attended
    kept = numbers * engine.compute + 4 * (one.tokens * layer.stats_tokens + rows * layer.stats_rows)
    kept += one.tokens * layer.dropped
    if layer.heads:  # capped scores, and probabilities in fp32 and in the compute dtype
        each = engine.compute + 4 + (engine.compute if engine.compute < 4 else 0)
        kept += one.pairs * layer.heads * each
    if one.gathered:
        kept += engine.compute * ((one.gathered - one.tokens) * layer.keys - one.tokens * layer.joint)
    if engine.slices and 0 < layer.window < one.longest:  # a mask for each document; small ones are shared by layers
        own = one.longest**2 > REMEMBERED_FLOATS or index == 0
        kept += one.pairs * engine.compute if own else 0
    elif engine.slices and not layer.heads:
        kept += (one.masked_each + (one.masked_once if index == 0 else 0)) * engine.compute
    return kept


def _grown(shape: Shape, engine: Engine, one: Pass) -> float:
    """Gradients that are there while activations are."""
    return _gradients(shape, engine) if one.several else 0.0


def _forward(shape: Shape, engine: Engine, one: Pass) -> Memory:
    base = _in_pass(shape, engine)
    row = one.labels * shape.hidden * engine.compute
    widened = _widened(shape, engine)
    if shape.head_trained and not engine.weighted:
        head: float = _plain_logits(shape, engine, one, copies=2) + row
    else:
        # The logits, in which their gradient is formed, hidden states and their gradient, that of the head's weight.
        head = _chunk(shape, one) * engine.compute + _blocks_on_cpu(engine) + 2 * row + widened
        head += shape.head * engine.compute if shape.head_trained else 0
    return replace(
        base,
        gradients=_grown(shape, engine, one),
        activations=activations(shape, engine, one),
        head=head,
        workspace=base.workspace - (engine.compute * shape.largest_linear if widened else 0),
        moment="logits of a pass",
    )


def _head_backward(shape: Shape, engine: Engine, one: Pass) -> Memory:
    row = one.labels * shape.hidden * engine.compute
    of_weight = shape.head * engine.compute if shape.head_trained else 0
    head: float = 2 * row + 2 * of_weight
    if shape.head_trained and not engine.weighted:
        # Logits that are made again, their softmax, and their gradient from both terms of a log-prob.
        head = 2 * row + of_weight + _plain_logits(shape, engine, one, copies=4)
    return replace(
        _in_pass(shape, engine),
        gradients=_grown(shape, engine, one),
        activations=activations(shape, engine, one),
        head=head,
        moment="backward of the head",
    )


def _reference(shape: Shape, engine: Engine, one: Pass) -> Memory:
    """The logits of the reference's forward pass, which keeps nothing and comes before the policy's."""
    base = _in_pass(shape, engine)
    widened = _widened(shape, engine)
    return replace(
        base,
        gradients=_grown(shape, engine, one),
        activations=_outside_layers(shape, engine, one),
        head=_chunk(shape, one) * engine.compute + widened,
        workspace=base.workspace - (engine.compute * shape.largest_linear if widened else 0),
        moment="logits of the reference",
    )


def _chunk(shape: Shape, one: Pass) -> int:
    """Numbers in the logits that are there at a time."""
    return min(max(1, CHUNK_FLOATS // shape.vocabulary), one.labels) * shape.vocabulary


def _plain_logits(shape: Shape, engine: Engine, one: Pass, *, copies: int) -> float:
    """Bytes of a chunk of logits as plain torch has it: in the compute dtype, and so many times in fp32."""
    return _chunk(shape, one) * (4 * copies + (engine.compute if engine.compute < 4 else 0))


def _blocks_on_cpu(engine: Engine) -> int:
    """Bytes of a block of logits in fp32, and of its softmax, where a CPU computes in 16 bits."""
    return 2 * 4 * BLOCK_FLOATS_CPU * torch.get_num_threads() if engine.cpu and engine.compute < 4 else 0


def _widened(shape: Shape, engine: Engine) -> int:
    """Bytes of the part of the head's weight that is widened at a time, where it is stored in fewer bits."""
    return min(BLOCK_FLOATS, shape.head) * engine.compute if engine.frozen < engine.compute else 0


def _backward(shape: Shape, engine: Engine, one: Pass) -> Memory:
    base, last = _in_pass(shape, engine), len(shape.layers) - 1
    kept, index = activations(shape, engine, one), max(0, last - 1)
    if last > 0 and engine.mode(last) not in BY_LAYER:
        kept -= _kept(shape, engine, one, last)
    if engine.mode(index) in BY_LAYER:
        kept += _kept(shape, engine, one, index, whole=True)
    waiting = _unreduced(shape, engine)
    gradients = _grown(shape, engine, one) + waiting
    return replace(
        base,
        gradients=gradients or _head_gradient(shape),
        activations=kept,
        workspace=base.workspace + _beside(shape, engine, one, index),
        moment="backward of a layer",
    )


def _beside(shape: Shape, engine: Engine, one: Pass, index: int) -> float:
    """Bytes that a layer's backward makes at once beside what was kept."""
    layer = shape.layers[index]
    # The MLP's product and its gradient, and torch's own activation where there is no kernel for it; in tiles gate and
    # up are made again as well.
    wide = 3 if engine.cpu else 2
    if engine.in_tiles(index):
        inner = (wide + 2.0) * layer.inner * min(one.tokens, engine.tile)
    else:
        inner = float(wide * layer.inner * one.tokens)
    remade = max(layer.normed_tokens, layer.normed_rows) if engine.mode(index) in ("norms", "mlp") else 0
    return engine.compute * (one.tokens * (layer.passing + remade) + max(one.tokens * layer.attending, inner))


def _head_gradient(shape: Shape) -> float:
    return 4 * shape.head if shape.head_trained else 0


def _backward_done(shape: Shape, engine: Engine, one: Pass) -> Memory:
    base = _in_pass(shape, engine, after_forward=False)
    kept = _kept(shape, engine, one, 0, whole=engine.mode(0) in BY_LAYER)
    # A gradient is taken as it comes, but for that of embeddings which the head has given one, and for 16-bit ones,
    # which are added to fp32 ones.
    joined = shape.tied and shape.input_trained and shape.head_trained
    passing = engine.compute * shape.vocabulary * shape.hidden if joined else 0
    waiting = _unreduced(shape, engine, at_end=True)
    if engine.compute < 4 and shape.trained_16 and not waiting:
        passing += engine.compute * shape.largest_trained
    return replace(
        base,
        gradients=_gradients(shape, engine) + waiting,
        activations=kept + one.tokens * shape.hidden * engine.compute,
        workspace=base.workspace + max(passing, _beside(shape, engine, one, 0)),
        moment="end of backward",
    )


def _step(shape: Shape, engine: Engine) -> Memory:
    temporary = temporary_bytes(engine.optimizer, shape, at_once=not engine.cpu)
    return replace(
        _base(shape, engine),
        gradients=_gradients(shape, engine),
        workspace=_buckets(engine, 3) + temporary * _spread(shape, engine, 1),
        moment="optimizer step",
    )


def rule_of_thumb(parameters: int) -> float:
    """Bytes of full fine-tuning with Adam in fp32 by the classical rule, activations aside: four times the weights,
    which are the weights, their gradients, and Adam's two moments."""
    return 4 * 4 * parameters


def variants(shape_full: Shape, shape_lora: Shape, engine: Engine) -> dict[str, tuple[Shape, Engine]]:
    """The ways to train one model, by name; the engine's other settings hold for all of them."""
    plain = replace(engine, quantised=None, frozen=max(engine.frozen, min(2, engine.compute)))
    return {
        "full": (shape_full, replace(plain, frozen=engine.compute)),
        "LoRA": (shape_lora, plain),
        "8-bit LoRA": (shape_lora, replace(plain, quantised="8bit")),
        "QLoRA": (shape_lora, replace(plain, quantised="4bit")),
    }

