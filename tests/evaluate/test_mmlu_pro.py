"""MMLU-Pro against what its authors published, against their regular expressions, and against transformers."""

from __future__ import annotations

import json
import logging
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import luthier
from luthier import cli
from luthier.config import Config
from luthier.errors import ConfigError, DataError, ModelError, RunError
from luthier.evaluate.intervals import bootstrap_difference
from luthier.evaluate.mmlu_pro import run as mmlu_pro
from luthier.evaluate.mmlu_pro.data import (
    Question,
    choose_subjects,
    cot_prompt,
    extract_answer,
    guessed_index,
    guessed_letter,
    load_benchmark,
)
from luthier.evaluate.mmlu_pro.figures import figures_of, shown
from luthier.evaluate.mmlu_pro.run import KEY, recorded, run_mmlu_pro
from luthier.evaluate.opened import Which, identity, precision_of, which_models
from luthier.evaluate.record import Record
from luthier.evaluate.store import Store
from luthier.generate.engine import Engine
from luthier.generate.slots import Slots

# Outputs and predictions of several models, of the benchmark's repository (Apache-2.0); its first line says more.
PUBLISHED = [json.loads(line) for line in Path(__file__).with_name("mmlu_pro_published.jsonl").open(encoding="utf-8")]
BASE_MODEL = Path(luthier.__file__).parent / "demo" / "base_model"
CPU: dict[str, Any] = {"device": "cpu", "dtype": "fp32"}


def row_of(case: dict[str, Any]) -> dict[str, Any]:
    prediction, stage = extract_answer(case["model_outputs"])
    index = "ABCDEFGHIJ".index(case["answer"])
    return {**case, "category": "any", "prediction": prediction, "stage": stage, "answer_index": index, "shots": 5,
            "finish": "stop"}  # fmt: skip


# --- extraction and scoring -----------------------------------------------------------------------------------


def test_predictions_are_the_published_ones() -> None:
    cases = PUBLISHED[1:]
    assert len(cases) == 46 and {case["pred"] for case in cases} > {*"ABCDEFGHI", None}
    assert [extract_answer(case["model_outputs"])[0] for case in cases] == [case["pred"] for case in cases]
    right = sum(case["pred"] == case["answer"] for case in cases)
    assert figures_of([[row_of(case) for case in cases]])["all"]["counts"]["target"]["right"] == right


def test_accuracy_of_a_whole_published_file() -> None:
    whole = [row_of(case) for case in PUBLISHED[1:] if case["source"].startswith("eval_results/business_result.json")]
    figures = figures_of([whole])["all"]
    assert (figures["rows"], figures["counts"]["target"]["right"]) == (3, 3)
    assert figures["target"]["accuracy_with_guess"]["value"] == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So the answer is (B).", ("B", 1)),
        ("the answer is D because A is wrong", ("D", 1)),
        ("The answer is (C).\nQuestion two. The answer is (D).", ("C", 1)),  # the first match
        ("The answer is (K). Answer: C", ("C", 2)),  # beyond the letters
        ("Answer: C", ("C", 2)),
        ("answer:\n\n  J", ("J", 2)),
        ("Answer: A, no, Answer: B\nAnswer: C", ("B", 2)),  # the first line, and the last of it
        ("The answer is: (B)", ("B", 3)),  # the colon is in the way of the first stage
        ("**Answer:** E", ("E", 3)),
        ("B or perhaps I", ("I", 3)),
        ("réponse : \u00abC\u00bb", ("C", 3)),
        ("\u00c9A A\u0301", ("A", 3)),  # a letter inside of a word is none; a combining accent ends one
        ("ABBA, Go_A, H2O", (None, 0)),
        ("the answer is (b)", (None, 0)),
        ("", (None, 0)),
    ],
)
def test_stages(text: str, expected: tuple[str | None, int]) -> None:
    assert extract_answer(text) == expected


def test_extraction_is_that_of_the_published_expressions() -> None:
    def published(text: str) -> str | None:
        for pattern, flags in (
            (r"answer is \(?([A-J])\)?", 0),
            (r".*[aA]nswer:\s*([A-J])", 0),
            (r"(\b[A-J]\b)(?!.*\b[A-J]\b)", re.DOTALL),
        ):
            if found := re.search(pattern, text, flags):
                return found[1]
        return None

    draw = random.Random(0)
    pieces = ["A", "(B)", "J.", "K", " ", "\n", "answer is ", "Answer:", "answer: ", "the", "É", "_", "2", "(", "Ĉ"]
    texts = ["".join(draw.choices(pieces, k=draw.randint(0, 9))) for _ in range(4000)]
    found = [extract_answer(text) for text in texts]
    assert [letter for letter, _ in found] == [published(text) for text in texts]
    assert min(sum(stage == one for _, stage in found) for one in range(4)) > 100


