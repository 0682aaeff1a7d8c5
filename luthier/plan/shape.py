"""What a model keeps for each token of a pass, read off its modules; no weight is needed for it.

The training engine keeps certain tensors of each layer for the backward pass and no others, so their sizes follow
from the shapes of the layer: its widths, its adapters' ranks, where its norms stand. What a layer looks like is asked
of the same table that decides at load which fused module takes its place (`models.fused`). A layer that the table
does not know runs as transformers has it, and gets a rougher figure from the widths of its linear layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.errors import ModelError
from luthier.models.fused import FusedAttention, FusedLayer, FusedMLP
from luthier.models.load import count_parameters, decoder_of, embeddings_of, text_config_of
from luthier.models.lora import DoRALinear, LoRALinear

# What transformers' own layers keep, as a factor on the inputs and outputs of their linear layers: norms in fp32,
# activation functions, copies of heads. Measured on its Llama: 1.2 to 1.4.
BESIDE_LINEARS = 1.3
# Tensors of fewer numbers have 32-bit state in bitsandbytes' 8-bit optimizers.
SMALL = 4096


@dataclass(frozen=True)
class Layer:
    """What a decoder layer keeps for backward, in numbers for each token, and its size.

    A fused last layer computes only rows that a label needs after its attention: `rows` counts what is kept for
    those, `tokens` what is kept for all.

    Attributes:
        known: whether the figures are those of fused modules, rather than a factor on widths.
        tokens, rows: numbers in the compute dtype. wide: those of `rows` that lie inside the MLP, between its input
            and its output. normed_tokens, normed_rows: those that are outputs of norms.
        input: numbers of the layer's input, kept unless no gradient reaches it.
        stats_tokens, stats_rows: numbers in fp32 (of norms and of attention).
        dropped: bytes of dropout's masks.
        heads: attention heads whose scores are kept whole, a number for each pair of tokens of a document; 0 where
            attention never forms them.
        window: tokens that a query attends to at most; 0 for all before it.
        attended: width of attention's output, kept twice where documents are attended to one by one.
        keys: width of keys and values as attention takes them, which branches of a shared beginning each have whole.
            joint: numbers of a projection that is kept whole for the values in it, which such copies spare.
        passing, attending, inner: numbers in the compute dtype that backward makes beside what was kept: gradients that
            pass by, those of the attention, the width of the MLP.
        parameters: of the layer. gates: of the projections into the MLP.
        adapters, trained: of the parameters, those of LoRA, and others that are trained. linear: in frozen linear
            layers; linear_rows: their outputs.
    """

    known: bool
    tokens: float
    rows: float
    wide: float
    normed_tokens: int
    normed_rows: int
    input: int
    stats_tokens: int
    stats_rows: int
    dropped: int
    heads: int
    window: int
    attended: int
    keys: int
    joint: int
    passing: float
    attending: float
    inner: int
    parameters: int
    gates: int
    adapters: int
    trained: int
    linear: int
    linear_rows: int


@dataclass(frozen=True)
class Shape:
    """A model as far as memory and work go; counts of parameters, unless said otherwise.

    Attributes:
        hidden, vocabulary, rotary: widths; rotary counts cosines and sines of a token.
        positions: the longest sequence that the model was made for; 0 if it does not say.
        total, trainable: with adapters; tied ones once. adapters: of LoRA.
        stacked: of adapters, kept side by side with those that share an input.
        linear: in frozen linear layers of the decoder, which quantisation stores in fewer bits; linear_rows: their
            outputs.
        largest_linear: the largest of them. largest_trained: the largest trained tensor.
        trained_16: trained ones that are no adapters, and so have the compute dtype and an fp32 copy.
        hidden_matrices: of the trained ones, those in matrices inside of the network, no embeddings and no head.
            small: those in tensors of fewer than 4,096. factors: rows and columns of all trained matrices, and what is
            in vectors.
        head_trained, input_trained: whether the head's weight and the embeddings are trained. tied: they are one.
        multiplied: that a token is multiplied with, the head left out; head: those of the head;
            multiplied_trained: of both, the trained ones.
        query_width: of all heads.
        exact: whether every layer is `known`, and labelled rows alone go through the last one.
    """

    name: str
    hidden: int
    vocabulary: int
    rotary: int
    positions: int
    layers: tuple[Layer, ...]
    total: int
    trainable: int
    adapters: int
    stacked: int
    linear: int
    linear_rows: int
    largest_linear: int
    largest_trained: int
    trained_16: int
    hidden_matrices: int
    small: int
    factors: int
    head_trained: bool
    input_trained: bool
    tied: bool
    multiplied: int
    head: int
    multiplied_trained: int
    query_width: int
    exact: bool


def shape_of(model: PreTrainedModel, *, fused: bool = True) -> Shape:
    """The shape of a model whose parameters are marked as they will be trained; they may be on the meta device.

    Args:
        fused: whether modules will be replaced by fused ones (`kernels: auto`).

    Raises:
        ModelError: no decoder or no head that could be named, so that nothing can be said of them.
    """
    head = head_of(model)
    decoder, config = decoder_of(model), text_config_of(model)
    embeddings = embeddings_of(model)
    blocks = _blocks(decoder)
    layers = [_layer(block, config, fused=fused) for block in blocks]
    trainable, total = count_parameters(model)
    trained = list({id(p): p for p in model.parameters() if p.requires_grad}.values())
    edges = (embeddings.weight, head.weight)
    names = {id(p): name for name, p in model.named_parameters()}
    adapters = [p for p in trained if ".lora_" in names[id(p)]]
    others = [p for p in trained if ".lora_" not in names[id(p)]]
    frozen = [m for m in _linears(decoder) if not m.weight.requires_grad and m is not head]
    met = {id(p): _met(p, config) for p in decoder.parameters() if p is not embeddings.weight}
    return Shape(
        name=type(model).__name__,
        hidden=int(embeddings.weight.shape[1]),
        vocabulary=int(head.weight.shape[0]),
        rotary=2 * int(getattr(config, "head_dim", None) or 0),
        positions=int(getattr(config, "max_position_embeddings", None) or 0),
        layers=tuple(layers),
        total=total,
        trainable=trainable,
        adapters=sum(p.numel() for p in adapters),
        stacked=sum(_stacked(block) for block in blocks),
        linear=sum(m.weight.numel() for m in frozen),
        linear_rows=sum(_out(m) for m in frozen),
        largest_linear=max((m.weight.numel() for m in frozen), default=0),
        largest_trained=max((p.numel() for p in trained), default=0),
        trained_16=sum(p.numel() for p in others),
        hidden_matrices=sum(p.numel() for p in trained if p.dim() == 2 and not any(p is edge for edge in edges)),
        small=sum(p.numel() for p in trained if p.numel() < SMALL),
        factors=sum(math.prod(p.shape[:-2]) * sum(p.shape[-2:]) for p in trained if p.dim() > 1)
        + sum(p.numel() for p in trained if p.dim() < 2),
        head_trained=bool(head.weight.requires_grad),
        input_trained=bool(embeddings.weight.requires_grad),
        tied=head.weight is embeddings.weight,
        multiplied=sum(met.values()),
        head=head.weight.numel(),
        multiplied_trained=sum(met.get(id(p), 0) for p in trained)
        + (head.weight.numel() if head.weight.requires_grad else 0),
        query_width=_query_width(config),
        exact=fused and all(layer.known for layer in layers),
    )


def head_of(model: PreTrainedModel) -> Any:
    """The module from hidden states to logits.

    Raises:
        ModelError: transformers cannot name it.
    """
    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise ModelError(
            f"{type(model).__name__} has no output head that transformers can name, so what its logits need is "
            "not known and no plan can be made; base_model must be a causal language model"
        )
    return head


def _blocks(decoder: nn.Module) -> list[nn.Module]:
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    longest = max(lists, key=len, default=None)
    return list(longest) if longest is not None else [decoder]


def _layer(layer: nn.Module, config: Any, *, fused: bool) -> Layer:
    found = _parts(layer) if fused else None
    if found is None:
        return _rough_layer(layer, config)
    form, attention, mlp = found
    m = cast(Any, layer)
    before, after, before_mlp, after_mlp = FusedLayer.forms[form]
    hidden = int(getattr(config, "hidden_size", 0)) or _in(_linears(attention)[0])
    inputs = [m.self_attn.get_submodule(name) for name in _attention_inputs(m.self_attn)]
    out = m.self_attn.o_proj
    queries, head_dim = _in(out), int(m.self_attn.head_dim)
    keys = (sum(map(_out, inputs)) - queries) // 2
    heads, key_heads = queries // head_dim, keys // head_dim
    explicit = bool(getattr(config, "attn_logit_softcapping", None)) or hasattr(attention, "sinks")

    tokens = float(sum(map(_rank, inputs)) + 2 * queries + 2 * keys)  # turned q and k, v, attention's output
    stats_tokens = heads  # log-sum-exp of each query
    normed_tokens = hidden if before is not None and any(map(_takes_input, inputs)) else 0
    tokens += normed_tokens
    stats_tokens += 1 if before is not None else 0
    for norm, width, count in (("q_norm", queries, heads), ("k_norm", keys, key_heads)):
        if hasattr(attention, norm):
            tokens += width
            stats_tokens += 1 if getattr(attention, norm).weight.numel() == width else count
    if len(inputs) == 1:  # values are a part of the one projection, which is kept whole
        tokens += queries + keys
    if explicit:  # keys and values spread over the query heads
        tokens += 2 * (queries - keys)
    rows, stats_rows = float(_rank(out) + hidden), 0  # the residual sum, or what takes its place as the MLP's input
    for norm_name in (after, after_mlp):
        rows += hidden if norm_name else 0
        stats_rows += 1 if norm_name else 0
    gates = [mlp.get_submodule(name) for name in _mlp_inputs(mlp)]
    down = cast(Any, mlp).down_proj
    normed_rows = hidden if before_mlp is not None and any(map(_takes_input, gates)) else 0
    rows += normed_rows
    stats_rows += 1 if before_mlp is not None else 0
    inner = _in(down)
    wide = float(2 * inner + sum(map(_rank, gates)) + _rank(down))
    # DoRA keeps what it rescales; between rescaled layers the MLP runs in pieces, which keep their product as well.
    tokens += sum(map(_rescaled, inputs))
    rows += _rescaled(out)
    if again := sum(map(_rescaled, [*gates, down])):
        wide += again + inner
    linears = [*inputs, out, *gates, down]
    return Layer(
        known=True,
        tokens=tokens,
        rows=rows + wide,
        wide=wide,
        normed_tokens=normed_tokens,
        normed_rows=normed_rows,
        input=hidden,
        stats_tokens=stats_tokens,
        stats_rows=stats_rows,
        dropped=sum(_in(one) for one in linears if isinstance(one, LoRALinear) and one.dropout),
        heads=heads if explicit else 0,
        window=int(getattr(attention, "sliding_window", getattr(config, "sliding_window", None)) or 0),
        attended=queries,
        keys=2 * (queries if explicit else keys),
        joint=queries + keys if len(inputs) == 1 and not explicit else 0,
        passing=2 * hidden,
        attending=4 * queries + 4 * keys,
        inner=inner,
        parameters=sum(p.numel() for p in layer.parameters()),
        gates=sum(cast(nn.Linear, gate).weight.numel() for gate in gates),
        **_owned(layer),
    )


def _owned(layer: nn.Module) -> dict[str, int]:
    """Who the layer's parameters belong to."""
    frozen = [m for m in _linears(layer) if not m.weight.requires_grad]
    named = list(layer.named_parameters())
    return {
        "adapters": sum(p.numel() for name, p in named if p.requires_grad and ".lora_" in f".{name}"),
        "trained": sum(p.numel() for name, p in named if p.requires_grad and ".lora_" not in f".{name}"),
        "linear": sum(m.weight.numel() for m in frozen),
        "linear_rows": sum(map(_out, frozen)),
    }


