"""One adapter merged into its base: PEFT's logits, on families whose files and modules differ in every way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from luthier.cli import main
from luthier.export import merge, shards
from luthier.export.shards import Checkpoint, Written, write_shards
from tests.export.conftest import loaded, logits, randomise

EXACT = ["--dtype", "float32", "--max-shard-size", "0.00003"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name).clone() for name in checkpoint.stored}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma2", "phi3"])
def test_merged_model_is_pefts(family: str, base_dir: Callable[..., Path], peft_adapter: Any) -> None:
    """Plain, transposed (gpt2), experts stored one by one under other names (mixtral), tied (gpt2, gemma2)."""
    base = base_dir(family)
    theirs, folder = peft_adapter(base)
    assert main(["merge-lora", str(folder), *EXACT]) == 0
    merged = folder / "merged"
    torch.testing.assert_close(logits(loaded(merged)), logits(theirs), atol=2e-5, rtol=1e-5)
    before, after = tensors(base), tensors(merged)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == len([name for name in theirs.state_dict() if "lora_A" in name])
    assert (merged / shards.INDEX).is_file()
    assert (merged / "generation_config.json").is_file()


@pytest.mark.parametrize(
    "values",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}, "alpha_pattern": {"v_proj": 3}},
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True},
        {"target_modules": ["lm_head", "q_proj"]},
        {"modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["k_proj"], "layers_to_transform": [1]},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("tied", [False, True])
def test_kinds_of_adapters(
    values: dict[str, Any], tied: bool, base_dir: Callable[..., Path], peft_adapter: Any
) -> None:
    base = base_dir("llama", tie_word_embeddings=tied)
    theirs, folder = peft_adapter(base, **values)
    assert main(["merge-lora", str(folder), *EXACT]) == 0
    torch.testing.assert_close(logits(loaded(folder / "merged")), logits(theirs), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "still_tied"),
    [
        ({}, True),
        ({"target_modules": ["lm_head"]}, False),
        ({"target_modules": ["embed_tokens"]}, False),
        ({"modules_to_save": ["embed_tokens"]}, False),
    ],
    ids=["neither", "head", "embeddings", "embeddings whole"],
)
def test_tied_weights_are_parted_only_where_they_differ(
    values: dict[str, Any], still_tied: bool, base_dir: Callable[..., Path], peft_adapter: Any
) -> None:
    base = base_dir("llama", tie_word_embeddings=True)
    _, folder = peft_adapter(base, **values)
    assert main(["merge-lora", str(folder), *EXACT]) == 0
    config = json.loads((folder / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is still_tied
    assert ("lm_head.weight" in Checkpoint(folder / "merged").stored) is not still_tied


def test_modules_saved_whole_with_more_rows_than_the_base(
    base_dir: Callable[..., Path], tmp_path: Path
) -> None:
    import peft

    base = base_dir("llama")
    model = loaded(base)
    model.resize_token_embeddings(133)
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(model, settings).eval()
    theirs.save_pretrained(tmp_path / "a")
    assert main(["merge-lora", str(tmp_path / "a"), "--base-model", str(base), *EXACT]) == 0
    ours = loaded(tmp_path / "a" / "merged")
    assert ours.config.vocab_size == 133
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


def test_16_bits_are_the_sum_rounded_once(base_dir: Callable[..., Path], peft_adapter: Any) -> None:
    theirs, folder = peft_adapter(base_dir("llama"))
    assert main(["merge-lora", str(folder)]) == 0
    expected = theirs.merge_and_unload().state_dict()
    for name, tensor in tensors(folder / "merged").items():
        assert tensor.dtype == torch.bfloat16
        # Sums in another order may fall on the other side of a rounding boundary.
        differs = tensor != expected[name].to(torch.bfloat16)
        assert differs.float().mean() < 0.005, name
    assert json.loads((folder / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_bases_own_format(base_dir: Callable[..., Path], peft_adapter: Any, tmp_path: Path) -> None:
    """auto and the default take 16 bits as they are; what is kept more finely than the rest stays so."""
    model = loaded(base_dir("llama")).half()
    model.save_pretrained(tmp_path / "half")
    found = load_file(tmp_path / "half" / shards.ONE)
    found["model.norm.weight"] = found["model.norm.weight"].float()
    save_file(found, tmp_path / "half" / shards.ONE, metadata={"format": "pt"})
    _, folder = peft_adapter(base_dir("llama"))
    for option in ([], ["--dtype", "auto"]):
        target = tmp_path / f"out{len(option)}"
        arguments = ["--base-model", str(tmp_path / "half"), "--out", str(target), *option]
        assert main(["merge-lora", str(folder), *arguments]) == 0
        dtypes = {name: t.dtype for name, t in tensors(target).items()}
        assert dtypes.pop("model.norm.weight") == torch.float32
        assert set(dtypes.values()) == {torch.float16}
    assert main(["merge-lora", str(folder), "--dtype", "auto"]) == 0
    assert {t.dtype for t in tensors(folder / "merged").values()} == {torch.float32}


def test_pickled_base(base_dir: Callable[..., Path], peft_adapter: Any, tmp_path: Path) -> None:
    theirs, folder = peft_adapter(base_dir("llama"))
    base = tmp_path / "pickled"
    base.mkdir()
    torch.save(loaded(base_dir("llama")).state_dict(), base / shards.PICKLED)
    shutil.copy(base_dir("llama") / "config.json", base)
    assert main(["merge-lora", str(folder), "--base-model", str(base), *EXACT]) == 0
    torch.testing.assert_close(logits(loaded(folder / "merged")), logits(theirs), atol=2e-5, rtol=1e-5)


def test_names_without_the_models_prefix(
    base_dir: Callable[..., Path], peft_adapter: Any, tmp_path: Path
) -> None:
    """GPT-2's published files call `transformer.h.0...` just `h.0...`; the head is tied and has no tensor."""
    theirs, folder = peft_adapter(base_dir("gpt2"), target_modules=["c_attn", "lm_head"])
    base = tmp_path / "published"
    base.mkdir()
    found = {name.removeprefix("transformer."): t for name, t in tensors(base_dir("gpt2")).items()}
    assert "h.0.attn.c_attn.weight" in found
    save_file(found, base / shards.ONE, metadata={"format": "pt"})
    shutil.copy(base_dir("gpt2") / "config.json", base)
    assert main(["merge-lora", str(folder), "--base-model", str(base), *EXACT]) == 0
    assert tensors(folder / "merged").keys() == found.keys() | {"lm_head.weight"}
    torch.testing.assert_close(logits(loaded(folder / "merged")), logits(theirs), atol=2e-5, rtol=1e-5)


