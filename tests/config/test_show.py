"""The config as YAML with origins, and as a person sees it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from luthier.config import Config
from luthier.config.show import show_config

NASTY = [
    "", " a ", "a: b", "# no comment", "two\nlines\n", "yes", "null", "~", "1e5", "2024-01-01", "010", "12",
    "-", "[a]", "{a}", "'q'", '"q"', "back\\slash", "\u2028", "\x85", "\ufeff", "日本", "😀", "tab\there",
    "*a", "&a", "!t", "a\r\nb", "{{ x }}", "%", "@", "`", "a #b", "é", "=", "<<", "\x7f", ".",
]  # fmt: skip


@pytest.mark.parametrize(
    "flat",
    [
        {},
        {"adapter": "lora", "lora_r": 8, "val_set_size": 0.1, "sample_prompts": NASTY},
        {"optimizer": "sgd", "optim_args": {"momentum": 0.9}, "tokens": NASTY, "lr_scheduler": "constant"},
        {
            "datasets": [{"path": "d", "type": "chat_template"}],
            "chat_template_kwargs": {
                text or "k": [text, {"a": {text: [[1, 2.5], []]}}, {}, None] for text in NASTY
            },
        },
        {
            "datasets": [
                {"path": "d", "type": {"format": "a\n\n# {input}"}},
                {"path": "e", "type": "chat_template", "roles": {"user": NASTY}},
            ]
        },
        {"special_tokens": {"pad_token": "<pad>"}, "device_map": {"": 0}, "resume_from_checkpoint": True},
    ],
)
def test_yaml_loads_again_to_the_same(flat, tmp_path: Path):
    config = Config.from_flat({"base_model": "m", "datasets": [{"path": "d", "type": "alpaca"}], **flat})
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    again = Config.load(path)
    assert again.flat() == config.flat()
    assert again.to_yaml().count("\n") == config.to_yaml().count("\n")


def test_each_line_says_its_origin(load):
    text = load("seed: 3\n", "datasets.0.split=train").to_yaml()
    lines = dict(line.split("  # ") for line in text.splitlines() if "  # " in line)
    assert lines["seed: 3"] == "cfg.yml:5"
    assert lines["    split: train"] == "command line"
    assert lines["  - path: d.jsonl"] == "cfg.yml:3"
    assert lines["max_steps: null"] == "default"
    assert lines["learning_rate: 2.0e-05"] == "derived: usual without an adapter"
    assert lines["# lora_r: 16"] == "default"


def test_show(load):
    out = io.StringIO()
    show_config(load("seed: 3\n"), Console(file=out, width=40))
    text = out.getvalue()
    assert "\x1b" not in text
    (seed,) = [line for line in text.splitlines() if line.strip().startswith("seed:")]
    assert seed.split() == ["seed:", "3", "cfg.yml:5"]
    assert "lora_r:" not in text  # does nothing in this config
    assert "Training" in text
