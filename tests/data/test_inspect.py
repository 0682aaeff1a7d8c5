"""`luthier inspect data`: each kind of problem planted and found, clean rows left alone, figures those of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from luthier.cli import main
from luthier.config import Config
from luthier.data.dataset import prepare
from luthier.data.inspect.checks import KINDS, hidden, problems_of
from luthier.data.inspect.command import inspect_data
from luthier.data.inspect.judge import lora_parameters
from luthier.data.inspect.repeats import sketch_jaccard
from luthier.data.inspect.views import View, words_of
from luthier.data.tokenizer import load_tokenizer
from luthier.errors import DataError
from luthier.models.assemble import build_model

CLEAN = [
    ("Name three colours.", "Red, green and blue."),
    ("Solve x < 3 and y > <b>2</b>.", "x = 2, y = 3; see `<s>` in HTML, or a[insert_at] in code."),
    ("Übersetze: café, naïve, “quoted”, – dash", "Ein Café; naïve; 日本語も。 🚀"),
    ("What does Â mean in Portuguese, and Ã?", "Letters: Â as in câmara, Ã as in maçã."),
    ("List words", "\n".join(f"- thing number {n} of a kind" for n in range(30))),
    ("Apologise to a customer", "I'm sorry to hear that your order was late. We will send another."),
    ("Why?", "Yes."),
]
KEY = "sk-" + "aB3" * 8


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def alpaca(instruction: str, output: str, **more: Any) -> dict[str, Any]:
    return {"instruction": instruction, "input": "", "output": output, **more}


def verdict(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in result["verdicts"] if each["name"] == name)


def kinds_of(result: dict[str, Any]) -> dict[str, int]:
    return {kind: found["rows"] for kind, found in verdict(result, "broken")["figures"]["kinds"].items()}


# --- one row


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("secret", f"Set the key to {KEY} and go."),
        ("secret", "AKIAIOSFODNN7EXAMPLE is the id."),
        ("password", "password = 'hunter2hunter2'"),
        ("empty answer", " \n"),
        ("encoding", "It is the womanâ€™s fiancÃ© who said so."),
        ("encoding", "This \ufffd is lost."),
        ("control characters", "a\x00b is not."),
        ("control characters", "a\u0085b is not."),
        ("template tokens", "Fine.</s>"),
        ("template tokens", "Fine.<|im_end|>\n<|im_start|>user"),
        ("template tokens", "[INST] Do [/INST]"),
        ("placeholder", "Dear {{name}}, hello."),
        ("placeholder", "Dear [Your Name], hello."),
        ("repeats the prompt", "Tell me all that there is to know of the sea. It is wet."),
        ("repeats itself", "this is what i said before and " * 20 + "end."),
        ("no answer", "N/A"),
        ("refusal", "I'm sorry, but I can't help with that."),
        ("refusal", "As an AI language model, I do not have feelings."),
        ("cut off", "The sea is wide and it is deep " * 4 + "and then it was, "),
        ("line ends", "one\r\ntwo."),
        ("line ends", "one\u2028two."),
        ("one word", "Blue"),
    ],
)
def test_each_kind_is_found(kind: str, answer: str) -> None:
    view = View("Tell me all that there is to know of the sea.", (answer,), given="")
    assert kind in dict(problems_of(view))
    assert kind in KINDS


def test_clean_rows_are_clean() -> None:
    for prompt, answer in CLEAN:
        found = dict(problems_of(View(prompt, (answer,), given="")))
        assert set(found) <= {"one word"}, (prompt, found)


def test_no_secret_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert KEY[4:] not in hidden(f"key: {KEY}.")
    path = write(tmp_path / "rows.jsonl", [alpaca("What is the key?", f"It is {KEY}.")] * 2)
    assert main(["inspect", "data", str(path)]) == 0
    said = capsys.readouterr()
    assert KEY not in said.out + said.err
    assert "what looks like a key or a token" in said.out


def test_words() -> None:
    assert words_of("Don't stop, 日本 x2!") == ["don", "t", "stop", "日", "本", "x2"]


def test_sketches_estimate_jaccard() -> None:
    draw = np.random.default_rng(0)
    pool = draw.permutation(np.unique(draw.integers(0, 2**63, 6000, dtype=np.uint64)))
    for common in (500, 1500, 2500):
        one, other = np.sort(pool[:3000]), np.sort(np.concatenate([pool[:common], pool[3000:4000]]))
        exact = common / (3000 + len(other) - common)
        assert abs(sketch_jaccard(one[:256], other[:256]) - exact) < 0.1  # three standard deviations of 256 draws
        few, more = np.sort(pool[:50]), np.sort(pool[25:90])
        assert sketch_jaccard(few, more) == 25 / 90


# --- files


def test_types_are_guessed(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi there?"}, {"role": "assistant", "content": "Hello to you."}]
    shapes: list[tuple[dict[str, Any], Any, str | None]] = [
        ({"instruction": "a b", "output": "c d"}, "alpaca", None),
        ({"question": "a b", "answer": "c d"}, "alpaca_chat.load_qa", None),
        ({"messages": chat}, "chat_template", None),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b c"}]}, "chat_template", None),
        ({"text": "a b c"}, "completion", None),
        ({"segments": [{"label": True, "text": "a b"}]}, "input_output", None),
        ({"input_ids": [1, 2, 3]}, None, None),
        ({"prompt": "a b", "chosen": "c d", "rejected": "e f"}, None, "dpo"),
        ({"conversations": chat[:1], "chosen": chat[1], "rejected": {**chat[1], "content": "No."}},
         "chat_template.default", "dpo"),
        ({"prompt": "a b", "completion": "c d", "label": True}, None, "kto"),
        ({"messages": chat, "label": False}, "chat_template.default", "kto"),
        ({"problem": "a b", "solution": "c d"}, {"field_instruction": "problem", "field_output": "solution",
                                                "format": "{instruction}\n"}, None),
    ]  # fmt: skip
    for number, (row, kind, rl) in enumerate(shapes):
        result = inspect_data([str(write(tmp_path / f"{number}.jsonl", [row]))])
        assert (result["sources"][0]["type"], result["rl"]) == (kind, rl)
        assert kinds_of(result).get("unreadable", 0) == 0
    with pytest.raises(DataError, match=r"cannot be guessed from their columns \(a, b\).*--type"):
        inspect_data([str(write(tmp_path / "odd.jsonl", [{"a": 1.5, "b": 2.5}]))])


def test_repeats_and_contamination(tmp_path: Path) -> None:
    long = " ".join(f"word{n}" for n in range(40))
    rows = [alpaca(f"Question number {n} is what?", f"Answer {n} it is, {n * n}.") for n in range(30)]
    near = [alpaca("Tell a story of words.", long), alpaca("Tell a story of words.", long + " more")]
    path = write(tmp_path / "rows.jsonl", [*rows, rows[3], *near, alpaca("Question number 5 is what?", "No idea.")])
    test = write(tmp_path / "test.jsonl", [rows[7], alpaca("Another?", f"So {long[40:200]}"), alpaca("Short?", "No.")])
    result = inspect_data([str(path)], validation=[str(test)])
    repeated, contaminated = verdict(result, "duplicated")["figures"], verdict(result, "contaminated")["figures"]
    assert (repeated["equal"], repeated["near"], repeated["same_prompt_other_answer"]) == (1, 1, 4)
    assert (contaminated["equal"], contaminated["sharing_text"], contaminated["validation"]) == (1, 1, 3)
    assert contaminated["too_short"] == 2
    assert verdict(result, "contaminated")["level"] == "bad"
    shown = {row["place"]: dict(map(tuple, row["problems"])) for row in result["worst"]}
    assert shown[f"{path}:31"]["repeats"] == "as line 4"
    assert shown[f"{path}:8"]["in the validation data"] == f"as {test}:1"


def test_unreadable_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(alpaca("What is it?", "It is this."))
    path.write_text(f"{good}\n{{broken\n{good}\n" + json.dumps({"instruction": "x", "output": None}) + "\n")
    result = inspect_data([str(path)])
    assert kinds_of(result)["unreadable"] == 2
    assert result["worst"][0]["place"] == f"{path}:2"
    assert verdict(result, "broken")["level"] == "bad"


def test_balance(tmp_path: Path) -> None:
    rows = [alpaca(f"Say number {n}, please.", f"{n} it is.", kind="a" if n else "b", id=n) for n in range(60)]
    result = inspect_data([str(write(tmp_path / "rows.jsonl", rows))])
    balance = verdict(result, "balanced")
    assert balance["figures"]["columns"] == {"kind": {"a": 59, "b": 1}}  # `id` is no category
    assert balance["figures"]["empty_inputs"] == 60
    assert balance["level"] == "look"
    labels = [{"prompt": f"What is {n}?", "completion": f"It is {n}.", "label": n > 0} for n in range(30)]
    assert verdict(inspect_data([str(write(tmp_path / "kto.jsonl", labels))]), "balanced")["level"] == "look"
    one = [{**row, "label": True} for row in labels]
    assert verdict(inspect_data([str(write(tmp_path / "one.jsonl", one))]), "balanced")["level"] == "bad"


@pytest.mark.parametrize(("no", "level"), [(0, "bad"), (5, "look"), (20, "look"), (101, "fine")])
def test_answers_of_one_word(tmp_path: Path, no: int, level: str) -> None:
    """The same to every row; one-sided; two kinds (each of which begins a quarter); a class to every row of its own."""
    names = ["No." if n < no else "yes" for n in range(100)] if no <= 100 else [f"Word{n}" for n in range(100)]
    rows = [alpaca(f"Is {n} a number, as far as you know?", name) for n, name in enumerate(names)]
    balance = verdict(inspect_data([str(write(tmp_path / "rows.jsonl", rows))]), "balanced")
    assert balance["level"] == level
    counted = {"yes": 100 - no} | ({"no": no} if no else {})
    assert balance["figures"].get("short_answers") == (counted if no <= 100 else None)
    assert ("one-sided" in " ".join(balance["more"])) == (no <= 5)


def test_a_sample_is_even_and_said(tmp_path: Path) -> None:
    rows = [alpaca(f"Say number {n}, please.", "" if n % 8 == 0 else f"Here is number {n}.") for n in range(900)]
    result = inspect_data([str(write(tmp_path / "rows.jsonl", rows))], limit=200)
    assert any("113 of 900 rows were looked at, every 8th" in line for line in result["said"])
    assert kinds_of(result)["empty answer"] == 113
    assert verdict(result, "large enough")["figures"]["rows"] == 900


def test_lines_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    path.write_bytes(b"one thing happened here\r\n\r\nanother thing happened\r\none thing happened here\r\nlast one")
    result = inspect_data([str(path)])
    assert kinds_of(result)["line ends"] == 3
    assert verdict(result, "duplicated")["figures"]["equal"] == 1


# --- configs


def test_a_config_counts_as_its_run_does(
    toy_llama_dir: Path, toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [alpaca(f"Say number {n % 30}, please.", f"Here is {n % 30}. " * (1 + n % 30)) for n in range(40)]
    path = write(tmp_path / "rows.jsonl", rows)
    flat = {
        "base_model": str(toy_llama_dir), "datasets": [{"path": str(path), "type": "alpaca"}], "sequence_len": 256,
        "val_set_size": 6, "adapter": "lora", "lora_r": 4, "lora_target_linear": True,
        "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    file = tmp_path / "run.yml"
    file.write_text(json.dumps(flat))
    result = inspect_data([str(file)])
    config = Config.load(file)
    data = prepare(config, toy_tokenizer)
    assert data.validation is not None
    too_long = verdict(result, "too long")["figures"]
    assert too_long["over"] == sum(tally.count for tally in data.report.dropped.values()) > 0
    everything = prepare(config.replace("test", sequence_len=4096, val_set_size=0), toy_tokenizer)
    assert too_long["longest"] == everything.report.longest
    assert verdict(result, "large enough")["figures"]["trained_tokens"] == everything.report.trained_tokens
    contaminated = verdict(result, "contaminated")["figures"]
    held = data.validation.digests
    assert contaminated["validation"] == 6
    assert contaminated["equal"] == int(np.isin(data.train.digests, held).sum()) > 0
    left = prepare(config.replace("test", dataset_exact_deduplication=True), toy_tokenizer)
    assert left.report.repeats is not None
    assert left.report.repeats.contaminating.count == contaminated["equal"]
    # LoRA's own count, from shapes alone.
    model, _ = build_model(config, load_tokenizer(config), torch.device("cpu"), torch.float32)
    trained = sum(each.numel() for name, each in model.named_parameters() if "lora_" in name)
    assert lora_parameters(config) == trained > 0


def test_chats_of_a_tokenizer_without_a_template(
    toy_tokenizer: PreTrainedTokenizerFast, tokenizer_with: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    plain = tokenizer_with(None, ("<|im_start|>", "<|im_end|>"))
    plain.save_pretrained(folder)
    chat = [{"role": "user", "content": "Hi there?"}, {"role": "assistant", "content": "Hello to you."}]
    path = write(tmp_path / "chats.jsonl", [{"messages": chat}])
    result = inspect_data([str(path)], tokenizer=str(folder))
    assert result["tokens"] == "counted"
    assert "the tokenizer has no chat template; chatml is taken" in result["said"]
    assert verdict(result, "large enough")["figures"]["trained_tokens"] > 0


# --- the command


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "rows.jsonl", [alpaca("What is it?", f"It is {n}.") for n in range(10)])
    report = tmp_path / "report.json"
    assert main(["inspect", "data", str(path), "--json", str(report), "--worst", "2"]) == 0
    said = capsys.readouterr().out
    assert " bad  large enough: 10 rows" in said
    assert json.loads(report.read_text())["sources"][0]["rows"] == 10
    assert main(["inspect", "data", str(path), "--strict"]) == 1
    capsys.readouterr()
    assert main(["inspect", "data", str(path), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["verdicts"]


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = str(write(tmp_path / "rows.jsonl", [alpaca("What is it?", "It is this.")]))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text("{no\n")
    (tmp_path / "odd.yml").write_text("- a\n- b\n")
    pairs = str(write(tmp_path / "pairs.jsonl", [{"prompt": "a b", "chosen": "c d", "rejected": "e f"}]))
    cases: list[tuple[list[str], int, str]] = [
        (["data", str(tmp_path / "gone.jsonl")], 1, "gone.jsonl"),
        (["data", rows, "--type", "alpaka"], 2, "alpaka"),
        (["data", rows, "--type", "{field_instruction: [}"], 2, "--type"),
        (["data", rows, "--type", "chat_template"], 1, "none of its rows can be read as chat_template"),
        (["data", str(tmp_path / "empty.jsonl")], 1, "there are no rows in it"),
        (["data", str(tmp_path / "broken.jsonl")], 1, "no row of it can be read"),
        (["data", str(tmp_path / "odd.yml")], 2, "odd.yml"),
        (["data", str(tmp_path / "gone.yml")], 2, "gone.yml"),
        (["data", rows, pairs], 2, "inspect them apart"),
        (["data", rows, str(tmp_path / "odd.yml")], 2, "is a config, and is inspected alone"),
        (["data", str(tmp_path / "odd.yml"), "--type", "alpaca"], 2, "which says that itself"),
        (["data", rows, "--tokenizer", str(tmp_path / "nowhere")], 1, "nowhere"),
        (["model", rows], 2, "luthier inspect data"),
        (["data", rows, "--near", "0.1"], 2, "greater than or equal to 0.5"),
        (["data", rows, "--json", str(tmp_path / "no" / "file.json")], 1, "cannot be written"),
    ]
    for arguments, status, message in cases:
        assert main(["inspect", *arguments]) == status, arguments
        said = capsys.readouterr()
        assert message in said.err, (arguments, said.err)
        assert "Traceback" not in said.err and "internal error" not in said.err


# --- public data, and what is known to be odd about it

KNOWN: list[tuple[str, dict[str, int], int]] = [
    ("llamafactory/alpaca_en_demo.json", {"no input": 5}, 14),
    ("llamafactory/kto_en_demo.json", {"template tokens": 1}, 0),
    ("llamafactory/identity.json", {"placeholder": 80}, 0),
    ("llamafactory/glaive_toolcall_en_demo.json", {}, 38),
    ("prefs_dpo_en_single_turn.jsonl", {"control characters": 1}, 2),
    ("mmlu_pro_validation.jsonl", {"one word": 70}, 0),
    ("logs/Apache_2k.log", {"line ends": 1999}, 539),
]
LARGE: list[tuple[str, dict[str, int], int]] = [
    ("logs/HDFS_2k.log", {"line ends": 1900}, 0),
    ("logs/OpenSSH_2k.log", {"line ends": 1999}, 0),
    ("alpaca_52k.jsonl", {"empty answer": 28, "control characters": 2, "no input": 484}, 0),
    ("gsm8k_train.jsonl", {"line ends": 1}, 0),
    ("gsm8k_train_problem_answer.parquet", {"line ends": 1}, 0),
    ("gsm8k_test.jsonl", {}, 0),
    ("prefs_dpo_en_300_conversational.jsonl", {"control characters": 1}, 5),
    ("mmlu_pro_test.jsonl", {"control characters": 1}, 0),
]


def _check(folder: Path, name: str, least: dict[str, int], equal: int) -> dict[str, Any]:
    if not (folder / name).exists():
        pytest.skip(f"needs {name}, which is kept beside the checkout")
    result = inspect_data([str(folder / name)], worst=50)
    found = kinds_of(result)
    assert found.get("unreadable", 0) == 0
    for kind, count in least.items():
        assert found.get(kind, 0) >= count, (name, kind, found)
    assert verdict(result, "duplicated")["figures"]["equal"] >= equal
    return result


@pytest.mark.parametrize(("name", "least", "equal"), KNOWN)
def test_public_data(shared_data: Path, name: str, least: dict[str, int], equal: int) -> None:
    _check(shared_data, name, least, equal)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least", "equal"), LARGE)
def test_large_public_data(shared_data: Path, name: str, least: dict[str, int], equal: int) -> None:
    result = _check(shared_data, name, least, equal)
    places = {kind: [place for place, _ in found["first"]] for kind, found in
              verdict(result, "broken")["figures"]["kinds"].items()}  # fmt: skip
    if name == "alpaca_52k.jsonl":
        assert [int(place.rpartition(":")[2]) for place in places["empty answer"]] == [285, 1224, 1348]
        assert [int(place.rpartition(":")[2]) for place in places["control characters"]] == [29820, 38225]
        assert verdict(result, "too long")["figures"]["longest_at"].endswith(":6286")
        assert verdict(result, "balanced")["figures"]["empty_inputs"] == 31323
    if name == "gsm8k_train.jsonl":
        assert places["line ends"][0].endswith(":2382")
