"""Artifacts as sources: names, downloads, the cache, and every way in which they cannot be had."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from luthier.artifacts import source
from luthier.cli import main
from luthier.config import Config
from luthier.config.artifact_names import parse
from luthier.config.datasets import DatasetEntry
from luthier.data.readers import open_rows
from luthier.errors import ConfigError, LuthierError, RunError
from tests.artifacts.conftest import ROWS, forget
from tests.artifacts.stand_in import Wandb


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("wandb:e/p/n:v0", ("e", "p", "n", "v0", None)),
        ("wandb:p/n:best", (None, "p", "n", "best", None)),
        ("wandb:n", (None, None, "n", "latest", None)),
        ("wandb:e/p/n:v0/a/b.jsonl", ("e", "p", "n", "v0", "a/b.jsonl")),
    ],
)
def test_names(text: str, parts: tuple[str | None, ...]) -> None:
    found = parse(text)
    assert (found.entity, found.project, found.name, found.version, found.inside) == parts


@pytest.mark.parametrize(
    "text",
    ["wandb:", "wandb:a/b/c/d:v0", "wandb:/n:v0", "wandb:n:", "wandb:e/p/n:v0/../x", "wandb:e/p/n:v0/", "wandb:a b"],
)
def test_names_that_name_nothing(text: str) -> None:
    with pytest.raises(ValueError, match="wandb:"):
        parse(text)


def test_a_malformed_name_is_an_error_of_the_config_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "c.yml"
    file.write_text("base_model: wandb:a/b/c/d:v0\ndatasets:\n  - path: wandb:e/p/n:/x\n    type: alpaca\n")
    with pytest.raises(ConfigError) as error:
        Config.load(file)
    assert "c.yml:1: base_model: wandb:a/b/c/d:v0 names no artifact" in str(error.value)
    assert "c.yml:3: datasets.0.path: wandb:e/p/n:/x" in str(error.value)


def test_the_project_of_the_config_completes_a_name() -> None:
    config = Config.from_flat({
        "base_model": "wandb:tiny:v1", "datasets": [{"path": "wandb:rows:best#5", "type": "alpaca"}],
        "wandb_project": "lab", "wandb_entity": "team",
    })  # fmt: skip
    assert config.model.base_model == "wandb:team/lab/tiny:v1"
    assert config.data.datasets[0].path == "wandb:team/lab/rows:best#5"


def test_rows_of_an_artifact_are_those_of_the_folder(wandb: Wandb, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "luthier")
    wandb.server.add("rows", {"train.jsonl": ROWS, "test.jsonl": ROWS[:40]}, "best", kind="dataset")
    entry = DatasetEntry(path="wandb:team/lab/rows:best#5", type="alpaca")
    assert [row["instruction"] for _, row in open_rows(entry)] == [f"Say {n}." for n in range(5)]
    of_test = DatasetEntry(path="wandb:team/lab/rows:v0", data_files="train.jsonl", type="alpaca")
    assert len(list(open_rows(of_test))) == 12
    assert "wandb:team/lab/rows:best is v0 now" in caplog.text
    assert [name for name, _ in wandb.downloads] == ["rows:v0"]


def test_one_file_is_all_that_is_fetched_of_it_until_more_is_wanted(wandb: Wandb) -> None:
    wandb.server.add("rows", {"a/train.jsonl": ROWS, "a/b.txt": b"b", "c.txt": b"c"})
    path = Path(source.local("wandb:team/lab/rows:v0/a/train.jsonl"))
    assert path.read_bytes() == ROWS and not (path.parent / "b.txt").exists()
    forget()
    assert source.local("wandb:team/lab/rows:v0/a/train.jsonl") == str(path) and len(wandb.downloads) == 1
    folder = Path(source.local("wandb:team/lab/rows:v0"))
    assert (folder / "c.txt").read_bytes() == b"c" and len(wandb.downloads) == 2
    with pytest.raises(ConfigError, match=r"no a/tran.jsonl in it; it holds a/train.jsonl"):
        source.local("wandb:team/lab/rows:v0/a/tran.jsonl")


def test_a_version_that_is_here_is_used_without_a_network_and_an_alias_as_last_asked(
    wandb: Wandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "luthier")
    wandb.server.add("rows", {"train.jsonl": ROWS})
    there = source.local("wandb:team/lab/rows:latest")
    forget()
    monkeypatch.setitem(sys.modules, "wandb", None)  # neither a network nor the package
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert source.local("wandb:team/lab/rows:v0") == there
    assert "already on this machine" in caplog.text
    with pytest.raises(ConfigError, match=r"pip install 'luthier\[wandb\]'"):
        source.local("wandb:team/lab/rows:latest")
    monkeypatch.setitem(sys.modules, "wandb", wandb.module())
    assert source.local("wandb:team/lab/rows:latest") == there
    assert "was v0 when last asked" in caplog.text
    with pytest.raises(ConfigError, match=r"cannot be reached .* does not hold it either"):
        source.local("wandb:team/lab/rows:v1")
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(ConfigError, match="WANDB_MODE is offline"):
        source.local("wandb:team/lab/other:v1")


def test_what_was_changed_here_is_fetched_again(wandb: Wandb, caplog: pytest.LogCaptureFixture) -> None:
    wandb.server.add("rows", {"train.jsonl": ROWS})
    file = Path(source.local("wandb:team/lab/rows:v0")) / "train.jsonl"
    file.write_bytes(b"short")
    forget()
    source.local("wandb:team/lab/rows:v0")
    assert file.read_bytes() == ROWS and "is not as it was downloaded" in caplog.text


def test_bytes_that_are_not_those_of_the_manifest_are_not_used(wandb: Wandb, tmp_path: Path) -> None:
    wandb.server.add("rows", {"train.jsonl": ROWS})
    wandb.server.damaged = True
    with pytest.raises(RunError, match=r"train.jsonl arrived with other bytes .* nothing of it is used"):
        source.local("wandb:team/lab/rows:v0")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != "rows.json"]


def test_a_file_that_would_leave_its_folder_is_refused(wandb: Wandb) -> None:
    wandb.server.add("rows", {"../../evil": b"x"})
    with pytest.raises(ConfigError, match="leads out of its folder"):
        source.local("wandb:team/lab/rows:v0")


def test_not_there_not_logged_in_and_nobodys(wandb: Wandb, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.server.add("rows", {"train.jsonl": ROWS})
    with pytest.raises(ConfigError, match="has no such artifact, version or alias"):
        source.local("wandb:team/lab/rows:v7")
    with pytest.raises(ConfigError, match="whose artifact is it"):
        source.local("wandb:rows:v0")
    wandb.key = False
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(ConfigError, match="nobody is logged in"):
        source.local("wandb:team/lab/rows:v0")


def test_an_error_names_the_key(wandb: Wandb, tmp_path: Path) -> None:
    file = tmp_path / "c.yml"
    file.write_text("base_model: wandb:team/lab/gone:v0\ndatasets:\n  - path: x.jsonl\n    type: alpaca\n")
    with pytest.raises(LuthierError, match=r"c.yml:1: base_model: wandb:team/lab/gone:v0"):
        source.pinned(Config.load(file))


def test_a_verb_takes_an_artifact_where_it_takes_a_model(
    wandb: Wandb, toy_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {path.name: path.read_bytes() for path in toy_llama_dir.iterdir() if path.is_file()}
    wandb.server.add("tiny", files)
    arguments = ["--prompt", "wandb:", "--max-new-tokens", "2"]
    assert main(["generate", "wandb:team/lab/tiny:latest", *arguments]) == 0, capsys.readouterr().err
    assert main(["generate", "wandb:team/lab/tiny:v4", *arguments]) == 2
    assert "has no such artifact" in capsys.readouterr().err


def test_adapters_of_artifacts_are_merged_with_weights(
    wandb: Wandb, toy_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(toy_llama_dir)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(base, config).save_pretrained(folder := tmp_path / f"adapter-{seed}")
        wandb.server.add(f"adapter-{seed}", {path.name: path.read_bytes() for path in folder.iterdir()})
        folders.append(str(folder))

    def merged(one: str, other: str, out: str) -> int:
        method = ["--method", "cat", "--adapter-only", "--out", str(tmp_path / out)]
        return main(["merge-lora", one, "--adapter", other, *method])

    assert merged(f"{folders[0]}:0.5", f"{folders[1]}:-2", "here") == 0
    there = [f"wandb:team/lab/adapter-{seed}:v0" for seed in (0, 1)]
    assert merged(f"{there[0]}:0.5", f"{there[1]}:-2", "there") == 0, capsys.readouterr().err
    expected, found = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("here", "there"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    assert merged(f"{there[0]}:0.5", there[1], "none") == 2
    assert "write one behind each" in capsys.readouterr().err
    assert main(["generate", f"{there[0]}:0.5", "--prompt", "a"]) == 2
    assert "has to follow the colon" in capsys.readouterr().err
