"""Started by a launcher in two processes: what a policy of each family computes by itself and under ZeRO's stage 3,
with an adapter and trained as a whole. Ends with 1 and says where they differ."""

from __future__ import annotations

import sys

import torch

from luthier.config import Config
from luthier.errors import ModelError
from luthier.models.freeze import set_trainable
from luthier.models.fuse import fuse_policy
from luthier.models.isolation import build_policy
from luthier.train import zero
from luthier.train.distributed import Processes
from tests.models.families import ALONE, FAMILIES, OTHERS
from tests.models.test_fuse import Batch, adapted, plain
from tests.train.fsdp_families import computed

CPU = torch.device("cpu")
SETTINGS = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def differences(family: str, adapter: str | None, processes: Processes) -> list[str]:
    from deepspeed.utils import safe_get_full_grad

    values = {"base_model": "x", "datasets": [{"path": "x", "type": "alpaca"}], "deepspeed": SETTINGS}
    config = Config.from_flat({**values, "adapter": adapter})
    if adapter:
        model, state = adapted(family)
    else:
        model, state = plain(family), None
        set_trainable(model, config.freeze)
    policy = build_policy(model, state, sequence_len=64)
    fuse_policy(policy)
    expected = computed(policy)
    policy.train()
    try:
        engine = zero.spread(config, policy, CPU, torch.float32, processes)
        for last in (False, True):  # the second pass knows what the first has found out
            logps, _ = engine.policy(Batch())
            engine.backward(logps.sum() / 2, last=last)
    except ModelError as error:
        return [] if family in ALONE else [f"{family} {adapter}: {error}"]
    found = {"logps": logps.detach()}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            found[name] = safe_get_full_grad(parameter)
    wrong = [f"{family} {adapter}: {name} is missing" for name in expected.keys() - found.keys()]
    for name, tensor in found.items():
        # Every process adds its own gradients, which are the same here; what nothing reads has 0 here and none there.
        like = (1 if name == "logps" else processes.size) * expected.get(name, torch.zeros_like(tensor))
        difference = float((tensor - like).norm() / like.norm().clamp_min(1e-12))
        if difference > 1e-5:
            wrong.append(f"{family} {adapter}: {name} differs by {difference:.0e}")
    return wrong


if __name__ == "__main__":
    processes = Processes.of_environment()
    with processes.connected():
        processes.join(CPU)
        wrong = []
        for family in {**FAMILIES, **OTHERS, **ALONE}:
            for adapter in ("lora", None):
                wrong += differences(family, adapter, processes)
        if wrong and processes.main:
            print("\n".join(wrong), file=sys.stderr)
    sys.exit(bool(wrong))
