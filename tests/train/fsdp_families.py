"""Started by a launcher in two processes: what a policy of each family computes before its weights are shared out and
after, with an adapter and trained as a whole. Ends with 1 and says where they differ."""

from __future__ import annotations

import sys
from typing import Any

import torch

from luthier.config import Config
from luthier.models.freeze import set_trainable
from luthier.models.fuse import fuse_policy
from luthier.models.isolation import build_policy
from luthier.models.policy import Policy
from luthier.train import fsdp
from luthier.train.distributed import Processes
from tests.models.families import ALONE, FAMILIES, OTHERS
from tests.models.test_fuse import Batch, adapted, plain

CPU = torch.device("cpu")


def computed(policy: Policy) -> dict[str, torch.Tensor]:
    """Log-probs, and the gradients of their sum over all processes."""
    logps, _ = policy(Batch())
    logps.sum().backward()
    found = {"logps": logps.detach()}
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None:
            gradient: Any = parameter.grad
            found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            parameter.grad = None
    return found


def differences(family: str, adapter: str | None, processes: Processes) -> list[str]:
    values = {"base_model": "x", "datasets": [{"path": "x"}], "fsdp_version": 2, "adapter": adapter}
    config = Config.from_flat(values)
    if adapter:
        model, state = adapted(family)
    else:
        model, state = plain(family), None
        set_trainable(model, config.freeze)
    policy = build_policy(model, state, sequence_len=64)
    fuse_policy(policy)
    expected = computed(policy)
    fsdp.shard(policy, config, CPU, torch.float32, processes)
    found = computed(policy)
    wrong = [f"{family} {adapter}: {name} is missing" for name in expected.keys() - found.keys()]
    for name, tensor in found.items():
        # Of shares every process adds its own gradients, which are the same here.
        times = processes.size if name != "logps" and adapter is None else 1
        like = times * expected[name]
        difference = float((tensor - like).norm() / like.norm().clamp_min(1e-12))
        if difference > 1e-5:
            wrong.append(f"{family} {adapter}: {name} differs by {difference:.0e}")
    return wrong


def main() -> int:
    processes = Processes.of_environment()
    wrong: list[str] = []
    with processes.connected():
        processes.join(CPU)
        for family in {**FAMILIES, **OTHERS, **ALONE}:
            for adapter in ("lora", None):
                wrong += differences(family, adapter, processes)
    print("\n".join(wrong), file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
