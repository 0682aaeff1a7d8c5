"""The host waits for the device where a row is logged, and nowhere else in a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.config import Config
from luthier.data.loader import StepLoader
from luthier.errors import RunError
from luthier.train import checkpoint, loop, run
from luthier.train.run import train
from tests.train.conftest import losses

MakeConfig = Callable[..., Config]

# What makes a host wait for its device: a number out of a tensor, and shapes that depend on values.
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2"}


class _Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = op.name().startswith("aten::index.") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if masked or op.name().split(".")[0] in WAITING:
            self.seen.append(op.name())
        return op(*args, **(kwargs or {}))


@pytest.fixture
def far_device(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The loop treats this machine's CPU as a device that it must not wait for; returns the steps read at once."""
    read = loop._read
    readings: list[int] = []

    def counted(unread: list[loop.Unread], *arguments: Any, **options: Any) -> float:
        readings.append(len(unread))
        return read(unread, *arguments, **options)

    monkeypatch.setattr(loop, "READ_AT_ONCE", set())
    monkeypatch.setattr(loop, "_read", counted)
    return readings


@pytest.mark.parametrize("adapter", ["lora", None])
def test_nothing_waits_between_rows(
    run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, far_device: list[int], adapter: str | None
) -> None:
    waits = _Waits()

    def watched(*arguments: Any, **options: Any) -> Any:
        with waits:
            return fit(*arguments, **options)

    fit = run.fit
    monkeypatch.setattr(run, "fit", watched)
    values = {} if adapter else {"adapter": None, "lora_r": None, "learning_rate": 1e-3}
    train(run_config(**values, max_steps=20, num_epochs=10, logging_steps=10, saves_per_epoch=0))
    assert far_device == [10, 10]
    assert waits.seen == []


def test_rows_are_the_same_read_late_or_at_once(
    run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = dict(max_steps=12, num_epochs=10, logging_steps=4, save_steps=5, val_set_size=6, eval_steps=3)
    train(run_config(**values, output_dir=str(tmp_path / "at_once")))
    monkeypatch.setattr(loop, "READ_AT_ONCE", set())
    train(run_config(**values))
    assert losses(tmp_path / "run") == losses(tmp_path / "at_once")
    one, other = (checkpoint.read_state(tmp_path / f / "checkpoint-5")[0] for f in ("run", "at_once"))
    assert one.window.loss == other.window.loss != 0
    assert one.evaluations == other.evaluations


def test_a_loss_that_was_not_finite_is_named_when_it_is_read(
    run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, far_device: list[int]
) -> None:
    """The fourth of ten: the checkpoint of step 2 is the last, and the rows are those of step 4."""
    loader = StepLoader
    seen: list[list[str]] = []

    class Fourth(run.SFT):
        def __call__(self, *of_pass: Any) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append([])
            loss, sums = super().__call__(*of_pass)
            return (loss * math.nan if len(seen) == 4 else loss), sums

    monkeypatch.setattr(run, "SFT", Fourth)
    named: list[int] = []
    locations = loader.locations
    monkeypatch.setattr(
        loader, "locations", lambda self, step: named.extend(step.rows) or locations(self, step)
    )
    config = run_config(
        max_steps=10, num_epochs=10, logging_steps=2, save_steps=2, max_tokens_per_pass=10_000
    )
    with pytest.raises(RunError, match=r"loss is nan at step 4, .*rows\.jsonl:\d+.*checkpoint-2"):
        train(config)
    assert len(named) == 4 and far_device == [2, 2]
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert "Unfinished: step 2 of 10." in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
