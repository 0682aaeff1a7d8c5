"""`luthier.train`, `luthier.load`, `luthier.Config`: the road below the doors, and what `import luthier` costs."""

from __future__ import annotations

import doctest
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import luthier
from luthier.config import Config
from luthier.errors import ConfigError, DataError, ModelError
from tests.api.conftest import Row

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def keys(toy_llama_dir: Path, rows: list[Row], tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "base_model": str(toy_llama_dir),
        "datasets": [{"path": str(path), "type": "alpaca"}],
        "adapter": "lora",
        "lora_r": 4,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "logging_steps": 1,
        "bf16": False,
        "output_dir": str(tmp_path / "run"),
    }


def test_import_loads_neither_torch_nor_transformers() -> None:
    code = """
import sys, luthier
dir(luthier)
luthier.train, luthier.Config
heavy = {"torch", "transformers", "peft", "datasets"} & set(sys.modules)
assert not heavy, heavy
try:
    luthier.nothing
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no attribute 'nothing'" in done.stdout


@pytest.mark.parametrize("name", ["PatchDPOTrainer", "GRPOTrainer", "setup_chat_format"])
def test_names_of_the_others_say_what_to_write(name: str) -> None:
    with pytest.raises(ImportError, match=f"luthier has no {name}; write .*docs/porting.md"):
        exec(f"from luthier import {name}")


def test_every_name_is_there() -> None:
    for name in luthier.__all__:
        assert getattr(luthier, name) is not None
    from luthier.train.run import train

    assert luthier.run is train
    # A function and a package, whichever is asked for first.
    assert isinstance(luthier.train, ModuleType) and luthier.train.run.train is train


@pytest.mark.slow
def test_without_peft_the_doors_say_what_to_install() -> None:
    code = """
import sys
sys.modules["peft"] = None
import luthier
luthier.Config, luthier.load
try:
    from luthier import FastLanguageModel
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'luthier[notebook]'" in done.stdout


def test_train_takes_a_config_a_file_or_keys(keys: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for name, config in (
        ("keys", keys),
        ("file", tmp_path / "run.yml"),
        ("text", str(tmp_path / "run.yml")),
        ("config", Config.from_flat({**keys, "loraplus_lr_ratio": 4.0})),
    ):
        (tmp_path / "run.yml").write_text(Config.from_flat(keys).to_yaml())
        result = luthier.train(config, output_dir=str(tmp_path / name), max_steps=2, loraplus_lr_ratio=None)
        assert result.finished and result.state.step == 2 and result.output_dir == tmp_path / name
        found.append(result.summary["final_loss"])
    assert len(set(found)) == 1
    with pytest.raises(ConfigError, match="max_stesp"):
        luthier.train(keys, max_stesp=2)


def test_load_and_generate(keys: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    result = luthier.train(keys)
    loaded = luthier.load(result.output_dir)
    assert loaded.config is not None and loaded.config.adapter.lora_r == 4 and "Llama" in repr(loaded)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    alone = loaded.generate("Add 3 and 4.", **options)
    both = loaded.generate(["Add 3 and 4.", "Add 1 and 2."], **options)
    assert isinstance(alone, str) and both[0] == alone and len(both) == 2
    assert "".join(loaded.stream("Add 3 and 4.", **options)) == alone

    # Asked in the run's format: what transformers says to the same text.
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd 3 and 4.\n\n### Response:"
    )
    ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = loaded.model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert loaded.tokenizer.decode(expected, skip_special_tokens=True) == alone
    assert loaded.generate(prompt, raw=True, **options) == alone

    messages = [{"role": "user", "content": "Add 3 and 4."}]
    assert loaded.generate([messages, messages], **options) == [loaded.generate(messages, **options)] * 2
    assert loaded.generate(messages, stop=["zzz"], **options) is not None
    with pytest.raises(ConfigError, match="raw=True"):
        loaded.generate(messages, raw=True)
    with pytest.raises(ModelError, match="neither a run"):
        luthier.load(result.output_dir.parent)


def test_load_a_plain_model(toy_llama_dir: Path) -> None:
    loaded = luthier.load(toy_llama_dir)
    for prompts in (3, [3], ["a", ["b"]], {"role": "user"}):
        with pytest.raises(DataError, match="a prompt is a text, or a list of messages"):
            loaded.generate(prompts)
    assert loaded.config is None
    assert isinstance(loaded.generate("one two", system="Be brief.", max_new_tokens=3, seed=1, temperature=0.9), str)


# --- documentation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["python.md"])
def test_examples_on_the_page_run(
    page: str, toy_llama_dir: Path, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every `>>>` of the page, in a folder with a model (`base`) and rows (`rows.jsonl`, `pairs.jsonl`)."""
    shutil.copytree(toy_llama_dir, tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yml").write_text(
        "base_model: base\ndatasets:\n  - {path: rows.jsonl, type: alpaca}\nadapter: lora\noutput_dir: out\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("luthier"), "handlers", [logging.NullHandler()])
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    # Outputs end where their code block ends.
    text = re.sub(r"^```.*$", "", text, flags=re.MULTILINE)
    test = doctest.DocTestParser().get_doctest(text, {}, page, page, 0)
    assert len(test.examples) > 15
    failures: list[str] = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    doctest.DocTestRunner(verbose=False, optionflags=flags).run(test, out=failures.append)
    assert not failures, "".join(failures)


def test_the_page_on_porting_names_every_argument() -> None:
    """Each argument of transformers' and TRL's classes, under what becomes of it."""
    from luthier.api import translate

    text = (ROOT / "docs" / "porting.md").read_text(encoding="utf-8")
    for name, key in translate.CARRIED.items():
        assert re.search(rf"`{name}`.*`{key}`", text), name
    for name in (*translate.NO_EFFECT, *translate.REFUSED):
        assert f"`{name}`" in text or f"`{name.split('_')[0]}_*`" in text, name
