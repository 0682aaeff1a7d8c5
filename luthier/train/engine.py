"""How a step's gradients come together and how the step is taken: what depends on how a run is spread over devices.

The loop computes shares of the loss in passes. What becomes of them is here for runs in which every process holds all
that is trained: one process, or several replicas whose gradients are added up once, behind the last pass (Li et al.
2020 overlap that with the backward pass; here ranks may have different numbers of passes, and agree on an end of
memory before they send anything). `train.fsdp` and `train.zero_engine` spread weights out, with the same face.

A checkpoint knows nothing of all that: it holds whole tensors by parameter name, so that a run that was spread in one
way goes on in any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from luthier.train import checkpoint
from luthier.train.checkpoint import Collected
from luthier.train.distributed import Processes
from luthier.train.optim import Masters, clip_gradients


class Engine:
    """Replicas: every process holds all trained parameters, their gradients and the optimizer's state.

    Args:
        policy: the module that is called. scaler: scales the loss where activations are fp16; disabled otherwise.
        max_norm: bound on the gradients' common norm; 0 for none.

    Attributes:
        lockstep: whether a pass of one process needs all others in the same pass. each_writes: whether every process
            writes a share of a checkpoint.
        clip: bounds the masters' gradients and returns their norm.
    """

    lockstep = False
    each_writes = False

    def __init__(
        self,
        policy: nn.Module,
        masters: Masters,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        processes: Processes,
        *,
        max_norm: float,
    ) -> None:
        self.policy, self.masters, self.optimizer = policy, masters, optimizer
        self.scaler, self.processes = scaler, processes
        self.clip: Callable[[Masters], torch.Tensor] = partial(clip_gradients, max_norm=max_norm)

    # --- in the loop --------------------------------------------------------------------------------------------

    @property
    def stepped_by_backward(self) -> bool:
        """Whether weights take their step inside of the backward pass, so that a step cannot be repeated."""
        return self.masters.stepped_by_backward

    def set_rate(self, rate: float) -> None:
        """The learning rate of the step to come; before its passes, in which it may be taken already."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)

    def zero_grad(self) -> None:
        self.masters.zero_grad()

    def backward(self, share: torch.Tensor, *, last: bool) -> None:
        """Add a pass's gradients to the step's; `last` of this process in this step."""
        self.scaler.scale(share).backward()

    def add_up(
        self, figures: Sequence[torch.Tensor], words: Sequence[float], *, failed: bool = False
    ) -> list[list[float]]:
        """Sum gradients and figures over the processes, in place; see `Processes.add_up`."""
        return self.processes.add_up(self.masters.whole_here(), figures, words, failed=failed)

    def step(self) -> tuple[torch.Tensor, str]:
        """Clip, take the optimizer's step, and bring the result into the model.

        Returns:
            The gradients' norm before, on the device; and what there is to say, if anything.
        """
        # With fp16 an overflow is ordinary: the scaler skips that step and lowers the scale.
        self.scaler.unscale_(self.optimizer)
        norm = self.clip(self.masters)
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.masters.publish()
        if (after := self.scaler.get_scale()) < before:
            return norm, f"is skipped: fp16 overflowed; loss scale now {after:g}"
        return norm, ""

    @contextmanager
    def looked_at(self) -> Iterator[None]:
        """While the model is evaluated or saved: the weights that are looked at need not be those that gradients are
        taken at."""
        with self.masters.looked_at(self.optimizer):
            yield

    @contextmanager
    def generating(self) -> Iterator[None]:
        """While texts are written by the model's own forward, past the policy."""
        yield

    # --- checkpoints --------------------------------------------------------------------------------------------

    def level(self, device: torch.device) -> None:
        """Give all processes what they hold alike, and the random state, from process 0."""
        self.processes.level(self.masters.whole_here(), device)

    def collect(self) -> Collected | None:
        """What a checkpoint holds, in the process that writes it; None in the others."""
        if not self.processes.main:
            return None
        tensors, values = checkpoint.optimizer_by_name(self.masters.masters, self.optimizer)
        return Collected(self.masters.masters, tensors, values)

    def weights(self) -> dict[str, torch.Tensor] | None:
        """All weights of a model that no process holds as a whole, in the process that writes; None where it does."""
        return None

    def load_masters(self, path: Path) -> None:
        """Take the trained parameters of a checkpoint."""
        self.masters.load(checkpoint.read_masters(path))

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint: trained parameters, the optimizer's state, random states."""
        self.load_masters(path)
        checkpoint.restore_optimizer(path, self.masters.masters, self.optimizer, self.masters.part)
        self.masters.publish()  # an optimizer may put weights of its own in place (schedule-free)
