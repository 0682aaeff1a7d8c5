"""How many tokens one forward pass may hold: what memory allows and, on a CPU, what is fastest.

A pass's memory grows with its tokens, so one number bounds it. On CUDA the number is measured: one real pass
runs and the allocator says what it took. Elsewhere it is estimated from the shapes of the linear layers, which
costs nothing, and leaves more room for being wrong.

Where what a pass has to hold does not fit (one document, or as many tokens as run at full speed), smaller passes are
no way out, and layers recompute (`gradient_checkpointing: auto`): as much as it takes, by what `models.kept` counts.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from luthier.models.fused import FusedLayer
from luthier.models.kept import count
from luthier.models.layers import Recomputation, layers_of
from luthier.models.load import decoder_of, embeddings_of, text_config_of
from luthier.models.policy import Policy
from luthier.models.recompute import Mode

log = logging.getLogger("luthier")

# Tokens of a pass on a CPU. Matrix multiplies are at their full speed long before, but more documents in a pass share
# more of what they begin with: at SmolLM2-135M's shape with 8 of its layers, 32 Alpaca rows a step, passes of 512 /
# 1024 / 2048 / 4096 tokens gave 324 / 354 / 389 / 366 tokens a CPU second (262 / 266 / 291 / 289 without sharing).
CPU_TOKENS = 2048
# Tokens of the pass that is measured on CUDA.
PROBE_TOKENS = 2048
# A pass of fewer tokens is slower than recomputation is worth; one of more hardly faster, see above.
FULL_SPEED_TOKENS = {"cpu": 512}
FULL_SPEED_ELSEWHERE = 2048

# Share of the free memory that may be planned with. A measured pass leaves out fragmentation only; an estimate
# from shapes is rough, and a computer's memory is shared with whatever else its user does.
_SHARE_MEASURED, _SHARE_ESTIMATED = 0.85, 0.5
# What a layer keeps for its backward beside the inputs and outputs of its linear layers (norms, activation
# functions, attention), as a factor on those. Measured on transformers' Llama: 1.2 to 1.4.
_BESIDE_LINEARS = 1.5
# Of that, what is left where layers make parts of it again; rough, as the rest of the estimate.
_LEFT: dict[Mode, float] = {"keep": 1.0, "norms": 0.85, "mlp": 0.45, "layer": 0.0, "offload": 0.0}
# fp32 gradient and Adam's two moments for each trained parameter, and its gradient in 16 bits.
_OPTIMIZER_BYTES = 14


@dataclass(frozen=True)
class Budget:
    """Most tokens in a forward pass, and where the number comes from, for the log."""

    tokens: int
    why: str

    def __str__(self) -> str:
        return f"passes of up to {self.tokens:,} tokens ({self.why})"


def choose_pass(
    policy: Policy,
    recomputation: Recomputation,
    device: torch.device,
    *,
    longest: int,
    step_tokens: int,
    run_pass: Callable[[], int],
    asked: int | None = None,
    agree: Callable[[int], int] | None = None,
) -> Budget:
    """`choose_budget`, and before it how much the layers recompute, where that is free to be chosen: set on the
    layers, and said. Nothing is recomputed where memory has room for the longest document and for a pass that runs at
    full speed.

    Args:
        asked: tokens of a pass that the user asks for; it is not changed.
        agree: given where weights are shared out over processes: the free memory of one -> that of all. Nothing is
            measured or counted on such a model, since all would have to do it; it recomputes all or nothing.
    """
    free = free_memory(device)
    free = free if agree is None else agree(free)
    full_speed = FULL_SPEED_TOKENS.get(device.type, FULL_SPEED_ELSEWHERE)
    needed = max(longest, min(step_tokens, asked or full_speed))
    if recomputation.free:
        share = _SHARE_MEASURED if device.type == "cuda" and agree is None else _SHARE_ESTIMATED
        room = share * max(0, free - _OPTIMIZER_BYTES * _trained(policy.model))
        # The rough figure is on the large side: where it fits, there is nothing to count.
        short = activation_bytes(policy.model) * needed > room
        if short and agree is not None:
            recomputation.set_all("layer" if recomputation.knows(0, "layer") else "mlp")
            log.info("%s (by an estimate: there is room for %s)", recomputation, size(room))
        elif short:
            kept = count(policy, recomputation)
            modes = kept.choose(needed, longest, room)
            whole = kept.bytes(list(recomputation.modes), needed, longest)
            recomputation.set(modes)
            log.info(
                "%s (a pass of %s tokens would take %s, there is room for %s)",
                recomputation,
                f"{needed:,}",
                size(whole),
                size(room),
            )
            if (least := kept.bytes(modes, needed, longest)) > room:
                log.warning(
                    "memory is short all the same: %s; gradient_checkpointing: offload keeps least on a GPU, and a "
                    "shorter sequence_len needs less",
                    size(least),
                )
            if asked is None:
                most = min(step_tokens, CPU_TOKENS) if device.type == "cpu" else step_tokens
                tokens = kept.tokens(modes, longest, room, most)
                return Budget(tokens, f"{size(room)} of room, counted")
        else:
            log.info("%s, memory suffices", recomputation)
    if asked is not None:
        return Budget(asked, "max_tokens_per_pass")
    return choose_budget(
        policy.model,
        device,
        free=free,
        longest=longest,
        step_tokens=step_tokens,
        run_pass=run_pass if agree is None else None,
    )


def choose_budget(
    model: PreTrainedModel,
    device: torch.device,
    *,
    longest: int,
    step_tokens: int,
    run_pass: Callable[[], int] | None,
    free: int | None = None,
) -> Budget:
    """The most tokens for a pass of a model that is loaded, before its optimizer has any state.

    Args:
        longest: tokens of the longest document, which a pass has to hold whatever memory says.
        step_tokens: what the largest optimizer step needs; more would do nothing.
        run_pass: runs one pass of about `PROBE_TOKENS`, forward and backward, leaves no trace of it, and says
            how many tokens it had. Called on CUDA only; None where it cannot be.
        free: bytes of memory; None: what there is now.
    """
    if step_tokens <= longest:
        return Budget(longest, "the longest document")
    free = (free_memory(device) if free is None else free) - _OPTIMIZER_BYTES * _trained(model)
    if device.type == "cuda" and run_pass is not None:
        try:
            per_token, how, share = _measured(device, run_pass), "measured", _SHARE_MEASURED
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return Budget(longest, "the longest document; memory has no room for a pass that tries out more")
    else:
        per_token, how, share = activation_bytes(model), "estimated", _SHARE_ESTIMATED
    fits = int(max(0, free) * share / per_token) if per_token else longest
    limits = [
        (step_tokens, "a whole step needs no more"),
        (fits, f"{max(0, free) / 2**30:.1f} GiB are free, {per_token / 2**20:.2f} MiB a token {how}"),
    ]
    if device.type == "cpu":
        limits.append((CPU_TOKENS, "larger ones are no faster on a CPU"))
    tokens, why = min(limits)
    return Budget(tokens, why) if tokens > longest else Budget(longest, "the longest document")


def _trained(model: nn.Module) -> int:
    """Trained numbers that this process holds."""
    held = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters() if p.requires_grad)
    return sum(getattr(p, "ds_tensor", p).numel() for p in held)


def activation_bytes(model: PreTrainedModel) -> int:
    """Bytes that a decoder keeps for its backward pass, for each token, estimated from its linear layers.

    Of a layer that is recomputed that is its input, and the inside of one of them.
    """
    decoder = decoder_of(model)
    hidden = embeddings_of(model).weight  # quantised weights have another dtype than what is computed
    kept = inside = 0.0
    for layer in layers_of(decoder):
        width, mode = _BESIDE_LINEARS * _linear_widths(layer, model), _mode_of(layer, decoder)
        kept += _LEFT[mode] * width + (_whole_shape(hidden)[1] if mode == "layer" else 0)
        inside = max(inside, (1 - _LEFT[mode]) * width)
    return int((kept + inside) * hidden.element_size())


def size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _mode_of(layer: nn.Module, decoder: nn.Module) -> Mode:
    if isinstance(forward := layer.__dict__.get("forward"), FusedLayer):
        return forward.mode
    whole = getattr(layer, "gradient_checkpointing", getattr(decoder, "gradient_checkpointing", False))
    return "layer" if whole else "keep"


def _linear_widths(layer: nn.Module, model: PreTrainedModel) -> int:
    """Inputs and outputs of a layer's matrix multiplies; of experts, of as many as a token meets."""
    chosen = getattr(text_config_of(model), "num_experts_per_tok", None) or 1
    shapes = [_whole_shape(p) for p in layer.parameters()]
    total = sum(chosen * sum(shape[1:]) for shape in shapes if len(shape) == 3)
    for module in layer.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "in_features"):  # a quantised weight's own shape says nothing
            total += cast(int, module.in_features) + cast(int, module.out_features)
        elif isinstance(weight, torch.Tensor) and len(shape := _whole_shape(weight)) == 2:
            total += sum(shape)
    return total


