"""`luthier chat`: what the model reads in each turn, what the commands do, and what a terminal does to it."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.cli import main
from luthier.config import Config
from luthier.data.formats import ALPACA
from luthier.generate.continuous import Continuous

NEW = 5
Chat = Callable[..., tuple[list[str], str, int]]


@pytest.fixture
def chat(toy_llama_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Chat:
    """chat(lines, *options): answers, messages and exit status of lines from a pipe."""

    def run(lines: list[str], *options: str, models: tuple[Path, ...] = (toy_llama_dir,)) -> tuple[list[str], str, int]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        status = main(["chat", *map(str, models), "--max-new-tokens", str(NEW), *options])
        shown = capsys.readouterr()
        return shown.out.split("\n")[:-1], shown.err, status

    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids of the prompt of each turn."""
    seen: list[list[int]] = []
    submit = Continuous.submit

    def noting(self: Continuous, rows: Any) -> None:
        rows = list(rows)
        seen.extend(list(row.prompt_ids) for row in rows)
        submit(self, rows)

    monkeypatch.setattr(Continuous, "submit", noting)
    return seen


def chatml(*turns: str, system: str = "") -> str:
    """Turns of a user and an assistant by turns, and the header of the next answer."""
    opening = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    roles = ("user", "assistant")
    said = "".join(f"<|im_start|>{roles[n % 2]}\n{turn}<|im_end|>\n" for n, turn in enumerate(turns))
    return f"{opening}{said}<|im_start|>assistant\n"


def saved(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_turn_is_answered_after_all_before_it(
    chat: Chat, asked: list[list[int]], toy_llama_dir: Path, toy_tokenizer: Any, tmp_path: Path
) -> None:
    _, _, status = chat(["hello", "", "and then", f"/save {tmp_path}/talk.jsonl"], "--system", "be kind")
    assert status == 0
    [row] = saved(tmp_path / "talk.jsonl")
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    _, first, said, second, answer = (message["content"] for message in row["messages"])
    assert (first, second) == ("hello", "and then")
    texts = [chatml("hello", system="be kind"), chatml("hello", said, "and then", system="be kind")]
    assert asked == [toy_tokenizer(text)["input_ids"] for text in texts]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(toy_llama_dir)
    for ids, text in zip(asked, (said, answer), strict=True):
        alone = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :]
        assert text == toy_tokenizer.decode(alone, skip_special_tokens=True)


