"""`luthier evaluate` from end to end, on a toy run: figures against the run's log, transformers and PEFT."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier import cli
from luthier.config import Config
from luthier.data.dataset import prepare
from luthier.data.tokenizer import load_tokenizer
from luthier.evaluate import what_data
from luthier.evaluate.data_eval import evaluate_data
from luthier.evaluate.exact_match import is_exact

KINDS = ("sum", "a kind of rows with quite a long name")


def rows_of(count: int) -> list[dict[str, Any]]:
    rows = []
    for n in range(count):
        answer = str(2 * n + 1) if n % 4 else " ".join(str(k) for k in range(40))
        rows.append({"instruction": f"Add {n} and {n + 1}.", "output": answer, "kind": KINDS[n % 2], "level": n % 3})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, toy_llama_dir: Path) -> Path:
    """A run of twenty steps that held a quarter of its rows out."""
    from luthier.train.run import train

    folder = tmp_path_factory.mktemp("evaluated")
    config = Config.from_flat(
        {
            "base_model": str(toy_llama_dir),
            "datasets": [{"path": str(write(folder / "rows.jsonl", rows_of(80))), "type": "alpaca"}],
            "val_set_size": 0.25,
            "adapter": "lora",
            "lora_r": 4,
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
            "max_steps": 20,
            "sequence_len": 512,
            "bf16": False,
            "output_dir": str(folder / "run"),
            "dataset_prepared_path": str(folder / "cache"),
        }
    )
    train(config)
    return folder / "run"


@pytest.fixture(scope="module")
def result(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    path, found = evaluate_data(str(run), compare="base", by=["kind", "level"])
    assert path == run / "evaluation" / "validation.json"
    assert json.loads(path.read_text()) == found
    return found, [json.loads(line) for line in path.with_name(found["rows"]).read_text().splitlines()]


@torch.no_grad()
def own_loss(model: Any, run: Path) -> list[tuple[float, int]]:
    """transformers' own loss of each validation row of the run, and its tokens."""
    config = Config.load(run / "config.yaml")
    validation = prepare(config, load_tokenizer(config)).validation
    assert validation is not None
    found = []
    for n in range(len(validation)):
        ids, labels = (torch.from_numpy(np.asarray(each, np.int64))[None] for each in validation[n][:2])
        found.append((float(model(input_ids=ids, labels=labels).loss), int(validation.trained[n])))
    return found


def test_losses_are_those_of_transformers_and_peft_on_the_rows_that_the_run_held_out(
    run: Path, result: Any, toy_llama_dir: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found, rows = result
    base = AutoModelForCausalLM.from_pretrained(toy_llama_dir).eval()
    of_base = own_loss(base, run)
    tuned = PeftModel.from_pretrained(base, run).eval()
    for role, expected in (("compare", of_base), ("target", own_loss(tuned, run))):
        assert [row[role]["loss"] for row in rows] == pytest.approx([loss for loss, _ in expected], abs=1e-5)
        whole = sum(loss * n for loss, n in expected) / sum(n for _, n in expected)
        figures = found["figures"]["all"][role]
        assert figures["loss"]["value"] == pytest.approx(whole, abs=1e-5)
        assert figures["perplexity"]["value"] == pytest.approx(math.exp(whole), rel=1e-5)
        assert figures["loss"]["low"] < whole < figures["loss"]["high"]


def test_the_figures_go_on_from_those_of_the_runs_log(run: Path, result: Any) -> None:
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(logged) if "eval_loss" in row)
    figures = result[0]["figures"]["all"]
    assert figures["target"]["loss"]["value"] == pytest.approx(last["eval_loss"], abs=1e-5)
    assert figures["target"]["token_accuracy"]["value"] == pytest.approx(last["eval_token_accuracy"])
    difference = figures["difference"]["loss"]
    assert difference["value"] == pytest.approx(
        figures["target"]["loss"]["value"] - figures["compare"]["loss"]["value"], abs=1e-12
    )
    assert difference["beyond_chance"] and difference["better"] and difference["high"] < 0