def _whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Also of one that DeepSpeed has in pieces."""
    return cast(torch.Size, getattr(parameter, "ds_shape", parameter.shape))


def free_memory(device: torch.device) -> int:
    """Bytes that could still be allocated: on the device, or within the machine's and the container's limits."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return min([_machine_memory(), *_container_memory()])


def is_out_of_memory(error: Exception) -> bool:
    """CUDA has a class for it; the CPU's allocator and MPS have words only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("can't allocate memory", "not enough memory", "MPS backend out of memory", "CUDA out of memory")
    return isinstance(error, RuntimeError) and any(each in str(error) for each in words)


def free_unused(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _measured(device: torch.device, run_pass: Callable[[], int]) -> int:
    """Bytes a token, by the allocator. What a pass takes once (a chunk of logits, workspaces) is counted in, so
    that the figure errs on the safe side."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    tokens = run_pass()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) // tokens


def _machine_memory() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # Elsewhere the system says only how much there is, and half of that is taken to be in use.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _container_memory(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """What is left under each memory limit of this process's control groups, of version 1 and 2.

    Every parent may have a limit as well. Inside a container the path that the kernel names may be that of the
    host, while the container's own group lies at the root: what is not there is passed over.
    """
    try:
        lines = proc.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    left: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, usage = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *(p for p in group.parents if p == base or base in p.parents)):
            try:
                allowed = (folder / limit).read_text(encoding="ascii").strip()
                if allowed != "max":
                    used = int((folder / usage).read_text(encoding="ascii"))
                    left.append(int(allowed) - used + _file_cache(folder))
            except (OSError, ValueError):
                continue
    return left


def _file_cache(folder: Path) -> int:
    """Cached files that count as used and are given up first."""
    values = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))