def test_files_that_name_the_text_part_otherwise(tmp_path: Path) -> None:
    """Gemma 3 with its eyes: `language_model.model.layers...` in the files, `model.language_model.layers...` loaded."""
    import peft
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = dict(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=8,
    )  # fmt: skip
    sight = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=text, vision_config=sight, image_token_index=127)
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    names = tensors(tmp_path / "base").keys()
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in names

    def opened(folder: Path) -> Any:
        return Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    settings = peft.LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|down_proj)")
    theirs = peft.get_peft_model(opened(tmp_path / "base"), settings).eval()
    randomise(theirs, 3)
    theirs.save_pretrained(tmp_path / "a")
    assert main(["merge-lora", str(tmp_path / "a"), *EXACT]) == 0
    assert tensors(tmp_path / "a" / "merged").keys() == names
    torch.testing.assert_close(logits(opened(tmp_path / "a" / "merged")), logits(theirs), atol=2e-5, rtol=1e-5)


def test_experts_are_merged_in_a_model_loaded_whole(
    toy_tokenizer: Any, peft_adapter: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mixtral's files have a tensor for each matrix of each expert, and its modules one for all of them."""
    from tests.models.families import toy_model

    base = tmp_path / "base"
    toy_model("mixtral", vocab_size=len(toy_tokenizer)).save_pretrained(base)
    toy_tokenizer.save_pretrained(base)
    theirs, folder = peft_adapter(
        base, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    assert main(["merge-lora", str(folder), *EXACT, "--base-model", str(base)]) == 0
    assert "warning: the whole model is loaded to be merged" in capsys.readouterr().err
    torch.testing.assert_close(logits(loaded(folder / "merged")), logits(theirs), atol=2e-5, rtol=1e-5)
    assert json.loads((folder / "merged" / "merge.json").read_text())["check"]["relative"] < 1e-5


def test_tensors_come_and_go_one_by_one(
    base_dir: Callable[..., Path], peft_adapter: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The most that is alive at once is a few copies of the largest tensor, however many there are."""
    base = base_dir("llama", num_hidden_layers=12, hidden_size=64, intermediate_size=256)
    _, folder = peft_adapter(base)
    live = Live()
    read, rounded = Checkpoint.read, merge._Planner._rounded_once
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: live.count(read(self, name).clone()))
    monkeypatch.setattr(
        merge._Planner, "_rounded_once", lambda self, *args: live.count(rounded(self, *args))
    )
    assert main(["merge-lora", str(folder), "--dtype", "bfloat16", "--max-shard-size", "0.0001"]) == 0
    reads, peak = live.reads, live.peak
    sizes = [tensor.nbytes for tensor in tensors(base).values()]
    assert reads == len(sizes)
    assert sum(sizes) > 20 * max(sizes)
    assert max(sizes) < peak < 3 * max(sizes)
    files = sorted((folder / "merged").glob("*.safetensors"))
    assert len(files) > 10
    assert max(file.stat().st_size for file in files) < 110_000


class Live:
    """Bytes of the tensors that were handed out and are still alive."""

    def __init__(self) -> None:
        self.now = self.peak = self.reads = 0

    def count(self, tensor: torch.Tensor) -> torch.Tensor:
        import weakref

        if tensor.dtype == torch.float32:
            self.reads += 1
        size = tensor.nbytes
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._gone, size)
        return tensor

    def _gone(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("dtype", sorted(shards._NAMES, key=str), ids=str)
def test_files_are_those_of_safetensors(dtype: torch.dtype, tmp_path: Path) -> None:
    values = {
        "a": torch.arange(6).reshape(2, 3).to(dtype),
        "scalar": torch.ones(()).to(dtype),
        "empty": torch.zeros(0, 4).to(dtype),
        "turned": torch.arange(6).reshape(2, 3).to(dtype).T,
    }
    written = [
        Written(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in values.items()  # type: ignore[misc]
    ]
    write_shards(tmp_path, written, 10**6)
    with safe_open(tmp_path / shards.ONE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in values.items():
            found = file.get_tensor(name)
            assert found.dtype == dtype and found.shape == tensor.shape
            assert torch.equal(found.float(), tensor.float())
