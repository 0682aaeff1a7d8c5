"""LoRA on the experts of a layer, which transformers keeps in one tensor each: (experts, out, in), or with the last
two turned round (GPT-OSS).

Every expert has an A and a B of its own. Which expert computes what is the model's own code, in whatever form is the
fastest; it reads its tensors from the module, so for the time of a forward pass it finds W + s B A there. That is
what PEFT does (`target_parameters`), and its files are PEFT's: A of all experts one under another,
(experts * r, in), and B (out, r * experts) with the experts as the fastest index.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from luthier.models.adapter import ForwardAdapter, adds_nothing, scale_of


class LoRAExperts(ForwardAdapter):
    """The forward of a module some of whose parameters, (E, out, in) or a single (out, in), have adapters.

    Args:
        strengths: parameter name -> rank and alpha.
        gaussian: draw A from a normal distribution of deviation 1 / r instead of uniformly.
    """

    def __init__(
        self,
        module: nn.Module,
        strengths: Mapping[str, tuple[int, float]],
        *,
        rslora: bool,
        gaussian: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__(module)
        own = [name for name, _ in module.named_parameters(recurse=False)]
        self.ranks = {name: strengths[name] for name in own if name in strengths}  # PEFT nests in this order
        self.scales = {name: scale_of(alpha, r, rslora) for name, (r, alpha) in self.ranks.items()}
        for name, (r, _) in self.ranks.items():
            weight = getattr(module, name)
            experts, rows, columns = self._shape(weight)
            a = torch.empty(experts * r, columns)
            if gaussian:
                a.normal_(std=1 / r, generator=generator)
            else:
                nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            setattr(module, f"{name}_lora_A", nn.Parameter(a.to(weight.device)))
            b = torch.zeros(rows, r * experts, device=weight.device)
            setattr(module, f"{name}_lora_B", nn.Parameter(b))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return self.original(*args, **kwargs)
        inside = vars(self.module)  # is looked at before the module's parameters
        try:
            inside.update({name: self.adapted(name) for name in self.ranks})
            return self.original(*args, **kwargs)
        finally:
            for name in self.ranks:
                inside.pop(name, None)

    def adapted(self, name: str) -> torch.Tensor:
        """A parameter with its adapter, in the parameter's dtype and shape."""
        weight = self.module._parameters[name]
        a, b = (getattr(self.module, f"{name}_lora_{part}") for part in "AB")
        return adapted_experts(weight, a, b, self.scales[name], turned=self._turned(weight))

    def idle(self) -> bool:
        both = [[getattr(self.module, f"{name}_lora_{part}") for part in "AB"] for name in self.ranks]
        return all(adds_nothing(a, b) for a, b in both)

    def tensors(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, inner in zip(self.ranks, _nesting(len(self.ranks)), strict=True):
            found[f"{inner}lora_A.weight"] = getattr(self.module, f"{name}_lora_A")
            found[f"{inner}lora_B.weight"] = getattr(self.module, f"{name}_lora_B")
        return found

    def strengths(self) -> dict[str, tuple[int, float]]:
        return dict(self.ranks)

    @torch.no_grad()
    def merged(self) -> dict[str, torch.Tensor]:
        found = {}
        for name in self.ranks:
            weight = self.module._parameters[name].float()
            a, b = (getattr(self.module, f"{name}_lora_{part}") for part in "AB")
            found[name] = adapted_experts(weight, a, b, self.scales[name], turned=self._turned(weight))
        return found

    def _shape(self, weight: torch.Tensor) -> tuple[int, int, int]:
        """Experts, outputs, inputs."""
        if weight.dim() == 2:
            return 1, int(weight.shape[0]), int(weight.shape[1])
        rows, columns = (2, 1) if self._turned(weight) else (1, 2)
        return int(weight.shape[0]), int(weight.shape[rows]), int(weight.shape[columns])

    def _turned(self, weight: torch.Tensor) -> bool:
        return weight.dim() == 3 and bool(getattr(self.module, "is_transposed", False))


def _nesting(count: int) -> list[str]:
    """PEFT wraps a module once for each of its parameters, so the first one lies deepest."""
    return ["base_layer." * (count - 1 - i) for i in range(count)]


def adapted_experts(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, *, turned: bool
) -> torch.Tensor:
    """W + s B A of every expert, in W's dtype and shape.

    Args:
        weight: (E, out, in), or (E, in, out) if turned, or (out, in). a: (E * r, in). b: (out, r * E).
    """
    if weight.dim() == 2:
        return torch.addmm(weight, b.to(weight.dtype), a.to(weight.dtype), alpha=scale)
    experts = weight.shape[0]
    a = a.to(weight.dtype).view(experts, -1, a.shape[-1])
    b = b.to(weight.dtype).view(b.shape[0], -1, experts).permute(2, 0, 1)
    if turned:
        return torch.baddbmm(weight, a.transpose(1, 2), b.transpose(1, 2), alpha=scale)
    return torch.baddbmm(weight, b, a, alpha=scale)
