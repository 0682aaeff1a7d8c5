"""Which module becomes which fused one, and the proof of each on the model at hand.

A module that has the parts of a norm, a gated MLP, an attention or a decoder layer gets the fused forward of
that kind, but only after both have computed the same: on the inputs that the module sees in a pass of the
model itself, with random adapters, forward and gradients. One proof stands for all modules of a kind, which is
the class with all its settings, shapes and number formats. What differs keeps its own forward, and a line says
so. Nothing is matched by family name, so a new family mostly works unseen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from luthier.models import attention
from luthier.models.fused import KINDS, AttentionCall, Fused, FusedAttention, FusedLayer
from luthier.models.kinds import looks, one_of_each_layer
from luthier.models.load import decoder_of, embeddings_of
from luthier.models.lora import DoRALinear, lora_layers
from luthier.models.policy import Policy

log = logging.getLogger("luthier")

# Largest difference allowed between a module's own numbers and the fused ones, relative to the largest number of
# the same tensor; rounding alone reaches a tenth of it.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_LENGTHS = (9, 21, 5)


@dataclass
class Kind:
    """Modules that one proof stands for: the first of them is what it is made with."""

    fused: type[Fused]
    modules: list[nn.Module]
    call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    worst: float = 0.0
    why: str = ""


@dataclass
class Fusion:
    """What was replaced and what was not.

    Attributes:
        rows_in_last_layer: the last layer computes labelled rows only, when it is told them.
    """

    kinds: list[Kind] = field(default_factory=list)
    rows_in_last_layer: bool = False

    def log(self) -> None:
        """A line for each kind."""
        for kind in self.kinds:
            name = f"{len(kind.modules)} x {type(kind.modules[0]).__name__} ({kind.fused.what})"
            if kind.why:
                log.info("kept as it is: %s: %s", name, kind.why)
            else:
                log.info("fused: %s, equal within %.0e", name, kind.worst)


def fuse(model: PreTrainedModel, classes: Sequence[type[Fused]] = KINDS) -> Fusion:
    """Give the decoder's modules their fused forwards, each kind proven first; the model is otherwise unchanged."""
    decoder = decoder_of(model)
    kinds = _kinds(decoder, classes)
    was_training = model.training
    model.eval()
    fusion = Fusion()
    try:
        with _random_adapters(model):
            spied = _inputs(model, decoder, kinds)
            for kind in kinds:
                _try(kind, spied)
                fusion.kinds.append(kind)
            fusion.rows_in_last_layer = _try_rows(decoder, kinds)
    finally:
        model.train(was_training)
    return fusion


def fuse_policy(policy: Policy) -> None:
    """Fuse the model of a policy that runs flat passes, and say what came of it."""
    if not policy.flat:
        log.info("kernels: none is fused, since documents run one per pass on this model")
        return
    fusion = fuse(policy.model)
    policy.rows_in_last_layer = fusion.rows_in_last_layer
    fusion.log()
    if any(isinstance(module, DoRALinear) and module.dropout for module in policy.model.modules()):
        log.info("kept as they are: attention and MLPs with DoRA, because of its lora_dropout")


def undo(model: nn.Module) -> None:
    """Give every module its own forward back."""
    for module in model.modules():
        if isinstance(found := module.__dict__.get("forward"), Fused):
            del module.forward
            if isinstance(found, FusedLayer) and found.mode in ("layer", "offload"):
                module.gradient_checkpointing = True  # type: ignore[assignment]


def _kinds(decoder: nn.Module, classes: Sequence[type[Fused]]) -> list[Kind]:
    """Everything that one of the fused classes may fit, children before parents."""
    found: dict[Any, Kind] = {}
    for fused in classes:
        for module in decoder.modules():
            if next(fused.candidates(module), None) is not None:
                found.setdefault((fused, looks(module)), Kind(fused, [])).modules.append(module)
    return list(found.values())


