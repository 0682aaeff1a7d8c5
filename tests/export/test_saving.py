"""`luthier export` to adapters, merged models and models in 4 bits, and what all formats share: disk and options."""

from __future__ import annotations

import json
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from luthier.cli import main
from luthier.export import room, shards
from luthier.export.save import export
from luthier.models.assemble import open_for_inference

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def adapter(toy_llama_dir: Path, peft_adapter: Callable[..., tuple[Any, Path]]) -> tuple[Any, Path]:
    return peft_adapter(toy_llama_dir)


def failed(call: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a call says that fails as it should."""
    assert main(["export", *call]) in (1, 2)
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and "internal" not in said
    return said


# --- adapters and merged models -----------------------------------------------------------------------------


def test_an_adapter_by_itself(adapter: tuple[Any, Path], toy_llama_dir: Path, tmp_path: Path) -> None:
    theirs, folder = adapter
    AutoTokenizer.from_pretrained(toy_llama_dir).save_pretrained(folder)
    (folder / "optimizer.pt").write_bytes(b"state")
    out = export(str(folder), "adapter", output=str(tmp_path / "out"))
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {p.name for p in out.iterdir()}
    assert not (out / "optimizer.pt").exists()
    base = AutoModelForCausalLM.from_pretrained(toy_llama_dir, dtype=torch.float32)
    ours = peft.PeftModel.from_pretrained(base, out).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_half_an_adapter(adapter: tuple[Any, Path], tmp_path: Path) -> None:
    out = export(f"{adapter[1]}:0.5", "adapter", output=str(tmp_path / "out"))
    before, half = load_file(adapter[1] / "adapter_model.safetensors"), load_file(out / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    assert json.loads((out / "adapter_config.json").read_text())["lora_alpha"] == 4  # as r, and so a scale of one
    a, b = (half[name.format(k)] for k in "AB")
    # The scale was 8 / 4.
    torch.testing.assert_close(b @ a, (before[name.format("B")] @ before[name.format("A")]) * 2 * 0.5)


def test_a_merged_model_in_shards(
    adapter: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, folder = adapter
    call = ["export", str(folder), "--to", "merged", "--output", str(tmp_path / "out"), "--max-shard-size", "0.0001"]
    assert main(call) == 0
    said = capsys.readouterr().err
    assert "needs 0.3 MB of disk" in said and "largest difference of a logit from base + adapter" in said
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(input_ids=ids).logits, rtol=0.02, atol=0.02)


# --- 4 bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_4_bits_are_those_of_bitsandbytes(base_dir: Callable[..., Path], tmp_path: Path, family: str) -> None:
    """Codes and scales, bit for bit, of the same weights quantised by transformers at load."""
    source = base_dir(family)
    out = export(str(source), "merged-4bit", output=str(tmp_path / "four"))
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    assert stored["bnb_4bit_quant_type"] == "nf4" and stored["bnb_4bit_use_double_quant"] is True
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    # In bfloat16, as the file was made of fp32 weights.
    theirs = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
    )
    ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, device_map="cpu")
    other = {name: module for name, module in theirs.named_modules() if hasattr(module, "quant_state")}
    found = {name: module for name, module in ours.named_modules() if hasattr(module, "quant_state")}
    assert found.keys() == other.keys() and found
    for name, module in found.items():
        state, expected = module.weight.quant_state, other[name].weight.quant_state
        assert torch.equal(module.weight.data, other[name].weight.data)
        assert torch.equal(state.absmax, expected.absmax) and torch.equal(state.offset, expected.offset)
        assert torch.equal(state.state2.absmax, expected.state2.absmax)
        assert (state.shape, state.dtype, state.blocksize) == (expected.shape, expected.dtype, expected.blocksize)
    rest = {name: tensor for name, tensor in theirs.state_dict().items() if tensor.dtype == torch.bfloat16}
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in rest.items())


def test_an_adapter_in_4_bits(
    toy_llama_dir: Path,
    peft_adapter: Callable[..., tuple[Any, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """DoRA and a head of its own, in shards; read by the engine beside PEFT's merge quantised in memory."""
    theirs, folder = peft_adapter(toy_llama_dir, use_dora=True, modules_to_save=["lm_head"])
    words = AutoTokenizer.from_pretrained(toy_llama_dir)
    words.save_pretrained(folder)
    call = [str(folder), "--to", "merged-4bit", "--output", str(tmp_path / "four"), "--max-shard-size", "0.00005"]
    assert main(["export", *call]) == 0
    assert "14 of 21 tensors in 4 bits" in capsys.readouterr().err
    assert len(list((tmp_path / "four").glob("model-*.safetensors"))) > 2
    merged = theirs.merge_and_unload().to(torch.bfloat16)
    merged.save_pretrained(tmp_path / "merged")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    ours, _, _ = open_for_inference(str(tmp_path / "four"), dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        first, second = ours(ids).logits, expected(ids).logits
    # PEFT merges DoRA in another order, so that a few codes are their neighbours.
    assert float((first - second).pow(2).mean().sqrt() / second.std()) < 0.02


def test_a_killed_export_leaves_nothing(
    toy_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "_write_file", broken)
    call = [str(toy_llama_dir), "--to", "merged-4bit", "--output", str(tmp_path / "four")]
    assert "No space left on device" in failed(call, capsys)
    assert not list(tmp_path.iterdir())


def test_without_bitsandbytes(
    toy_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    call = [str(toy_llama_dir), "--to", "merged-4bit", "--output", str(tmp_path / "four")]
    assert 'pip install "luthier[bitsandbytes]"' in failed(call, capsys)


# --- what all share -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["adapter", "merged", "merged-4bit", "gguf"])
def test_a_full_disk_is_found_before(
    adapter: tuple[Any, Path],
    toy_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    to: str,
) -> None:
    AutoTokenizer.from_pretrained(toy_llama_dir).save_pretrained(adapter[1])
    asked = []

    def almost_full(place: Path) -> Usage:
        asked.append(place)
        return Usage(10**12, 10**12, 20_000_000)

    monkeypatch.setattr(room.shutil, "disk_usage", almost_full)
    out = tmp_path / "there" / "out"
    said = failed([str(adapter[1]), "--to", to, "--output", str(out)], capsys)
    assert "MB of disk, and 20.0 MB are free there" in said and "--output" in said
    assert asked == [tmp_path] and not out.parent.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--to", "ggml"], "Did you mean gguf?"),
        (["--to", "merged_4bit"], "Did you mean merged-4bit?"),
        (["--to", "merged", "--quant", "q8_0"], "--quant is for --to gguf"),
        (["--to", "gguf", "--max-shard-size", "1"], "--max-shard-size: --to gguf is one file"),
        (["--to", "merged", "--max-shard-size", "0"], "more than 0"),
        (["--to", "adapter", "--onto", "full"], "saved without its base"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in failed([str(tmp_path), *options], capsys)


def test_sources(
    adapter: tuple[Any, Path], toy_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no such folder" in failed([str(tmp_path / "x"), "--to", "gguf"], capsys)
    assert "no adapter here" in failed([str(tmp_path), "--to", "gguf"], capsys)
    assert "no adapter" in failed([str(toy_llama_dir), "--to", "merged"], capsys)
    assert "no adapter" in failed([str(toy_llama_dir), "--to", "adapter"], capsys)
    assert "has no base" in failed([str(toy_llama_dir), "--to", "gguf", "--base-model", "x"], capsys)
    assert "with --output" in failed(["someone/model", "--to", "gguf"], capsys)
    (tmp_path / "run.yml").write_text("base_model: x\n")
    assert "not its config" in failed([str(tmp_path / "run.yml"), "--to", "gguf"], capsys)
    call = [str(adapter[1]), "--to", "merged-4bit", "--base-model", str(tmp_path / "gone")]
    assert "does not exist" in failed(call, capsys)


@pytest.mark.parametrize("to", ["adapter", "merged-4bit"])
def test_nothing_is_overwritten_unasked(
    adapter: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    call = [str(adapter[1]), "--to", to, "--output", str(tmp_path / "out")]
    assert main(["export", *call]) == 0
    capsys.readouterr()
    assert "nothing is overwritten unasked" in failed(call, capsys)
    assert main(["export", *call, "--overwrite"]) == 0
