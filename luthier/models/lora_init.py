"""With which A and B a linear layer's adapter begins, beside the usual A at random and B = 0.

Some ways begin where the weight itself is largest: PiSSA with its first singular vectors (Meng et al. 2024, equations
2 to 4), OLoRA with the first columns of its QR decomposition (Büyükakyüz 2024). They take their part out of the base
weight, so that the function stays the same; `LoRALinear.exported` turns such an adapter into an ordinary one. LoftQ
begins with what quantisation left out (Li et al. 2024, with the base quantised once); EVA with the directions in
which the layer's inputs vary (Paischer et al. 2024). The last two leave the base as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from luthier.errors import ModelError

if TYPE_CHECKING:
    from luthier.models.lora import LoRALinear

CHANGES_BASE = re.compile(r"pissa(_niter_\d+)?|olora")


@dataclass(frozen=True)
class Sources:
    """What the start of an adapter may need beside the model.

    Attributes:
        documents: token ids of documents of the training data, in an order that the seed fixes.
        original: gives the full-precision weight (out, in) of a linear layer that was quantised, by its path.
        earlier: the adapter of the checkpoint that the run goes on from, `<path>.lora_A.weight` and so on: what was
            computed when the run began is read there instead of being computed anew, which might differ in a bit.
    """

    documents: Sequence[torch.Tensor] | None = None
    original: Callable[[str], torch.Tensor] | None = None
    earlier: Mapping[str, torch.Tensor] | None = None


def changes_base(how: bool | str) -> bool:
    """Whether an adapter that begins this way is trained on other base weights than it is loaded onto."""
    return isinstance(how, str) and CHANGES_BASE.fullmatch(how) is not None


@torch.no_grad()
def begin(
    layer: LoRALinear, path: str, how: bool | str, seed: int, sources: Sources, directions: torch.Tensor | None
) -> None:
    """Give a new layer its first A and B.

    Args:
        how: `peft_init_lora_weights`; true leaves the layer as it was made.
        directions: rows that A may begin with, at least as many as its rank; for `eva`.
    """
    r = layer.r
    if changes_base(how):
        if layer.storage != "dense":
            raise ModelError(
                f"peft_init_lora_weights: {how} takes its part out of the base weights, and {path} is stored in "
                f"{layer.storage}; take the model's full checkpoint"
            )
        if sources.earlier is not None:
            both_a, both_b = (sources.earlier.get(f"{path}.lora_{part}.weight") for part in "AB")
            if both_a is None or both_b is None or both_a.shape[0] != 2 * r:
                raise ModelError(
                    f"peft_init_lora_weights: the checkpoint's adapter did not begin with {how} at rank {r} in {path}; "
                    "go on with the settings that the run began with"
                )
            a, b = both_a[r:], -both_b[:, r:]
        else:
            a, b = principal_parts(layer.weight_in(torch.float32), r, layer.scale, str(how), seed)
        layer.take_out(a.to(layer.lora_A), b.to(layer.lora_B))
    elif sources.earlier is not None and not (how == "loftq" and sources.original is not None):
        return  # the checkpoint's values follow
    elif how == "gaussian":
        drawn = torch.empty(layer.lora_A.shape).normal_(
            std=1 / r, generator=torch.Generator().manual_seed(seed)
        )
        layer.lora_A.copy_(drawn)
    elif how == "eva":
        assert directions is not None
        layer.lora_A.copy_(directions[:r])
    elif how == "loftq":
        assert sources.original is not None
        base = layer.weight_in(torch.float32)
        original = sources.original(path).to(base)
        # GPT-2's Conv1D is transposed in the file. Of a square weight only the values tell: rounding moves them little.
        if original.shape != base.shape or (
            base.shape[0] == base.shape[1] and (original.t() - base).norm() < (original - base).norm()
        ):
            original = original.t()
        a, b = quantisation_residual(original, base, r, layer.scale)
        layer.lora_A.copy_(a)
        layer.lora_B.copy_(b)


def principal_parts(
    weight: torch.Tensor, r: int, scale: float, how: str, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) for which s B A is the part of a weight (out, in) that the adapter begins with.

    Args:
        how: `pissa`, `pissa_niter_N` (randomised, with N power iterations; much faster), or `olora`.

    Raises:
        ModelError: a rank larger than the weight's own.
    """
    if r > min(weight.shape):
        raise ModelError(
            f"peft_init_lora_weights: {how!r} cannot begin with rank {r} in a layer of "
            f"{weight.shape[1]} x {weight.shape[0]}: lower lora_r or leave that layer out"
        )
    if how == "olora":
        q, upper = torch.linalg.qr(weight)
        # PEFT subtracts scale * Q R from the weight, so the factor is not divided out here either.
        return upper[:r], q[:, :r]
    if how == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :r], s[:r], vh[:r]
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(weight, q=r, niter=int(how.rpartition("_")[2]))
        vh = v.t()
    root = (s / scale).sqrt()
    return root[:, None] * vh, u * root


def quantisation_residual(
    weight: torch.Tensor, quantised: torch.Tensor, r: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) for which quantised + s B A is as near to a weight (out, in) as rank r allows.

    PEFT leaves out the division by s; the two are the same at alpha = r.
    """
    u, s, vh = torch.linalg.svd(weight - quantised, full_matrices=False)
    root = (s[:r] / scale).sqrt()
    a, b = weight.new_zeros(r, weight.shape[1]), weight.new_zeros(weight.shape[0], r)
    a[: len(root)], b[:, : len(root)] = root[:, None] * vh[:r], u[:, :r] * root
    return a, b


def earlier_ranks(earlier: Mapping[str, torch.Tensor], names: Sequence[str], how: bool | str) -> dict[str, int]:
    """Ranks of the layers of an adapter that was saved; 0 where a layer has none."""
    fold = 2 if changes_base(how) else 1
    found = {name: earlier.get(f"{name}.lora_A.weight") for name in names}
    return {name: 0 if a is None else a.shape[0] // fold for name, a in found.items()}


class OriginalWeights:
    """Full-precision weights of linear layers, read one at a time from a checkpoint's files.

    Args:
        prefix: what the names of the model's modules have in front and a checkpoint's may lack, such as "model".
    """

    def __init__(self, files: Sequence[Path], prefix: str) -> None:
        self.prefix = prefix
        self.places: dict[str, Path] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                self.places.update(dict.fromkeys(file.keys(), path))

    def __call__(self, path: str) -> torch.Tensor:
        """The weight (out, in) of the layer at a path, on the CPU.

        Raises:
            ModelError: it is not there, or only quantised.
        """
        wanted = f"{path}.weight"
        for name in (wanted, wanted.removeprefix(f"{self.prefix}."), f"{self.prefix}.{wanted}"):
            if name in self.places:
                with safe_open(self.places[name], framework="pt") as file:
                    weight: torch.Tensor = file.get_tensor(name)
                if weight.is_floating_point() and weight.dim() == 2:
                    return weight
                raise ModelError(
                    f"loftq_config: {name} is stored as {str(weight.dtype)[6:]} in {self.places[name].name}: "
                    "LoftQ needs a checkpoint in full precision, to see what quantising it leaves out"
                )
        raise ModelError(
            f"loftq_config: the checkpoint's safetensors files have no {wanted}, and LoftQ needs the weights as they "
            "were before they were quantised"
        )
