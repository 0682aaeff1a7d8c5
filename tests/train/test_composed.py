"""One optimizer for each parameter: steps inside of backward, and bfloat16 weights that are rounded stochastically."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from luthier.config import Config
from luthier.errors import ConfigError, RunError
from luthier.models.policy import Policy
from luthier.train import checkpoint, run, spread
from luthier.train.composed import PerParameter, stochastic_round
from luthier.train.optim import Masters
from luthier.train.run import train
from tests.train.conftest import losses
from tests.train.test_memory import _small_device

MakeConfig = Callable[..., Config]
FULL: dict[str, Any] = dict(
    adapter=None,
    lora_r=None,
    learning_rate=1e-3,
    micro_batch_size=4,
    gradient_accumulation_steps=1,
    max_grad_norm=0,
    max_steps=4,
)


def _same(one: Path, other: Path) -> bool:
    ours, theirs = (checkpoint.read_masters(folder / "checkpoint-4") for folder in (one, other))
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_8bit", "muon", "schedule_free_adamw", "sophia"])
def test_steps_inside_of_backward_are_the_ordinary_ones_to_the_last_bit(
    run_config: MakeConfig, tmp_path: Path, name: str
) -> None:
    values = {**FULL, "optimizer": name, "weight_decay": 0.1, "warmup_steps": 1, "save_steps": 2}
    train(run_config(**values, output_dir=str(tmp_path / "plain")))
    train(run_config(**values, optimizer_in_backward=True))
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    assert _same(tmp_path / "run", tmp_path / "plain")
    # and resumed from an ordinary run's state
    train(
        run_config(
            **values,
            optimizer_in_backward=True,
            resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"),
            output_dir=str(tmp_path / "again"),
        )
    )
    assert _same(tmp_path / "again", tmp_path / "plain")


def test_of_all_gradients_one_parameters_is_alive_at_a_time(
    run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of all .grad whenever one arrives, and the norm is the one that clipping would have seen."""
    alive: list[int] = []
    largest, total = 0, 0
    build = spread.build_optimizer

    def built(masters: Masters, training: Any) -> torch.optim.Optimizer:
        nonlocal largest, total
        parameters = [parameter for parameter, _ in masters.pairs()]
        largest, total = max(p.nbytes for p in parameters), sum(p.nbytes for p in parameters)

        def count(_: torch.Tensor) -> None:
            alive.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(count)
        return build(masters, training)

    monkeypatch.setattr(spread, "build_optimizer", built)
    values = {**FULL, "kernels": "reference"}
    train(run_config(**values, optimizer_in_backward=True))
    assert 0 < max(alive) == largest
    alive.clear()
    train(run_config(**values, output_dir=str(tmp_path / "plain")))
    assert max(alive) == total > 3 * largest

    def norms(folder: str) -> list[float]:
        rows = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        return [row["grad_norm"] for row in rows if "loss" in row]

    assert norms("run") == pytest.approx(norms("plain"), rel=1e-5)


