"""Loading tokenizers as a config wants them, and what is said where that cannot be done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from luthier.config import Config
from luthier.data import templates
from luthier.data.encode import TextEncoder
from luthier.data.tokenizer import load_tokenizer, terminator_ids
from luthier.errors import ConfigError, ModelError


@pytest.fixture
def folder(toy_tokenizer: Any, tmp_path: Path) -> Path:
    """A folder that holds the toy tokenizer and nothing else."""
    toy_tokenizer.save_pretrained(tmp_path / "toy")
    return tmp_path / "toy"


def config_for(folder: Path | str, *entries: dict[str, Any], **flat: Any) -> Config:
    datasets = [{"path": "rows.jsonl", **entry} for entry in entries] or [
        {"path": "rows.jsonl", "type": "alpaca"}
    ]
    return Config.from_flat({"base_model": str(folder), "datasets": datasets, **flat})


def settings(folder: Path, **changes: Any) -> None:
    """Change the tokenizer's settings on disk; None removes one."""
    path = folder / "tokenizer_config.json"
    known = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(
        json.dumps({key: value for key, value in known.items() if value is not None}), encoding="utf-8"
    )


def test_as_it_is(folder, toy_tokenizer):
    tokenizer = load_tokenizer(config_for(folder))
    assert tokenizer.get_vocab() == toy_tokenizer.get_vocab()
    assert tokenizer.chat_template == toy_tokenizer.chat_template
    assert terminator_ids(tokenizer, config_for(folder)) == tuple(
        tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    )


