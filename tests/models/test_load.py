"""A model that cannot be loaded as its config asks."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from luthier.config import Config
from luthier.models import attention
from luthier.models.load import load_model
from tests.models.families import toy_model


class _Tokens:
    def __len__(self) -> int:
        return 128


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is here")
def test_flash_attention_that_is_not_installed_is_the_default_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy_model("llama").save_pretrained(tmp_path)
    values = {"base_model": str(tmp_path), "datasets": [{"path": "x", "type": "alpaca"}], "bf16": False}
    config = Config.from_flat({**values, "attn_implementation": "flash_attention_2"})
    model = load_model(config, _Tokens(), torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
    assert model.config._attn_implementation == attention.NAME
    assert "flash_attention_2 is not installed here" in caplog.text