def test_a_step_that_has_begun_is_not_repeated(
    run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _small_device(monkeypatch, 60, where="backward")
    with pytest.raises(RunError, match=r"out of memory at step 1, one pass of .*optimizer_in_backward"):
        train(run_config(**FULL, optimizer_in_backward=True))
    assert not checkpoint.list_checkpoints(tmp_path / "run")


def test_a_step_is_one_pass_or_is_refused(
    run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    forward = Policy.forward

    def counted(self: Policy, batch: Any) -> Any:
        passes.append(len(batch.input_ids))
        return forward(self, batch)

    monkeypatch.setattr(Policy, "forward", counted)
    train(run_config(**{**FULL, "micro_batch_size": 30}, optimizer_in_backward=True, kernels="reference"))
    assert len([tokens for tokens in passes if tokens > 1000]) == 4  # one in each step
    build = run.build_policy

    def alone(*arguments: Any, **options: Any) -> nn.Module:
        policy = build(*arguments, **options)
        policy.flat = False
        return policy

    monkeypatch.setattr(run, "build_policy", alone)
    with pytest.raises(ConfigError, match="micro_batch_size: 1"):
        train(run_config(**FULL, optimizer_in_backward=True, overwrite_output_dir=True))


def test_stochastic_rounding_is_right_on_average_and_takes_the_neighbours_only() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, generator=generator) * torch.logspace(-20, 20, 64)
    torch.manual_seed(0)
    drawn = torch.stack([stochastic_round(x) for _ in range(20_000)]).double()
    below, above = drawn.min(0).values, drawn.max(0).values
    step = above - below
    assert ((below <= x) & (x <= above)).all()
    nearest = x.bfloat16().double()
    assert ((nearest == below) | (nearest == above)).all()
    # The mean of n draws from two neighbours lies within 5 of its standard deviations, at most step / 2 / sqrt(n).
    assert ((drawn.mean(0) - x).abs() <= 5 * step / 2 / 20_000**0.5 + 1e-12 * x.abs()).all()
    exact = torch.tensor([0.0, 1.0, -2.5, float("inf"), -float("inf")])
    assert torch.equal(stochastic_round(exact).float(), exact)
    assert stochastic_round(torch.tensor([float("nan")])).isnan().all()


def test_small_updates_add_up_on_average_and_are_lost_without() -> None:
    """400 steps of 0.0005 from 1.0, where bfloat16's next lower number is 0.0039 away."""

    def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=0.0005)

    torch.manual_seed(0)
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.ones(16, 16, dtype=torch.bfloat16))
    masters = Masters(holder, copies=False)
    optimizer = PerParameter([{"params": list(masters)}], sgd, rounds=True)
    plain = nn.Parameter(torch.ones(16, 16, dtype=torch.bfloat16))
    lost = torch.optim.SGD([plain], lr=0.0005)
    for _ in range(400):
        for parameter, each in ((holder.weight, optimizer), (plain, lost)):
            parameter.sum().backward()
            each.step()
            parameter.grad = None
    assert (plain == 1).all()
    assert holder.weight.dtype == torch.bfloat16 and holder.weight.float().std() > 0
    assert holder.weight.float().mean().item() == pytest.approx(1 - 400 * 0.0005, abs=0.01)


@pytest.mark.parametrize("in_backward", [False, True])
def test_bfloat16_weights_train_without_copies_and_resume_to_the_bit(
    run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_backward: bool
) -> None:
    monkeypatch.setattr(run, "choose_dtype", lambda config, device: torch.bfloat16)
    values = {
        **FULL,
        "bf16": True,
        "bf16_stochastic_rounding": True,
        "optimizer_in_backward": in_backward,
        "save_steps": 2,
        "learning_rate": 3e-3,
        "kernels": "reference",
    }
    train(run_config(**values, output_dir=str(tmp_path / "whole")))
    whole = losses(tmp_path / "whole")
    assert whole[-1] < whole[0]
    kept = checkpoint.read_masters(tmp_path / "whole" / "checkpoint-4")
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    moments = checkpoint.load_file(tmp_path / "whole" / "checkpoint-4" / "optimizer.safetensors")
    assert {tensor.dtype for tensor in moments.values()} == {torch.float32}
    train(run_config(**values, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")))
    assert losses(tmp_path / "run")[-2:] == whole[2:]
    assert _same(tmp_path / "run", tmp_path / "whole")


def test_gradients_of_bfloat16_weights_add_up_in_fp32() -> None:
    """256 and sixteen times 1, which bfloat16 cannot count: above 256 its numbers are 2 apart."""
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    masters = Masters(holder, copies=False)
    (holder.weight * 256).sum().backward()
    for _ in range(16):
        holder.weight.sum().backward()
    (master,) = masters
    assert master.grad is not None and (master.grad == 272).all()