def test_groups_are_those_of_the_columns_and_add_up(result: Any) -> None:
    found, rows = result
    assert found["figures"]["by"].keys() == {"kind", "level"}
    for column, groups in found["figures"]["by"].items():
        assert sum(group["rows"] for group in groups.values()) == found["figures"]["all"]["rows"] == len(rows) == 20
        for value, group in groups.items():
            mine = [row["target"] for row in rows if row["by"][column] == value]
            tokens = sum(row["tokens"] for row in mine)
            assert group["tokens"] == tokens
            assert group["target"]["loss"]["value"] == pytest.approx(
                sum(row["loss"] * row["tokens"] for row in mine) / tokens
            )
            asked = [row["exact"] for row in mine if row["answer"] is not None]
            assert group["asked"] == len(asked)
            assert group["target"]["exact_match"]["value"] == pytest.approx(np.mean(asked))
    assert list(found["figures"]["by"]["level"]) == ["0", "1", "2"]


def test_short_answers_are_asked_and_only_they(run: Path, result: Any, toy_tokenizer: Any) -> None:
    _, rows = result
    expected = {row["instruction"]: row["output"] for row in rows_of(80)}
    for row in rows:
        instruction = row["prompt"].split("### Instruction:\n")[1].split("\n\n###")[0]
        assert row["expected"] == expected[instruction]
        for role in ("target", "compare"):
            asked = row[role]["answer"] is not None
            assert asked == (len(toy_tokenizer(row["expected"])["input_ids"]) <= 32)
            if asked:
                right = row[role]["stopped"] and is_exact(row[role]["answer"], row["expected"])
                assert row[role]["exact"] == right
    assert {row["target"]["answer"] is None for row in rows} == {True, False}


