"""Several adapters of one base as one.

`cat` and `svd` keep the weighted sum of what the adapters add (svd: its best approximation of a given rank). The
others combine the A's and the B's each for themselves, an approximation that costs nothing: `linear` adds them;
`ties` (Yadav et al. 2023) keeps the largest entries of each, elects a sign per entry by the sum over the adapters,
and averages those that agree with it; `dare_ties` (Yu et al. 2024) drops entries at random instead of by size and
scales up what is left. The results are those of PEFT's `add_weighted_adapter`: a weight and a scale go in as
their square root on both A and B, and a negative one's sign on A alone.

Each result is an ordinary LoRA with scale 1. (PEFT keeps rank-stabilised scaling on, where the first adapter had
it, and its result is then too strong by the square root of the rank.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from luthier.errors import ConfigError, ModelError
from luthier.export.adapters import Adapter, Delta

METHODS = ("linear", "cat", "svd", "ties", "dare_ties")
_BY_DENSITY = ("ties", "dare_ties")

Prune = Callable[[torch.Tensor], torch.Tensor]


def check_options(
    method: str, weights: Sequence[float], *, density: float | None, rank: int | None, seed: int | None
) -> None:
    """Raises ConfigError for a method that does not exist, or options that would do nothing."""
    if method not in METHODS:
        raise ConfigError(f"--method: there is no {method!r}; there are {', '.join(METHODS)}")
    if density is not None and method not in _BY_DENSITY:
        raise ConfigError(f"--density does nothing with --method {method}; it is for {' and '.join(_BY_DENSITY)}")
    if density is None and method in _BY_DENSITY:
        raise ConfigError(f"--method {method} needs --density, the share of entries to keep (0.5, say)")
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"--density {density:g}: it is a share above 0 and at most 1")
    if rank is not None and method != "svd":
        raise ConfigError(f"--rank does nothing with --method {method}; it is for svd")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank {rank}: at least 1")
    if seed is not None and method != "dare_ties":
        raise ConfigError(f"--seed does nothing with --method {method}; it is for dare_ties")
    if not any(weights):
        raise ConfigError("the weights are all 0: nothing would be left of the adapters")


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: str,
    paths: Sequence[str],
    *,
    density: float | None = None,
    rank: int | None = None,
    seed: int | None = None,
) -> Adapter:
    """One adapter with scale 1 of several; a module that only some of them adapt gets what those have.

    Args:
        paths: all module paths of the model in its order, in which random draws are made.

    Raises:
        ModelError: adapters that cannot be combined like this.
    """
    check_options(method, weights, density=density, rank=rank, seed=seed)
    _check_kinds(adapters)
    ranks = {a.source: max(delta.r for delta in a.deltas.values()) for a in adapters}
    if method == "cat":
        r = sum(ranks.values())
    elif method == "svd":
        r = rank or max(ranks.values())
    else:
        _check_ranks(adapters, method)
        r = max(ranks.values())
    generator = torch.Generator().manual_seed(seed or 0)
    deltas = {}
    for path in paths:
        found = [(a.deltas[path], w) for a, w in zip(adapters, weights, strict=True) if path in a.deltas]
        if not found:
            continue
        if len({delta.shape for delta, _ in found}) > 1:
            raise ModelError(f"the adapters are for different models: {path} has different shapes in them")
        if method == "cat":
            a, b = _cat(found)
        elif method == "svd":
            a, b = _svd(found, r)
        else:
            a, b = _entries(found, method, density, generator)
        deltas[path] = Delta(
            _padded(a, 0, r), _padded(b, 1, r), scale=1.0, embedding=found[0][0].embedding
        )
    whole = {name: tensor for a in adapters for name, tensor in a.whole.items()}
    return Adapter(" + ".join(a.source for a in adapters), _config(adapters, r, paths, deltas), deltas, whole)


def _cat(found: Sequence[tuple[Delta, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Side by side: B A is the weighted sum, exactly."""
    a = torch.cat([delta.a.float() * weight * delta.scale for delta, weight in found])
    return a, torch.cat([delta.b.float() for delta, _ in found], dim=1)


