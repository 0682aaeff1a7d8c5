"""Ranks by layer from the user's data: where a layer's inputs vary in more directions, its adapter gets more rank.

EVA (Paischer et al. 2024, sections 3.2 and 3.3): some of the training data runs through the base model, and the
singular value decomposition of each target's inputs, around their mean, says how much of their variance each
direction explains. All directions of all layers are then taken in the order of what they explain, until the
budget of trainable parameters is used up. A layer none of whose directions is taken gets no adapter.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.config import AdapterConfig
from luthier.errors import ConfigError, DataError
from luthier.models.load import decoder_of, embeddings_of

log = logging.getLogger("luthier")

# A layer gets at most this many times lora_r (rho in the paper, where 2 is the default).
MOST = 2
# Tokens of training data that are looked at.
TOKENS = 4096


class Directions:
    """Mean and first singular vectors of rows that come in parts (Ross et al. 2008, section 3.1), in fp32.

    Attributes:
        components: (k, in), orthonormal. squares: (k,), the squared singular values. total: all variance, times rows.
    """

    def __init__(self, k: int) -> None:
        self.k, self.rows = k, 0
        self.components: torch.Tensor | None = None
        self.squares: torch.Tensor | None = None
        self.mean: torch.Tensor | None = None
        self.total = 0.0

    def add(self, x_TI: torch.Tensor) -> None:
        x_TI = x_TI.float()
        rows, mean = x_TI.shape[0], x_TI.mean(0)
        parts = [x_TI - mean]
        if self.mean is None or self.components is None or self.squares is None:
            self.total += float(parts[0].square().sum())
            self.mean = mean
        else:
            # The difference of the means is one more row of what varies.
            shift = (self.mean - mean) * (self.rows * rows / (self.rows + rows)) ** 0.5
            self.total += float(parts[0].square().sum()) + float(shift.square().sum())
            parts = [self.components * self.squares.sqrt()[:, None], *parts, shift[None]]
            self.mean = self.mean + (mean - self.mean) * (rows / (self.rows + rows))
        self.rows += rows
        whole = torch.cat(parts)
        # Right singular vectors by the smaller of the two products; what is wanted of them is the first few.
        if whole.shape[0] <= whole.shape[1]:
            squares, left = torch.linalg.eigh((whole @ whole.t()).double())
            order = squares.argsort(descending=True)[: self.k]
            self.squares = squares[order].clamp_min(0).float()
            vectors = left[:, order].float().t() @ whole
            self.components = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-30)
        else:
            squares, right = torch.linalg.eigh((whole.t() @ whole).double())
            order = squares.argsort(descending=True)[: self.k]
            self.squares = squares[order].clamp_min(0).float()
            self.components = right[:, order].float().t()

    def explained(self) -> list[float]:
        """Share of the variance that each direction explains, in descending order."""
        assert self.squares is not None
        return (self.squares / max(self.total, 1e-30)).tolist()


def looks_at_data(adapter: AdapterConfig) -> bool:
    """Whether training data has to run through the base model before the adapter is made."""
    new = adapter.adapter is not None and adapter.lora_model_dir is None
    return new and (adapter.lora_rank_budget is not None or adapter.peft_init_lora_weights == "eva")


def choose_ranks(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    adapter: AdapterConfig,
    documents: Sequence[torch.Tensor] | None,
) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """Rank of each target layer under `lora_rank_budget`, and the directions of its inputs, the first ones first.

    Without a budget the ranks are none of this function's affair, and the directions are as many as `lora_r` or its
    patterns may ask for. Without weights (on the meta device) the budget is spread evenly.

    Args:
        layers: module path -> linear layer, in the model's order.
        documents: token ids of training documents; the first ones are used.

    Raises:
        ConfigError: a budget that no layer's first rank fits into, or that the layers cannot use up.
        DataError: too little data to tell directions apart.
    """
    sizes = {name: _size(layer) for name, layer in layers.items()}
    most = max(adapter.lora_r, *adapter.rank_pattern.values(), 0)
    caps = {name: min(MOST * most, *size) for name, size in sizes.items()}
    costs = {name: sum(size) for name, size in sizes.items()}
    extras = {name: size[1] if adapter.peft_use_dora else 0 for name, size in sizes.items()}
    if adapter.lora_rank_budget is not None:
        _check_budget(adapter, caps, costs, extras)
    if embeddings_of(model).weight.is_meta:
        explained = {name: [1.0 / (i + 1) for i in range(caps[name])] for name in layers}
        directions: dict[str, torch.Tensor] = {}
    else:
        found = _look(model, layers, caps, documents or ())
        explained = {name: found[name].explained() for name in layers}
        directions = {name: cast(torch.Tensor, found[name].components) for name in layers}
    if adapter.lora_rank_budget is None:
        return {}, directions
    ranks = share_out(explained, costs, extras, adapter.lora_rank_budget)
    _say(ranks, costs, extras, adapter.lora_rank_budget)
    return ranks, directions


def share_out(
    explained: Mapping[str, Sequence[float]], costs: Mapping[str, int], extras: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Directions in the order of what they explain, each taken if its parameters still fit.

    Args:
        explained: of each layer, in descending order. costs: parameters of one rank. extras: of the first rank more.
    """
    order = sorted(
        ((share, name) for name, shares in explained.items() for share in shares), key=lambda pair: -pair[0]
    )
    ranks = dict.fromkeys(explained, 0)
    left = budget
    for _, name in order:
        cost = costs[name] + (extras[name] if ranks[name] == 0 else 0)
        if cost <= left:
            ranks[name] += 1
            left -= cost
    return ranks