def test_an_answer_that_the_model_knows_is_right(toy_llama_dir: Path, toy_tokenizer: Any, tmp_path: Path) -> None:
    """Expect what the model says, and it is right: prompt, decoding and comparison go together."""
    from luthier.data.tokenizer import terminator_ids
    from luthier.generate.engine import Engine
    from luthier.generate.sampling import Sampling
    from luthier.models.assemble import open_for_inference

    model, tokenizer, _ = open_for_inference(str(toy_llama_dir))
    with torch.no_grad():  # a model that ends everything at once, or nearly
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 40
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = Config.from_flat({"base_model": "toy", "datasets": [{"path": "none", "type": "completion"}]})
    engine = Engine(model, tokenizer, terminator_ids(tokenizer, config))
    prompts = [f"Say {n} " * (1 + n % 3) for n in range(40)]
    said = engine.generate([tokenizer(text)["input_ids"] for text in prompts], Sampling(max_new_tokens=20))
    known = [
        {"segments": [{"label": False, "text": p}, {"label": True, "text": s.text + tokenizer.eos_token}]}
        for p, s in zip(prompts, said, strict=True)
        if s.finish_reason == "stop" and s.text.strip() and "\ufffd" not in s.text
    ]
    assert len(known) > 3
    wrong = [{"segments": [*row["segments"][:1], {"label": True, "text": "no" + tokenizer.eos_token}]} for row in known]
    for rows, share in ((known, 1.0), (wrong, 0.0)):
        file = write(tmp_path / "rows.jsonl", rows)
        found = evaluate_data(
            str(tmp_path / "model"), data=[str(file)], type="input_output", output=tmp_path / "out"
        )[1]
        assert found["figures"]["all"]["target"]["exact_match"]["value"] == share
        assert found["figures"]["all"]["target"]["stopped"]["value"] == 1.0


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main(["evaluate", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_table_fits_in_80_columns_and_says_in_words_what_is_beyond_chance(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, out, err = evaluate(capsys, run, "--compare", "base", "--by", "kind", "--output", tmp_path)
    assert status == 0, err
    assert max(map(len, out.splitlines()[:-1])) <= 80
    for text in ("tuned", "base", "difference", *KINDS, "loss: better than base by ", "exact match, by kind"):
        assert text in out, text
    assert "the run's own validation data (held out by val_set_size: 0.25): 20 rows" in err
    assert {path.name for path in tmp_path.iterdir()} == {"validation.json", "validation.jsonl"}


def test_files_of_data_with_another_model_by_dataset_as_json(
    run: Path, toy_llama_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, two = write(tmp_path / "one.jsonl", rows_of(6)), write(tmp_path / "two.jsonl", rows_of(9)[6:])
    files = ("--data", one, "--data", two, "--json")
    status, out, err = evaluate(capsys, run, "--compare", toy_llama_dir, *files, "--output", tmp_path / "out")
    assert status == 0 and "report.html" not in err, err
    found = json.loads(out)
    assert (found["kind"], found["target"], found["compare"]) == ("data", str(run), str(toy_llama_dir))
    assert {name: group["rows"] for name, group in found["figures"]["by"]["dataset"].items()} == {
        "one.jsonl": 6,
        "two.jsonl": 3,
    }
    # Three rows are too few to say anything, however far apart the models are on them.
    assert not found["figures"]["by"]["dataset"]["two.jsonl"]["difference"]["loss"]["beyond_chance"]

    status, out, err = evaluate(capsys, run, *files, "--limit", 4, "--short-answer", 0)
    assert status == 0, err
    some = json.loads(out)["figures"]["all"]
    assert some["rows"] == 4 and some["asked"] == 0 and "exact_match" not in some["target"]
    # What lies in the run's folder is on its page.
    assert f"{run / 'report.html'} holds this result now" in err
    assert "Held-out data: one-and-1" in (run / "report.html").read_text(encoding="utf-8")


def test_a_config_brings_its_own_data_and_a_bare_model_needs_one_or_a_type(
    toy_llama_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "1"}]
    test = write(tmp_path / "test.jsonl", [{"messages": turns}] * 3)
    config = tmp_path / "cfg.yml"
    config.write_text(
        f"base_model: elsewhere\ndatasets:\n  - {{path: nowhere.jsonl, type: alpaca}}\n"
        f"test_datasets:\n  - {{path: {test}, type: chat_template}}\nsequence_len: 64\n"
    )
    output = ("--output", tmp_path / "out", "--json")
    by_config = evaluate(capsys, toy_llama_dir, "--data", config, *output)
    by_type = evaluate(capsys, toy_llama_dir, "--data", test, "--type", "chat_template", *output)
    assert by_config[0] == by_type[0] == 0, by_config[2] + by_type[2]
    figures = [json.loads(each[1])["figures"] for each in (by_config, by_type)]
    assert figures[0] == figures[1] and figures[0]["all"]["rows"] == figures[0]["all"]["asked"] == 3


def test_another_tokenizer_has_the_same_rows_in_its_own_tokens(
    run: Path, toy_llama_dir: Path, toy_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(vocabulary)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    other = tmp_path / "other"
    shutil.copytree(toy_llama_dir, other)
    letters.save_pretrained(other)
    _, found = evaluate_data(str(run), compare=str(other), output=tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "validation.jsonl").read_text().splitlines()]
    assert "tokenizers differ" in caplog.text
    assert len(rows) == found["figures"]["all"]["rows"] == 20
    # Whether an answer is short is said by the target's tokens, and both are asked the same.
    assert found["figures"]["all"]["asked"] > 0 and "exact_match" in found["figures"]["all"]["difference"]
    assert all((row["target"]["answer"] is None) == (row["compare"]["answer"] is None) for row in rows)
    for row in rows:
        assert row["compare"]["tokens"] == len(row["expected"]) + 1  # a letter each, and the end
        assert row["compare"]["tokens"] >= row["target"]["tokens"]


def test_rows_that_the_run_was_trained_on_are_called_that(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trained = run.parent / "rows.jsonl"
    others = write(tmp_path / "others.jsonl", rows_of(2))
    config = tmp_path / "cfg.yml"
    config.write_text(f"base_model: x\ndatasets:\n  - {{path: {trained}, type: alpaca}}\n")
    for data, said in ((trained, True), (config, True), (others, False)):
        options = ("--limit", 1, "--short-answer", 0, "--output", tmp_path / "out")
        status, _, err = evaluate(capsys, run, "--data", data, *options)
        assert status == 0 and ("rows.jsonl: the run was trained on rows of it" in err) == said


def test_one_row_has_figures_without_an_interval(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, out, err = evaluate(capsys, run, "--compare", "base", "--limit", 1, "--output", tmp_path)
    assert status == 0 and "1 row, " in err
    found = json.loads((tmp_path / "validation-limit1.json").read_text())["figures"]["all"]
    assert found["rows"] == 1 and found["target"]["loss"]["value"] > 0 and found["target"]["loss"]["low"] is None
    assert found["difference"]["loss"]["low"] is None and not found["difference"]["loss"]["beyond_chance"]
    assert next(line for line in out.splitlines() if line.startswith("loss")).count("[") == 0


def test_a_comparison_is_not_lost_to_a_result_without_it(run: Path, toy_llama_dir: Path, tmp_path: Path) -> None:
    """What was measured beside the base stays when the run is measured by itself, beside another, or on fewer rows."""
    few: dict[str, Any] = {"short_answer": 0, "output": tmp_path}

    def written(target: Path | str = run, **options: Any) -> tuple[str, str | None]:
        path, found = evaluate_data(str(target), **options, **few)
        assert path.with_name(found["rows"]).stem == path.stem
        return path.name, found["names"]["compare"]

    assert written() == ("validation.json", None)
    assert written(compare="base") == ("validation.json", "base")  # which holds what the first did
    again = (tmp_path / "validation.json").read_bytes(), (tmp_path / "validation.jsonl").read_bytes()
    assert written() == ("validation-alone.json", None)
    assert written(limit=2) == ("validation-limit2.json", None)
    beside = str(run).strip("/").replace("/", "--")[-60:]
    assert written(compare=str(run)) == (f"validation-beside-{beside}.json", str(run))
    assert again == ((tmp_path / "validation.json").read_bytes(), (tmp_path / "validation.jsonl").read_bytes())
    assert written(run / ".." / "run", compare=str(toy_llama_dir))[0] == "validation.json"  # the base, by its path


def test_the_network_is_looked_for_once_and_only_where_something_is_not_here(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(what_data, "notice_missing_network", lambda: asked.append(1))
    what_data.must_exist(str(run))
    assert not asked
    what_data.must_exist("no-such-model")
    assert len(asked) == 1
    (elsewhere := tmp_path / "elsewhere").mkdir()  # a run whose base is not here
    base = Config.load(run / "config.yaml").model.base_model
    (elsewhere / "config.yaml").write_text((run / "config.yaml").read_text().replace(base, "org/base"))
    what_data.must_exist(str(elsewhere))
    assert len(asked) == 2


def test_files_that_a_shell_made_of_a_pattern(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, two = write(tmp_path / "one.jsonl", rows_of(2)), write(tmp_path / "two.jsonl", rows_of(3))
    options = ("--short-answer", 0, "--output", tmp_path / "out", "--json")
    status, out, err = evaluate(capsys, run, "--data", one, two, *options)
    assert status == 0 and json.loads(out)["figures"]["all"]["rows"] == 5, err
    for given in ((one,), ("--data", one, tmp_path / "missing.jsonl")):
        status, _, err = evaluate(capsys, run, *given, *options)
        assert status == 2 and f"error: {given[-1]}: one run or model is measured at a time" in err


def test_the_dtype_is_the_one_that_was_asked_for(run: Path, tmp_path: Path) -> None:
    _, found = evaluate_data(str(run), dtype="bf16", limit=1, short_answer=0, output=tmp_path)
    assert found["settings"]["models"]["run"]["dtype"] == "bfloat16"


def test_the_commands_default_is_that_of_the_function() -> None:
    from luthier.evaluate import answers, command

    assert command.SHORT_ANSWER == answers.SHORT_ANSWER


def pairs(folder: Path) -> Path:
    return write(folder / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])


BAD: dict[str, tuple[Callable[[Path, Path, Path], list[object]], str]] = {
    "no such run": (lambda run, toy, tmp: [tmp / "nowhere"], "there is no such folder"),
    "no such checkpoint": (lambda run, toy, tmp: [run / "checkpoint-999"], "there is no such folder"),
    "nothing to compare with": (lambda run, toy, tmp: [run, "--compare", tmp / "nowhere"], "there is no such folder"),
    "a place that cannot be written": (lambda run, toy, tmp: [run, "--output", "/dev/null/x"], "name another folder"),
    "a field that is not there": (
        lambda run, toy, tmp: [run, "--by", "kind.sub"], "there is no column `kind.sub` to group by"
    ),
    "not a model": (
        lambda run, toy, tmp: [tmp, "--data", write(tmp / "a.jsonl", rows_of(2)), "--type", "alpaca"],
        "neither a run, an adapter",
    ),
    "no data": (lambda run, toy, tmp: [toy], "give --data"),
    "no type": (lambda run, toy, tmp: [toy, "--data", write(tmp / "a.jsonl", rows_of(2))], "add --type"),
    "an unknown type": (
        lambda run, toy, tmp: [run, "--data", write(tmp / "a.jsonl", rows_of(2)), "--type", "alpacca"],
        "there is no type `alpacca`. Did you mean `alpaca`?",
    ),
    "empty": (lambda run, toy, tmp: [run, "--data", write(tmp / "a.jsonl", [])], "a.jsonl: there are no rows in it"),
    "no file": (lambda run, toy, tmp: [run, "--data", tmp / "a.jsonl"], "there is no such file"),
    "no column": (
        lambda run, toy, tmp: [run, "--data", write(tmp / "a.jsonl", [{"question": "a"}])],
        "a.jsonl:1: `instruction` is missing",
    ),
    "a column that some rows lack": (
        lambda run, toy, tmp: [
            run, "--by", "kind", "--data", write(tmp / "a.jsonl", [*rows_of(2), {"instruction": "a", "output": "b"}])
        ],
        "a.jsonl:3: there is no column `kind` to group by",
    ),
    "a column that is no name": (
        lambda run, toy, tmp: [
            run, "--by", "k", "--data", write(tmp / "a.jsonl", [{"instruction": "a", "output": "b", "k": [1]}])
        ],
        "a.jsonl:1: `k` is a list",
    ),
    "pairs": (lambda run, toy, tmp: [run, "--data", pairs(tmp)], "its rows are answers to compare"),
    "no base": (
        lambda run, toy, tmp: [
            toy, "--data", write(tmp / "a.jsonl", rows_of(2)), "--type", "alpaca", "--compare", "base"
        ],
        "is no run, which would say what its base is",
    ),
    "a dtype": (lambda run, toy, tmp: [run, "--dtype", "int3"], "auto, fp32, bf16, fp16"),
    "a benchmark": (lambda run, toy, tmp: [run, "--benchmark", "glue"], "mmlu_pro"),
    "subjects of no benchmark": (lambda run, toy, tmp: [run, "--subjects", "math"], "--subjects goes with --benchmark"),
    "by beside a benchmark": (lambda run, toy, tmp: [run, "--benchmark", "mmlu_pro", "--by", "x"], "--by does nothing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_before_a_model_is_loaded(
    case: str, run: Path, toy_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from luthier.models import assemble

    monkeypatch.setattr(assemble, "load_model", lambda *given: pytest.fail("a model was loaded"))
    make, message = BAD[case]
    status, out, err = evaluate(capsys, *make(run, toy_llama_dir, tmp_path))
    errors = [line for line in err.splitlines() if line.startswith(("error", "internal"))]
    assert status in (1, 2) and out == "" and len(errors) == 1
    assert errors[0].startswith("error: ") and message in errors[0]


def test_a_run_that_has_not_ended_and_one_that_held_nothing_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (run / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config)
    assert "the run has not ended yet" in evaluate(capsys, tmp_path)[2]
    (tmp_path / "config.yaml").write_text(
        "".join(line + "\n" for line in config.splitlines() if not line.startswith(("val_set_size", "eval")))
    )
    assert "the run held nothing out" in evaluate(capsys, tmp_path)[2]
