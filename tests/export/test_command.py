"""`luthier merge-lora` as a user types it: from a run or a config to a proven model, and every refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.cli import main
from luthier.export import adapters
from luthier.models.assemble import open_for_inference
from luthier.train.run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, toy_llama_dir: Path) -> Path:
    """A finished run of a few steps; tests must not write into it."""
    from luthier.config import Config

    folder = tmp_path_factory.mktemp("merge-run")
    rows = [{"instruction": f"Add {n} and 1.", "input": "", "output": f"{n + 1}"} for n in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    values = {
        "base_model": str(toy_llama_dir),
        "datasets": [{"path": str(folder / "rows.jsonl"), "type": "alpaca"}],
        "dataset_prepared_path": str(folder / "cache"),
        "adapter": "lora",
        "lora_r": 4,
        "learning_rate": 5e-2,
        "max_steps": 3,
        "sequence_len": 256,
        "bf16": False,
        "kernels": "reference",
        "output_dir": str(folder / "run"),
    }
    train(Config.from_flat(values))
    return folder / "run"


@pytest.mark.parametrize("rl", ["dpo", "kto"])
def test_a_preference_run_is_proven_on_its_own_rows(
    tmp_path: Path, toy_llama_dir: Path, rl: str
) -> None:
    from luthier.config import Config

    rows = [{"prompt": f"Add {n} and 1.", "chosen": f"{n + 1}", "rejected": f"{n}"} for n in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    values = {
        "base_model": str(toy_llama_dir),
        "datasets": [{"path": str(tmp_path / "pairs.jsonl")}],
        "rl": rl,
        "adapter": "lora",
        "learning_rate": 5e-2,
        "max_steps": 2,
        "bf16": False,
        "output_dir": str(tmp_path / "run"),
    }
    train(Config.from_flat(values))
    assert main(["merge-lora", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert "rows of" in record["check"]["text"] and "pairs.jsonl" in record["check"]["text"]


@pytest.fixture
def peft_model(
    toy_llama_dir: Path, peft_adapter: Callable[..., tuple[Any, Path]]
) -> Callable[..., tuple[Any, Path]]:
    return lambda **values: peft_adapter(toy_llama_dir, **values)


def failed(call: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a call says that fails as it should."""
    assert main(["merge-lora", *call]) in (1, 2)
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and "internal" not in said
    return said