def test_guesses_are_those_of_the_published_scripts() -> None:
    for options in range(1, 11):
        random.seed(12345)
        assert guessed_index(options) == random.randint(0, options - 1)
    random.seed(12345)
    assert guessed_letter() == random.choice(list("ABCDEFGHIJ"))


def test_no_answer_is_wrong_and_guessed_apart() -> None:
    hit = guessed_index(10)
    letters = (guessed_letter() == "ABCDEFGHIJ"[hit]) + (guessed_letter() == "ABCDEFGHIJ"[hit - 1])
    base = {"category": "law", "options": 10, "shots": 5, "finish": "stop", "stage": 0, "prediction": None}
    rows = [
        {**base, "answer": "ABCDEFGHIJ"[hit], "answer_index": hit},
        {**base, "answer": "ABCDEFGHIJ"[hit - 1], "answer_index": hit - 1, "finish": "length"},
        {**base, "answer": "C", "answer_index": 2, "prediction": "C", "category": "art", "stage": 1},
        {**base, "answer": "C", "answer_index": 2, "prediction": "J", "category": "art", "stage": 3, "options": 4},
    ]
    figures = figures_of([rows])
    whole, law, art = figures["all"], *(figures["by"]["category"][name] for name in ("law", "art"))
    assert {name: figure["value"] for name, figure in whole["target"].items()} == {
        "accuracy": 0.25, "accuracy_with_guess": 0.5, "accuracy_with_letter": 0.25 + 0.25 * letters, "answered": 0.5,
    }  # fmt: skip
    assert law["target"]["accuracy"]["value"] == 0 and art["target"]["accuracy"]["value"] == 0.5
    counts = whole["counts"]["target"]
    assert (counts["right"], counts["no_answer"], counts["cut_off"]) == (1, 2, 1)
    assert counts["stages"] == {"3": 1, "1": 1, "0": 2}
    low, high = (law["target"]["accuracy"][end] for end in ("low", "high"))
    assert low == 0 and (1 - high) ** 2 == pytest.approx(0.025)  # none of two right does not mean that none can be


# --- prompts and data -----------------------------------------------------------------------------------------


