"""The files that a run leaves behind besides its weights."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from luthier.config import Config
from luthier.train.artifacts import plot_losses, write_environment, write_model_card
from luthier.train.files import write_atomic, write_json_atomic, write_text_atomic

SUMMARY = {
    "steps": 120,
    "kept_step": 80,
    "examples": 1900,
    "tokens": 120_000,
    "trained_tokens": 30_500,
    "seconds": 61.4,
    "final_loss": 0.51234,
    "best_eval_loss": 0.75,
    "best_step": 80,
    "overfitting_since": None,
}


def config(tmp_path: Path, **values: Any) -> Config:
    return Config.from_flat(
        {
            "base_model": "meta-llama/Llama-3.2-1B",
            "datasets": [{"path": "tatsu-lab/alpaca", "type": "alpaca"}],
            "adapter": "lora",
            "output_dir": str(tmp_path / "my-run"),
            "wandb_project": "p",
            "wandb_entity": "secret-name",
            **values,
        }
    )


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "a.txt", "naïve\n")
    assert (tmp_path / "a.txt").read_bytes() == "naïve\n".encode()

    def half(partial: Path) -> None:
        partial.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(tmp_path / "a.txt", half)
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "naïve\n"
    write_json_atomic(tmp_path / "b.json", {"path": tmp_path, "word": "é"})
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))["path"] == str(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.json"]


def test_the_environment_names_versions_hardware_and_data(tmp_path: Path) -> None:
    import torch

    write_environment(tmp_path, {"data": {"fingerprint": "abc"}})
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["hardware"]["cpu_cores"] >= 1
    assert environment["data"] == {"fingerprint": "abc"}


def test_the_card_is_one_that_the_hub_reads(tmp_path: Path) -> None:
    write_model_card(tmp_path, config(tmp_path), SUMMARY)
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "meta-llama/Llama-3.2-1B"
    assert data["datasets"] == ["tatsu-lab/alpaca"]
    assert data["library_name"] == "peft"
    assert data["pipeline_tag"] == "text-generation"
    assert "lora" in data["tags"]
    assert card.text.strip().startswith("# my-run\n")
    for piece in (
        "1,900 documents in",
        "| best evaluation loss | 0.7500 |",
        "| weights of step | 80 |",
        "0.5123",
    ):
        assert piece in card.text
    assert 'luthier generate my-run --prompt "..."' in card.text
    assert "AutoPeftModelForCausalLM" in card.text
    assert "| `lora_r` |" not in card.text  # a default that nobody chose
    assert "| `learning_rate` | `0.0002` |" in card.text
    assert "overfitting" not in card.text
    assert "secret-name" not in card.text
    assert str(tmp_path) not in card.text


def test_local_paths_stay_out_of_the_front_matter(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    there = config(
        tmp_path, base_model=str(tmp_path), adapter=None, datasets=[{"path": f"{rows}", "type": "alpaca"}]
    )
    write_model_card(tmp_path, there, {"steps": 1})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert card.data.library_name == "transformers"
    assert "| `rows.jsonl` | `alpaca` |" in card.text
    assert str(rows) not in card.text


def test_the_plot_shows_what_was_logged(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = [{"step": n, "loss": 2 / n, "learning_rate": 1e-4} for n in range(1, 20)]
    rows += [{"step": 10, "eval_loss": 0.4}]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 20, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    plot_losses(tmp_path)
    picture = (tmp_path / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000
    assert not list(tmp_path.glob(".partial*"))


@pytest.mark.parametrize("rows", [None, "", '{"step": 1}\n'])
def test_nothing_logged_nothing_drawn(tmp_path: Path, rows: str | None) -> None:
    if rows is not None:
        (tmp_path / "metrics.jsonl").write_text(rows)
    plot_losses(tmp_path)
    assert not (tmp_path / "loss.png").exists()


def test_tables_survive_what_settings_hold(tmp_path: Path) -> None:
    write_model_card(tmp_path, config(tmp_path, lora_target_modules="(q|v)_proj"), SUMMARY)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^\| `lora_target_modules` \| `\(q\\\|v\)_proj` \|$", text, re.MULTILINE)
