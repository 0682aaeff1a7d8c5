"""Artifacts as sinks: of a run, and by `luthier push`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.cli import main
from luthier.config import Config
from luthier.errors import ConfigError
from luthier.export.wandb_push import push
from luthier.models.assemble import find
from luthier.train import run as train_run
from tests.artifacts.conftest import ROWS, forget
from tests.artifacts.stand_in import Wandb
from tests.artifacts.wandb_server import Server

Make = Callable[..., Config]


@pytest.fixture
def make(toy_llama_dir: Path, tmp_path: Path) -> Make:
    """Flat keys -> Config of two steps of LoRA from artifacts, on Weights & Biases."""

    def made(**values: Any) -> Config:
        return Config.from_flat({
            "base_model": "wandb:team/lab/tiny:best", "datasets": [{"path": "wandb:rows:latest#8", "type": "alpaca"}],
            "adapter": "lora", "lora_r": 2, "micro_batch_size": 2, "max_steps": 2, "save_steps": 1, "bf16": False,
            "sequence_len": 256, "wandb_project": "lab", "wandb_entity": "team", "wandb_log_model": "end",
            "output_dir": str(tmp_path / "my run"), **values,
        })  # fmt: skip

    return made


def fill(server: Server, toy_llama_dir: Path) -> None:
    server.add("tiny", {p.name: p.read_bytes() for p in toy_llama_dir.iterdir() if p.is_file()}, "best")
    server.add("rows", {"train.jsonl": ROWS}, kind="dataset")


def check_the_run(server: Server, folder: Path, toy_llama_dir: Path) -> None:
    """What a run from artifacts writes down, and what of it is an artifact then."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["base_model"] == "wandb:team/lab/tiny:v0"
    assert config["datasets"][0]["path"] == "wandb:team/lab/rows:v0#8"
    said = json.loads((folder / "environment.json").read_text())["artifacts"]
    assert [(each["key"], each["artifact"]) for each in said] == [
        ("base_model", "wandb:team/lab/tiny:v0"), ("datasets.0.path", "wandb:team/lab/rows:v0"),
    ]  # fmt: skip
    assert all(each["digest"] for each in said)
    made = server.find("team", "lab", "my-run:final")
    assert made is not None and made.kind == "model" and "step-2" in made.aliases
    assert made.files.keys() >= {"adapter_model.safetensors", "adapter_config.json", "config.yaml", "report.html"}
    assert made.files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    assert json.loads(made.files["adapter_config.json"])["base_model_name_or_path"] == "wandb:team/lab/tiny:v0"
    assert made.metadata["base_model"] == "wandb:team/lab/tiny:v0" and made.metadata["steps"] == 2
    assert not [name for name in made.files if "optimizer" in name or name in ("environment.json", "metrics.jsonl")]
    for name in ("README.md", "config.yaml", "report.html", "adapter_config.json"):
        assert str(folder.parent).encode() not in made.files[name], name


def test_a_run_from_artifacts_says_their_versions_and_becomes_one(
    wandb: Wandb, make: Make, toy_llama_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "luthier")
    fill(wandb.server, toy_llama_dir)
    folder = train_run.train(make()).output_dir
    check_the_run(wandb.server, folder, toy_llama_dir)
    assert wandb.server.used == ["team/lab/tiny:v0", "team/lab/rows:v0"]
    # Its own adapter names a folder, as PEFT wants it; where that is not, the artifact it was.
    own = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert (Path(own) / "config.json").is_file()
    (folder / "adapter_config.json").write_text(
        (folder / "adapter_config.json").read_text().replace(str(Path(own).parents[3]), "/elsewhere")
    )
    assert find(str(folder)).base == "wandb:team/lab/tiny:v0"
    # And the artifact of the run can be asked on, base and all.
    forget()
    arguments = ["--prompt", "Say 3.", "--max-new-tokens", "2"]
    assert main(["generate", "wandb:team/lab/my-run:final", *arguments]) == 0


def test_every_checkpoint(wandb: Wandb, make: Make, toy_llama_dir: Path) -> None:
    fill(wandb.server, toy_llama_dir)
    train_run.train(make(wandb_log_model="checkpoint", wandb_name="named"))
    made = [each for each in wandb.server.versions if each.name == "named"]
    assert [each.aliases for each in made] == [["step-1"], ["checkpoint"], ["latest", "final", "step-2"]]
    assert not [name for each in made for name in each.files if "optimizer" in name or name.endswith(".pt")]


def test_a_failed_upload_costs_the_upload_only(
    wandb: Wandb, make: Make, toy_llama_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(wandb.server, toy_llama_dir)
    wandb.server.uploads_fail = True
    result = train_run.train(make())
    assert result.finished and (result.output_dir / "adapter_model.safetensors").is_file()
    assert "was not uploaded: CommError: 503" in caplog.text and "luthier push" in caplog.text


def test_wandb_log_model_needs_wandb(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"wandb_log_model needs Weights & Biases: set wandb_project"):
        Config.from_flat({
            "base_model": "m", "datasets": [{"path": "x", "type": "alpaca"}], "wandb_log_model": "end",
        })  # fmt: skip
    with pytest.raises(ConfigError, match="wandb_log_model"):
        make(wandb_log_model="always")
    assert make(wandb_log_model="false").logging.wandb_log_model == "false"


def test_push_of_data_and_what_cannot_be_pushed(
    wandb: Wandb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(ROWS)
    assert main(["push", str(rows), "wandb:team/lab/rows", "--alias", "good"]) == 0
    assert capsys.readouterr().out == "wandb:team/lab/rows:v0\n"
    (made,) = wandb.server.versions
    assert made.kind == "dataset" and made.files == {"rows.jsonl": ROWS} and made.aliases == ["latest", "good"]
    for wrong, message in (
        ([str(rows), "wandb:team/lab/rows:v3"], "leave out what follows the name"),
        ([str(rows), "wandb:rows"], "which project"),
        ([str(tmp_path / "none"), "wandb:team/lab/rows"], "does not exist"),
        ([str(rows), "wandb:team/lab/rows", "--merged"], "--merged is for runs and models"),
        ([str(rows), "wandb:team/lab/rows", "--public"], "--public is for the hub"),
        ([str(tmp_path), "somebody/name", "--alias", "x"], "--alias is for artifacts"),
    ):
        assert main(["push", *wrong]) == 2
        assert message in capsys.readouterr().err
    wandb.server.uploads_fail = True
    assert main(["push", str(rows), "wandb:team/lab/rows"]) == 1
    assert "503" in capsys.readouterr().err


def test_a_push_without_a_network_says_so_at_once(
    wandb: Wandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(ROWS)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert main(["push", str(rows), "wandb:team/lab/rows"]) == 1
    assert "cannot be reached" in capsys.readouterr().err and not wandb.runs
    assert main(["push", str(rows), "wandb:team/lab/rows", "--dry-run"]) == 0


def test_a_push_of_a_model_is_without_this_machines_paths(
    wandb: Wandb, toy_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for each in toy_llama_dir.iterdir():
        (model / each.name).write_bytes(each.read_bytes())
    secret = "supersecretvalue1234"
    monkeypatch.setenv("SOME_TOKEN", secret)
    (model / "README.md").write_text(f"# A model\n\nMade in {tmp_path}/rows.jsonl with {secret}.\n")
    assert push(model, "wandb:team/lab/whole") == "wandb:team/lab/whole:v0"
    card = wandb.server.versions[0].files["README.md"].decode()
    assert str(tmp_path) not in card and secret not in card and "rows.jsonl" in card
