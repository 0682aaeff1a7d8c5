"""A run whose policy DeepSpeed has: a step of its, and whole tensors out of its pieces and back for checkpoints.

What a step is made of, and why, is in `zero`. DeepSpeed keeps fp32 pieces of all trained parameters one behind
another, and the optimizer steps on those; it has functions that find a parameter's part in them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from luthier.models.policy import Policy
from luthier.train import checkpoint
from luthier.train.checkpoint import Collected
from luthier.train.distributed import Processes
from luthier.train.engine import Engine
from luthier.train.optim import Masters

log = logging.getLogger("luthier")


class ZeroMasters(Masters):
    """The trained parameters, whose masters are inside of DeepSpeed. Made while they are whole."""

    def __init__(self, model: nn.Module) -> None:
        self.masters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.hidden = set()  # asked for by Muon, which ZeRO does not know
        self.stepped_by_backward = False
        self._copies, self._parameters = [], cast("list[nn.Parameter]", list(self.masters.values()))
        self._shapes = {name: list(master.shape) for name, master in self.masters.items()}

    @property
    def shapes(self) -> dict[str, list[int]]:
        return self._shapes


class Zero(Engine):
    """The engine of a policy that DeepSpeed has.

    Args:
        engine: DeepSpeed's. stage: of ZeRO. adapter: what is trained is an adapter.
    """

    lockstep = True

    def __init__(
        self,
        policy: Policy,
        masters: ZeroMasters,
        optimizer: torch.optim.Optimizer,
        processes: Processes,
        *,
        device: torch.device,
        engine: Any,
        stage: int,
        adapter: bool,
    ) -> None:
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        # DeepSpeed's is called instead of the policy: it counts passes, and has to see them come.
        super().__init__(engine, masters, optimizer, scaler, processes, max_norm=0)
        self.model = policy.model
        self.engine, self.stage, self.adapter = engine, stage, adapter
        self.device = device

    # --- in the loop --------------------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        """A step leaves no gradients, and none is begun anew."""

    def backward(self, share: torch.Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(share * self.processes.size, scale_wrt_gas=False)

    def add_up(
        self, figures: Sequence[torch.Tensor], words: Sequence[float], *, failed: bool = False
    ) -> list[list[float]]:
        return self.processes.add_up([], figures, words, failed=failed)

    def step(self) -> tuple[torch.Tensor, str]:
        self.engine.step()
        self.masters.publish()
        # A step that DeepSpeed leaves out for its gradients ends the run as elsewhere, by their norm.
        norm = self.engine.get_global_grad_norm() if self.engine.was_step_applied() else torch.nan
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device), ""

    # --- checkpoints --------------------------------------------------------------------------------------------

    def level(self, device: torch.device) -> None:
        self.processes.level([], device)  # DeepSpeed has sent the weights of process 0 to all

    @torch.no_grad()
    def collect(self) -> Collected | None:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        masters: dict[str, torch.Tensor] = {}
        state: dict[str, torch.Tensor] = {}
        fields = self._fields()
        self._link_state()
        for name, parameter in self.masters.masters.items():
            parts = {"": safe_get_full_fp32_param(parameter)}
            for key, value in fields.items():  # a single number is alike in all pieces
                parts[key] = value if value.dim() == 0 else safe_get_full_optimizer_state(parameter, key)
            if self.processes.main:
                masters[name] = parts.pop("").to("cpu", copy=True)
                state |= {f"{key}/{name}": tensor.to("cpu", copy=True) for key, tensor in parts.items()}
        weights = self.weights()
        return Collected(masters, state, {}, weights) if self.processes.main else None

    @torch.no_grad()
    def weights(self) -> dict[str, torch.Tensor] | None:
        self.gather_adapter()
        if self.stage < 3 or self.adapter:
            return None
        from deepspeed.runtime.zero import GatheredParameters

        found: dict[str, torch.Tensor] = {}
        seen: dict[int, torch.Tensor] = {}  # tied weights are one tensor in the file too
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if not hasattr(tensor, "ds_id"):
                found[name] = tensor.detach()
                continue
            if id(tensor) not in seen:
                with GatheredParameters([tensor]):
                    seen[id(tensor)] = tensor.detach().to("cpu", copy=True) if self.processes.main else torch.empty(0)
            found[name] = seen[id(tensor)]
        return found if self.processes.main else None

    def gather_adapter(self) -> None:
        """Put a shared out adapter together, which is small, until it is run the next time: for what reads it."""
        if self.stage == 3 and self.adapter:
            parameters: Any = list(self.masters)
            parameters[0].all_gather(parameters)

    @torch.no_grad()
    def load_masters(self, path: Path) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        tensors = checkpoint.read_masters(path)
        for name, parameter in self.masters.masters.items():
            tensor = tensors[name].to(self.device)
            if self.stage == 3:
                safe_set_local_fp32_param(parameter, self._piece(parameter, tensor))
            else:
                safe_set_full_fp32_param(parameter, tensor)
        inside = self.engine.optimizer
        if self.stage < 3:
            inside.update_lp_params()
        else:
            inside._partition_all_parameters()  # what is gathered now is old
            for index in range(len(inside.fp16_groups)):
                inside._reassign_or_swap_out_partitioned_parameters(index)
            if inside.persistent_parameters:
                inside.persistent_parameters[0].all_gather(inside.persistent_parameters)
        self.masters.publish()
        self.gather_adapter()

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        self.load_masters(path)
        numbers: dict[str, list[torch.Tensor]] = {}
        found: list[tuple[str, str, torch.Tensor]] = []
        for entry, tensor in checkpoint.read_tensors(path, "optimizer").items():
            key, _, name = entry.partition("/")
            if tensor.dim():
                found.append((key, name, tensor))
            else:
                numbers.setdefault(key, []).append(tensor)
        self._begin_state({key: torch.stack(each) for key, each in numbers.items()}, {key for key, *_ in found})
        for key, name, tensor in found:
            parameter, whole = self.masters.masters[name], tensor.to(self.device)
            if self.stage == 3:
                safe_set_local_optimizer_state(parameter, self._piece(parameter, whole), key)
            else:
                safe_set_full_optimizer_state(parameter, whole, key)
        checkpoint.restore_random_state(path)

    # --- inside of DeepSpeed ------------------------------------------------------------------------------------

    def _pieces(self) -> Iterator[torch.Tensor]:
        """The flat fp32 pieces that the optimizer steps on in this process, whose state it keeps."""
        inside = self.engine.optimizer
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(inside, name):
                yield from getattr(inside, name)
                return

    def _fields(self) -> dict[str, torch.Tensor]:
        """What the optimizer keeps for a piece, by name; nothing before the first step."""
        state: dict[str, Any] = self.optimizer.state.get(next(self._pieces()), {})
        # In one order in all processes, which gather them one after another.
        return {key: value for key, value in sorted(state.items()) if isinstance(value, torch.Tensor)}

    def _begin_state(self, numbers: dict[str, torch.Tensor], tensors: set[str]) -> None:
        """The optimizer's state as its first step makes it.

        Args:
            numbers: by name what it keeps for a weight as a single number, such as the count of steps, for all
                weights. tensors: names of all else, which is 0 for now.
        """
        single = {key: found.max() for key, found in numbers.items()}
        for key, largest in single.items():
            if (numbers[key] != largest).any():
                log.warning("deepspeed: %s is %g for all weights from now on, and was less for some", key, largest)
        there = any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups)
        for piece in self._pieces():
            state = self.optimizer.state[piece]
            state |= {key: number.to(piece.device if there else "cpu", copy=True) for key, number in single.items()}
            state |= {key: torch.zeros_like(piece) for key in tensors}
        self._link_state()

    def _link_state(self) -> None:
        """Let the parameters of stages 1 and 2 know where their optimizer's state lies. DeepSpeed does that within its
        first step, as soon as the first group of parameters has made it: those of other groups have none by then."""
        if self.stage < 3 and self.optimizer.state:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _piece(self, parameter: Any, whole: torch.Tensor) -> torch.Tensor:
        """This process's share of a whole tensor, with zeros behind its end where it does not come out even."""
        size, flat = parameter.ds_tensor.numel(), whole.reshape(-1)
        own = flat[self.processes.rank * size : (self.processes.rank + 1) * size]
        return nn.functional.pad(own, (0, size - own.numel()))