def _rescaled(module: nn.Module) -> int:
    return _out(module) if isinstance(module, DoRALinear) else 0


def _parts(layer: nn.Module) -> tuple[str, nn.Module, nn.Module] | None:
    """Form of a layer, its attention and its MLP, if all of them are of kinds that have fused forwards."""
    form = next(FusedLayer.candidates(layer), None)
    if form is None:
        return None
    attention, mlp = cast(Any, layer).self_attn, cast(Any, layer).mlp
    known = next(FusedAttention.candidates(attention), None) and next(FusedMLP.candidates(mlp), None)
    return (form["form"], attention, mlp) if known else None


def _rough_layer(layer: nn.Module, config: Any) -> Layer:
    linears = _linears(layer)
    chosen = int(getattr(config, "num_experts_per_tok", None) or 1)
    experts = [p for p in layer.parameters() if p.dim() == 3]
    # (experts, outputs, inputs) in most families; which is which hardly matters, since the inputs are kept as well
    # only where the experts are trained.
    widths = sum(_out(m) + (_in(m) if _takes_input(m) else 0) for m in linears)
    widths += chosen * sum(sum(p.shape[1:]) if p.requires_grad else max(p.shape[1:]) for p in experts)
    widest = max([_out(m) for m in linears] + [_in(m) for m in linears] + [1])
    widest = max([widest] + [chosen * max(p.shape[1:]) for p in experts])
    hidden = int(getattr(config, "hidden_size", None) or getattr(config, "n_embd", None) or 0)
    explicit = bool(getattr(config, "attn_logit_softcapping", None)) or any(
        hasattr(m, "sinks") for m in layer.modules()
    )
    heads = int(getattr(config, "num_attention_heads", 0) or 0) if explicit else 0
    kept = BESIDE_LINEARS * widths + sum(map(_rank, linears))
    dropped = sum(_in(m) for m in linears if isinstance(m, LoRALinear) and m.dropout)
    size = sum(p.numel() for p in layer.parameters())
    return Layer(
        known=False,
        tokens=kept,
        rows=0.0,
        wide=0.0,
        normed_tokens=0,
        normed_rows=0,
        input=hidden,
        stats_tokens=0,
        stats_rows=0,
        dropped=dropped,
        heads=heads,
        window=0,
        attended=0,
        keys=_rough_keys(config),
        joint=0,
        passing=3.0 * widest,
        attending=0.0,
        inner=0,
        parameters=size,
        gates=0,
        **_owned(layer),
    )


