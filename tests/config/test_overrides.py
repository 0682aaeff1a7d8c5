"""Overrides on the command line, in all their spellings."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["seed=7"], {"seed": 7}),
        (["--seed", "7"], {"seed": 7}),
        (["--seed=7"], {"seed": 7}),
        (["--learning-rate", "5e-5", "--deterministic"], {"learning_rate": 5e-5, "deterministic": True}),
        (["--deterministic", "seed=7"], {"deterministic": True, "seed": 7}),
        (["--deterministic", "--seed", "7"], {"deterministic": True, "seed": 7}),
        (["--deterministic", "false"], {"deterministic": False}),
        (["--output_dir", "a=b"], {"output_dir": "a=b"}),
        (["--revision", "12345"], {"revision": "12345"}),
        (["revision=null"], {"revision": None}),
        (["--revision", "'null'"], {"revision": "null"}),
        (["chat_template=jinja", "chat_template_jinja={{ x }}"], {"chat_template_jinja": "{{ x }}"}),
        (["tokens=[a, b]"], {"tokens": ["a", "b"]}),
        (["seed=7", "seed=8"], {"seed": 8}),
        (["output_dir="], {"output_dir": "./model-out"}),
        (["special_tokens.pad_token=<pad>"], {"special_tokens": {"pad_token": "<pad>"}}),
        (["optim_args.momentum=0.5"], {"optim_args": {"momentum": 0.5}}),
        (
            ["chat_template_kwargs={enable_thinking: false}", "datasets.0.type=chat_template"],
            {"chat_template_kwargs": {"enable_thinking": False}},
        ),
        (["datasets.0.path=e#10"], {"datasets": [{"path": "e#10", "type": "alpaca"}]}),
        (
            ["datasets.1.path=e", "datasets.1.type=completion"],
            {"datasets": [{"path": "d.jsonl", "type": "alpaca"}, {"path": "e", "type": "completion"}]},
        ),
        (
            ["test_datasets.0.path=e", "--test_datasets.0.type", "completion"],
            {"test_datasets": [{"path": "e", "type": "completion"}]},
        ),
    ],
)
def test_spellings(load, overrides, expected):
    config = load("", *overrides)
    flat = config.flat()
    assert {key: flat[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["foo"], "'foo' is no override"),
        (["--seed", "7", "8"], "'8' is no override"),
        (["lora_rr=3"], "Did you mean lora_r?"),
        (["--datasets.3.path", "x"], "the list has 1 entries"),
        (["datasets.path=x"], "the list has 1 entries"),
        (["datasets.0.path.x=1"], "nothing inside"),
        (["--seed"], "expected a whole number, found true"),
        (["tokens=[a"], "not valid YAML"),
        (["datasets.0.typ=x"], "Did you mean type?"),
        (["base_model=null"], "base_model is missing"),
    ],
)
def test_mistakes(report, overrides, words):
    (line,) = report("", *overrides)
    assert words in line
    assert line.startswith("command line: ") or "missing" in line


def test_an_override_replaces_what_the_file_says_inside(load):
    config = load("special_tokens:\n  pad_token: a\n", "special_tokens={unk_token: b}")
    assert config.model.special_tokens.pad_token is None
    assert "special_tokens.pad_token" not in config.origins
    assert config.origins["special_tokens"] == "command line"
    assert load("seed: 3\n", "seed=null").training.seed == 42
