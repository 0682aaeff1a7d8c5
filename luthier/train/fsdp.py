"""FSDP2: every process keeps a share of every weight, and a layer's weights are whole while it computes.

torch's `fully_shard` does the sharing and gathering (Zhao et al. 2023; torchtitan, Liang et al. 2024, section 2.1). One
layer of the decoder is gathered at a time; embeddings, head and the last norm are the policy's own group, since it
reads them itself. Fused forwards lie inside of the layers and read their weights there, where they are whole.

What is trained as an adapter is small, and stays whole in every process: no layer gathers it, and its gradients are
added up once a step, as replicas do. What is trained as a whole is shared: the fp32 shares are the masters, layers are
gathered in the format that is computed in, and gradients come back in fp32 behind each pass. Optimizers see plain
tensors, the local shares, which is right for those that treat every number by itself; `config.sharding` refuses others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from luthier.config import Config
from luthier.models.frozen import FrozenLinear
from luthier.models.layers import layers_of
from luthier.models.load import decoder_of
from luthier.models.memory import size
from luthier.models.policy import Policy
from luthier.train import checkpoint
from luthier.train.checkpoint import Collected
from luthier.train.distributed import Processes
from luthier.train.engine import Engine
from luthier.train.optim import Masters

log = logging.getLogger("luthier")


def shard(policy: Policy, config: Config, device: torch.device, dtype: torch.dtype, processes: Processes) -> None:
    """Share out the weights of a policy whose model is whole in every process; trained weights become fp32.

    Args:
        dtype: what is computed in.
    """
    settings, mesh = config.distributed.fsdp, _mesh(config, device, processes)
    layers = layers_of(decoder_of(policy.model))
    whole: set[nn.Parameter] = set()
    for module in policy.modules():
        if isinstance(module, FrozenLinear):
            module.keep_plain(device)
    trained = [p for p in policy.parameters() if p.requires_grad]
    if config.adapter.adapter is not None:
        whole = set(trained)
        for parameter in trained:
            parameter.data = parameter.data.to(device)
    options: dict[str, Any] = {
        "mesh": mesh,
        "ignored_params": whole,
        "reshard_after_forward": settings.reshard_after_forward,
        "offload_policy": _offload(config, device),
    }
    if not whole and dtype != torch.float32:
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    before = sum(p.nbytes for p in policy.parameters())
    for group in (*layers, policy):
        if not whole:
            for parameter in group.parameters():
                if parameter.requires_grad and not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.float()
        # The policy's own group is not kept between passes: what is put into its shares from outside (a reference, an
        # average) has to be gathered anew.
        fully_shard(group, **{**options, "reshard_after_forward": group is policy or options["reshard_after_forward"]})
        cast(FSDPModule, group).set_force_sum_reduction_for_comms(True)  # Gloo knows no other
        cast(FSDPModule, group).set_gradient_divide_factor(1.0)  # shares of a loss add up, they are no means
    kept = sum(local(p).nbytes for p in policy.parameters())
    copies = "" if mesh.ndim == 1 else f", {mesh.size(0)} copies of {mesh.size(1)} processes each"
    log.info(
        "FSDP2: %s of weights are %s in each of %d processes%s%s",
        size(before),
        size(kept),
        processes.size,
        copies,
        "; the adapter is whole in all" if whole else "",
    )


def _mesh(config: Config, device: torch.device, processes: Processes) -> DeviceMesh:
    section = config.distributed
    size = section.dp_shard_size or processes.size // (section.dp_replicate_size or 1)
    if size == processes.size:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (processes.size // size, size), mesh_dim_names=("replicate", "shard"))


def _offload(config: Config, device: torch.device) -> OffloadPolicy:
    settings = config.distributed.fsdp
    if not settings.offload_params:
        return OffloadPolicy()
    if device.type == "cpu":
        log.warning("fsdp_config.offload_params does nothing: the run computes on a CPU")
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=settings.cpu_offload_pin_memory)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's share of a tensor that is spread; any other as it is."""
    return cast(DTensor, tensor.detach()).to_local() if isinstance(tensor, DTensor) else tensor