def _inputs(model: PreTrainedModel, decoder: nn.Module, kinds: list[Kind]) -> dict[int, AttentionCall]:
    """Run a small flat pass; notes what each kind's first module is called with, and what every attention module
    hands on (by id).
    """
    seen: dict[int, AttentionCall] = {}

    def spy(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        sinks = kwargs.get("s_aux")
        name = next((n for n, p in module.named_parameters(recurse=False) if p is sinks), None)
        if sinks is None or name is not None:
            seen[id(module)] = AttentionCall(
                kwargs.get("scaling"), kwargs.get("sliding_window"), kwargs.get("softcap"), name
            )
        return attention.attention(module, *args, **kwargs)

    def note(kind: Kind) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            kind.call = (args, kwargs)

        return hook

    device = embeddings_of(model).weight.device
    lengths = torch.tensor(_LENGTHS)
    ids = torch.randint(
        embeddings_of(model).weight.shape[0],
        (int(lengths.sum()),),
        generator=torch.Generator().manual_seed(1),
    )
    positions = torch.cat([torch.arange(n) for n in _LENGTHS])
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    with ExitStack() as stack, torch.no_grad(), attention.flat_pass(), one_of_each_layer(model):
        for kind in kinds:
            handle = kind.modules[0].register_forward_pre_hook(note(kind), with_kwargs=True)
            stack.callback(handle.remove)
        AttentionInterface.register(attention.NAME, spy)
        stack.callback(attention.register)
        decoder(
            input_ids=ids[None].to(device),
            position_ids=positions[None].to(device),
            use_cache=False,
            document_lengths=_LENGTHS,
            cu_seq_lens_q=cu,
            cu_seq_lens_k=cu,
            max_length_q=max(_LENGTHS),
            max_length_k=max(_LENGTHS),
        )
    return seen


def _try(kind: Kind, spied: dict[int, AttentionCall]) -> None:
    """Prove a kind with its first module, and on success replace all of its modules."""
    first = kind.modules[0]
    if kind.call is None:
        kind.why = "a pass of the model does not call it"
        return
    attends = issubclass(kind.fused, FusedAttention)
    calls = [spied[id(module)] for module in kind.modules if id(module) in spied]
    if attends and (not calls or any(call != calls[0] for call in calls)):
        kind.why = "it does not attend through the function that transformers registers"
        return
    extra = {"call": calls[0]} if attends else {}
    with _plain(first):
        expected = _run(first, kind.call)
    kind.why = "it computes something else"
    for settings in kind.fused.candidates(first):
        first.forward = kind.fused(first, **settings, **extra)
        worst = _difference(expected, first, kind.call)
        del first.forward
        if worst is not None and worst <= TOLERANCE[expected[0].dtype]:
            for module in kind.modules:
                _install(module, kind.fused(module, **settings, **extra))
            kind.worst, kind.why = worst, ""
            return
        if worst is not None:
            kind.why = f"the fused one differs by {worst:.0e}"


def _install(module: nn.Module, forward: Fused) -> None:
    module.forward = forward
    if isinstance(forward, FusedLayer):
        module.gradient_checkpointing = False  # type: ignore[assignment] # the fused one recomputes by itself


def _try_rows(decoder: nn.Module, kinds: list[Kind]) -> bool:
    """Whether the last layer, told some rows, computes those as it does among all."""
    layers = [m for m in decoder.modules() if isinstance(m.__dict__.get("forward"), FusedLayer)]
    stack = next((m for m in decoder.modules() if isinstance(m, nn.ModuleList) and set(layers) & set(m)), None)
    # The rows go to every layer, and one that is kept would hand them to its fused attention.
    if stack is None or not set(stack) <= set(layers):
        return False
    last = layers[-1]
    call = next(kind.call for kind in kinds if last in kind.modules and kind.call is not None)
    fused: Any = last.forward
    rows = torch.tensor([3, 8, 8, 20, 34], device=next(last.parameters()).device)
    whole = _run(last, call, rows=rows)
    fused.last = True
    picked = _run(last, (call[0], {**call[1], "label_rows": rows}))
    fused.last = _largest_difference(whole, picked) <= TOLERANCE[whole[0].dtype]
    return bool(fused.last)


def _run(
    module: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], rows: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Output and gradients (of the input, of every trained parameter) under a fixed random cotangent."""
    args, kwargs = call
    name = None if args else next(key for key in kwargs if isinstance(kwargs[key], torch.Tensor))
    x = (kwargs[name] if name else args[0]).detach().clone().requires_grad_(True)
    parameters = [p for p in module.parameters() if p.requires_grad]
    with torch.enable_grad(), attention.flat_pass():
        out = module(**{**kwargs, name: x}) if name else module(x, *args[1:], **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        out = out if rows is None else out.index_select(1, rows)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
        gradients = torch.autograd.grad(out, [x, *parameters], cotangent, allow_unused=True)
    return [out.detach(), *(g for g in gradients if g is not None)]


def _difference(
    expected: list[torch.Tensor], module: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]
) -> float | None:
    """The largest relative difference of the module's present forward from what is expected; None if it fails."""
    try:
        return _largest_difference(expected, _run(module, call))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return None  # a guess that does not fit may fail in any of these ways


def _largest_difference(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    worst = 0.0
    for one, other in zip(expected, found, strict=True):
        size = max(float(one.abs().max()), 1e-30)
        worst = max(worst, float((one.float() - other.float()).abs().max()) / size)
    return worst if worst == worst else float("inf")


@contextmanager
def _plain(module: nn.Module) -> Iterator[None]:
    """The module and all below it with their own forwards."""
    taken = []
    for part in module.modules():
        if isinstance(part.__dict__.get("forward"), Fused):
            taken.append((part, part.forward))
            del part.forward
    try:
        yield
    finally:
        for part, forward in taken:
            part.forward = forward


@contextmanager
def _random_adapters(model: nn.Module) -> Iterator[None]:
    """B is 0 in a new adapter, which would hide everything that A does; made random for a while."""
    generator = torch.Generator().manual_seed(3)
    before = []
    with torch.no_grad():
        for layer in lora_layers(model).values():
            before.append((layer.lora_B, layer.lora_B.detach().clone()))
            noise = torch.randn(layer.lora_B.shape, generator=generator) / layer.r
            layer.lora_B.copy_(noise.to(layer.lora_B))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in before:
                parameter.copy_(values)
