"""The keys that say how several processes share one model.

Three strategies, and one of them holds for a run:

    replicas    every process holds the whole model and adds its gradients to those of the others (the default)
    fsdp        torch's FSDP2: each process keeps a share of every weight, and layers are gathered while they compute
    deepspeed   DeepSpeed's ZeRO: stages 1 to 3 share out optimizer state, then gradients, then weights

The names are Axolotl's and Accelerate's, which write the keys inside `fsdp_config` with `fsdp_` before them or without;
`one_spelling` makes one of the two. What the keys cannot say together is in `sharding`, DeepSpeed's settings in `zero`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from luthier.config.base import Section
from luthier.config.yaml_source import Path_, Source
from luthier.config.zero import zero_settings

Strategy = Literal["replicas", "fsdp", "deepspeed"]
StateDict = Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT"]


class FsdpConfig(Section):
    """How weights are shared out under `fsdp_version: 2`. Each key may also be written with `fsdp_` before it."""

    prefix: ClassVar[str] = "fsdp_"

    reshard_after_forward: bool = True
    """Give a layer's gathered weights back after its forward pass and gather them again for the backward pass. `false`
    keeps them in between: less communication, more memory."""
    offload_params: bool = False
    """Keep the shares in the host's memory, and take the optimizer's steps there."""
    cpu_offload_pin_memory: bool = True
    """With `offload_params`: pin that memory, so that copies run beside the computation. `false` where the host has
    too little of it."""
    activation_checkpointing: bool | None = None
    """`true` is the same as `gradient_checkpointing: true`; `false` leaves that key to itself."""
    state_dict_type: StateDict = "FULL_STATE_DICT"
    """Who writes a checkpoint's tensors: the first process all of them (`FULL_STATE_DICT`), or every process a share
    (`SHARDED_STATE_DICT`). Any strategy and any number of processes goes on from either."""
    final_state_dict_type: Literal["FULL_STATE_DICT"] = "FULL_STATE_DICT"
    """The finished model is written in ordinary files, whatever the checkpoints are."""
    auto_wrap_policy: Literal["TRANSFORMER_BASED_WRAP"] = "TRANSFORMER_BASED_WRAP"
    """What is gathered at once: one layer of the model."""
    transformer_layer_cls_to_wrap: str | list[str] | None = None
    """Class of the layers, such as `LlamaDecoderLayer`. It is found by itself; a written one has to be that."""
    cpu_ram_efficient_loading: bool = True
    """Read weights from mapped files, of which a machine holds one copy; it is always so."""
    sync_module_states: bool = True
    """All processes begin with the weights of the first; it is always so."""
    use_orig_params: bool = True
    """Keep every parameter by itself instead of flattened with others; FSDP2 always does."""

    @property
    def layer_classes(self) -> list[str]:
        """The names in `transformer_layer_cls_to_wrap`, which may also be one text with commas; empty if unset."""
        named = self.transformer_layer_cls_to_wrap or []
        return [name.strip() for name in named.split(",")] if isinstance(named, str) else named


class DistributedConfig(Section):
    """How several processes, one for each GPU, share the model. Unset: each holds the whole of it."""

    ddp: bool | None = None
    """Every process holds the whole model, which is what happens by itself; `true` says so."""
    ddp_timeout: Annotated[int | None, Field(ge=1)] = None
    """Seconds that a process waits for the others before the run ends. Default: 10 minutes between GPUs, a day on
    CPUs."""
    fsdp_version: Literal[2] | None = None
    """Share weights, gradients and optimizer state between the processes (torch's FSDP2): `2`. With an adapter the
    frozen base is shared."""
    fsdp_config: FsdpConfig | None = None
    """How FSDP does that, as a mapping."""
    dp_shard_size: Annotated[int | None, Field(ge=1)] = None
    """Processes that share one copy of the model, such as those of one machine; groups of that size hold copies of
    each other (hybrid sharding). Default: all."""
    dp_replicate_size: Annotated[int | None, Field(ge=1)] = None
    """Number of such copies; times `dp_shard_size` it is the number of processes. Default: 1."""
    deepspeed: str | dict[str, Any] | None = None
    """Share by DeepSpeed's ZeRO: `zero1` (optimizer state), `zero2` (and gradients), `zero3` (and weights),
    `zero3_offload` (all in the host's memory), or the path of a JSON file with DeepSpeed's own settings, whose content
    is then what the run keeps."""

    @property
    def strategy(self) -> Strategy:
        """What several processes do with the model."""
        if self.fsdp_version is not None:
            return "fsdp"
        return "replicas" if self.deepspeed is None else "deepspeed"

    @property
    def fsdp(self) -> FsdpConfig:
        """`fsdp_config`, or its defaults where it is unset."""
        return self.fsdp_config or FsdpConfig()

    @property
    def zero(self) -> dict[str, Any]:
        """DeepSpeed's settings, without what the rest of the config says; see `zero.zero_settings`."""
        return {} if self.deepspeed is None else zero_settings(self.deepspeed)


# Keys of FsdpConfig with one possible value; they are accepted because other tools' configs have them.
ONE_VALUE: dict[str, Any] = {
    key: FsdpConfig.model_fields[key].default
    for key in (
        "final_state_dict_type",
        "auto_wrap_policy",
        "cpu_ram_efficient_loading",
        "sync_module_states",
        "use_orig_params",
    )
}
_UPPER = ("state_dict_type", "final_state_dict_type", "auto_wrap_policy")


# Names of other tools, and what to write instead; see `names`.
_ONE_GPU = "Leave it out: a document is computed on one GPU whole, and a model layer by layer."
_LONG = (
    "Leave it out: a document is computed on one GPU whole; `gradient_checkpointing: offload` and tiled_mlp make room "
    "for long ones."
)
_OWN_SUM = "Leave it out: gradients are added up once a step, in buckets of the run's own."
_LAUNCH = "Leave it out: `luthier train` says it (--num-processes, --nnodes, --node-rank, --rdzv-endpoint)."
_RAY = "Leave it out: `luthier train cfg.yml --launcher ray --num-workers N` says it."
_ACCELERATE = "Write what is inside it at the top level, as fsdp_version and fsdp_config, or deepspeed."
ELSEWHERE: dict[str, str] = {
    "fsdp": "Write `fsdp_version: 2`, which is full_shard and auto_wrap; offload is offload_params in fsdp_config.",
    "fsdp_final_state_dict_type": "Leave it out: the finished model is written in ordinary files.",
    "fsdp_min_num_params": "Leave it out: what is gathered at once is one layer.",
    "use_fsdp": "Write `fsdp_version: 2`.",
    "use_deepspeed": "Write `deepspeed: zero2`, or another preset.",
    "deepspeed_config": "Write deepspeed, with a preset or the path of a JSON file.",
    "zero_stage": "Write `deepspeed: zero1`, zero2 or zero3.",
    "deepcompile": "Leave it out: compiling by DeepSpeed is not built.",
    "accelerator_config": "Leave it out: batches are the run's own, the same on any number of processes.",
    "accelerate_config": _ACCELERATE,
    "distributed_type": _ACCELERATE,
    "parallelism_config": "Write dp_shard_size and dp_replicate_size at the top level; other kinds are not built.",
    "context_parallel_size": _LONG,
    "sequence_parallel_degree": _LONG,
    "sequence_parallel_size": _LONG,
    "cp_size": _LONG,
    "heads_k_stride": _LONG,
    "ring_attn_func": _LONG,
    "tensor_parallel_size": f"{_ONE_GPU} For a model that is too large for one, write `fsdp_version: 2`.",
    "tp_size": f"{_ONE_GPU} For a model that is too large for one, write `fsdp_version: 2`.",
    "pipeline_parallel_size": f"{_ONE_GPU} For a model that is too large for one, write `fsdp_version: 2`.",
    "pp_size": f"{_ONE_GPU} For a model that is too large for one, write `fsdp_version: 2`.",
    "expert_parallel_size": f"{_ONE_GPU} For experts that are too large for one, write `fsdp_version: 2`.",
    "ep_size": f"{_ONE_GPU} For experts that are too large for one, write `fsdp_version: 2`.",
    "data_parallel_size": _LAUNCH,
    "ddp_bucket_cap_mb": _OWN_SUM,
    "ddp_broadcast_buffers": "Leave it out: buffers are those of the loaded model, and no step changes them.",
    "ddp_find_unused_parameters": "Leave it out: parameters without a gradient are never waited for.",
    "ddp_static_graph": _OWN_SUM,
    "ddp_backend": "Leave it out: NCCL between GPUs, Gloo on CPUs.",
    **dict.fromkeys(
        ("num_processes", "nproc_per_node", "nnodes", "num_machines", "local_rank", "world_size"), _LAUNCH
    ),
    **dict.fromkeys(("use_ray", "ray_run_name", "ray_num_workers", "resources_per_worker"), _RAY),
}
# The same inside `fsdp_config`, without `fsdp_`.
INSIDE_FSDP: dict[str, str] = {
    "version": "Write `fsdp_version: 2` at the top level.",
    "sharding_strategy": "FSDP2 has `reshard_after_forward: true` for FULL_SHARD and false for SHARD_GRAD_OP; for the "
    "HYBRID ones write dp_shard_size at the top level, and for NO_SHARD leave FSDP out.",
    "mixed_precision_policy": "Leave it out: bf16 and fp16 at the top level say it.",
    "mixed_precision": "Leave it out: bf16 and fp16 at the top level say it.",
    "min_num_params": "Leave it out: what is gathered at once is one layer.",
    "backward_prefetch": "Leave it out: FSDP2 gathers the next layer beside the computation by itself.",
    "forward_prefetch": "Leave it out: FSDP2 gathers the next layer beside the computation by itself.",
    "limit_all_gathers": "Leave it out: FSDP2 bounds the memory of gathered layers by itself.",
    "ignored_modules": "Leave it out: what an adapter trains is whole in every process, all else is shared out.",
    "cpu_offload": "Write offload_params.",
    "transformer_cls_names_to_wrap": "Write transformer_layer_cls_to_wrap, or leave it out: it is found by itself.",
    **dict.fromkeys(
        ("xla", "xla_fsdp_v2", "xla_fsdp_settings", "xla_fsdp_grad_ckpt"), "Leave it out: TPUs are not built."
    ),
}
VALUES_OF_PROCESSES: dict[str, str] = {
    "fsdp_version: 1": " FSDP's first version flattens weights, and torch gives it up. Write 2; in fsdp_config, "
    "reshard_after_forward takes the place of sharding_strategy.",
    **{f"deepspeed: {stage}": f" Write zero{stage}." for stage in (1, 2, 3)},
    "fsdp_config.state_dict_type: LOCAL_STATE_DICT": " Write SHARDED_STATE_DICT.",
    "fsdp_config.reshard_after_forward: FULL_SHARD": " Write true.",
    "fsdp_config.reshard_after_forward: SHARD_GRAD_OP": " Write false.",
    **dict.fromkeys(
        (f"fsdp_config.auto_wrap_policy: {name}" for name in ("SIZE_BASED_WRAP", "NO_WRAP")),
        " What is gathered at once is one layer: leave it out.",
    ),
    **dict.fromkeys(
        (f"fsdp_config.final_state_dict_type: {name}" for name in ("SHARDED_STATE_DICT", "LOCAL_STATE_DICT")),
        " The finished model is written in ordinary files: leave it out.",
    ),
}


def one_spelling(source: Source) -> None:
    """Write the keys inside `fsdp_config` without `fsdp_`, and names of choices in capitals; report a key that is there
    in both spellings with different values."""
    inside = source.values.get("fsdp_config")
    if not isinstance(inside, dict):
        return
    plain: dict[Any, Any] = {}
    for key, value in inside.items():
        name = plain_name(key)
        if name in _UPPER and isinstance(value, str):
            value = value.upper()
        written: Path_ = ("fsdp_config", key)
        if plain.get(name) is not None and value not in (None, plain[name]):
            both = f"fsdp_config.{FsdpConfig.prefix}{name} and fsdp_config.{name}"
            source.report(
                f"{both} are one key with different values: leave one of them out.", source.lines.get(written)
            )
        if plain.get(name) is None:
            plain[name] = value
            if written in source.lines:
                source.lines[("fsdp_config", name)] = source.lines[written]
    source.values["fsdp_config"] = plain


def plain_name(key: Any) -> Any:
    """A key of `fsdp_config` without `fsdp_`, if it is one; all others as they are."""
    short = key.removeprefix(FsdpConfig.prefix) if isinstance(key, str) else key
    return short if short in FsdpConfig.model_fields else key


def plain_path(path: Path_) -> Path_:
    """The same for a path such as `fsdp_config.fsdp_offload_params`."""
    if len(path) > 1 and path[0] == "fsdp_config":
        return (path[0], plain_name(path[1]), *path[2:])
    return path
