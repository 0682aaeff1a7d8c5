"""Notebooks as they are written for Unsloth, TRL, PEFT and bitsandbytes, with nothing changed but their imports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier.config import Config
from tests.api.conftest import Row

HERE = Path(__file__).parent / "notebooks"


def run_notebook(name: str, **names: Any) -> dict[str, Any]:
    """Everything that the notebook defines; its imports of Unsloth and TRL are ours."""
    text = (HERE / f"{name}.txt").read_text()
    changed = text.replace("from unsloth ", "from luthier ").replace("from trl ", "from luthier ")
    assert changed != text
    found: dict[str, Any] = dict(names)
    exec(compile(changed, f"{name}.txt", "exec"), found)
    return found


def write_jsonl(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def test_alpaca_with_unsloth(toy_llama_dir: Path, rows: list[Row], tmp_path: Path, caplog: Any) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("gguf")
    caplog.set_level("INFO", logger="luthier")
    found = run_notebook(
        "alpaca_unsloth", MODEL=str(toy_llama_dir), ROWS=write_jsonl(tmp_path / "rows.jsonl", rows), DEVICE="cpu"
    )
    stats, trainer = found["trainer_stats"], found["trainer"]
    assert stats.global_step == 10 and stats.training_loss == stats.metrics["train_loss"] > 0
    assert found["answers"][0].startswith("Below is an instruction.")

    # What the machine cannot do is said once, with what to write.
    (said,) = [r.message for r in caplog.records if "fp16=True" in r.message]
    assert "Write fp16=False" in said

    # The run is a run as any other, and its config says what the notebook said.
    config = Config.load(tmp_path / "outputs" / "config.yaml")
    flat = config.flat()
    asked = {
        "base_model": str(toy_llama_dir), "load_in_4bit": True, "lora_r": 16, "lora_alpha": 16.0, "sequence_len": 512,
        "micro_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 10, "learning_rate": 2e-3, "seed": 3407,
        "optimizer": "adamw_bnb_8bit", "weight_decay": 0.01, "lr_scheduler": "linear", "warmup_steps": 2,
        "gradient_checkpointing": "offload", "bf16": False,
    }  # fmt: skip
    assert {key: flat[key] for key in asked} == asked
    assert flat == {**trainer.config.flat()}
    assert sorted(flat["lora_target_modules"]) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    for name in ("report.html", "metrics.jsonl", "adapter_model.safetensors", "README.md", "checkpoint-10"):
        assert (tmp_path / "outputs" / name).exists(), name

    # The trained adapter is in the model that the notebook holds, in lora_model and in the run.
    from safetensors.torch import load_file

    of_run = load_file(tmp_path / "outputs" / "adapter_model.safetensors")
    saved = load_file(tmp_path / "lora_model" / "adapter_model.safetensors")
    assert of_run.keys() == saved.keys()
    for key, tensor in of_run.items():
        torch.testing.assert_close(saved[key], tensor)
        held = found["trained"][key.replace(".weight", ".default.weight")]
        torch.testing.assert_close(held, tensor)
    assert any(tensor.abs().max() > 0 for key, tensor in of_run.items() if "lora_B" in key)

    # What was merged is the model as it was trained, on the rounded weights.
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected, got = found["model"](ids).logits, merged(ids).logits
    assert (got - expected).abs().max() < 0.02 * expected.std()  # bfloat16 has 8 bits
    assert (tmp_path / "model" / "tokenizer_config.json").is_file()
    files = sorted(path.name for path in (tmp_path / "model_gguf").glob("*.gguf"))
    assert files == ["model_gguf-f16.gguf", "model_gguf-q8_0.gguf"]


def test_orpo_on_a_prepared_4bit_base(toy_llama_dir: Path, rows: list[Row], tmp_path: Path, caplog: Any) -> None:
    pytest.importorskip("bitsandbytes")
    caplog.set_level("INFO", logger="luthier")
    pairs = [
        {
            side: [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": answer}]
            for side, answer in (("chosen", row["output"]), ("rejected", "I do not know" + row["output"]))
        }
        for row in rows
    ]
    found = run_notebook(
        "orpo_qlora", MODEL=str(toy_llama_dir), PAIRS=write_jsonl(tmp_path / "pairs.jsonl", pairs)
    )
    trainer = found["trainer"]
    flat = trainer.config.flat()
    assert flat["rl"] == "orpo" and flat["rl_beta"] == 0.1 and flat["load_in_4bit"] and flat["eval_steps"] == 0.5
    assert flat["lora_dropout"] == 0.0 and any("disable_dropout" in r.message for r in caplog.records)
    history = trainer.state.log_history
    assert [row["step"] for row in history if "eval_loss" in row] == [4]
    losses = [row["loss"] for row in history if "loss" in row]
    assert len(losses) == 7 and losses[-1] < losses[0]
    assert sum(p.abs().sum() for n, p in trainer.model.named_parameters() if "lora_B" in n) > 0
    assert (tmp_path / "Orpo-toy" / "adapter_model.safetensors").is_file()
    assert type(found["model"]).__name__ == "LlamaForCausalLM"