class ShardedMasters(Masters):
    """Trained parameters of which each process steps on its share, in fp32.

    Attributes:
        spread: by name, the parameters that are shared out. What is not is a master as elsewhere.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.spread: dict[str, DTensor] = {}
        for name, master in self.masters.items():
            if isinstance(master, DTensor):
                self.spread[name] = master
                self.masters[name] = local(master)

    @property
    def shapes(self) -> dict[str, list[int]]:
        return {name: list(self.spread.get(name, master).shape) for name, master in self.masters.items()}

    def whole_here(self) -> Iterable[torch.Tensor]:
        return (master for name, master in self.masters.items() if name not in self.spread)

    def zero_grad(self) -> None:
        super().zero_grad()
        for parameter in self.spread.values():
            parameter.grad = None

    def take_gradients(self) -> None:
        """The gradients of the step, which FSDP has added up, to the masters."""
        for name, parameter in self.spread.items():
            if parameter.grad is not None:
                self.masters[name].grad = local(parameter.grad)
                parameter.grad = None

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """This process's share of a whole tensor that has a parameter's shape; another tensor as it is."""
        like = self.spread.get(name)
        if like is None or tensor.shape != like.shape:
            return tensor
        tensor = tensor.to(like.device_mesh.device_type)
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local()

    def whole(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The opposite; called by all processes at once."""
        like = self.spread.get(name)
        if like is None or tensor.shape != self.masters[name].shape:
            return tensor
        return whole(like, tensor)

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        super().load({name: self.part(name, tensor) for name, tensor in tensors.items()})

    def norm(self) -> torch.Tensor:
        """Of all gradients together, as if they were whole."""
        own, others = self._squares(self.whole_here()), self._squares(self.masters[name] for name in self.spread)
        if self.spread:
            like = next(iter(self.spread.values()))
            others = others.to(like.device_mesh.device_type)
            distributed.all_reduce(others, group=like.device_mesh.get_group(like.device_mesh.ndim - 1))
        return (own.to(others.device) + others).sqrt()

    def _squares(self, masters: Iterable[torch.Tensor]) -> torch.Tensor:
        gradients = [master.grad for master in masters if master.grad is not None and master.grad.numel()]
        if not gradients:
            return torch.zeros((), device=next(iter(self)).device)
        return torch.nn.utils.get_total_norm(gradients) ** 2


def whole(like: DTensor, share: torch.Tensor) -> torch.Tensor:
    """A tensor put together from every process's share of it, spread as `like` is; on the device."""
    mesh = like.device_mesh
    spread = DTensor.from_local(
        share.to(mesh.device_type), mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return spread.full_tensor()


class Sharded(Engine):
    """The engine of a policy that `shard` has shared out.

    Attributes:
        each_writes: every process writes a share of a checkpoint's tensors, rather than the first all of them.
    """

    lockstep = True
    masters: ShardedMasters

    def __init__(
        self, policy: Policy, *arguments: Any, dtype: torch.dtype, max_norm: float, each_writes: bool
    ) -> None:
        super().__init__(policy, *arguments, max_norm=max_norm)
        self.dtype, self.max_norm, self.each_writes = dtype, max_norm, each_writes
        self.clip = self._clip  # type: ignore[assignment]

    def add_up(self, figures: Any, words: Any, *, failed: bool = False) -> list[list[float]]:
        self.masters.take_gradients()
        return super().add_up(figures, words, failed=failed)

    def _clip(self, masters: ShardedMasters) -> torch.Tensor:
        norm = masters.norm()
        if self.max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(list(masters), self.max_norm, norm)
        return norm

    @contextmanager
    def generating(self) -> Iterator[None]:
        """While texts are written, by the model's own forward: what the policy reads itself is gathered for it."""
        policy = cast(FSDPModule, self.policy)
        policy.unshard()
        try:
            yield
        finally:
            policy.reshard()

    def collect(self) -> Collected | None:
        """Whole tensors, one after another: the first process keeps them all, or each its turn (`each_writes`)."""
        rank, turns = self.processes.rank, self.processes.size if self.each_writes else 1

        def kept(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            found = {}
            for number, (key, tensor) in enumerate(tensors.items()):
                whole = self.masters.whole(key.rpartition("/")[2], tensor)
                if number % turns == rank:
                    found[key] = whole.to("cpu")
            return found

        tensors, values = checkpoint.optimizer_by_name(self.masters.masters, self.optimizer)
        found = Collected(kept(self.masters.masters), kept(tensors), values, self.weights())
        return found if self.processes.main or self.each_writes else None

    def weights(self) -> dict[str, torch.Tensor] | None:
        if not self.masters.spread:
            return None
        found: dict[str, torch.Tensor] = {}
        seen: dict[int, torch.Tensor] = {}  # tied weights are one tensor in the file too
        for name, tensor in cast(Policy, self.policy).model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, DTensor):
                found[name] = tensor.detach()
                continue
            place = id(tensor)
            if place not in seen:
                full = whole(tensor, local(tensor))
                if full.is_floating_point():
                    full = full.to(self.dtype)
                seen[place] = full.to("cpu") if self.processes.main else full.new_empty(0)
            found[name] = seen[place]
        return found if self.processes.main else None