def _check_budget(
    adapter: AdapterConfig, caps: Mapping[str, int], costs: Mapping[str, int], extras: Mapping[str, int]
) -> None:
    budget = adapter.lora_rank_budget
    assert budget is not None
    largest = sum(caps[name] * costs[name] + extras[name] for name in caps)
    each = sum(costs[name] + extras[name] for name in caps)
    if budget < each:
        raise ConfigError(
            f"lora_rank_budget: {budget:,} parameters are less than rank 1 in each of the {len(caps)} layers takes, "
            f"{each:,}: raise it, or name fewer layers in lora_target_modules"
        )
    if budget > largest:
        raise ConfigError(
            f"lora_rank_budget: {budget:,} parameters are more than these {len(caps)} layers can use, {largest:,}, at "
            f"no more than {MOST} times lora_r ({adapter.lora_r}) each: lower it, or raise lora_r"
        )


def _size(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs, whatever the weight is stored as."""
    if isinstance(layer, Conv1D):
        return int(layer.weight.shape[0]), int(layer.weight.shape[1])
    return int(cast(Any, layer).in_features), int(cast(Any, layer).out_features)


@torch.no_grad()
def _look(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    caps: Mapping[str, int],
    documents: Sequence[torch.Tensor],
) -> dict[str, Directions]:
    """Run documents through the model, each on its own, and follow the inputs of every layer."""
    device = embeddings_of(model).weight.device
    found = {name: Directions(caps[name]) for name in layers}
    head = model.get_output_embeddings()
    runs = model if any(layer is head for layer in layers.values()) else decoder_of(model)
    seen = 0
    was_training = model.training
    model.train()  # nothing in it drops out; but in eval mode, on some CPUs, bitsandbytes packs its weights anew
    with _followed(layers, found) as groups:
        for ids in documents:
            if seen >= TOKENS:
                break
            runs(input_ids=ids[None, : TOKENS - seen].to(device), use_cache=False)
            seen += len(ids)
    model.train(was_training)
    short = [name for name, of in found.items() if groups.get(name, name) == name and of.rows < of.k]
    if short:
        raise DataError(
            f"too little training data for ranks by layer: {seen} tokens, {found[short[0]].rows} of which reach "
            f"{short[0]}, do not have {found[short[0]].k} directions; lower lora_r, or set lora_r and rank_pattern "
            "instead of lora_rank_budget"
        )
    return {name: found[groups.get(name, name)] for name in layers}


@contextmanager
def _followed(layers: Mapping[str, nn.Module], found: dict[str, Directions]) -> Iterator[dict[str, str]]:
    """Inside, the inputs of the layers are added to `found`; gives layer -> the one before it with the same input,
    which is not decomposed twice (q, k and v; gate and up)."""
    groups: dict[str, str] = {}
    before: list[Any] = [None, ""]

    def follow(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if x is before[0] and found[before[1]].k == found[name].k:
                groups[name] = before[1]
                return
            before[:] = [x, name]
            rows = x.reshape(-1, x.shape[-1])
            if len(rows):
                found[name].add(rows)

        return hook

    handles = [layer.register_forward_pre_hook(follow(name)) for name, layer in layers.items()]
    try:
        yield groups
    finally:
        for handle in handles:
            handle.remove()


def _say(
    ranks: Mapping[str, int], costs: Mapping[str, int], extras: Mapping[str, int], budget: int
) -> None:
    used = sum(r * costs[name] + (extras[name] if r else 0) for name, r in ranks.items())
    log.info("lora_rank_budget: %s of %s trainable parameters used; ranks by layer:", f"{used:,}", f"{budget:,}")
    by_parent: dict[str, list[str]] = {}
    for name, r in ranks.items():
        parent, _, last = name.rpartition(".")
        by_parent.setdefault(parent, []).append(f"{last} {r}")
    for parent, parts in by_parent.items():
        log.info("  %s: %s", parent, ", ".join(parts))
    if dropped := [name for name, r in ranks.items() if r == 0]:
        log.info("%d layers explain too little to get any rank: no adapter on them", len(dropped))
