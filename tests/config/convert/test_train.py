"""An Axolotl config trains as it is, on the shipped base model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import luthier.demo
from luthier import cli
from luthier.config import Config

AXOLOTL = """\
base_model: {model}
model_type: AutoModelForCausalLM
load_in_8bit: false
strict: false
plugins:
  - axolotl.integrations.liger.LigerPlugin
liger_rms_norm: true
datasets:
  - path: rows.jsonl
    type: alpaca
    trust_remote_code: false
val_set_size: 0.25
output_dir: ./out
adapter: lora
lora_r: 4
lora_alpha: 8
lora_target_linear: true
sequence_len: 64
sample_packing: true
pad_to_sequence_len: true
sdp_attention: true
wandb_project:
wandb_watch:
gradient_accumulation_steps: 1
micro_batch_size: 2
max_steps: 2
optimizer: adamw_torch_fused
learning_rate: "5e-4"
bf16: false
tf32: false
evals_per_epoch: 1
saves_per_epoch: 1
logging_steps: 1
special_tokens:
"""


def test_luthier_train_runs_an_axolotl_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    model = Path(luthier.demo.__file__).parent / "base_model"
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(16)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("axolotl.yml").write_text(AXOLOTL.format(model=model))
    assert cli.main(["train", "axolotl.yml", "general_eval=false"]) == 0
    err = capfd.readouterr().err
    assert "axolotl.yml: read as Axolotl 0.19" in err and "sdp_attention -> attn_implementation: sdpa" in err
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    run = Config.load("out/config.yaml")
    assert run.training.learning_rate == 5e-4 and run.training.warmup_ratio == 0.03
    losses = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in row for row in losses) >= 2
