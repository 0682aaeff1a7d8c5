"""Frozen weights in e4m3: near the reference in both directions, on a whole run, and refused where it cannot be."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from luthier.config import Config
from luthier.errors import ConfigError, RunError
from luthier.kernels.fp8_linear import (
    TOLERANCE,
    fp8_input_gradient,
    fp8_linear,
    quantize_rows,
    reference_fp8_linear,
)
from luthier.kernels.lora_linear import Linear, lora_linears, reference_lora_linears
from luthier.models import fp8
from luthier.models.frozen import FrozenLinear
from luthier.train import run
from luthier.train.run import train
from tests.train.conftest import losses, rows_file, run_config  # noqa: F401 -- fixtures

MakeConfig = Callable[..., Config]


def _off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_forward_and_input_gradient_are_near_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 64, generator=generator, requires_grad=True)
    weight, scale = quantize_rows(
        torch.randn(48, 64, generator=generator) * torch.logspace(-3, 1, 48)[:, None]
    )
    bias, grad = torch.randn(48, generator=generator), torch.randn(33, 48, generator=generator)
    expected = reference_fp8_linear(x, weight, scale, bias)
    expected.backward(grad)
    assert x.grad is not None
    assert 0 < _off(fp8_linear(x.detach(), weight, scale, bias), expected.detach()) < TOLERANCE
    assert 0 < _off(fp8_input_gradient(grad, weight, scale), x.grad) < TOLERANCE


def test_rows_keep_their_own_precision() -> None:
    rows = torch.tensor([[1e-6, 2e-6, -3e-6], [1e3, 500.0, 2.0], [0.0, 0.0, 0.0]])
    rounded, scale = quantize_rows(rows)
    torch.testing.assert_close(rounded.float() * scale, rows, rtol=2**-4, atol=0)


def test_an_adapter_on_rounded_weights() -> None:
    generator = torch.Generator().manual_seed(1)
    base = nn.Linear(64, 32)
    layer = FrozenLinear(base)
    layer.to_fp8()
    a = torch.randn(4, 64, generator=generator, requires_grad=True)
    b = torch.randn(32, 4, generator=generator, requires_grad=True)
    x = torch.randn(17, 64, generator=generator, requires_grad=True)
    spec = layer.linear(x)
    outs = []
    for compute in (lora_linears, reference_lora_linears):
        plain = Linear(layer.weight_in(torch.float32), layer.bias, a, b, 2.0)
        full = (
            Linear(spec.weight, spec.bias, a, b, 2.0, row_scale=spec.row_scale)
            if compute is lora_linears
            else plain
        )
        (out,) = compute(x, [full])
        outs.append([out.detach(), *torch.autograd.grad(out.square().sum(), (x, a, b))])
    for found, expected in zip(*outs, strict=True):
        assert _off(found, expected) < 2 * TOLERANCE


def test_a_run_in_fp8_follows_the_one_without(
    run_config: MakeConfig,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Here the device is taken to be able to: torch's CPU multiply takes the same arguments."""
    config = run_config(max_steps=12, learning_rate=1e-3, output_dir=str(tmp_path / "plain"))
    train(config)
    monkeypatch.setattr(run, "check_fp8", lambda device, dtype: None)
    with caplog.at_level(logging.INFO, logger="luthier"):
        train(config.replace("test", load_in_fp8=True, output_dir=str(tmp_path / "fp8")))
    assert "14 linear layers in fp8: the loss of the first pass moves from" in caplog.text
    plain, found = losses(tmp_path / "plain"), losses(tmp_path / "fp8")
    assert found != plain and found == pytest.approx(plain, rel=0.01)


def test_a_model_that_does_not_bear_it_is_refused(
    run_config: MakeConfig,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "check_fp8", lambda device, dtype: None)
    monkeypatch.setattr(fp8, "COSINE", 1.0)
    with pytest.raises(RunError, match="this model does not bear it: the loss of the first pass moves from"):
        train(run_config(load_in_fp8=True))


def test_elsewhere_it_is_an_error_before_the_model_is_loaded(
    run_config: MakeConfig,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "build_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match="load_in_fp8: cpu has no 8-bit floating-point multiply"):
        train(run_config(load_in_fp8=True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ConfigError, match="load_in_fp8: A100 has no"):
        fp8.check_fp8(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ConfigError, match="this run computes in float16"):
        fp8.check_fp8(torch.device("cuda"), torch.float16)
    fp8.check_fp8(torch.device("cuda"), torch.bfloat16)
