"""DeepSpeed's ZeRO (Rajbhandari et al. 2020): stages 1 to 3 share out optimizer state, then gradients, then weights.

DeepSpeed does the sharing, the sums and the step; the loop, the losses, the learning rates and the checkpoints are the
run's own, so that the numbers are those of one process. What has to be known for that:

    sums      DeepSpeed takes the mean over processes, and shares of a loss add up: each is multiplied by their number.
    passes    All processes run as many (`StepLoader.lockstep`); only the last one of a step is told to be a boundary.
    optimizer It is the run's own, and steps on flat pieces of the parameters; DeepSpeed's own are not compiled.
    formats   In full fine-tuning in 16 bits the fp32 masters are DeepSpeed's. An adapter is in fp32 as everywhere, and
              DeepSpeed is told of no 16 bits at all, so that a frozen base stays as it is stored.
    stage 3   A fused forward reads the weights of a whole layer, so that a layer is gathered at once (DeepSpeed's leaf
              modules). Embeddings, head and the last norm are gathered where they are called or read.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import distributed, nn

from luthier.config import Config
from luthier.config.zero import stage_of
from luthier.errors import ConfigError, ModelError
from luthier.models.layers import layers_of
from luthier.models.load import decoder_of, embeddings_of
from luthier.models.memory import size
from luthier.models.policy import Policy
from luthier.train import checkpoint
from luthier.train.checkpoint import Collected
from luthier.train.distributed import Processes
from luthier.train.engine import Engine
from luthier.train.optim import Masters
from luthier.train.optimizers import build_optimizer

log = logging.getLogger("luthier")


def check(config: Config, device: torch.device, dtype: torch.dtype, *, given: bool) -> None:
    """Say what DeepSpeed cannot do here, before anything is loaded.

    Args:
        dtype: what the run computes in. given: it trains a model that a program made.

    Raises:
        ConfigError: it is not installed, the run computes in fp16, the model belongs to a program, or its settings ask
            for what is not built.
    """
    if device.type == "cpu":
        # Before anybody imports it: transformers does when it saves, and it would print that it has found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if config.distributed.strategy != "deepspeed":
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "deepspeed: DeepSpeed is not installed: pip install 'luthier[deepspeed]', or write `fsdp_version: 2` in "
            "place of deepspeed"
        )
    if given:
        raise ConfigError("deepspeed takes a model's weights apart, and this one belongs to a program: leave it out")
    if dtype == torch.float16:
        raise ConfigError(
            "deepspeed: this run computes in fp16, whose loss scaling is not built with DeepSpeed: write `bf16: true`, "
            "or `fp16: false` for fp32, or leave deepspeed out"
        )
    settings = config.distributed.zero
    if stage_of(settings) == 0:
        raise ConfigError("deepspeed: stage 0 shares nothing: leave deepspeed out, or write zero1, zero2 or zero3")
    of_zero = settings["zero_optimization"]
    for key in ("offload_optimizer", "offload_param"):
        if (of_zero.get(key) or {}).get("device") == "nvme":
            raise ConfigError(f"deepspeed: {key} to nvme is not built: write `device: cpu` there")


def shares_weights(config: Config, *, several: bool) -> bool:
    """Whether a device never has to hold the whole model: stage 3, of several processes or with the weights in the
    host's memory."""
    if config.distributed.strategy != "deepspeed":
        return False
    settings = config.distributed.zero
    return stage_of(settings) == 3 and (several or "offload_param" in settings["zero_optimization"])