def _svd(found: Sequence[tuple[Delta, float]], r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum's r largest singular directions."""
    total = sum(weight * delta.scale * (delta.b.float() @ delta.a.float()) for delta, weight in found)
    assert isinstance(total, torch.Tensor)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    return vh[:r], u[:, :r] * s[:r]


def _entries(
    found: Sequence[tuple[Delta, float]], method: str, density: float | None, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A's and B's each for themselves."""

    def prune(tensor: torch.Tensor) -> torch.Tensor:
        if method == "linear" or density == 1:
            return tensor
        assert density is not None
        if method == "ties":
            return _largest(tensor, density)
        kept = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
        return tensor * kept / density

    strengths = [weight * delta.scale for delta, weight in found]
    roots = [math.sqrt(abs(strength)) for strength in strengths]
    signed = [math.copysign(root, strength) for root, strength in zip(roots, strengths, strict=True)]
    elect = method in _BY_DENSITY
    results = []
    for name, factors in (("a", signed), ("b", roots)):
        tensors = [prune(getattr(delta, name).float()) for delta, _ in found]
        results.append(_agreeing(tensors, factors) if elect else _weighted(tensors, factors))
    return results[0], results[1]


def _weighted(tensors: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
    return torch.stack([t * f for t, f in zip(tensors, factors, strict=True)]).sum(0)


def _agreeing(tensors: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
    """Entry by entry the mean of what has the sign of the sum; the sign is elected before weights are given."""
    stacked = torch.stack(list(tensors))
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agrees = stacked.sign() == elected
    weighted = stacked * torch.tensor(factors).view(-1, *[1] * (stacked.dim() - 1))
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """The share of entries that is largest in size; zero elsewhere."""
    flat = tensor.flatten()
    chosen = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, chosen, flat[chosen]).view_as(tensor)


def _padded(tensor: torch.Tensor, dim: int, r: int) -> torch.Tensor:
    missing = r - tensor.shape[dim]
    if missing <= 0:
        return tensor.contiguous()
    size = list(tensor.shape)
    size[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(size)], dim=dim)


def _check_kinds(adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        if not adapter.deltas:
            raise ModelError(f"{adapter.source}: it has whole modules only, and those cannot be combined")
        if any(delta.magnitude is not None for delta in adapter.deltas.values()):
            raise ModelError(
                f"{adapter.source}: a DoRA adapter rescales rows of the sum, so that it can be merged only as it is: "
                "alone, and with weight 1"
            )
    names = [name for adapter in adapters for name in adapter.whole]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ModelError(
            f"more than one of the adapters trained {twice[0]} whole; whole modules cannot be combined"
        )


def _check_ranks(adapters: Sequence[Adapter], method: str) -> None:
    by_path: dict[str, dict[str, int]] = {}
    for adapter in adapters:
        for path, delta in adapter.deltas.items():
            by_path.setdefault(path, {})[adapter.source] = delta.r
    for path, ranks in by_path.items():
        if len(set(ranks.values())) > 1:
            listed = ", ".join(f"{source} {r}" for source, r in ranks.items())
            raise ModelError(
                f"--method {method} needs adapters of equal rank, and {path} has {listed}; cat and svd take any"
            )


def _config(
    adapters: Sequence[Adapter], r: int, paths: Sequence[str], deltas: Mapping[str, Delta]
) -> dict[str, Any]:
    """`adapter_config.json`: the first adapter's base, and targets that match these modules and no others."""
    targets = sorted({path.rpartition(".")[2] for path in deltas})
    matched = {p for p in paths if any(re.fullmatch(rf"(.*\.)?{re.escape(t)}", p) for t in targets)}
    first = adapters[0].config
    return {
        "peft_type": "LORA",
        "task_type": first.get("task_type", "CAUSAL_LM"),
        "base_model_name_or_path": first.get("base_model_name_or_path"),
        "revision": first.get("revision"),
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "target_modules": targets if matched == set(deltas) else list(deltas),
        "modules_to_save": sorted({m for a in adapters for m in a.config.get("modules_to_save") or ()}) or None,
        "bias": "none",
        "fan_in_fan_out": bool(first.get("fan_in_fan_out")),
        "inference_mode": True,
        "init_lora_weights": True,
    }
