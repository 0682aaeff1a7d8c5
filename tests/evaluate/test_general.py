"""The general set: what it is made of, its tokens, and its figures against transformers' own loss."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier import cli
from luthier.config import Config
from luthier.evaluate import data_eval, general
from luthier.evaluate.data_eval import evaluate_data
from luthier.train.run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, toy_llama_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("general")
    rows = [{"instruction": f"Add {n} and {n + 1}.", "output": str(2 * n + 1)} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.from_flat(
        {
            "base_model": str(toy_llama_dir),
            "datasets": [{"path": str(folder / "rows.jsonl"), "type": "alpaca"}],
            "adapter": "lora",
            "micro_batch_size": 4,
            "learning_rate": 1e-2,
            "max_steps": 12,
            "sequence_len": 128,
            "bf16": False,
            "output_dir": str(folder / "run"),
            "dataset_prepared_path": str(folder / "cache"),
        }
    )
    train(config)
    return folder / "run"


# --- the rows -----------------------------------------------------------------------------------------------


def test_the_rows_are_of_even_kinds_short_and_all_different() -> None:
    rows = general.rows()
    counts = Counter(row["category"] for row in rows)
    assert len(counts) == 11 and set(counts.values()) == {18}
    assert all(row.keys() == {"category", "prompt", "answer"} and row["prompt"] and row["answer"] for row in rows)
    assert len({row["prompt"] for row in rows}) == len({row["answer"] for row in rows}) == len(rows)
    assert 30_000 < sum(len(row["prompt"] + row["answer"]) for row in rows) < 40_000
    # A prompt ends where a token does, the answer begins with its own space or line.
    assert not [row for row in rows if row["prompt"].endswith(" ")]
    assert not [row for row in rows if not row["prompt"].endswith("\n") and not row["answer"].startswith(" ")]


def test_what_can_be_checked_by_a_machine_is_right() -> None:
    by_kind: dict[str, list[dict[str, str]]] = {}
    for row in general.rows():
        by_kind.setdefault(row["category"], []).append(row)
    for row in by_kind["code"]:
        ast.parse(row["prompt"] + row["answer"])
    asked = [row["answer"] for row in by_kind["formats"] if row["prompt"].startswith("Write as JSON")]
    assert len(asked) > 3 and all(json.loads(answer) for answer in asked)
    equations = 0
    for row in by_kind["arithmetic"]:
        for piece in re.split(r"[^\d+*/(). =-]", row["answer"]):
            sides = [side.strip(" .") for side in piece.split("=")]
            if len(sides) > 1 and all(sides):
                values = [eval(side) for side in sides]
                assert values == pytest.approx([values[0]] * len(values)), piece
                equations += 1
    assert equations >= 20


def test_a_row_is_plain_text_scored_on_its_answer_with_no_end_to_predict(toy_llama_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy_llama_dir)
    documents = general.general_set(tokenizer).documents
    assert len(documents) == len(general.rows())
    for index, row in enumerate(general.rows()):
        ids, labels = documents[index].input_ids, documents[index].labels
        assert tokenizer.decode(ids) == row["prompt"] + row["answer"]
        assert tokenizer.decode(labels[labels >= 0]) == row["answer"]
        assert tokenizer.eos_token_id not in ids


def test_a_tokenizers_own_beginning_stands_before_each_row(toy_llama_dir: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(toy_llama_dir)
    first = tokenizer.convert_ids_to_tokens(5)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{first} $A", special_tokens=[(first, 5)])
    documents = general.general_set(tokenizer).documents
    assert all(documents[index].input_ids[0] == 5 and documents[index].labels[0] == -100 for index in range(20))


def test_rows_beyond_the_models_positions_are_left_out_which_is_said(
    toy_llama_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy_llama_dir)
    every = general.general_set(tokenizer).documents
    limit = int(sorted(every.lengths)[100])
    fitting = general.general_set(tokenizer, limit).documents
    assert int(fitting.lengths.max()) == limit and len(fitting) == int((every.lengths <= limit).sum())
    assert f"{len(every) - len(fitting)} of its 198 rows" in caplog.text
    with pytest.raises(Exception, match="no row of it fits the model's 2 positions"):
        general.general_set(tokenizer, 2)


# --- the figures --------------------------------------------------------------------------------------------


@torch.no_grad()
def own_losses(model: Any, tokenizer: Any) -> list[float]:
    """transformers' own loss of every third row, tokenised part by part."""
    found = []
    for row in general.rows()[::3]:
        prompt, answer = (tokenizer(row[part], add_special_tokens=False)["input_ids"] for part in ("prompt", "answer"))
        ids, labels = torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])
        found.append(float(model(input_ids=ids, labels=labels).loss))
    return found


