"""What is known of each optimizer before any of its code is imported: its package, its devices, its memory.

The names are Axolotl's and transformers' where they have one. `train.optimizers` holds the constructors; what a run
would need (`luthier plan`), and what a config may say beside an optimizer, follows from this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

OptimizerName = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adam",
    "sgd",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_8bit",
    "paged_lion_8bit",
    "ademamix_8bit",
    "paged_ademamix_8bit",
    "adafactor",
    "muon",
    "sophia",
    "schedule_free_adamw",
]

# One name for two spellings.
ALIASES = {"adamw_8bit": "adamw_bnb_8bit"}

_8BIT = 1 + 4 / 256
"""Bytes of an 8-bit moment: itself, and an fp32 scale for each block of 256 (Dettmers et al. 2022, section 2.1)."""


@dataclass(frozen=True)
class OptimizerInfo:
    """One optimizer, as far as it can be known without it.

    Attributes:
        state: bytes of state for each trained number, all of it in fp32 unless it is 8-bit; tensors of fewer than
            4,096 numbers keep 32-bit state in the 8-bit optimizers as well. with_momentum: where `optim_args` has
            momentum. matrices: of the matrices that it treats otherwise (`muon`: the hidden layers'). factored: of a
            matrix it keeps a number for each row and column; `state` is that of vectors.
        temporary: bytes for each trained number that a step makes and frees on an accelerator.
        adam: whether adam_beta1, adam_beta2 and adam_epsilon are its settings.
        package: the module that it needs. extra: what installs that.
        devices: where it runs. paged: its state can move to the host's memory. on_cpu: what to know before running
            it there.
    """

    state: float
    with_momentum: float | None = None
    matrices: float | None = None
    factored: bool = False
    temporary: float = 0.0
    adam: bool = True
    package: str | None = None
    extra: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda", "mps")
    paged: bool = False
    on_cpu: str | None = None


def _bitsandbytes(state: float, *, adam: bool = True, paged: bool = False) -> OptimizerInfo:
    slow = "bitsandbytes' optimizers are made for GPUs; on a CPU a step took ten times as long as torch's"
    unpaged = "there is no other memory to page to on a CPU: the state stays where it is, as without paged_. "
    return OptimizerInfo(
        state,
        adam=adam,
        package="bitsandbytes",
        extra="bitsandbytes",
        devices=("cpu", "cuda"),
        paged=paged,
        on_cpu=unpaged + slow if paged else slow,
    )


OPTIMIZERS: dict[str, OptimizerInfo] = {
    "adamw_torch": OptimizerInfo(8, temporary=4),
    "adamw_torch_fused": OptimizerInfo(8),
    "adam": OptimizerInfo(8, temporary=4),
    "sgd": OptimizerInfo(0, with_momentum=4, adam=False),
    "adamw_bnb_8bit": _bitsandbytes(2 * _8BIT),
    "adamw_8bit": _bitsandbytes(2 * _8BIT),
    "paged_adamw_8bit": _bitsandbytes(2 * _8BIT, paged=True),
    "paged_adamw_32bit": _bitsandbytes(8, paged=True),
    "lion_8bit": _bitsandbytes(_8BIT, adam=False),
    "paged_lion_8bit": _bitsandbytes(_8BIT, adam=False, paged=True),
    "ademamix_8bit": _bitsandbytes(3 * _8BIT),
    "paged_ademamix_8bit": _bitsandbytes(3 * _8BIT, paged=True),
    # Of a vector, and of each row and column of a matrix, one number.
    "adafactor": OptimizerInfo(4, factored=True, adam=False),
    "muon": OptimizerInfo(
        8,
        matrices=4,
        on_cpu="muon multiplies in bfloat16, which is hundreds of times slower than fp32 on a CPU without units for it",
    ),
    "sophia": OptimizerInfo(8, temporary=8, adam=False, package="pytorch_optimizer", extra="optimizers"),
    "schedule_free_adamw": OptimizerInfo(8, temporary=4, package="schedulefree", extra="optimizers"),
}
assert set(OPTIMIZERS) == set(get_args(OptimizerName))


def bytes_per_parameter(name: str, *, sixteen_bit: bool, stochastic_rounding: bool = False) -> float:
    """Bytes that a trained number of a large matrix costs beside its gradient and activations.

    The weight itself, its fp32 master where the model computes in 16 bits (none with `bf16_stochastic_rounding`), and
    the optimizer's state.
    """
    info = OPTIMIZERS[name]
    state = 0.0 if info.factored else info.state if info.matrices is None else info.matrices
    weight = 4 if not sixteen_bit else 2 if stochastic_rounding else 2 + 4
    return weight + state
