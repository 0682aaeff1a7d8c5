"""On a GPU: a run is the CPU's run, in bf16 close to it, and its steps do not wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.config import Config
from luthier.train import loop, run
from luthier.train.checkpoint import Checkpoints
from luthier.train.run import train
from tests.train.conftest import losses

pytestmark = pytest.mark.gpu

MakeConfig = Callable[..., Config]


@pytest.mark.parametrize("adapter", ["lora", None])
def test_five_steps_are_the_cpus(run_config: MakeConfig, tmp_path: Path, adapter: str | None) -> None:
    values: dict[str, Any] = {} if adapter else {"adapter": None, "lora_r": None, "learning_rate": 1e-3}
    values |= {"max_steps": 5, "bf16": False, "tf32": False}
    for device in ("cpu", "cuda"):
        train(run_config(**values, device_map=device, output_dir=str(tmp_path / device)))
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)


def test_bf16_is_close(run_config: MakeConfig, tmp_path: Path) -> None:
    train(run_config(max_steps=5, device_map="cpu", bf16=False, output_dir=str(tmp_path / "cpu")))
    train(run_config(max_steps=5, device_map="cuda", output_dir=str(tmp_path / "cuda")))
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=2e-2)


@pytest.mark.parametrize("share", ["auto", "off"])
@pytest.mark.parametrize(
    "settings", [{}, {"adapter": None, "lora_r": None}, {"gradient_checkpointing": True}], ids=str
)
def test_nothing_waits_between_rows(
    run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], share: str
) -> None:
    """torch raises where the host waits for the device, but where a row is read and a checkpoint is written. The
    first row's steps come before that: what they load and compile may wait."""

    def allowed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.set_sync_debug_mode("default")
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("error" if seen else "default")

        return call

    read, seen = loop._read, []

    def counted(unread: list[loop.Unread], *args: Any, **options: Any) -> float:
        seen.append(len(unread))
        return read(unread, *args, **options)

    monkeypatch.setattr(loop, "_read", allowed(counted))
    monkeypatch.setattr(Checkpoints, "save", allowed(Checkpoints.save))
    fit = run.fit

    def watched(*args: Any, **options: Any) -> Any:
        try:
            return fit(*args, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(run, "fit", watched)
    settings = {**settings, "share_prefixes": share, "device_map": "cuda"}
    train(run_config(**settings, max_steps=15, num_epochs=10, logging_steps=5, saves_per_epoch=0))
    assert seen == [5, 5, 5]