def test_a_run_becomes_a_model_that_is_proven(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert main(["merge-lora", str(run), "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert "largest difference of a logit from base + adapter" in said
    record = json.loads((out / "merge.json").read_text())
    assert record["check"]["text"].startswith("4 rows of")
    assert 0 < record["check"]["largest"] < 0.1
    assert record["check"]["relative"] < record["check"]["effect"] / 4  # bf16 against what three steps changed
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(run).chat_template
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    theirs, _, _ = open_for_inference(str(run), dtype=torch.float32)
    ids = tokenizer("Add 3 and 1.", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, atol=0.02, rtol=0.02)
    assert main(["generate", str(out), "--prompt", "hello", "--greedy", "--max-new-tokens", "3"]) == 0


def test_a_config_and_a_folder(run: Path, tmp_path: Path, toy_llama_dir: Path) -> None:
    """Both spellings of the key, and the result where other tools put it; checkpoints count as adapters."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = tmp_path / "cfg.yml"
    config.write_text((run / "config.yaml").read_text().replace(str(run), str(tmp_path / "elsewhere")))
    assert main(["merge-lora", str(config), f"--lora-model-dir={copy}"]) == 0
    first = load_file(copy / "merged" / "model.safetensors")
    checkpoint = copy / "checkpoint-3"
    assert main(["merge-lora", str(config), f"--lora_model_dir={checkpoint}", "--dtype", "float32"]) == 0
    second = load_file(checkpoint / "merged" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name].to(torch.bfloat16)) for name in first)
    shutil.rmtree(copy / "merged")
    assert main(["merge-lora", str(config), f"output_dir={copy}"]) == 0
    assert (copy / "merged" / "model.safetensors").is_file()


def test_a_wrong_merge_is_noticed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = adapters.adapted_weight
    monkeypatch.setattr(
        adapters, "adapted_weight", lambda w, a, b, scale, magnitude=None: right(w, a, b, 1.5 * scale, magnitude)
    )
    assert main(["merge-lora", str(run), "--out", str(tmp_path / "m"), "--dtype", "float32"]) == 1
    assert "is not base + adapter" in capsys.readouterr().err


def test_an_adapter_lost_in_rounding_is_said(
    peft_model: Any, toy_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = peft_model()
    weights = load_file(folder / "adapter_model.safetensors")
    faint = {name: t * 3e-2 for name, t in weights.items()}
    save_file(faint, folder / "adapter_model.safetensors")
    assert main(["merge-lora", str(folder), "--dtype", "bfloat16"]) == 0
    assert "warning: rounding takes" in capsys.readouterr().err
    assert main(["merge-lora", str(folder), "--dtype", "float32", "--overwrite"]) == 0
    assert "rounding takes" not in capsys.readouterr().err


def test_modules_trained_whole_and_embeddings_are_proven(
    peft_model: Any, toy_llama_dir: Path, tmp_path: Path
) -> None:
    """The proof loads what PEFT wrote for resized and adapted embeddings as well."""
    kinds = {"whole": {"modules_to_save": ["lm_head"]}, "looked up": {"target_modules": ["embed_tokens"]}}
    for name, values in kinds.items():
        _, folder = peft_model(**values)
        assert main(["merge-lora", str(folder), "--dtype", "float32", "--out", str(tmp_path / name)]) == 0
        record = json.loads((tmp_path / name / "merge.json").read_text())
        assert record["check"]["relative"] < 1e-5


def test_added_tokens_get_rows(peft_model: Any, tmp_path: Path, toy_llama_dir: Path) -> None:
    """A tokenizer beside the adapter that is larger than the base: room for each token, as in training."""
    _, folder = peft_model()
    tokenizer = AutoTokenizer.from_pretrained(toy_llama_dir)
    tokenizer.add_tokens(["<new>", "<newer>"])
    tokenizer.save_pretrained(folder)
    assert main(["merge-lora", str(folder), "--dtype", "float32"]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().weight.shape[0]
    rows = model.get_output_embeddings().weight
    torch.testing.assert_close(rows[-1], rows[:-2].mean(0))
    assert json.loads((folder / "merged" / "merge.json").read_text())["check"]["relative"] < 1e-5


def test_stretched_positions_stay_stretched(peft_model: Any, toy_llama_dir: Path, tmp_path: Path) -> None:
    _, folder = peft_model()
    config = tmp_path / "cfg.yml"
    rope = {"rope_type": "yarn", "factor": 2.0}
    data = [{"path": "none.jsonl", "type": "alpaca"}]
    values = {"base_model": str(toy_llama_dir), "adapter": "lora", "datasets": data, "rope_parameters": rope}
    config.write_text(json.dumps(values))
    assert main(["merge-lora", str(config), f"--lora-model-dir={folder}", "--dtype", "float32"]) == 0
    found = AutoModelForCausalLM.from_pretrained(folder / "merged").config
    assert found.max_position_embeddings == 1024
    assert rope.items() <= found.rope_parameters.items()
    assert json.loads((folder / "merged" / "merge.json").read_text())["check"]["relative"] < 1e-5


def test_generation_ends_where_training_ended(run: Path, tmp_path: Path) -> None:
    """A chat run ends turns with a token that the base's generation config does not know."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    text = (copy / "config.yaml").read_text()
    config = tmp_path / "cfg.yml"
    config.write_text(text + "\neot_tokens: ['<|im_end|>']\n" if "\neot_tokens:" not in text else text)
    assert main(["merge-lora", str(config), f"--lora-model-dir={copy}", "--no-check"]) == 0
    settings = json.loads((copy / "merged" / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(copy)
    assert settings["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_nothing_is_overwritten_unasked(
    peft_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], toy_llama_dir: Path
) -> None:
    _, folder = peft_model()
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    call = [str(folder), "--no-check", "--out", str(out)]
    assert "already holds something" in failed(call, capsys)
    assert "was not made by a merge" in failed([*call, "--overwrite"], capsys)
    assert "which the merge reads" in failed([str(folder), "--out", str(folder.parent), "--overwrite"], capsys)
    assert (out / "thesis.txt").read_text() == "years of work"
    (out / "thesis.txt").unlink()
    assert main(["merge-lora", *call]) == 0
    before = (out / "model.safetensors").stat().st_size
    assert main(["merge-lora", *call, "--overwrite", "--dtype", "float32"]) == 0
    assert (out / "model.safetensors").stat().st_size > 1.9 * before
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_merge_that_fails_midway_leaves_nothing(
    peft_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """16-bit floats end at 65,504, which shows only when the tensor is reached."""
    _, folder = peft_model(target_modules=["down_proj"])
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: t * 1e4 for name, t in weights.items()}, folder / "adapter_model.safetensors")
    said = failed([str(folder), "--dtype", "float16"], capsys)
    assert "float16 cannot hold" in said and "--dtype bfloat16" in said
    assert not (folder / "merged").exists()
    assert not list(folder.glob(".partial*"))


def _bigger(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    wide = {n: torch.cat([t, t], dim=1) if "lora_A" in n else t for n, t in weights.items()}
    save_file(wide, folder / "adapter_model.safetensors")


def _elsewhere(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({n.replace("layers", "blocks"): t for n, t in weights.items()}, folder / "adapter_model.safetensors")


def _half(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({n: t for n, t in weights.items() if "lora_A" in n}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "options", "says"),
    [
        (_bigger, [], "have another shape (model.layers.0"),
        (_elsewhere, [], "are not in the base (model.blocks.0"),
        (_half, [], "has no lora_B"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), [], "neither adapter_model.safetensors nor"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"{}"), [], "cannot be read"),
        (lambda f: (f / "adapter_config.json").unlink(), [], "no adapter here"),
        (None, ["--base-model", "/no/such/model"], "does not exist"),
        (None, ["--base-model", "README.md"], "is a file"),
        (None, ["--base-model", "tests"], "has no config.json"),
        (None, ["--dtype", "int4"], "there is no 'int4'"),
        (None, ["--onto", "both"], "there is no 'both'"),
        (None, ["--method", "ties"], "for several adapters"),
        (None, ["--max-shard-size", "0"], "more than 0"),
        (None, ["--lora_r", "4"], "is no YAML file"),
        (None, ["--adapter", "{}:0.5", "--method", "cat", "--out", "x"], "2 adapters and 1 weights"),
        (None, ["--adapter-only", "--dtype", "float32"], "--adapter-only writes no model"),
    ],
)
def test_one_clear_error_before_anything_is_written(
    spoil: Any, options: list[str], says: str, peft_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = peft_model()
    if spoil is not None:
        spoil(folder)
    before = sorted(folder.iterdir())
    assert says in failed([str(folder), *(option.format(folder) for option in options)], capsys)
    assert sorted(folder.iterdir()) == before


def test_several_adapters_need_a_method_and_a_place(
    peft_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = peft_model()
    call = [f"{folder}:1", "--adapter", f"{folder}:1"]
    assert "need --out" in failed(call, capsys)
    assert "need --method" in failed([*call, "--out", "x"], capsys)
    assert "there is no 'sum'" in failed([*call, "--out", "x", "--method", "sum"], capsys)
    assert not Path("x").exists()


def test_bases_that_are_not_whole(
    peft_model: Any, toy_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = peft_model()
    base = tmp_path / "base"
    shutil.copytree(toy_llama_dir, base)
    weights = load_file(base / "model.safetensors")
    less = {name: t for name, t in weights.items() if name != "model.layers.1.mlp.up_proj.weight"}
    save_file(less, base / "model.safetensors", metadata={"format": "pt"})
    call = [str(folder), "--base-model", str(base)]
    assert "1 weights are missing (model.layers.1.mlp.up_proj.weight)" in failed(call, capsys)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name][:5].clone()}, base / "model.safetensors", metadata={"format": "pt"})
    assert "its config says (128, 64)" in failed(call, capsys)
    (base / "model.safetensors").write_bytes(b"\x10")
    assert "cannot be read" in failed(call, capsys)
    (base / "model.safetensors").unlink()
    assert "no weights here" in failed(call, capsys)


def test_folders_that_are_no_adapters(
    run: Path, toy_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "holds a whole model and no adapter" in failed([str(toy_llama_dir)], capsys)
    assert "there is no such folder" in failed([str(tmp_path / "none")], capsys)
    unfinished = tmp_path / "cut-off"
    unfinished.mkdir()
    shutil.copy(run / "config.yaml", unfinished)
    assert "has not ended yet" in failed([str(unfinished)], capsys)