def spread(config: Config, policy: Policy, device: torch.device, dtype: torch.dtype, processes: Processes) -> Zero:
    """Hand a policy whose model is whole in every process to DeepSpeed.

    Args:
        dtype: what is computed in.

    Raises:
        ConfigError: DeepSpeed does not take its settings. ModelError: stage 3 cannot share out a model like this.
    """
    masters = ZeroMasters(policy.model)
    optimizer = build_optimizer(masters, config.training)
    settings = _settings(config, dtype)
    stage, own = stage_of(settings), config.adapter.adapter is not None
    if stage == 3:
        _gather_by_layers(policy)
    elif settings["zero_optimization"].get("offload_optimizer") and device.type == "cpu":
        log.info("deepspeed: the optimizer's state is in the host's memory anyway: the run computes on a CPU")
    if "bf16" in settings and (wide := [n for n, p in policy.named_parameters() if p.dtype == torch.float32]):
        log.warning("deepspeed: %d fp32 parameters, such as %s, are computed in bf16", len(wide), wide[0])
    before = sum(p.nbytes for p in policy.parameters())
    engine = _start(policy, optimizer, settings, device, stage)
    kept = sum(getattr(p, "ds_tensor", p).nbytes for p in policy.parameters())
    log.info(
        "DeepSpeed %s, ZeRO stage %d: %s of weights are %s in each of %s",
        engine.luthier_version,
        stage,
        size(before),
        size(kept),
        "1 process" if processes.size == 1 else f"{processes.size} processes",
    )
    found = Zero(policy, masters, optimizer, processes, device=device, engine=engine, stage=stage, adapter=own)
    found.gather_adapter()
    return found


def _settings(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's settings, with what the YAML and this module say."""
    settings = config.distributed.zero
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    settings |= {
        "train_micro_batch_size_per_gpu": 1,  # what a pass is, the loader says
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.training.max_grad_norm,
    }
    if config.adapter.adapter is None and dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings.setdefault("communication_data_type", "fp32")
    return settings


def _gather_by_layers(policy: Policy) -> None:
    """Let stage 3 gather each of the decoder's layers as a whole."""
    decoder = decoder_of(policy.model)
    layers = layers_of(decoder)
    if layers == [decoder]:
        raise ModelError(
            f"deepspeed: stage 3 gathers layer by layer, and those of {type(decoder).__name__} are not in one list: "
            "write `deepspeed: zero2`"
        )
    for layer in layers:
        layer._z3_leaf = True  # type: ignore[assignment] # what `set_z3_leaf_modules` sets for a class
        layer.register_forward_pre_hook(_has_trained_input)
    # DeepSpeed sends a layer's gradients away when that of its input is there, and thinks so at once if it needs none.
    embeddings_of(policy.model).register_forward_hook(_with_gradient)


def _with_gradient(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


def _has_trained_input(module: nn.Module, args: tuple[Any, ...]) -> None:
    if torch.is_grad_enabled() and module.training and not (args and getattr(args[0], "requires_grad", False)):
        raise ModelError(
            f"deepspeed: stage 3 does not see when the gradients of a {type(module).__name__} are complete, since its "
            "input is no first argument that has a gradient: write `deepspeed: zero2`"
        )


def _start(
    policy: Policy, optimizer: torch.optim.Optimizer, settings: dict[str, Any], device: torch.device, stage: int
) -> Any:
    """DeepSpeed's engine around a policy; what DeepSpeed says goes to the log, at the level of debugging."""
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    old_names = ".*all_gather_into_tensor.*|.*reduce_scatter_tensor.*"  # torch's, which DeepSpeed calls
    warnings.filterwarnings("ignore", message=old_names, category=FutureWarning)
    import deepspeed
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import Init
    from deepspeed.utils import groups, logger

    logger.handlers = [_Quietly()]
    # Sums between CPUs through shared memory: it would be compiled, with a print and a minute's wait.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if comm.cdb is not None:  # of an earlier run of this process, whose connections are closed
        groups._release_process_group_references()
        comm.cdb = None
    if not distributed.is_initialized():  # a single process, which DeepSpeed wants in a group too
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        if stage == 3:  # weight by weight, also where the device has no room for all
            Init(module=policy, config_dict_or_path=settings)
            for module in policy.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, buffer.to(device))
        engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=settings)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"deepspeed: DeepSpeed does not take its settings: {error}") from error
    engine.luthier_version = deepspeed.__version__
    return engine


class _Quietly(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level = logging.WARNING if record.levelno >= logging.ERROR else logging.DEBUG
        log.log(level, "DeepSpeed: %s", record.getMessage())


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

