"""On a GPU: the fused families against the models' own modules, in fp32 and bf16, flat and with shared prefixes."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from luthier.config import Config
from luthier.models import attention, fuse, load
from luthier.models.isolation import build_policy
from luthier.models.load import use_flat_attention
from luthier.models.lora import DropoutState, add_lora, lora_layers
from luthier.models.policy import Policy
from tests.models.families import FAMILIES, toy_model

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
LENGTHS, PARENTS = (40, 17, 23, 31), (-1, 0, 0, -1)


@dataclass
class Batch:
    """Three documents, of which two begin with the same 40 tokens: shared, or written out."""

    shared: bool
    device: torch.device
    lengths: tuple[int, ...] = field(init=False)
    parents: tuple[int, ...] = field(init=False)
    seeds: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        start, one, two, alone = (torch.randint(3, 128, (n,), generator=generator) for n in LENGTHS)
        weights = {"start": torch.full((39,), 2.0 if self.shared else 1.0)}
        if self.shared:
            segments, self.parents, starts = [start, one, two, alone], PARENTS, [0, 40, 40, 0]
            places = [torch.arange(39), torch.arange(40, 56), torch.arange(57, 79), torch.arange(80, 110)]
            targets = [start[1:], one[1:], two[1:], alone[1:]]
            weight = [weights["start"], *(torch.ones(len(p)) for p in places[1:])]
        else:
            segments, self.parents, starts = (
                [torch.cat([start, one]), torch.cat([start, two]), alone],
                (-1,) * 3,
                [0] * 3,
            )
            # The labels that a branch's first token is are left out in both forms.
            kept = [torch.tensor([i for i in range(len(s) - 1) if len(s) == 31 or i != 39]) for s in segments]
            ends = [0, 57, 120]
            places = [k + end for k, end in zip(kept, ends, strict=True)]
            targets = [s[k + 1] for s, k in zip(segments, kept, strict=True)]
            weight = [torch.ones(len(k)) for k in kept]
        self.lengths = self.drawn = tuple(map(len, segments))
        self.seeds = tuple(range(len(segments)))
        self.input_ids = torch.cat(segments).to(self.device)
        self.position_ids = torch.cat(
            [torch.arange(at, at + len(s)) for at, s in zip(starts, segments, strict=True)]
        ).to(self.device)
        self.cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32).to(self.device)
        self.position_N = torch.cat(places).to(self.device)
        self.target_N = torch.cat(targets).to(self.device)
        self.weight_N = torch.cat(weight).to(self.device)


def adapted(family: str, device: torch.device, dtype: torch.dtype) -> Policy:
    """A toy of the family with random adapters, the same on every device."""
    model = toy_model(family).to(device, dtype)
    use_flat_attention(model)
    load.turn_off_randomness(model)
    values = {
        "base_model": "x",
        "datasets": [{"path": "x", "type": "alpaca"}],
        "adapter": "lora",
        "lora_r": 4,
    }
    state: DropoutState = add_lora(model, Config.from_flat(values).adapter, seed=0)
    generator = torch.Generator().manual_seed(5)
    for layer in lora_layers(model).values():
        layer.lora_B.data.copy_(torch.empty(layer.lora_B.shape).normal_(0, 0.1, generator=generator))
    return build_policy(model, state, sequence_len=128)


def loss_and_gradients(policy: Policy, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    policy.train()
    policy.zero_grad(set_to_none=True)
    logps, _ = policy(batch)
    loss = -(logps * batch.weight_N).sum() / 130
    loss.backward()
    named = {
        name: p.grad.detach().float().cpu() for name, p in policy.named_parameters() if p.grad is not None
    }
    return float(loss.detach()), named


def assert_same(
    found: tuple[float, dict[str, torch.Tensor]],
    expected: tuple[float, dict[str, torch.Tensor]],
    tolerance: float,
) -> None:
    """Losses, and all gradients together by the norm of their difference."""
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    one, other = (torch.cat([g.flatten() for g in pair[1].values()]) for pair in (found, expected))
    assert float((one - other).norm() / other.norm()) <= tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_families_on_the_gpu_are_those_on_the_cpu(family: str) -> None:
    expected = loss_and_gradients(
        adapted(family, torch.device("cpu"), torch.float32), Batch(False, torch.device("cpu"))
    )
    policy = adapted(family, GPU, torch.float32)
    fuse.fuse_policy(policy)
    assert policy.flat and policy.rows_in_last_layer
    assert_same(loss_and_gradients(policy, Batch(False, GPU)), expected, 1e-4)
    assert_same(loss_and_gradients(policy, Batch(True, GPU)), expected, 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_everything_is_fused_and_near_fp32(family: str) -> None:
    """No kind is refused for its rounding, and the fused model is no further from fp32 than the model's own."""
    exact = loss_and_gradients(adapted(family, GPU, torch.float32), Batch(False, GPU))
    policy = adapted(family, GPU, torch.bfloat16)
    assert policy.flat and not policy.why_not_shared
    fusion = fuse.fuse(policy.model)
    policy.rows_in_last_layer = fusion.rows_in_last_layer
    assert fusion.rows_in_last_layer
    assert not [(kind.fused.what, kind.why) for kind in fusion.kinds if kind.why]
    for shared in (False, True):
        assert_same(loss_and_gradients(policy, Batch(shared, GPU)), exact, 0.1)


def test_the_variable_length_kernel_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="luthier")
    attention._tried.clear()
    policy = adapted("llama", GPU, torch.bfloat16)
    loss_and_gradients(policy, Batch(False, GPU))
    assert attention._tried and all(attention._tried.values()), caplog.text