def test_tokens_are_added_and_saved(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    config = config_for(
        folder,
        tokens=["<tool>"],
        special_tokens={"bos_token": "<s>", "additional_special_tokens": ["<a>", "<b>"]},
    )
    tokenizer = load_tokenizer(config)
    assert "4 tokens added to the vocabulary: <s>, <a>, <b>, <tool>" in caplog.text
    assert tokenizer("x<tool>y")["input_ids"].count(tokenizer.convert_tokens_to_ids("<tool>")) == 1
    assert "<tool>" not in tokenizer.all_special_tokens
    assert {"<a>", "<b>", "<s>", "<|im_end|>"} <= set(tokenizer.all_special_tokens)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(config_for(tmp_path / "saved")).get_vocab() == tokenizer.get_vocab()
    caplog.clear()
    load_tokenizer(config_for(tmp_path / "saved", tokens=["<tool>"]))
    assert not caplog.messages  # what is there already is not added


def test_a_new_bos_is_put_before_texts(folder, tmp_path, tokenizer_with):
    from tokenizers import processors

    tokenizer = tokenizer_with(bos="<s>")
    post = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = post
    tokenizer.save_pretrained(tmp_path / "putting")
    for source, puts in ((tmp_path / "putting", True), (folder, False)):
        loaded = load_tokenizer(config_for(source, special_tokens={"bos_token": "<begin>"}))
        begin = loaded.convert_tokens_to_ids("<begin>")
        assert TextEncoder(loaded).opening == ([begin] if puts else [])
        loaded.save_pretrained(tmp_path / "again")
        assert TextEncoder(load_tokenizer(config_for(tmp_path / "again"))).opening == (
            [begin] if puts else []
        )


def test_eos_is_needed(folder):
    settings(folder, eos_token=None)
    with pytest.raises(ModelError, match=r"no EOS token.*eos_token.*<\|im_end\|>"):
        load_tokenizer(config_for(folder))
    tokenizer = load_tokenizer(config_for(folder, special_tokens={"eos_token": "<|im_end|>"}))
    assert tokenizer.eos_token == "<|im_end|>"


def test_a_pad_token_is_not_needed(folder):
    settings(folder, pad_token=None)
    assert load_tokenizer(config_for(folder)).pad_token is None


CHAT = {"type": "chat_template"}


@pytest.mark.parametrize(
    ("entries", "flat", "expected"),
    [
        ([CHAT], {}, None),
        ([CHAT], {"chat_template": "tokenizer_default"}, None),
        ([CHAT], {"chat_template": "chatml"}, "chatml"),
        ([], {"chat_template": "phi"}, "phi_3"),
        ([{**CHAT, "chat_template": "llama3"}], {}, "llama3"),
        ([{**CHAT, "chat_template": "llama3"}, CHAT], {}, None),
        ([{**CHAT, "chat_template": "llama3"}], {"chat_template": "chatml"}, "chatml"),
    ],
)
def test_the_template_that_is_saved(folder, toy_tokenizer, entries, flat, expected):
    tokenizer = load_tokenizer(config_for(folder, *entries, **flat))
    assert tokenizer.chat_template == (templates.named(expected) if expected else toy_tokenizer.chat_template)


def test_conversations_need_a_template(folder):
    (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(config_for(folder)).chat_template is None
    assert terminator_ids(load_tokenizer(config_for(folder)), config_for(folder)) == (0,)
    with pytest.raises(
        ConfigError, match=r"brings none. Set chat_template to one of alpaca, .*qwen3.*\.jinja file"
    ):
        load_tokenizer(config_for(folder, CHAT))
    assert load_tokenizer(config_for(folder, {**CHAT, "chat_template": "chatml"})).chat_template


def test_eot_tokens_are_single_tokens(folder):
    with pytest.raises(
        ConfigError, match=r"'<\|eot\|>' is not one token of this tokenizer but \d+. Add it with `tokens"
    ):
        load_tokenizer(config_for(folder, eot_tokens=["<|eot|>"]))
    config = config_for(folder, eot_tokens=["<|eot|>"], tokens=["<|eot|>"])
    tokenizer = load_tokenizer(config)
    assert tokenizer.convert_tokens_to_ids("<|eot|>") in terminator_ids(tokenizer, config)


def test_terminators_of_entries_with_their_own_templates(folder):
    config = config_for(folder, CHAT, {**CHAT, "chat_template": "llama3"}, tokens=["<|eot_id|>"])
    tokenizer = load_tokenizer(config)
    names = ["<|endoftext|>", "<|im_end|>", "<|eot_id|>"]
    assert set(terminator_ids(tokenizer, config)) == set(tokenizer.convert_tokens_to_ids(names))


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("missing", r"missing does not exist"),
        ("empty", r"empty holds no tokenizer \(none of tokenizer\.json, .*tokenizer_config"),
        ("file.json", r"file\.json is a file, not a folder"),
        ("broken", r"cannot load the tokenizer .*broken"),
    ],
)
def test_folders_without_a_tokenizer(tmp_path, source, problem):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (tmp_path / "file.json").write_text("{}", encoding="utf-8")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text('{"model": {"ty', encoding="utf-8")
    with pytest.raises(ModelError, match=problem):
        load_tokenizer(config_for(tmp_path / source))


def test_hub_names_that_cannot_be_reached():
    with pytest.raises(
        ModelError, match="'nobody/nothing': it is not on this machine, and the hub cannot be reached"
    ):
        load_tokenizer(config_for("nobody/nothing"))


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("You are trying to access a gated repo.\nMake sure to have access to it", "gated or private"),
        ("401 Client Error: Unauthorized", "HF_TOKEN"),
        ("x is not a local folder and is not a valid model identifier", "no such name on the hub"),
        ("Please pass the argument `trust_remote_code=True`", "set trust_remote_code: true"),
        ("something\nelse", "OSError: something else"),
    ],
)
def test_one_message_for_whatever_goes_wrong(monkeypatch, said, hint):
    import transformers

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(said)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ModelError, match=hint) as raised:
        load_tokenizer(config_for("some/model"))
    assert "\n" not in str(raised.value)


def test_class_and_place_of_the_tokenizer(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    config = config_for(
        "no/model", tokenizer_config=str(tmp_path / "elsewhere"), tokenizer_type="PreTrainedTokenizerFast"
    )
    assert len(load_tokenizer(config)) > 0
    with pytest.raises(ConfigError, match="has no class 'NoTokenizer'"):
        load_tokenizer(config_for(folder, tokenizer_type="NoTokenizer"))