def test_losses_are_those_of_transformers_and_peft(run: Path, toy_llama_dir: Path) -> None:
    from peft import PeftModel

    path, result = evaluate_data(str(run), general=True)
    assert path == run / "evaluation" / "general.json" and result["kind"] == "general"
    rows = [json.loads(line) for line in path.with_name(result["rows"]).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(toy_llama_dir)
    base = AutoModelForCausalLM.from_pretrained(toy_llama_dir).eval()
    assert [row["compare"]["loss"] for row in rows[::3]] == pytest.approx(own_losses(base, tokenizer), abs=1e-5)
    tuned = own_losses(PeftModel.from_pretrained(base, run).eval(), tokenizer)
    assert [row["target"]["loss"] for row in rows[::3]] == pytest.approx(tuned, abs=1e-5)
    weights = [row["target"]["tokens"] for row in rows]
    whole = sum(row["target"]["loss"] * n for row, n in zip(rows, weights, strict=True)) / sum(weights)
    assert result["figures"]["all"]["target"]["loss"]["value"] == pytest.approx(whole, abs=1e-5)
    assert result["figures"]["by"]["category"].keys() == {row["category"] for row in general.rows()}
    assert result["figures"]["all"]["asked"] == 0


def test_the_command_shows_kinds_of_text_and_sets_any_two_models_side_by_side(
    run: Path, toy_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", str(run), "--general", "--limit", "60", "--output", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "base" in shown and "tuned" in shown and "loss, by category (rows)" in shown and "code (" in shown
    alone = ["evaluate", str(toy_llama_dir), "--general", "--limit", "30"]
    assert cli.main([*alone, "--output", str(tmp_path / "alone"), "--json"]) == 0
    assert "compare" not in json.loads(capsys.readouterr().out)["figures"]["all"]
    assert cli.main([*alone, "--compare", str(run), "--output", str(tmp_path / "other"), "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["compare"] == str(run) and both["figures"]["all"]["rows"] == 30


def test_a_run_on_preferences_is_measured_as_text(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load = Config.load
    monkeypatch.setattr(general.Config, "load", lambda path: load(path).replace("a test", rl="orpo", sequence_len=16))
    result = evaluate_data(str(run), general=True, limit=20, output=tmp_path)[1]
    figures = result["figures"]["all"]
    assert figures["rows"] == 20 and {"loss", "token_accuracy"} <= figures["target"].keys() == figures["compare"].keys()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data", "rows.jsonl"], "--data does nothing with --general, which has rows of its own"),
        (["--benchmark", "mmlu_pro"], "--benchmark does nothing with --general"),
        (["--tasks", "gsm8k"], "--tasks does nothing with --general"),
        (["--by", "task"], "--by does nothing with --general"),
        (["--type", "alpaca"], "--type does nothing with --general"),
        (["--shots", "3"], "--shots does nothing with --general"),
        (["--short-answer", "3"], "--short-answer does nothing with --general"),
    ],
)
def test_what_would_do_nothing_is_refused(
    options: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data_eval, "evaluate_data", lambda *a, **k: pytest.fail("a model would be loaded"))
    assert cli.main(["evaluate", "a-model", "--general", *options]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_that_is_not_there_and_a_base_that_nobody_knows(
    toy_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "./nowhere", "--general"]) == 2
    assert "./nowhere: there is no such folder" in capsys.readouterr().err
    assert cli.main(["evaluate", str(toy_llama_dir), "--general", "--compare", "base"]) == 2
    assert "is no run" in capsys.readouterr().err
