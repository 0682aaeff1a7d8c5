"""`luthier generate`, from the command line to the text."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.cli import main
from luthier.config import Config
from luthier.data.formats import prompt_example
from luthier.data.render import Renderer
from luthier.generate.cli import asking_format


def greedy_text(folder: Path, ids: list[int], new_tokens: int) -> str:
    """What transformers makes of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    output = model.generate(torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False)
    return str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))


def test_a_model_is_asked_with_its_chat_template(
    toy_llama_dir: Path, toy_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["generate", str(toy_llama_dir), "--prompt", "hello", "--max-new-tokens", "8", "--greedy"]
    assert main(asked) == 0
    ids = toy_tokenizer("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    shown = capsys.readouterr()
    assert shown.out == greedy_text(toy_llama_dir, ids, 8) + "\n"
    assert "8 tokens" in shown.err
    assert "--max-new-tokens" in shown.err


def test_raw_text_from_standard_input(
    toy_llama_dir: Path,
    toy_tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one two\n"))
    assert (
        main(["generate", str(toy_llama_dir), "--prompt", "-", "--raw", "--greedy", "--max-new-tokens", "8"])
        == 0
    )
    assert (
        capsys.readouterr().out == greedy_text(toy_llama_dir, toy_tokenizer("one two")["input_ids"], 8) + "\n"
    )


def test_the_same_seed_the_same_answer(toy_llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        sampling = ["--temperature", "1.5", "--top-k", "0", "--seed", seed, "--max-new-tokens", "12"]
        assert main(["generate", str(toy_llama_dir), "--prompt", "hello", *sampling]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_run_is_asked_in_the_format_of_its_training(
    toy_llama_dir: Path, toy_tokenizer: Any, tmp_path: Path
) -> None:
    run = Config.from_flat(
        {
            "base_model": str(toy_llama_dir),
            "datasets": [{"path": str(tmp_path / "rows.jsonl"), "type": "alpaca"}],
        }
    )
    config, entry = asking_format(str(tmp_path), toy_tokenizer, run)
    ids = Renderer(toy_tokenizer, config).prompt_ids(prompt_example(entry, "Add.", "1 2"), entry)
    assert "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:" in toy_tokenizer.decode(ids)
    # A checkpoint of a run and its merged model know their run.
    (tmp_path / "config.yaml").write_text(run.to_yaml())
    for inside in ("checkpoint-5", "merged", "merged-4bit"):
        (tmp_path / inside).mkdir()
        config, entry = asking_format(str(tmp_path / inside), toy_tokenizer, None)
        assert entry.type == "alpaca"
    assert asking_format(str(tmp_path), toy_tokenizer, run, raw=True)[1].type == "completion"


def test_without_a_template_the_text_is_continued_and_that_is_said(
    toy_llama_dir: Path, tmp_path: Path, toy_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from shutil import copytree

    bare = copytree(toy_llama_dir, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    assert main(["generate", str(bare), "--prompt", "one two", "--greedy", "--max-new-tokens", "8"]) == 0
    shown = capsys.readouterr()
    assert shown.out == greedy_text(bare, toy_tokenizer("one two")["input_ids"], 8) + "\n"
    assert "has no chat template" in shown.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--greedy", "--top-p", "0.5"], "--greedy leaves nothing to sample"),
        (["--raw", "--input", "x"], "--raw takes the prompt as it is"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
    ],
)
def test_what_contradicts_itself_is_an_error(
    options: list[str], message: str, toy_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(toy_llama_dir), "--prompt", "hello", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path / "nothing"), "--prompt", "hello"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "nothing" in error


def test_a_prompt_of_broken_bytes(toy_llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(toy_llama_dir), "--prompt", "x\udcff"]) == 1
    assert "error: the prompt holds half of a surrogate pair" in capsys.readouterr().err
