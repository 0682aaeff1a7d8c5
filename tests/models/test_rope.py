"""Longer than the model was made for: scaled as transformers scales, or refused before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.cli import main
from luthier.config import Config
from luthier.errors import ConfigError, LuthierError
from luthier.models.assemble import open_for_inference
from luthier.models.isolation import build_policy
from luthier.models.load import load_model, read_model_config
from luthier.models.rope import carry_scaling, check_length, with_rope
from luthier.train.run import train
from tests.models.families import toy_config, toy_model
from tests.train.conftest import rows_file, run_config  # noqa: F401 -- fixtures

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"type": "yarn", "factor": 2, "original_max_position_embeddings": 128, "beta_fast": 16},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
]
YARN = {"rope_type": "yarn", "factor": 4.0}


class _Tokens:
    new_tokens: tuple[str, ...] = ()

    def __len__(self) -> int:
        return 128


def settings(folder: Path, **values: Any) -> Config:
    return Config.from_flat(
        {"base_model": str(folder), "datasets": [{"path": "x", "type": "alpaca"}], "bf16": False, **values}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    def save(family: str) -> Path:
        toy_model(family).save_pretrained(tmp_path / family)
        return tmp_path / family

    return save


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_are_those_of_transformers(
    family: str, scaling: dict[str, Any], folder: Callable[[str], Path]
) -> None:
    """The same numbers as the model that transformers makes of a `config.json` with the same scaling in it; and
    documents of a pass go on not seeing each other."""
    path = folder(family)
    config = settings(path, rope_parameters=scaling)
    ours = load_model(config, _Tokens(), torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
    described = json.loads((path / "config.json").read_text())
    theta = described["rope_parameters"]["rope_theta"]
    before = scaling.get("original_max_position_embeddings", 256)
    described["max_position_embeddings"] = before * int(scaling["factor"])
    described["rope_parameters"] = {
        "rope_theta": theta,
        **({} if scaling.get("rope_type") == "linear" else {"original_max_position_embeddings": before}),
        **scaling,
    }
    (path / "config.json").write_text(json.dumps(described))
    theirs = AutoModelForCausalLM.from_pretrained(path).eval()
    assert ours.config.max_position_embeddings == theirs.config.max_position_embeddings
    ids = torch.randint(3, 128, (1, 400), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = ours(ids).logits, theirs(ids).logits
        plain = toy_model(family)(ids).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert float((found - plain).abs().max()) > 1e-2  # it does something
    assert build_policy(ours, None, 400).flat


def test_what_is_exported_says_the_scaling(folder: Callable[[str], Path]) -> None:
    path = folder("llama")
    raw = json.loads((path / "config.json").read_text())
    raw["rope_scaling"] = None
    config = settings(path, rope_parameters=YARN)
    scaled = read_model_config(config.model)
    full = with_rope(config, scaled)
    assert full.model.rope_parameters == {
        "rope_theta": 10000.0,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    # What is spelled out means the same again, on the base as on what carries the scaling already.
    assert read_model_config(full.model).to_dict() == scaled.to_dict()
    (path / "config.json").write_text(json.dumps(carry_scaling(raw, scaled)))
    for again in (AutoConfig.from_pretrained(path), read_model_config(full.model), read_model_config(config.model)):
        assert again.rope_parameters == scaled.rope_parameters and again.max_position_embeddings == 1024


def test_of_several_kinds_of_attention_the_full_one_is_scaled(folder: Callable[[str], Path]) -> None:
    path = folder("gemma3_text")
    described = json.loads((path / "config.json").read_text())
    described["layer_types"] = ["sliding_attention", "full_attention"]
    (path / "config.json").write_text(json.dumps(described))
    found = read_model_config(settings(path, rope_parameters={"rope_type": "linear", "factor": 8.0}).model)
    before = toy_config("gemma3_text").rope_parameters
    assert found.rope_parameters["sliding_attention"] == before["sliding_attention"]
    full = found.rope_parameters["full_attention"]
    assert (full["rope_type"], full["factor"]) == ("linear", 8.0)
    assert full["rope_theta"] == before["full_attention"]["rope_theta"]


@pytest.mark.parametrize(
    ("family", "values", "longest", "message"),
    [
        ("llama", {}, 300, r"300 tokens.*made for 256.*sequence_len: 256.*rope_type: yarn, factor: 2"),
        ("gpt2", {}, 1100, r"made for 256.*sequence_len: 256 leaves such documents out, or cuts them[^;]*$"),
        ("gpt2", {"rope_parameters": YARN}, 10, "no rotary embedding"),
        ("phi3", {"rope_parameters": YARN}, 10, "must be one of .*longrope"),
        ("llama", {"rope_parameters": YARN, "sequence_len": 1024}, 1024, None),
        ("llama", {"rope_parameters": YARN, "sequence_len": 1500}, 10, r"factor of 4 gives 1,024.*at least 5.86"),
        ("gpt_oss", {"rope_parameters": {"rope_type": "linear", "factor": 2}}, 10, "scaled already .yarn, factor 32"),
    ],
    ids=str,
)
def test_lengths(
    family: str, values: dict[str, Any], longest: int, message: str | None, folder: Callable[[str], Path]
) -> None:
    path = folder(family)
    config = settings(path, **{"sequence_len": 256 if "rope_parameters" in values else 2048, **values})

    def check() -> None:
        check_length(config, read_model_config(config.model), longest)

    if message is None:
        check()
        return
    with pytest.raises(LuthierError, match=message):
        check()


def test_a_family_without_a_limit() -> None:
    model_config = AutoConfig.for_model("bloom", n_layer=2, n_head=4, hidden_size=32)
    check_length(settings(Path("x")), model_config, 10**6)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "documents of a pass would change each other"),
        ({"rope_type": "su", "factor": 2.0}, "one of linear, yarn, llama3; it has 'su'"),
        ({"factor": 2.0}, "needs a rope_type"),
        ({"rope_type": "yarn"}, "needs a factor"),
        ({"rope_type": "yarn", "factor": 0.5}, "factor of 1 or more; it has 0.5"),
        ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor and high_freq_factor"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, "beta_fast: not for `rope_type: linear`"),
    ],
    ids=str,
)
def test_bad_scalings_are_seen_in_the_config(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(Path("x"), rope_parameters=rope)


def test_a_run_with_longer_documents(
    run_config: Callable[..., Config],  # noqa: F811
    toy_llama_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Refused as it is, trained with a scaling; the adapter's folder says it, and generation applies it."""
    base = tmp_path / "short"
    shutil.copytree(toy_llama_dir, base)
    described = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**described, "max_position_embeddings": 96}))
    values: dict[str, Any] = dict(base_model=str(base), max_steps=1)
    with pytest.raises(LuthierError, match="made for 96"):
        train(run_config(**values))
    caplog.set_level("INFO")
    train(run_config(**values, rope_parameters={"rope_type": "yarn", "factor": 8}))
    assert "RoPE scaled (yarn): 96 positions x 8 = 768" in caplog.text
    card = (tmp_path / "run" / "README.md").read_text()
    assert '"original_max_position_embeddings": 96' in card and '"rope_theta": 10000.0' in card
    model, _, _ = open_for_inference(str(tmp_path / "run"), device=torch.device("cpu"), dtype=torch.float32)
    assert model.config.max_position_embeddings == 768
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert main(["merge-lora", str(tmp_path / "run"), "--dtype", "float32", "--no-check"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged").eval()
    ids = torch.arange(4, 404)[None] % 500
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=2e-5, rtol=1e-5)
