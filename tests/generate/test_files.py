"""`luthier generate --data`: rows in, answers out, and what happens when it is cut off or asked otherwise."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch

from luthier.cli import main
from luthier.config import Config
from luthier.data.formats import ALPACA
from luthier.generate.continuous import Continuous
from luthier.generate.slots import Slots

Asked = Callable[..., int]
NEW = 6


@pytest.fixture
def ask(toy_llama_dir: Path, tmp_path: Path) -> Asked:
    """ask(*options): the command on `prompts.jsonl`, greedy and short unless the options say otherwise."""

    def run(*options: str, data: str = "prompts.jsonl", model: Path = toy_llama_dir) -> int:
        files = ["--data", str(tmp_path / data), "--output", str(tmp_path / "answers.jsonl")]
        return main(["generate", str(model), *files, "--max-new-tokens", str(NEW), *options])

    return run


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answers(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]


def transformers_says(folder: Path, tokenizer: Any, text: str) -> tuple[str, int]:
    """Greedy text, and how many tokens the prompt has."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    said = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :]
    return str(tokenizer.decode(said, skip_special_tokens=True)), len(ids)


def chatml(user: str, system: str = "") -> str:
    opening = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{opening}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


# --- what is asked -------------------------------------------------------------------------------------------------


def test_rows_of_all_kinds_are_asked_in_the_models_format_and_carried_along(
    ask: Asked, toy_llama_dir: Path, toy_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    rows = [
        {"id": 3, "prompt": "hello"},
        {"question": "what is that", "answer": "42", "index": "a"},
        {"instruction": "add", "input": "1 2", "output": "3"},
        {"messages": turns, "tags": ["x", None]},
        {"conversations": [{"from": "human", "value": "hello"}], "system": "be kind"},
        {"prompt": "hello", "system": ""},
    ]
    write(tmp_path / "prompts.jsonl", rows)
    assert ask("--system", "be brief") == 0
    texts = [
        chatml("hello", "be brief"), chatml("what is that", "be brief"), chatml("add\n1 2", "be brief"),
        chatml("one", "be brief"), chatml("hello", "be kind"), chatml("hello", "be brief"),
    ]  # fmt: skip
    found = answers(tmp_path)
    for index, (row, text, line) in enumerate(zip(rows, texts, found, strict=True)):
        said, count = transformers_says(toy_llama_dir, toy_tokenizer, text)
        assert (line["answer"], line["prompt_tokens"], line["answer_tokens"]) == (said, count, NEW)
        assert (line["index"], line["sample"], line["finish_reason"]) == (index, 0, "length")
        kept = {f"given_{name}" if name in ("answer", "index") else name: value for name, value in row.items()}
        assert kept.items() <= line.items()
    error = capsys.readouterr().err
    assert "carried with given_ before it: answer, index" in error
    assert "of their own, which --system does not replace: 1" in error
    assert "6 of them cut off" in error


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", b"\xef\xbb\xbfone two\r\n\n three\n"),
        ("p.csv", b'prompt,n\none two,1\n" three",2\n'),
        ("p.parquet", None),
    ],
)
def test_other_files(
    name: str, content: bytes | None, ask: Asked, toy_llama_dir: Path, toy_tokenizer: Any, tmp_path: Path
) -> None:
    if content is None:
        import datetime

        import pyarrow as pa
        import pyarrow.parquet as pq

        days = [datetime.date(2024, 5, 6)] * 2
        pq.write_table(pa.table({"prompt": ["one two", " three"], "day": days}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    assert ask("--raw", data=name) == 0
    found = answers(tmp_path)
    assert [line["answer"] for line in found] == [
        transformers_says(toy_llama_dir, toy_tokenizer, text)[0] for text in ("one two", " three")
    ]
    assert name != "p.parquet" or found[0]["day"] == "2024-05-06"


def test_a_run_is_asked_by_the_columns_of_its_data(
    ask: Asked, toy_llama_dir: Path, toy_tokenizer: Any, tmp_path: Path
) -> None:
    """Here a merged model inside of a run, whose rows have columns of their own."""
    entry = {"path": "rows.jsonl", "type": "alpaca", "field_instruction": "task", "field_input": "on"}
    config = Config.from_flat({"base_model": str(toy_llama_dir), "datasets": [entry]})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    folder = copytree(toy_llama_dir, tmp_path / "merged")
    rows = [{"task": "Add.", "on": "1 2", "prompt": "not this"}, {"prompt": "Add."}, {"text": "one", "x": "two"}]
    write(tmp_path / "prompts.jsonl", rows)
    assert ask(model=folder) == 0
    texts = [ALPACA.pieces(*parts, None)[0] for parts in (("Add.", "1 2"), ("Add.", ""), ("one", ""))]
    expected = [transformers_says(toy_llama_dir, toy_tokenizer, text)[0] for text in texts]
    assert [line["answer"] for line in answers(tmp_path)] == expected
    write(tmp_path / "prompts.jsonl", rows[2:])
    assert ask("--field", "x", "--overwrite", model=folder) == 0
    [line] = answers(tmp_path)
    assert line["answer"] == transformers_says(toy_llama_dir, toy_tokenizer, ALPACA.pieces("two", "", None)[0])[0]
    assert line["prompt"] == "two"  # the judge looks there


def test_what_cannot_be_answered_is_written_with_the_reason(
    ask: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "one two three " * 400
    only = [{"role": "assistant", "content": "x"}]
    write(tmp_path / "prompts.jsonl", [{"prompt": ""}, {"prompt": "hi"}, {"prompt": long}, {"messages": only}])
    assert ask() == 0
    found = answers(tmp_path)
    assert [bool(line.get("skipped")) for line in found] == [True, False, True, True]
    assert "empty" in found[0]["skipped"]
    assert "context window" in found[2]["skipped"]
    assert found[0]["answer"] is None
    assert "3 of 4 answers there are not" in capsys.readouterr().err
    write(tmp_path / "prompts.jsonl", [{"prompt": ""}])
    assert ask("--overwrite") == 1
    assert "not a single row could be answered" in capsys.readouterr().err


def test_bad_rows_are_named_before_a_model_is_loaded(
    ask: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi"}\nnot json\n[1]\n')
    assert ask() == 1
    error = capsys.readouterr().err
    assert f"bad rows: 2\n  {tmp_path}/prompts.jsonl:2: not valid JSON" in error
    assert "prompts.jsonl:3:" in error
    assert "--skip-bad-rows" in error
    with monkeypatch.context() as never:
        never.setattr("luthier.models.assemble.open_for_inference", None)
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi"}\n{"title": "x"}\n{"prompt": 3}\n')
        assert ask() == 1
    error = capsys.readouterr().err
    assert "prompts.jsonl:2: there is nothing to ask: no `messages`" in error
    assert "prompts.jsonl:3: `prompt` must be text" in error
    assert not (tmp_path / "answers.jsonl").exists()
    assert ask("--skip-bad-rows") == 0
    assert len(answers(tmp_path)) == 1
    assert "left out, 2 bad rows" in capsys.readouterr().err


# --- how many answers, and in which order --------------------------------------------------------------------------


def test_samples_are_those_of_their_seed_however_many_are_asked_for(ask: Asked, tmp_path: Path) -> None:
    write(tmp_path / "prompts.jsonl", [{"prompt": "hello"}, {"prompt": "other"}, {"prompt": "hello"}])
    sampled = ["--temperature", "1.5", "--top-k", "0", "--seed", "3"]
    assert ask(*sampled, "--num-samples", "3") == 0
    three = answers(tmp_path)
    assert [(line["index"], line["sample"]) for line in three] == [(i, s) for i in range(3) for s in range(3)]
    assert len({line["answer"] for line in three if line["prompt"] == "hello"}) == 6  # equal prompts: other draws
    (tmp_path / "answers.jsonl").unlink()
    assert ask(*sampled, "--num-samples", "1") == 0
    assert ask(*sampled, "--num-samples", "3") == 0  # two more of each
    assert answers(tmp_path) == three


def test_the_same_seed_gives_what_a_single_prompt_gives(
    ask: Asked, toy_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "prompts.jsonl", [{"prompt": "other"}, {"prompt": "hello"}])
    sampled = ["--temperature", "1.5", "--seed", "3"]
    assert ask(*sampled) == 0
    capsys.readouterr()
    assert main(["generate", str(toy_llama_dir), "-p", "hello", "--max-new-tokens", str(NEW), *sampled]) == 0
    assert capsys.readouterr().out == answers(tmp_path)[1]["answer"] + "\n"


# --- going on ------------------------------------------------------------------------------------------------------


def test_it_goes_on_where_it_was_cut_off_and_asks_nothing_twice(
    ask: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"number {n} " * (1 + n % 3)} for n in range(6)]
    write(tmp_path / "prompts.jsonl", rows)
    sampled = ["--temperature", "1.5"]  # without a seed: what is added later has that of the beginning
    assert ask(*sampled) == 0
    whole = answers(tmp_path)
    lines = (tmp_path / "answers.jsonl").read_bytes().splitlines(keepends=True)
    # As a process leaves it that is killed: some answers in any order, the last one in part.
    (tmp_path / "answers.jsonl").write_bytes(lines[4] + lines[1] + lines[2][:20])
    submitted: list[int] = []
    submit = Continuous.submit

    def counting(self: Continuous, rows: Any) -> None:
        rows = list(rows)
        submitted.append(len(rows))
        submit(self, rows)

    monkeypatch.setattr(Continuous, "submit", counting)
    assert ask(*sampled) == 0
    assert answers(tmp_path) == whole
    assert submitted == [4]
    assert "2 of 6 answers are there" in capsys.readouterr().err
    # Further rows at the end are answered, and nothing is loaded where there is nothing to do.
    write(tmp_path / "prompts.jsonl", [*rows, {"prompt": "one more"}])
    assert ask(*sampled) == 0
    assert submitted == [4, 1]
    assert answers(tmp_path)[:6] == whole
    monkeypatch.setattr("luthier.models.assemble.open_for_inference", None)
    assert ask(*sampled) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--max-new-tokens", "7"], "max_new_tokens (6 there, 7 now)"),
        (["--system", "be brief"], 'system (null there, "be brief" now)'),
        (["--raw"], "raw (null there, true now)"),
        (["--seed", "5"], "seed ("),
    ],
)
def test_what_was_made_otherwise_is_not_mixed(
    change: list[str], said: str, ask: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "prompts.jsonl", [{"prompt": "hello"}])
    assert ask() == 0
    before = (tmp_path / "answers.jsonl").read_bytes()
    assert ask(*change) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "--overwrite" in error
    assert (tmp_path / "answers.jsonl").read_bytes() == before
    assert ask(*change, "--overwrite") == 0


def test_other_weights_or_other_rows_are_refused(
    ask: Asked, toy_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = copytree(toy_llama_dir, tmp_path / "own")
    write(tmp_path / "prompts.jsonl", [{"prompt": "hello"}, {"prompt": "two"}])
    assert ask(model=own) == 0
    write(tmp_path / "prompts.jsonl", [{"prompt": "two"}, {"prompt": "hello"}])
    assert ask(model=own) == 1
    assert "answers.jsonl:1: its prompt is not that of row 1" in capsys.readouterr().err
    write(tmp_path / "prompts.jsonl", [{"prompt": "hello"}, {"prompt": "two"}])
    os.utime(own / "model.safetensors", (1, 1))
    assert ask(model=own) == 1
    assert "files (" in capsys.readouterr().err


def test_a_file_of_somebody_else_is_left_as_it_is(
    ask: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "prompts.jsonl", [{"prompt": "hello"}])
    (tmp_path / "answers.jsonl").write_text('{"mine": 1}\n{"mine": 2}')  # without an end: it is not "mended" either
    assert ask() == 1
    assert "no answers.jsonl.settings beside it" in capsys.readouterr().err
    assert (tmp_path / "answers.jsonl").read_text() == '{"mine": 1}\n{"mine": 2}'


@pytest.mark.slow
@pytest.mark.parametrize(("how", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_what_is_there_stays_when_it_is_stopped(
    how: signal.Signals, status: int, toy_llama_dir: Path, tmp_path: Path
) -> None:
    write(tmp_path / "prompts.jsonl", [{"prompt": f"number {n}"} for n in range(3000)])
    asked = [sys.executable, "-m", "luthier", "generate", str(toy_llama_dir), "--data", str(tmp_path / "prompts.jsonl"),
             "--output", str(tmp_path / "answers.jsonl"), "--max-new-tokens", "40"]  # fmt: skip
    process = subprocess.Popen(asked, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (tmp_path / "answers.jsonl").exists() and (tmp_path / "answers.jsonl").stat().st_size > 2000:
            break
        time.sleep(0.05)
    process.send_signal(how)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status
    found = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_bytes().split(b"\n")[:-1]]
    assert 0 < len(found) < 3000
    assert how == signal.SIGKILL or f"{len(found)} of 3000 answers are there; the same command goes on" in error


# --- memory, and what contradicts itself ---------------------------------------------------------------------------


def test_where_memory_ends_batches_get_smaller(
    ask: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "prompts.jsonl", [{"prompt": f"number {n}"} for n in range(8)])
    assert ask() == 0
    expected = answers(tmp_path)
    monkeypatch.setattr("luthier.generate.batches.MAX_CACHED_TOKENS", 400)
    resize = Slots.resize

    def short(self: Slots, slots: int, room: int) -> None:
        if slots * room > 150:
            raise torch.OutOfMemoryError("CUDA out of memory")
        resize(self, slots, room)

    monkeypatch.setattr(Slots, "resize", short)
    assert ask("--overwrite") == 0
    assert answers(tmp_path) == expected
    assert "out of memory with batches of up to 400 tokens: going on with 200" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "p.jsonl"], "--data needs --output"),
        (["--data", "p.jsonl", "-o", "a.jsonl", "-p", "x"], "one of --prompt TEXT and --data FILE"),
        ([], "one of --prompt TEXT and --data FILE"),
        (["-p", "x", "--num-samples", "2", "--overwrite"], "--num-samples, --overwrite: only with --data"),
        (["--data", "p.jsonl", "-o", "a.jsonl", "--input", "x"], "--input is that of a single prompt"),
        (["--data", "p.jsonl", "-o", "a.csv"], "call it a.jsonl"),
        (["--data", "nothing.jsonl", "-o", "a.csv"], "call it a.jsonl"),  # before the rows are read
        (["--data", "p.jsonl", "-o", "p.jsonl"], "is the file of the prompts"),
        (["--data", "p.jsonl", "-o", "a.jsonl", "--num-samples", "2"], "greedy answers are all the same"),
        (["--data", "p.jsonl", "-o", "a.jsonl", "--engine", "tgi"], "it is luthier or vllm"),
    ],
)
def test_what_contradicts_itself_is_an_error(
    options: list[str],
    message: str,
    toy_llama_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.jsonl", [{"prompt": "x"}])
    assert main(["generate", str(toy_llama_dir), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_judge_reads_it_as_a_contestant(ask: Asked, tmp_path: Path) -> None:
    from luthier.evaluate.judge.answers import answers_of, open_side, read_prompts

    write(tmp_path / "prompts.jsonl", [{"instruction": "add", "input": "1 2"}, {"prompt": "hello"}, {"prompt": " "}])
    assert ask() == 0
    (tmp_path / "asked.jsonl").write_text("".join((tmp_path / "prompts.jsonl").read_text().splitlines(True)[:2]))
    prompts = read_prompts(tmp_path / "asked.jsonl")
    side = open_side(str(tmp_path / "answers.jsonl"))
    read = answers_of(side, prompts, tmp_path / "kept.jsonl", None)
    assert list(read.by_question.values()) == [line["answer"] for line in answers(tmp_path)[:2]]
    assert not read.unanswered
