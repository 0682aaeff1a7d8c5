"""Several optimizers behind the face of one: for kinds of parameters (Muon), or one for each parameter.

One for each parameter can take a step as soon as that parameter's gradient is there. A step inside of the backward
pass frees the gradient before the next one exists (LOMO, Lv et al. 2023); and weights in bfloat16 need fp32 only for
the one that takes its step, whose result is rounded up or down at random, in proportion to the distance, so that the
expected weight is the exact one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from luthier.train.optim import Masters


class Composed(torch.optim.Optimizer):
    """Optimizers as one; its groups and states are theirs.

    Attributes:
        group_state: names of what a group holds that is state, not a setting.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        # Not torch's own __init__: groups and states stay in the parts.
        self.parts = list(parts)
        self.defaults: dict[str, Any] = {}
        self.group_state: tuple[str, ...] = getattr(self.parts[0], "group_state", ())

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[torch.Tensor, Any]:  # type: ignore[override]
        return {parameter: state for part in self.parts for parameter, state in part.state.items()}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def train(self) -> None:
        for part in self.parts:
            if hasattr(part, "train"):
                part.train()

    def eval(self) -> None:
        for part in self.parts:
            if hasattr(part, "eval"):
                part.eval()

    def state_dict(self) -> dict[str, Any]:
        """As torch's: parameters are numbered in the order of the groups."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for part in self.parts:
            packed, first = part.state_dict(), sum(len(group["params"]) for group in groups)
            state |= {first + number: value for number, value in packed["state"].items()}
            groups += [{**g, "params": [first + n for n in g["params"]]} for g in packed["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups, first = list(state_dict["param_groups"]), 0
        for part in self.parts:
            own = [groups.pop(0) for _ in part.param_groups]
            count = sum(len(group["params"]) for group in own)
            state = {n - first: v for n, v in state_dict["state"].items() if first <= n < first + count}
            own = [{**g, "params": [n - first for n in g["params"]]} for g in own]
            self._load(part, {"state": state, "param_groups": own})
            first += count

    def _load(self, part: torch.optim.Optimizer, packed: dict[str, Any]) -> None:
        part.load_state_dict(packed)


class PerParameter(Composed):
    """An optimizer of its own for each parameter.

    Args:
        build: makes one from groups. rounds: weights in bfloat16 take their step in fp32 and are rounded
            stochastically; their gradients and states are in fp32.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        *,
        rounds: bool,
    ) -> None:
        self.rounds = rounds
        self.of: dict[int, torch.optim.Optimizer] = {}
        self._fused = False
        self._squares: list[torch.Tensor] = []
        for group in groups:
            for parameter in group["params"]:
                self.of[id(parameter)] = build([{**group, "params": [parameter]}])
        super().__init__(list(self.of.values()))

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """A step of every parameter that has a gradient; nothing is left to do if backward took them."""
        if not self._fused:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self._step(parameter)

    def _step(self, parameter: torch.Tensor) -> None:
        if parameter.grad is None:
            return
        part = self.of[id(parameter)]
        if parameter.dtype == torch.float32:
            part.step()
            return
        with _in_fp32(parameter, rounded=True):
            part.step()

    def _load(self, part: torch.optim.Optimizer, packed: dict[str, Any]) -> None:
        # torch gives loaded state the parameter's dtype, and the state of a bfloat16 weight is in fp32
        (parameter,) = part.param_groups[0]["params"]
        with _in_fp32(parameter, rounded=False):
            part.load_state_dict(packed)

    def fuse_into_backward(self, masters: Masters) -> None:
        """From now on each parameter takes its step, and loses its gradient, as soon as backward has it."""
        self._fused = True
        for parameter, master in masters.pairs():
            parameter.register_post_accumulate_grad_hook(self._take(master))

    def _take(self, master: torch.Tensor) -> Callable[[torch.Tensor], None]:
        @torch.no_grad()
        def hook(parameter: torch.Tensor) -> None:
            # In Masters' order: a 16-bit parameter's gradient is its master's by now.
            if master.grad is None:
                return
            self._squares.append(torch.linalg.vector_norm(master.grad, dtype=torch.float32) ** 2)
            self._step(master)
            master.grad = None
            if parameter is not master:
                parameter.copy_(master)

        return hook

    def gradient_norm(self, masters: Masters) -> torch.Tensor:
        """The common norm of the gradients that backward has used up since the last call."""
        squares, self._squares = self._squares, []
        if not squares:
            return torch.zeros((), device=next(iter(masters)).device)
        return torch.stack(squares).sum().sqrt()


@contextmanager
def _in_fp32(parameter: torch.Tensor, *, rounded: bool) -> Iterator[None]:
    """A 16-bit parameter holds fp32 numbers for the moment, and is the same object with the same memory after it."""
    stored = parameter.data
    parameter.data = stored.float()
    try:
        yield
        if rounded:
            stored.copy_(stochastic_round(parameter.data))
    finally:
        parameter.data = stored


def stochastic_round(x: torch.Tensor) -> torch.Tensor:
    """fp32 to bfloat16, up or down at random with probabilities that make the expected result x.

    A bfloat16 is the upper half of an fp32 number, and the lower half is the distance to it in units of which the
    next one is 2**16 away; so a uniform 16-bit number is added to the bits and the lower half cut off. Infinities and
    NaN stay what they are.
    """
    bits = x.contiguous().view(torch.int32)
    noise = torch.randint_like(bits, 2**16)
    rounded = (bits + noise).bitwise_and_(-(2**16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)
