"""Merging from bases in 4 and 8 bits: the weights that bitsandbytes loads, and PEFT's logits on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from luthier.cli import main
from tests.export.conftest import loaded, logits

pytest.importorskip("bitsandbytes")

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4 single": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "8 bits": {"load_in_8bit": True},
}


def quantised(base: Path, how: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    extra = {"bnb_4bit_compute_dtype": dtype} if "load_in_4bit" in how else {}
    return AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**how, **extra), dtype=dtype, device_map={"": "cpu"}
    ).eval()


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """What a quantised model multiplies with, by path, read by bitsandbytes."""
    from bitsandbytes.functional import dequantize_4bit

    found = {}
    for path, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            found[path] = dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif type(module).__name__ == "Linear8bitLt":
            found[path] = module.weight.data * (module.weight.SCB / 127).unsqueeze(1)
    return found


def config_file(folder: Path, base: Path, how: dict[str, Any]) -> Path:
    values = {"base_model": str(base), "adapter": "lora", "datasets": [{"path": "x.jsonl", "type": "alpaca"}], **how}
    path = folder / "run.yml"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("family", "how"),
    [*(("llama", how) for how in FORMATS.values()), *(("gpt2", FORMATS[name]) for name in ("nf4", "8 bits"))],
    ids=[*(f"llama {name}" for name in FORMATS), "gpt2 nf4", "gpt2 8 bits"],
)
def test_rounded_as_the_load_rounds(
    how: dict[str, Any],
    family: str,
    base_dir: Callable[..., Path],
    peft_adapter: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The merged weights less what the adapter adds are those that bitsandbytes reads, bit for bit but for that sum."""
    monkeypatch.setattr("luthier.models.device.bf16_is_fast", lambda device: False)
    base = base_dir(family, vocab_size=512)
    _toy_tokenizer_into(base)
    _, folder = peft_adapter(base)
    config = config_file(tmp_path, base, how)
    call = ["merge-lora", str(config), "--lora-model-dir", str(folder), "--dtype", "float32"]
    assert main(call) == 0
    merged = loaded(folder / "merged")
    plain = peft.PeftModel.from_pretrained(loaded(base), folder).base_model.model
    expected = weights_of(quantised(base, how))
    assert expected
    for path, weight in expected.items():
        found = merged.get_submodule(path).weight
        found = found.T if family == "gpt2" else found
        module = plain.get_submodule(path)
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default")
            weight = weight + (delta.T if family == "gpt2" else delta)
        torch.testing.assert_close(found, weight, atol=1e-6, rtol=1e-5)
    record = json.loads((folder / "merged" / "merge.json").read_text())
    assert "as trained" in record["base_weights"]
    assert record["check"]["relative"] < 1e-4
    assert main([*call, "--onto", "full", "--overwrite"]) == 0
    torch.testing.assert_close(
        logits(loaded(folder / "merged")),
        logits(peft.PeftModel.from_pretrained(loaded(base), folder).eval()),
        atol=2e-5,
        rtol=1e-5,
    )
    record = json.loads((folder / "merged" / "merge.json").read_text())
    assert "before the rounding" in record["base_weights"]


def test_rounded_from_the_format_of_the_run(
    base_dir: Callable[..., Path], peft_adapter: Any, tmp_path: Path
) -> None:
    """A run in bfloat16 quantised what it had rounded to bfloat16; its folder says so."""
    base, how = base_dir("llama", vocab_size=512), FORMATS["nf4"]
    _toy_tokenizer_into(base)
    _, folder = peft_adapter(base, target_modules=["q_proj"])
    (folder / "environment.json").write_text(json.dumps({"dtype": "bfloat16"}))
    config = config_file(tmp_path, base, how)
    assert main(["merge-lora", str(config), f"lora_model_dir={folder}", "--dtype", "float32"]) == 0
    weights = dict(loaded(folder / "merged").named_parameters())
    expected, other = (weights_of(quantised(base, how, dtype)) for dtype in (torch.bfloat16, torch.float32))
    untouched = [path for path in expected if not path.endswith("q_proj")]
    assert all(torch.equal(weights[f"{path}.weight"], expected[path].float()) for path in untouched)
    assert not any(torch.equal(expected[path].float(), other[path]) for path in untouched)
    assert json.loads((folder / "merged" / "merge.json").read_text())["check"]["relative"] < 0.02


@pytest.mark.parametrize("how", FORMATS.values(), ids=FORMATS)
def test_base_stored_in_few_bits(
    how: dict[str, Any], base_dir: Callable[..., Path], peft_adapter: Any, tmp_path: Path
) -> None:
    base = tmp_path / "stored"
    quantised(base_dir("llama"), how).save_pretrained(base)
    _, folder = peft_adapter(base_dir("llama"))
    call = ["merge-lora", str(folder), "--base-model", str(base), "--dtype", "float32"]
    assert main(call) == 0
    merged = loaded(folder / "merged")
    assert getattr(merged.config, "quantization_config", None) is None
    plain = peft.PeftModel.from_pretrained(loaded(base_dir("llama")), folder).base_model.model
    for path, weight in weights_of(quantised(base_dir("llama"), how)).items():
        module = plain.get_submodule(path)
        if hasattr(module, "get_delta_weight"):
            weight = weight + module.get_delta_weight("default")
        torch.testing.assert_close(merged.get_submodule(path).weight, weight, atol=1e-6, rtol=1e-5)
    assert main([*call, "--overwrite", "--onto", "full"]) == 2  # there are no full weights here
    assert main([*call, "--overwrite", "--dtype", "auto"]) == 0
    assert json.loads((folder / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_logits_of_peft_on_the_quantised_base(
    base_dir: Callable[..., Path], peft_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.models.device.bf16_is_fast", lambda device: False)
    base, how = base_dir("llama", vocab_size=512), FORMATS["nf4"]
    _toy_tokenizer_into(base)
    _, folder = peft_adapter(base)
    config = config_file(tmp_path, base, how)
    assert main(["merge-lora", str(config), f"lora_model_dir={folder}", "--dtype", "float32", "--no-check"]) == 0
    # In eval mode bitsandbytes repacks for some CPUs, with scales in bf16; nothing here drops out.
    theirs = peft.PeftModel.from_pretrained(quantised(base, how), folder).train()
    torch.testing.assert_close(logits(loaded(folder / "merged")), logits(theirs), atol=1e-4, rtol=1e-4)


def test_a_base_quantised_by_others_is_refused(
    base_dir: Callable[..., Path], peft_adapter: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    base = tmp_path / "gptq"
    shutil.copytree(base_dir("llama"), base)
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**values, "quantization_config": {"quant_method": "gptq"}}))
    _, folder = peft_adapter(base_dir("llama"))
    assert main(["merge-lora", str(folder), "--base-model", str(base)]) == 1
    assert "quantised (gptq)" in capsys.readouterr().err
    assert main(["merge-lora", str(folder), "--onto", "quantized"]) == 2
    assert "nothing says that the adapter was trained on a quantised base" in capsys.readouterr().err
    assert not (folder / "merged").exists()


@pytest.fixture(autouse=True)
def _tokenizer(toy_tokenizer: Any) -> None:
    global _toy_tokenizer
    _toy_tokenizer = toy_tokenizer


_toy_tokenizer: Any = None


def _toy_tokenizer_into(folder: Path) -> None:
    _toy_tokenizer.save_pretrained(folder)
