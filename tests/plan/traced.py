"""A real training step on a toy model, with every tensor that it keeps and every allocation that it makes counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from luthier.config import AdapterConfig, Config, FreezeConfig
from luthier.data.batches import Completions
from luthier.models.freeze import set_trainable
from luthier.models.fuse import fuse_policy
from luthier.models.isolation import build_policy
from luthier.models.layers import Recomputation
from luthier.models.load import use_flat_attention
from luthier.models.lora import add_lora
from luthier.models.policy import Policy
from luthier.models.recompute import TILE, Mode
from luthier.models.reference import Reference
from luthier.objectives.preference import preference
from luthier.objectives.sft import SFT
from luthier.plan.engine import Engine, Pass
from luthier.plan.shape import Shape, shape_of
from luthier.train.optim import Masters
from luthier.train.optimizers import build_optimizer
from luthier.train.preferences import ReferenceLogps
from tests.models.families import toy_model

# Wide and long enough that activations weigh as much as they do in earnest, beside what is there once.
SIZES: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=512,
    layer_types=None,
)


@dataclass
class Traced:
    """Bytes of a real step, and what the plan needs to know of it."""

    shape: Shape
    engine: Engine
    one: Pass
    static: int
    kept: int
    peak: int
    optimizer: int
    gradients: int
    copy: int


def run_step(
    family: str,
    *,
    lengths: tuple[int, ...] = (700, 500),
    labels: int = 600,
    lora: bool = True,
    recompute: Mode = "keep",
    kernels: bool = True,
    optimizer: str = "adamw_torch_fused",
    dora: bool = False,
    rl: str | None = None,
    pairs: Sequence[tuple[int, int, int]] = (),
    **changes: Any,
) -> Traced:
    """One pass, backward and optimizer step, the third of three, traced.

    Args:
        rl: a preference run, with the reference's forward where it has one. pairs: tokens of the shared prompt, of the
            chosen and of the rejected answer, in place of `lengths` and `labels`.
    """
    from transformers import AutoModelForCausalLM

    small = toy_model(family)
    config = small.config
    for name, value in {**SIZES, "max_position_embeddings": 4096, **changes}.items():
        if value is not None:
            setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = (list(config.layer_types) * config.num_hidden_layers)[: config.num_hidden_layers]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    use_flat_attention(model)
    dropout = None
    if lora:
        dropout = add_lora(
            model, AdapterConfig(adapter="lora", lora_r=8, lora_target_linear=True, peft_use_dora=dora), 0
        )
    else:
        set_trainable(model, FreezeConfig())
    policy = build_policy(model, dropout, 1024)
    policy.weighted_sum = rl is None
    if kernels:
        fuse_policy(policy)
    Recomputation(model).set_all(recompute)
    policy.train()
    training = Config.from_flat(
        {"base_model": "x", "datasets": [{"path": "x", "type": "completion"}], "optimizer": optimizer}
    ).training
    masters = Masters(model)
    stepper = build_optimizer(masters, training)
    batch = _pairs(pairs, config.vocab_size) if pairs else _batch(lengths, labels, config.vocab_size)
    labels = len(batch.position_N)
    reference = Reference.of(model) if rl in ("dpo", "ipo") else None
    objective: Any = SFT()
    if rl is not None:
        settings = Config.from_flat({"base_model": "x", "datasets": [{"path": "x"}], "rl": rl}).preference
        before = None if reference is None else ReferenceLogps(reference)
        objective = preference(settings, before, before, lambda number: number)
    of_step = SimpleNamespace(rows=pairs, trained_tokens=labels, chosen_tokens=labels)

    def step() -> None:
        masters.zero_grad()
        objective(policy, batch, of_step)[0].backward()
        stepper.step()
        masters.publish()

    step()
    step()
    masters.zero_grad()
    state = [t for held in stepper.state.values() for t in held.values() if isinstance(t, torch.Tensor)]
    state_bytes = sum(t.untyped_storage().nbytes() for t in state)
    static = sum(p.untyped_storage().nbytes() for p in {id(p): p for p in model.parameters()}.values())
    copy = 0 if reference is None else reference.nbytes
    kept = _kept(policy, batch)
    peak = _peak(step)
    gradients = sum(m.grad.nbytes for m in masters if m.grad is not None)
    engine = Engine(
        compute=4,
        frozen=4,
        slices=True,
        cpu=True,
        optimizer=optimizer,
        recompute=recompute,
        tile=TILE["cpu"],
        weighted=rl is None,
        reference=reference is not None,
    )
    one = Pass.of(batch.lengths, batch.parents, labels, several=False)
    return Traced(shape_of(model, fused=kernels), engine, one, static, kept, peak, state_bytes, gradients, copy)


def _batch(lengths: tuple[int, ...], labels: int, vocabulary: int) -> Any:
    total = sum(lengths)
    generator = torch.Generator().manual_seed(1)
    return SimpleNamespace(
        input_ids=torch.randint(0, vocabulary, (total,), generator=generator),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        lengths=lengths,
        parents=(-1,) * len(lengths),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        drawn=lengths,
        seeds=tuple(range(len(lengths))),
        position_N=torch.randperm(total, generator=generator)[:labels].sort().values,
        target_N=torch.randint(0, vocabulary, (labels,), generator=generator),
        weight_N=torch.ones(labels),
    )


def _pairs(pairs: Sequence[tuple[int, int, int]], vocabulary: int) -> Any:
    """Pairs with their prompts computed once, every token of the answers labelled."""
    segments = [n for pair in pairs for n in pair]
    starts = [0, *torch.tensor(segments).cumsum(0).tolist()]
    positions = [torch.arange(prompt + n) for prompt, chosen, _ in pairs for n in (chosen,)]
    generator = torch.Generator().manual_seed(1)
    flat, places, owners = [], [], []
    for number, (prompt, chosen, rejected) in enumerate(pairs):
        flat += [positions[number], torch.arange(prompt, prompt + rejected)]
        begin = starts[3 * number]
        last = begin + prompt - 1
        for side, (start, n) in enumerate([(begin + prompt, chosen), (begin + prompt + chosen, rejected)]):
            places.append(torch.tensor([last, *range(start, start + n - 1)]))
            owners += [2 * number + side] * n
    position_N = torch.cat(places)
    owner_N = torch.tensor(owners)
    labels, total = len(position_N), sum(segments)
    lengths = tuple(segments)
    return SimpleNamespace(
        input_ids=torch.randint(0, vocabulary, (total,), generator=generator),
        position_ids=torch.cat(flat),
        lengths=lengths,
        parents=tuple(parent for n in range(len(pairs)) for parent in (-1, 3 * n, 3 * n)),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        drawn=lengths,
        seeds=tuple(range(len(lengths))),
        position_N=position_N,
        target_N=torch.randint(0, vocabulary, (labels,), generator=generator),
        weight_N=torch.ones(labels),
        rows=tuple(range(len(pairs))),
        completions=Completions(
            entry_M=torch.arange(labels),
            completion_M=owner_N,
            tokens_C=torch.bincount(owner_N).float(),
            desirable_C=torch.tensor([True, False] * len(pairs)),
            nll_weight_N=(owner_N % 2 == 0).float(),
        ),
    )


def _kept(policy: Policy, batch: Any) -> int:
    """Bytes of the storages that autograd keeps for backward, the parameters' own left out."""
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    found: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = policy(batch)
    del out
    return sum(size for size, _ in found.values())


def _peak(step: Any) -> int:
    """Most bytes allocated at once during a call, beyond what was there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
        step()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in traced.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    most = now = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        now += size
        most = max(most, now)
    return most