def _rough_keys(config: Any) -> int:
    heads = int(getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None) or 0)
    return 2 * heads * int(getattr(config, "head_dim", None) or 0)


def _stacked(layer: nn.Module) -> int:
    """Numbers in the A's that are kept one under another: those of q, k and v, and of gate and up."""
    found = _parts(layer)
    if found is None:
        return 0
    _, attention, mlp = found
    groups = [
        [attention.get_submodule(name) for name in _attention_inputs(attention)],
        [mlp.get_submodule(name) for name in _mlp_inputs(mlp)],
    ]
    adapted = [[m for m in group if isinstance(m, LoRALinear)] for group in groups]
    return sum(m.lora_A.numel() for group in adapted if len(group) > 1 for m in group)


def _attention_inputs(attention: nn.Module) -> tuple[str, ...]:
    return cast("tuple[str, ...]", next(FusedAttention.candidates(attention))["inputs"])


def _mlp_inputs(mlp: nn.Module) -> tuple[str, ...]:
    return cast("tuple[str, ...]", next(FusedMLP.candidates(mlp))["inputs"])


def _linears(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if isinstance(m, nn.Linear | Conv1D) or hasattr(m, "in_features")]


def _out(linear: Any) -> int:
    return int(linear.nf if isinstance(linear, Conv1D) else linear.out_features)


def _in(linear: Any) -> int:
    return int(linear.nx if isinstance(linear, Conv1D) else linear.in_features)


def _rank(linear: nn.Module) -> int:
    return linear.r if isinstance(linear, LoRALinear) else 0


def _takes_input(linear: Any) -> bool:
    """Whether backward needs the layer's input: an adapter's or the weight's gradient does, the input's own not."""
    return isinstance(linear, LoRALinear) or bool(linear.weight.requires_grad)


def _met(parameter: nn.Parameter, config: Any) -> int:
    """Of a parameter, what one token is multiplied with: of experts only those that are chosen."""
    if parameter.dim() == 3:
        chosen = int(getattr(config, "num_experts_per_tok", None) or 1)
        return parameter.numel() // parameter.shape[0] * min(chosen, parameter.shape[0])
    return parameter.numel() if parameter.dim() == 2 else 0


def _query_width(config: Any) -> int:
    heads = int(getattr(config, "num_attention_heads", None) or getattr(config, "n_head", None) or 0)
    hidden = int(getattr(config, "hidden_size", None) or 0)
    return heads * int(getattr(config, "head_dim", None) or (hidden // heads if heads else 0))
