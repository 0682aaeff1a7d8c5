"""A file that is not what it should be, as a file: one message each, with the line."""

from __future__ import annotations

import pytest

from luthier.config import Config
from luthier.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("output_dir: a: b\n", 5, "needs quotes"),
        ("lora_r 8\nseed: 3\n", 6, "colon"),
        ("\tseed: 3\n", 5, "tab"),
        ("special_tokens:\n\tbos_token: a\n", 6, "tab"),
        ("tokens: [a, b\nseed: 3\n", 6, "']'"),
        ('output_dir: "abc\n', 6, "quoted"),
        ("---\nseed: 4\n", 5, "second YAML document"),
        ("tokens: &a [*a]\n", 5, "alias"),
        ("tokens: *b\n", 5, "undefined alias"),
        ("seed: !!python/object/apply:os.getcwd []\n", 5, "tag"),
        ("seed: !!python/name:os.getcwd\n", 5, "tag"),
        ("? [a]\n: 3\n", 5, "one word"),
        ("output_dir: a\x00b\n", 5, "U+0000"),
        (b"output_dir: caf\xe9\n", 5, "not UTF-8"),
        ("seed: 1\r\nseed: 2\r\n", 6, "first in line 5"),
        ("    path: e.jsonl\n", 5, "first in line 3"),
    ],
)
def test_not_yaml(report, text, line, words):
    (message,) = report(text)
    assert message.startswith(f"cfg.yml:{line}: ")
    assert words in message


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "empty"), ("# nothing\n", "empty"), ("- a\n", "mapping"), ("a", "mapping"), ("[" * 500, "deeply")],
)
def test_no_config_at_all(report, text, words):
    (message,) = report(text, base="")
    assert message.startswith("cfg.yml")
    assert words in message


def test_missing_file_and_folder(tmp_path):
    for path, words in ((tmp_path / "nope.yml", "no such file"), (tmp_path, "folder")):
        with pytest.raises(ConfigError, match=words):
            Config.load(path)
    with pytest.raises(ConfigError, match="config comes first"):
        Config.load("--lora_r")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("5e-5", 5e-5),
        ("1E-4", 1e-4),
        ("1e3", 1000.0),
        ("0.0002", 2e-4),
        (".5", 0.5),
        ("2", 2.0),
        ("1_0.5", 10.5),
    ],
)
def test_numbers(load, written, value):
    assert load(f"learning_rate: {written}\n").training.learning_rate == value


@pytest.mark.parametrize("written", ["2024-01-01", "1:30", "010", "1e", "0b1", "'12'"])
def test_what_only_looks_like_a_number_is_text(load, written):
    assert load(f"revision: {written}\n").model.revision == written.strip("'")


def test_bom_crlf_anchors_and_merges(load):
    lines = [
        "base_model: m",
        "datasets:",
        "  - &d",
        "    path: a",
        "    type: alpaca",
        "  - <<: *d",
        "    path: b",
    ]
    config = load("\r\n".join(lines), base="\ufeff")
    assert [entry.path for entry in config.data.datasets] == ["a", "b"]
    assert {entry.type for entry in config.data.datasets} == {"alpaca"}
    assert config.origins["datasets.1.path"] == "cfg.yml:7"


def test_null_is_unset(load):
    config = load(
        "lora_r: null\nmax_steps:\nmax_grad_norm: ~\nspecial_tokens: {pad_token: null}\ntest_datasets:\n"
    )
    assert (config.adapter.lora_r, config.training.max_steps, config.training.max_grad_norm) == (
        16,
        None,
        1.0,
    )
    assert config.origins["max_grad_norm"] == "default"