def test_a_turn_computes_only_what_is_new(
    chat: Chat, asked: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    logits = Continuous.logits

    def counting(self: Continuous, ids: Any, writing: int, prompts: Any) -> Any:
        read.extend(unread for _, unread in prompts)
        return logits(self, ids, writing, prompts)

    chat(["x"])  # tries the model out, which is not counted
    del asked[:]
    monkeypatch.setattr(Continuous, "logits", counting)
    chat(["one two three four five six seven", "and", "then"])
    first, second, third = read[-3:]
    assert first == len(asked[0])
    # The answer's last token was never read, and the tokens of a text may be others than those it was written with.
    assert second <= len(asked[1]) - len(asked[0]) + NEW
    assert third <= len(asked[2]) - len(asked[1]) + NEW


def test_commands(chat: Chat, asked: list[list[int]], toy_tokenizer: Any, tmp_path: Path) -> None:
    lines = ["one", "/undo", "two", "/system be brief", "three", "/reset", "/system", "//four \\", "more", "/undo",
             "/undo", "five", "/save", "/nope", f"/save {tmp_path}/no/such", "/help", "/adapter", "/adapter x",
             f"/save {tmp_path}/a.jsonl", f"/save {tmp_path}/a.jsonl", "/exit", "never"]  # fmt: skip
    _, error, status = chat(lines)
    assert status == 1  # of a pipe, in which some lines could not be done
    texts = [toy_tokenizer.decode(ids) for ids in asked]
    assert texts[0] == chatml("one")
    assert texts[1] == chatml("two")
    assert texts[2].startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\ntwo")
    assert texts[3:] == [chatml("/four \nmore"), chatml("five")]
    for said in ("nothing to take back", "/save needs", "no command /nope", "no/such: No such file", "/undo  ",
                 "there is no x here", "a.jsonl: 1 row added"):  # fmt: skip
        assert said in error
    assert len(saved(tmp_path / "a.jsonl")) == 2


def test_saved_conversations_are_training_data(chat: Chat, toy_llama_dir: Path, tmp_path: Path) -> None:
    from luthier.config.datasets import DatasetEntry
    from luthier.data.formats import example_of

    chat(["one", "two", f"/save {tmp_path}/talk.jsonl"])
    [row] = saved(tmp_path / "talk.jsonl")
    example = example_of(row, DatasetEntry(path="talk.jsonl", type="chat_template"), False)
    assert len(example.messages) == 4  # type: ignore[union-attr]


def test_a_run_of_single_instructions_gets_one_at_a_time(
    chat: Chat, asked: list[list[int]], toy_llama_dir: Path, toy_tokenizer: Any, tmp_path: Path
) -> None:
    from shutil import copytree

    run = copytree(toy_llama_dir, tmp_path / "run")
    config = Config.from_flat({"base_model": str(toy_llama_dir), "datasets": [{"path": "d.jsonl", "type": "alpaca"}]})
    (run / "config.yaml").write_text(config.to_yaml())
    _, error, _ = chat(["Add.", "More.", f"/save {tmp_path}/a.jsonl"], models=(run,))
    assert "has no turns (alpaca): each message stands for itself" in error
    assert [toy_tokenizer.decode(ids) for ids in asked] == [
        ALPACA.pieces(text, "", None)[0] for text in ("Add.", "More.")
    ]
    assert [row["messages"][0]["content"] for row in saved(tmp_path / "a.jsonl")] == ["Add.", "More."]


def test_a_full_window_is_said_and_the_oldest_turns_are_read_no_longer(
    chat: Chat, asked: list[list[int]], toy_tokenizer: Any, tmp_path: Path
) -> None:
    long = toy_tokenizer.decode(toy_tokenizer("the quick brown fox jumps over " * 99)["input_ids"][:150])
    lines = [f"first {long}", f"second {long}", f"third {long}", f"fourth {long}", "x" * 4000, "short"]
    _, error, status = chat([*lines, f"/save {tmp_path}/a.jsonl"], "--system", "be kind")
    texts = [toy_tokenizer.decode(ids) for ids in asked]
    assert "first" in texts[1]
    assert "first" not in texts[3]
    assert "fourth" in texts[4]  # the message in between, which could not fit, has taken nothing away
    assert all("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user" in text for text in texts)
    assert "the context window of 512 tokens is full: the first" in error
    assert all(len(ids) <= 512 - NEW for ids in asked)
    # A message that cannot fit is not part of the conversation, and the others are, read or not.
    assert "the message has" in error
    assert status == 1
    [row] = saved(tmp_path / "a.jsonl")
    assert [m["content"] for m in row["messages"] if m["role"] == "user"] == [*lines[:4], "short"]


@pytest.fixture
def adapter(toy_llama_dir: Path, tmp_path: Path) -> Path:
    """PEFT's own, strong enough that it says something else than its base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(toy_llama_dir),
        LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    model.peft_config["default"].base_model_name_or_path = str(toy_llama_dir)
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def test_adapters_take_turns_in_one_conversation(
    chat: Chat, asked: list[list[int]], adapter: Path, toy_llama_dir: Path, tmp_path: Path
) -> None:
    back = f"/adapter {toy_llama_dir.name}"
    lines = ["hello", "/undo", "/adapter tuned", "hello", "/adapter", "/undo", back, "hello"]
    said, error, status = chat(lines, models=(toy_llama_dir, adapter))
    assert status == 0
    assert f"  {toy_llama_dir.name}" in error
    assert "* tuned" in error
    assert asked[0] == asked[1] == asked[2]
    base, tuned, again = said
    assert base == again != tuned
    assert chat(["hello"], models=(adapter,))[0] == [tuned]


def test_models_without_a_base_in_common_are_opened_by_themselves(
    chat: Chat, toy_llama_dir: Path, tmp_path: Path
) -> None:
    from shutil import copytree

    other = copytree(toy_llama_dir, tmp_path / "other")
    said, error, status = chat(["hello", "/undo", "/adapter other", "hello"], models=(toy_llama_dir, other))
    assert status == 0
    assert said[0] == said[1]
    assert "cannot share a base" in error


def test_what_is_not_there_is_said_before_the_first_word(chat: Chat, toy_llama_dir: Path, tmp_path: Path) -> None:
    said, error, status = chat(["hello"], models=(toy_llama_dir, tmp_path / "nothing"))
    assert (said, status) == ([], 1)
    assert "nothing" in error
    (tmp_path / "run.yml").write_text("base_model: x\n", encoding="utf-8")
    for wrong, says in (
        (Path("nosuch"), "'nosuch': it is not on this machine, and the hub cannot be reached"),
        (tmp_path / "run.yml", "run.yml is a file: give the folder"),
    ):
        said, error, status = chat(["hello"], models=(toy_llama_dir, wrong))
        assert (said, status) == ([], 1)
        assert says in error and error.count("error:") == 1


def test_out_of_memory_takes_the_message_back(chat: Chat, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    step, failing = Continuous.step, [True]

    def short(self: Continuous) -> Any:
        if failing.pop() if failing else False:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self)

    monkeypatch.setattr(Continuous, "step", short)
    _, error, status = chat(["one", "two", f"/save {tmp_path}/a.jsonl"])
    assert "out of memory" in error
    assert status == 1
    assert saved(tmp_path / "a.jsonl")[0]["messages"][0]["content"] == "two"


# --- a terminal ----------------------------------------------------------------------------------------------------


def test_ctrl_c_stops_the_answer_and_not_the_program(
    toy_llama_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines: Iterator[Any] = iter(["hello", KeyboardInterrupt, "again", f"/save {tmp_path}/a.jsonl", EOFError])

    def typed(prompt: str) -> str:
        line = next(lines)
        if not isinstance(line, str):
            raise line
        return line

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    step, taken = Continuous.step, []

    def pressing(self: Continuous) -> Any:
        taken.append(True)
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Continuous, "step", pressing)
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("sys.stdin", Terminal())
    assert main(["chat", str(toy_llama_dir), "--max-new-tokens", "12"]) == 0
    error = capsys.readouterr().err
    assert "(stopped)" in error
    assert "(Ctrl-D or /exit leaves)" in error
    [row] = saved(tmp_path / "a.jsonl")
    contents = [message["content"] for message in row["messages"]]
    assert (contents[0], contents[2]) == ("hello", "again")
    assert 0 < len(contents[1]) < len(contents[3])


@contextmanager
def in_terminal(arguments: list[str]) -> Iterator[tuple[Any, Callable[[str], str], Callable[[str], int]]]:
    """The command with a terminal: the process, what waits for a text to be shown, and what types."""
    ours, its = pty.openpty()
    # TIOCSCTTY: the terminal is the new session's own, so that its Ctrl-C is a signal.
    process = subprocess.Popen(
        [sys.executable, "-m", "luthier", *arguments], stdin=its, stdout=its, stderr=its, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
    )  # fmt: skip
    os.close(its)
    os.set_blocking(ours, False)
    shown = b""

    def wait(text: str) -> str:
        nonlocal shown
        deadline = time.monotonic() + 90
        while text.encode() not in shown and time.monotonic() < deadline:
            try:
                shown += os.read(ours, 65536)
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # the other end is closed
                break
        before, found, shown = shown.partition(text.encode())
        assert found, f"{text!r} was not shown: {before.decode(errors='replace')}"
        return before.decode(errors="replace")

    try:
        yield process, wait, lambda text: os.write(ours, text.encode())
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a terminal of its own is made as Linux does")
def test_a_real_terminal(toy_llama_dir: Path) -> None:
    with in_terminal(["chat", str(toy_llama_dir), "--max-new-tokens", "450"]) as (process, wait, type_):
        wait(f"{toy_llama_dir.name}> ")
        type_("hello\n")
        wait("hello")
        time.sleep(0.3)
        type_("\x03")
        wait("(stopped)")
        wait("> ")
        type_("/undo\n")
        wait("taken back")
        type_("\x04")
        assert process.wait(timeout=30) == 0