def question(number: int, category: str = "math", **changes: Any) -> dict[str, Any]:
    options = [f"{number + k}" for k in range(3 + number % 3)]
    index = number % len(options)
    return {
        "question_id": number, "question": f"What is {number} + 1?", "options": [*options, "N/A"],
        "answer": "ABCDEFGHIJ"[index], "answer_index": index, "category": category,
        "cot_content": f"A: Let's think step by step. It is so. The answer is ({'ABCDEFGHIJ'[index]}).",
    } | changes  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four questions of each of two subjects, five worked examples of each, and other data beside them."""
    folder = tmp_path_factory.mktemp("data")
    test = [question(n, "computer science" if n % 2 else "math") for n in range(8)]
    worked = [question(n, category) for category in ("math", "computer science") for n in range(100, 105)]
    write(folder / "mmlu_pro_test.jsonl", test)
    write(folder / "mmlu_pro_validation.jsonl", worked)
    write(folder / "gsm8k_test.jsonl", [{"question": "?"}])
    return folder


def test_prompt_is_the_published_one() -> None:
    shown = Question("1", "computer science", "Odd?", ("yes", "no"), "B", 1)
    example = Question("2", "computer science", "Even?", ("no", "yes"), "B", 1, "A: Let's think step by step. (B).")
    assert cot_prompt(shown, [example]) == (
        "The following are multiple choice questions (with answers) about computer science. Think step by step and "
        'then finish your answer with "the answer is (X)" where X is the correct letter choice.\n\n\n\n'
        "Question:\nEven?\nOptions:\nA. no\nB. yes\nAnswer: Let's think step by step. (B).\n\n"
        "Question:\nOdd?\nOptions:\nA. yes\nB. no\nAnswer: Let's think step by step."
    )


def test_the_real_data(shared_data: Path) -> None:
    if not (shared_data / "mmlu_pro_test.jsonl").exists():
        pytest.skip("needs the public MMLU-Pro files beside the checkout")
    benchmark = load_benchmark(str(shared_data), 5)
    assert sum(map(len, benchmark.test.values())) == 12032 and len(benchmark.test["math"]) == 1351
    assert {len(examples) for examples in benchmark.validation.values()} == {5}
    options = [one.options for questions in benchmark.validation.values() for one in questions]
    assert "N/A" not in {text for texts in options for text in texts} and min(map(len, options)) == 4
    asked = benchmark.test["history"][0]
    prompt = cot_prompt(asked, benchmark.validation["history"])
    assert prompt.count("Question:\n") == prompt.count("Answer: Let's think step by step.") == 6
    assert prompt.endswith("Answer: Let's think step by step.") and asked.text in prompt


def test_data_is_found_by_name(folder: Path, tmp_path: Path) -> None:
    paths = (folder, folder / "mmlu_pro_test.jsonl", folder / "mmlu_pro_*.jsonl")
    by = [load_benchmark(str(path), 5) for path in paths]
    assert by[0].test == by[1].test == by[2].test and by[0].validation == by[1].validation == by[2].validation
    named = load_benchmark([str(folder / f"mmlu_pro_{split}.jsonl") for split in ("test", "validation")], 5)
    assert named.test == by[0].test and named.validation == by[0].validation
    assert by[0].test["math"][1].options == ("2", "3", "4", "5", "6")[: 3 + 2 % 3]

    import pyarrow
    from pyarrow import parquet

    for split in ("test", "validation"):  # as the hub has it
        rows = [json.loads(line) for line in (folder / f"mmlu_pro_{split}.jsonl").open(encoding="utf-8")]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{split}-00000-of-00001.parquet")
    assert load_benchmark(str(tmp_path), 5).test == by[0].test


def test_bad_data(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load_benchmark(str(tmp_path / "mmlu_pro_test.jsonl"), 5)
    with pytest.raises(DataError, match="no data files"):
        load_benchmark(str(tmp_path), 5)
    with pytest.raises(DataError, match=r"this one says `validation`"):
        load_benchmark(str(folder / "mmlu_pro_validation.jsonl"), 5)
    alone = write(tmp_path / "test.jsonl", [question(1)])
    for data in (alone, tmp_path):
        with pytest.raises(DataError, match=r"no file of the validation split.*--shots 0"):
            load_benchmark(str(data), 5)
    assert not load_benchmark(str(alone), 0).validation
    for changes, message in (
        ({"answer": "Z"}, "letter from A"),
        ({"answer": "A", "answer_index": 2}, "contradict"),
        ({"options": "yes"}, "list of texts"),
        ({"options": ["N/A"]}, "0 options"),
        ({"category": None}, "category missing"),
    ):
        with pytest.raises(DataError, match=rf"bad_test.jsonl:2: .*{message}"):
            load_benchmark(str(write(tmp_path / "bad_test.jsonl", [question(1), question(1, **changes)])), 0)
    for number in (1, 2):
        write(tmp_path / f"{'ab'[number - 1]}_mmlu_pro_test.jsonl", [question(number)])
    with pytest.raises(DataError, match="more than one file could be the test split"):
        load_benchmark(str(tmp_path), 0)
    twice = tmp_path / "twice"
    for name in ("a", "b"):  # the same questions twice, and not twice as many questions
        (twice / name).mkdir(parents=True)
        write(twice / name / "mmlu_pro_test.jsonl", [question(1)])
    with pytest.raises(DataError, match=r"more than one file .*a/mmlu_pro_test.jsonl, .*b/mmlu_pro_test.jsonl"):
        load_benchmark(str(twice), 0)
    with pytest.raises(DataError, match="no.jsonl: there is no such file"):
        load_benchmark([str(folder / "mmlu_pro_test.jsonl"), "no.jsonl"], 0)


def test_subjects(folder: Path) -> None:
    benchmark = load_benchmark(str(folder), 5)
    assert choose_subjects("all", benchmark) == ["computer science", "math"]
    assert choose_subjects("Computer_Science", benchmark) == ["computer science"]
    for asked in ("maths", "math,maths", "", "all,math"):
        with pytest.raises(ConfigError, match="There are: all, or any of computer science, math"):
            choose_subjects(asked, benchmark)


def reference(path: str) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path)


# --- runs -----------------------------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")][1:]


def rows_in(folder: Path, mode: str = "cot") -> list[dict[str, Any]]:
    (path,) = folder.glob(f"mmlu_pro_{mode}-*.jsonl")
    return rows_of(path)


def test_a_run(
    toy_llama_dir: Path,
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "luthier")
    csv = tmp_path / "results.csv"
    options: dict[str, Any] = {"data": str(folder), "max_new_tokens": 6, "output": tmp_path / "a", "record": csv, **CPU}
    path, found = run_mmlu_pro(str(toy_llama_dir), **options)
    rows = {row["question_id"]: row for row in rows_in(tmp_path / "a")}
    assert len(rows) == found["figures"]["all"]["rows"] == 8

    model, tokenizer = reference(str(toy_llama_dir))
    benchmark = load_benchmark(str(folder), 5)
    for row in rows.values():
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        assert ids.shape[1] < 512 - 6 and row["shots"] == row["prompt"].count("It is so.")
        assert 0 < row["shots"] < 5
        asked = benchmark.test[row["category"]]
        (one,) = (one for one in asked if one.id == row["question_id"])
        one_more = cot_prompt(one, benchmark.validation[row["category"]][: row["shots"] + 1])
        assert len(tokenizer(one_more).input_ids) >= 512 - 6  # as many examples as leave room
        out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        text = tokenizer.decode(out, skip_special_tokens=True)
        assert row["output"] == text and (row["prediction"], row["stage"]) == extract_answer(text)
        assert row["right"] == (row["prediction"] == row["answer"])
    assert "8 of 8 prompts have fewer than 5 worked examples" in caplog.text
    assert json.loads(path.read_text()) == found and found["kind"] == "mmlu_pro"
    assert (path.parent / found["rows"]).is_file()

    # Measured again: nothing is asked, and the table still has one row; one subject of the same is there already.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "generate", lambda *_, **__: pytest.fail("asked twice"))
        again = run_mmlu_pro(str(toy_llama_dir), **options)[1]
        run_mmlu_pro(f"{toy_llama_dir}/", **options, subjects="math", limit=2)
    assert again["figures"] == found["figures"]
    table = Record.open(csv, KEY).rows
    found_in = [(row["subjects"], row["limit"], row["questions"]) for row in table]
    assert found_in == [("all", "", "8"), ("math", "2", "2")]
    assert len({row["model"] for row in table}) == 1


def test_a_killed_run_goes_on(
    toy_llama_dir: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"data": str(folder), "max_new_tokens": 3, **CPU}
    _, whole = run_mmlu_pro(str(toy_llama_dir), **options, output=tmp_path / "whole")
    add, asked = Store.add, []

    def killed(self: Store, row: dict[str, Any]) -> None:
        if len(asked) == 3:
            self._file.write(b'{"key": "half a li')
            raise KeyboardInterrupt
        asked.append(row["question_id"])
        add(self, row)

    monkeypatch.setattr(Store, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        run_mmlu_pro(str(toy_llama_dir), **options, output=tmp_path / "killed")
    later: list[str] = []
    monkeypatch.setattr(Store, "add", lambda self, row: (later.append(row["question_id"]), add(self, row)))
    _, resumed = run_mmlu_pro(str(toy_llama_dir), **options, output=tmp_path / "killed")
    assert sorted(asked + later) == [str(n) for n in range(8)] and len(later) == 5
    assert resumed["figures"] == whole["figures"]
    by_id = [sorted(rows_in(tmp_path / name), key=lambda row: row["question_id"]) for name in ("whole", "killed")]
    assert by_id[0] == by_id[1]

    # Another length of answers does not mix in.
    later.clear()
    run_mmlu_pro(str(toy_llama_dir), **{**options, "max_new_tokens": 4}, output=tmp_path / "killed")
    assert len(later) == 8 and len(list((tmp_path / "killed").glob("*.jsonl"))) == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, toy_llama_dir: Path) -> Path:
    """A run with a checkpoint, by its config and an adapter, far enough from its base to say other things."""
    from luthier.data.tokenizer import load_tokenizer
    from luthier.models.adapter_files import save_adapter
    from luthier.models.assemble import build_model

    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = {"base_model": str(toy_llama_dir), "datasets": [{"path": "none", "type": "completion"}],
                "adapter": "lora", "lora_r": 4, "bf16": False, "output_dir": str(folder)}  # fmt: skip
    config = Config.from_flat(settings)
    model, _ = build_model(config, load_tokenizer(config), torch.device("cpu"), torch.float32)
    (folder / "checkpoint-3").mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    for place, size in ((folder, 0.5), (folder / "checkpoint-3", 0.2)):
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=size)
        save_adapter(model, place, base_model=str(toy_llama_dir), revision=None, adapter=config.adapter)
    return folder


def test_two_models_are_asked_and_compared_question_by_question(
    run: Path, toy_llama_dir: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    csv = tmp_path / "r.csv"
    ask = ["evaluate", str(run), "--benchmark", "mmlu_pro", "--data", str(folder), "--mode", "loglik"]
    ask += ["--device", "cpu", "--dtype", "fp32", "--compare", "base", "--record", str(csv)]
    opened, add, answered = [], Store.add, []
    open_ = Which.open

    def watched(self: Which, *where: Any) -> Any:
        opened.append(self.name)
        return open_(self, *where)

    def killed(self: Store, row: dict[str, Any]) -> None:
        if len(answered) == 11:  # three questions into the second model
            raise KeyboardInterrupt
        answered.append(row["question_id"])
        add(self, row)

    monkeypatch.setattr(Which, "open", watched)
    monkeypatch.setattr(Store, "add", killed)
    assert cli.main(ask) == 130 and not csv.exists()
    monkeypatch.setattr(Store, "add", lambda self, row: (answered.append(row["question_id"]), add(self, row)))
    capsys.readouterr()
    assert cli.main([*ask, "--json"]) == 0
    assert opened == ["run", "base"] * 2 and sorted(answered) == sorted([str(n) for n in range(8)] * 2)

    result = json.loads(capsys.readouterr().out)
    assert (result["target"], result["compare"]) == (str(run), str(toy_llama_dir))
    sides = [rows_of(run / "evaluation" / result[name]) for name in ("rows", "rows_compare")]
    scores = []
    for (path, compared), rows in zip((("target", run), ("compare", toy_llama_dir)), sides, strict=True):
        _, alone = run_mmlu_pro(str(compared), data=str(folder), mode="loglik", output=tmp_path / path, **CPU)
        assert alone["figures"]["all"]["target"] == result["figures"]["all"][path]
        by_id = {row["question_id"]: row for row in rows}
        assert [row["logprobs"] for row in rows_of(tmp_path / path / alone["rows"])] == [
            by_id[row["question_id"]]["logprobs"] for row in rows_of(tmp_path / path / alone["rows"])
        ]
        scores.append({name: row["right"] for name, row in by_id.items()})
    assert sides[0][0]["logprobs"] != sides[1][0]["logprobs"]  # otherwise the adapter could be missing
    groups = {"all": list(range(8)), "math": [0, 2, 4, 6], "computer science": [1, 3, 5, 7]}
    for name, numbers in groups.items():
        group = result["figures"]["all"] if name == "all" else result["figures"]["by"]["category"][name]
        after, before = ([side[str(n)] for n in numbers] for side in scores)
        found = group["difference"]["accuracy"]
        assert found["value"] == pytest.approx((sum(after) - sum(before)) / len(numbers))
        assert found["low"] <= found["value"] <= found["high"] and found["beyond_chance"] is False
    assert [row["model"] for row in Record.open(csv, KEY).rows] == [str(run), str(toy_llama_dir)]

    # Once more, as a table, from what is there.
    monkeypatch.setattr(Store, "add", lambda *_: pytest.fail("asked twice"))
    assert cli.main(ask) == 0
    printed = capsys.readouterr().out
    assert "base, accuracy" in printed and "No difference in accuracy beyond chance" in printed
    assert len(Record.open(csv, KEY).rows) == 2


def test_a_difference_beyond_chance_is_said() -> None:
    base = {"category": "law", "options": 10, "shots": 5, "finish": "stop", "stage": 1}
    base |= {"answer": "C", "answer_index": 2}
    said = ("C" * 18 + "DD", "C" * 6 + "D" * 14)
    sides = [[{**base, "prediction": letter} for letter in letters] for letters in said]
    figures = figures_of(sides)
    found = figures["all"]["difference"]["accuracy"]
    before, after = ([row["prediction"] == "C" for row in rows] for rows in sides[::-1])
    assert (found["low"], found["high"]) == bootstrap_difference(before, after)
    assert found["value"] == pytest.approx(0.6) and found["beyond_chance"] and found["better"]
    settings = {"mode": "cot", "shots": 5}
    text = shown({"figures": figures, "names": {"target": "mine", "compare": "base"}, "settings": settings})
    assert "mine is better than base by 60.0 points" in text and "+60.0" in text
    assert figures_of(sides[::-1])["all"]["difference"]["accuracy"]["better"] is False


def test_a_checkpoint_has_results_of_its_own(run: Path, folder: Path) -> None:
    written = [
        run_mmlu_pro(str(target), data=str(folder), mode="loglik", limit=1, **CPU)[0]
        for target in (run, run / "checkpoint-3")
    ]
    assert written[1] == run / "evaluation" / "checkpoint-3" / written[0].name and written[0].is_file()


def test_a_checkpoint_is_opened_on_the_base_as_it_was_stored_in_training(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    copied = tmp_path / "run"
    shutil.copytree(run, copied, ignore=shutil.ignore_patterns("evaluation"))
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace("load_in_4bit: false", "load_in_4bit: true"))
    for target in (copied, copied / "checkpoint-3"):
        (which,) = which_models(str(target), None)
        model = which.open(torch.device("cpu"), torch.float32)
        assert identity(which, model)["dtype"] == precision_of(model) == "4 bits, float32"


def test_other_weights_do_not_mix_in(toy_llama_dir: Path, folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(toy_llama_dir)
    AutoTokenizer.from_pretrained(toy_llama_dir).save_pretrained(tmp_path / "model")
    for scale in (1.0, 0.5):
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        model.save_pretrained(tmp_path / "model")
        run_mmlu_pro(
            str(tmp_path / "model"), data=str(folder), mode="loglik", output=tmp_path / "out", **CPU
        )
    files = sorted((tmp_path / "out").glob("*.jsonl"))
    assert len(files) == 2 and len(files[0].read_text().splitlines()) == len(files[1].read_text().splitlines()) == 9
    with pytest.raises(RunError, match=r"measured otherwise \(weights\)"):
        Store(files[0], {**json.loads(files[0].read_text().splitlines()[0])["header"], "weights": "other"})
    files[0].write_text("no json\n")
    with pytest.raises(RunError, match="not the answers of an evaluation"):
        Store(files[0], {})


@pytest.mark.parametrize(("name", "behind"), [("toy", {2}), ("demo", {1, 2})], ids=["space apart", "some as two"])
@torch.no_grad()
def test_loglik_is_that_of_transformers(
    name: str, behind: set[int], toy_llama_dir: Path, folder: Path, tmp_path: Path
) -> None:
    """`behind`: ids that a letter and its space are, one kind of tokenizer after the other."""
    path = str(toy_llama_dir if name == "toy" else BASE_MODEL)
    run_mmlu_pro(path, data=str(folder), mode="loglik", output=tmp_path, **CPU, shots=2)
    model, tokenizer = reference(path)
    rows, lengths = rows_in(tmp_path, "loglik"), set()
    assert len(rows) == 8
    for row in rows:
        start = len(tokenizer(row["prompt"]).input_ids)
        assert row["prompt"].endswith("Answer:") and "step by step" not in row["prompt"] and row["shots"] == 2
        ids = {letter: tokenizer(f"{row['prompt']} {letter}").input_ids for letter in row["logprobs"]}
        lengths |= {len(found) - start for found in ids.values()}
        start += len({found[start] for found in ids.values()}) == 1  # a space that all letters go on from
        scores = {}
        for letter, found in ids.items():
            logps = model(torch.tensor([found])).logits[0].log_softmax(-1)
            scores[letter] = float(sum(logps[at - 1, found[at]] for at in range(start, len(found))))
        assert row["logprobs"] == pytest.approx(scores, abs=2e-4)
        assert row["prediction"] == max(scores, key=scores.__getitem__) and len(scores) == row["options"]
    assert lengths == behind


def test_chat_puts_the_prompt_into_the_template(toy_llama_dir: Path, folder: Path, tmp_path: Path) -> None:
    prompts: list[list[int]] = []
    generate = Engine.generate

    def spy(self: Engine, ids: Any, sampling: Any, **rest: Any) -> Any:
        prompts.extend(ids)
        assert sampling.stop == ("Question:",) and sampling.do_sample is False
        return generate(self, ids, sampling, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "generate", spy)
        run_mmlu_pro(
            str(toy_llama_dir), data=str(folder), chat=True, subjects="math", limit=1, shots=0, max_new_tokens=2,
            output=tmp_path, **CPU,
        )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(toy_llama_dir)
    message = {"role": "user", "content": rows_in(tmp_path)[0]["prompt"]}
    assert prompts == [tokenizer.apply_chat_template([message], add_generation_prompt=True)["input_ids"]]


def test_memory_that_runs_out_makes_smaller_batches(toy_llama_dir: Path, folder: Path, tmp_path: Path) -> None:
    resize, failed = Slots.resize, []

    def tight(self: Slots, slots: int, tokens: int) -> None:
        if slots > 1:
            failed.append(slots)
            raise torch.OutOfMemoryError("CUDA out of memory")
        resize(self, slots, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Slots, "resize", tight)
        patch.setattr(mmlu_pro, "cached_tokens", lambda model: 4000)
        _, found = run_mmlu_pro(
            str(toy_llama_dir), data=str(folder), max_new_tokens=2, output=tmp_path, **CPU
        )
    assert found["figures"]["all"]["rows"] == 8 and failed


def test_bad_asks(toy_llama_dir: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Which, "open", lambda *_, **__: pytest.fail("the model was loaded"))
    other = tmp_path / "other.csv"
    other.write_text("name,age\nx,1\n")
    for options, error, message in (
        ({"mode": "letters"}, ConfigError, "cot or loglik"),
        ({"mode": "loglik", "chat": True}, ConfigError, "--chat"),
        ({"limit": 0}, ConfigError, "--limit"),
        ({"shots": -1}, ConfigError, "--shots"),
        ({"dtype": "int3"}, ConfigError, "--dtype"),
        ({"subjects": "astrology"}, ConfigError, "no such subject"),
        ({"data": str(tmp_path / "none.jsonl")}, DataError, "no such file"),
        ({"compare": "base"}, ConfigError, "is no run"),
        ({"compare": str(tmp_path)}, ModelError, "neither a run, an adapter nor a model"),
        ({"output": other / "under-a-file"}, RunError, "cannot be written"),
        ({"record": other}, DataError, "no column `model`"),
        ({"record": tmp_path / "no" / "r.csv"}, DataError, "no folder"),
    ):
        with pytest.raises(error, match=message):
            run_mmlu_pro(str(toy_llama_dir), **{"data": str(folder), "output": tmp_path, **options})
    assert other.read_text() == "name,age\nx,1\n"


# --- the table ------------------------------------------------------------------------------------------------


def test_rows_that_differ_in_a_setting_are_told_apart_and_other_benchmarks_have_no_empty_row(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    record = Record.open(path, KEY)
    mine = {"model": "mine", "mode": "cot", "subjects": "all", "shots": 5, "dtype": "float32", "accuracy": "0.2"}
    record.add({**mine, "max_new_tokens": 2048})
    head, *rows = recorded(path).splitlines()[1:]
    assert head.split() == ["model", "mode", "subjects", "shots", "accuracy"]
    record.add({**mine, "max_new_tokens": 64})
    record.add({"model": "mine", "benchmark": "lm-eval", "demo exact_match": "0.9"})
    record.add({"model": "theirs", "accuracy": "0.7"})
    head, *rows = recorded(path).splitlines()[1:]
    assert head.split() == ["model", "mode", "subjects", "shots", "max_new_tokens", "accuracy"]
    assert [row.split()[-2:] for row in rows] == [["2048", "0.2"], ["64", "0.2"], ["theirs", "0.7"]]


def test_a_record_keeps_what_others_wrote(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text('\ufeffmodel,accuracy,note\nGPT-4o,0.7255,"published, API"\n', encoding="utf-8")
    record = Record.open(path, ("model", "mode"))
    assert not record.add({"model": "mine", "mode": "cot", "accuracy": "0.2"})
    assert not record.add({"model": "mine", "mode": "loglik", "accuracy": "0.3"})
    assert Record.open(path, ("model", "mode")).add({"model": "mine", "mode": "cot", "accuracy": "0.25", "limit": None})
    rows = Record.open(path, ("model", "mode")).rows
    assert [(row["model"], row["mode"], row["accuracy"]) for row in rows] == [
        ("GPT-4o", "", "0.7255"), ("mine", "cot", "0.25"), ("mine", "loglik", "0.3"),
    ]  # fmt: skip
    assert rows[0]["note"] == "published, API" and [file.name for file in tmp_path.iterdir()] == ["r.csv"]
