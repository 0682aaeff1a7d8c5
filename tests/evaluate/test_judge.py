"""`luthier judge` before a judge that follows a rule, one that misbehaves, and one that is killed in the middle."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from luthier.cli import main
from luthier.evaluate.judge import client as judge_client
from luthier.evaluate.judge.tally import wilson
from tests.evaluate.loopback_judge import Asked, LoopbackJudge, Say, longer, verdict

KEY = "sk-never-to-be-seen-1234567890"

# A answers the first three better, B the fourth, the fifth is a tie, and the sixth is the same text.
ANSWERS = [
    ("one", "a long answer", "short"),
    ("two", "a long answer too", "short"),
    ("three", "another long answer", "short"),
    ("four", "short", "a long answer"),
    ("five", "equal", "alike"),
    ("six", "the same", "the same"),
]
ASKED = 10  # both orders of all but the last


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackJudge]:
    monkeypatch.setattr(judge_client, "FIRST_WAIT", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    judge = LoopbackJudge()
    yield judge
    judge.close()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "a.jsonl", [{"prompt": q, "answer": a} for q, a, _ in ANSWERS])
    write_rows(tmp_path / "b.jsonl", [{"prompt": q, "answer": b} for q, _, b in ANSWERS])
    (tmp_path / "prompts.txt").write_text("".join(f"{q}\n" for q, _, _ in ANSWERS), encoding="utf-8")
    return tmp_path


def arguments(folder: Path, *options: str) -> list[str]:
    sides = [str(folder / "a.jsonl"), str(folder / "b.jsonl")]
    return ["judge", *sides, "--prompts", str(folder / "prompts.txt"), "--output", str(folder / "out"), *options]


def figures(folder: Path) -> dict[str, Any]:
    (path,) = (p for p in (folder / "out").glob("judge-*.json"))
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert found["kind"] == "judge"
    assert (folder / "out" / found["rows"]).is_file()
    result: dict[str, Any] = found["figures"]
    return result


def rows(folder: Path, pattern: str = "judge-b-*.jsonl") -> list[dict[str, Any]]:
    (path,) = (folder / "out").glob(pattern)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def counts(found: dict[str, Any]) -> tuple[int, int, int]:
    return found["wins"]["count"], found["ties"]["count"], found["losses"]["count"]


# --- the result ----------------------------------------------------------------------------------------------------


def test_a_judge_with_a_rule(folder: Path, server: LoopbackJudge, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, "--judge", server.url)) == 0
    found = figures(folder)
    assert counts(found) == (3, 2, 1)
    assert found["identical"] == 1
    assert found["counted"] == found["pairs"] == 6
    assert found["score"] == pytest.approx(4 / 6)
    assert found["winner"] is None  # four of six is no proof
    assert (found["tokens_in"], found["tokens_out"]) == (ASKED * 100, ASKED * 20)
    # Each pair in both orders, and nobody is asked about the same text twice over.
    both = {(q, *pair) for q, a, b in ANSWERS[:5] for pair in ((a, b), (b, a))}
    assert Counter(server.orders) == Counter(both)
    request = server.asked[0].request
    assert request["temperature"] == 0
    assert request["model"] == "rule-1"
    assert request["response_format"]["json_schema"]["schema"]["properties"]["choice"]["enum"] == [0, 1, 2]
    by_question = {row["prompt"]: row for row in rows(folder)}
    assert {q: row["outcome"] for q, row in by_question.items()} == {
        "one": "a", "two": "a", "three": "a", "four": "b", "five": "tie", "six": "identical",
    }  # fmt: skip
    assert [each["argument"] for each in by_question["one"]["verdicts"]] == ["because", "because"]
    shown = capsys.readouterr().out
    assert "A wins         3    50.0%" in shown
    assert "No winner" in shown
    # The same command asks nothing; nor does the one with the sides exchanged, which turns the result round.
    assert main(arguments(folder, "--judge", server.url)) == 0
    a, b, *rest = arguments(folder, "--judge", server.url)[1:]
    (folder / "out" / "moved").mkdir()
    for path in (folder / "out").glob("judge-b-*"):
        path.rename(folder / "out" / "moved" / path.name)
    assert main(["judge", b, a, *rest]) == 0
    assert len(server.asked) == ASKED
    assert counts(figures(folder)) == (1, 2, 3)
    # Another question to the judge is another matter.
    assert main(arguments(folder, "--judge", server.url, "--criteria", "Be brief.")) == 0
    assert len(server.asked) == 2 * ASKED
    assert "Be brief." in server.asked[-1].request["messages"][0]["content"]


def test_a_winner_beyond_chance(tmp_path: Path, server: LoopbackJudge, capsys: pytest.CaptureFixture[str]) -> None:
    questions = [f"q{i}" for i in range(8)]
    write_rows(tmp_path / "a.jsonl", [{"prompt": q, "answer": "s"} for q in questions])
    write_rows(tmp_path / "b.jsonl", [{"prompt": q, "answer": "longer"} for q in questions])
    write_rows(tmp_path / "prompts.txt", [])
    (tmp_path / "prompts.txt").write_text("\n".join(questions), encoding="utf-8")
    assert main(arguments(tmp_path, "--judge", server.url)) == 0
    assert figures(tmp_path)["winner"] == "b"
    assert "B is better" in capsys.readouterr().out


@pytest.mark.parametrize(("always", "place"), [(1, "to_first"), (2, "to_second")])
def test_a_judge_that_looks_at_the_place_only(
    always: int, place: str, folder: Path, server: LoopbackJudge, capsys: pytest.CaptureFixture[str]
) -> None:
    server.behave = lambda number, asked: verdict(always)
    (folder / "prompts.txt").write_text("one\ntwo\nfour\n", encoding="utf-8")
    assert main(arguments(folder, "--judge", server.url)) == 0
    found = figures(folder)
    assert found["flips"] == {"count": 3, "to_first": 0, "to_second": 0} | {place: 3}
    assert counts(found) == (0, 0, 0)
    assert found["score"] is None and found["winner"] is None
    assert found["first_chosen"] == (1 if always == 1 else 0)
    shown = capsys.readouterr().out
    assert "3 flips" in shown
    assert "No winner: of no pair is the verdict the same in both orders" in shown


def test_a_tie_in_one_order_is_not_counted(folder: Path, server: LoopbackJudge) -> None:
    server.behave = lambda number, asked: longer(asked) if len(asked.first) > len(asked.second) else verdict(0)
    assert main(arguments(folder, "--judge", server.url)) == 0
    found = figures(folder)
    assert found["wavered"] == {"count": 4, "towards_a": 3, "towards_b": 1}
    assert counts(found) == (0, 2, 0)


def test_wilson_inverts_the_score_test() -> None:
    z = 1.959963984540054
    for wins, total in ((0, 4), (1, 3), (7.5, 20), (50, 50)):
        interval = wilson(wins, total)
        assert interval is not None
        for end in interval:
            distance = abs(wins / total - end)
            assert distance == pytest.approx(z * math.sqrt(end * (1 - end) / total), abs=1e-9)
    assert wilson(0, 0) is None


def test_half_a_character_does_no_harm(folder: Path, server: LoopbackJudge) -> None:
    write_rows(folder / "a.jsonl", [{"prompt": q, "answer": f"{a} \ud83d"} for q, a, _ in ANSWERS[:4]])
    server.behave = lambda number, asked: verdict(json.loads(longer(asked).content)["choice"], "because \ud83d")
    for _ in range(2):
        assert main(arguments(folder, "--judge", server.url)) == 0
        assert counts(figures(folder)) == (3, 0, 1)
    assert len(server.asked) == 8


# --- a server that misbehaves --------------------------------------------------------------------------------------


def _slow(say: Say) -> Say:
    time.sleep(1.5)
    return say


MISBEHAVIOUR: dict[str, Callable[[Asked], Say]] = {
    "429": lambda asked: Say(status=429, headers={"Retry-After": "0.05"}, body=b"{}"),
    "500": lambda asked: Say(status=500, body=b"<html>oops</html>"),
    "slow": lambda asked: _slow(longer(asked)),
    "reset": lambda asked: Say(hang_up=True),
    "cut off": lambda asked: Say(longer(asked).content, promise=10_000),
    "cut off in the middle": lambda asked: Say(body=b'{"choices": [', promise=1000),
    "no JSON": lambda asked: Say("Answer 1 is better."),
    "half JSON": lambda asked: Say('{"argument": "it is', finish_reason="length"),
    "other schema": lambda asked: Say('{"winner": "first"}'),
    "choice 3": lambda asked: verdict(3),
    "choice true": lambda asked: verdict(True),
    "no text": lambda asked: Say(body=b'{"choices": [{"message": {"content": null}}], "usage": {}}'),
    "no completion": lambda asked: Say(body=b'{"choices": []}'),
    "no object": lambda asked: Say(body=b"[" * 100_000),
    "nothing": lambda asked: Say(body=b""),
    "huge": lambda asked: verdict(1, "x" * (5 * 2**20)),
}


@pytest.mark.parametrize("kind", MISBEHAVIOUR)
def test_what_fails_once_is_asked_again(kind: str, folder: Path, server: LoopbackJudge) -> None:
    server.behave = lambda number, asked: MISBEHAVIOUR[kind](asked) if number == 3 else longer(asked)
    patience = "0.75" if kind == "slow" else "60"
    assert main(arguments(folder, "--judge", server.url, "--timeout", patience, "--parallel", "2")) == 0
    assert counts(figures(folder)) == (3, 2, 1)
    assert len(server.asked) == ASKED + 1


@pytest.mark.parametrize(
    "content",
    [
        '```json\n{"argument": "x", "choice": %d}\n```',
        'I weigh {both}. {"choice": 0}? No: {"choice": %d, "argument": "x"}',
        '{"choice": "%d"}',
    ],
)
def test_a_verdict_with_something_around_it(content: str, folder: Path, server: LoopbackJudge) -> None:
    def behave(number: int, asked: Asked) -> Say:
        return Say(content % json.loads(longer(asked).content)["choice"])

    server.behave = behave
    assert main(arguments(folder, "--judge", server.url)) == 0
    assert counts(figures(folder)) == (3, 2, 1)


@pytest.mark.parametrize("argument", ["because", None, ""])
def test_text_in_pieces_and_arguments_that_are_missing(
    argument: str | None, folder: Path, server: LoopbackJudge, capsys: pytest.CaptureFixture[str]
) -> None:
    def behave(number: int, asked: Asked) -> Say:
        choice = json.loads(longer(asked).content)["choice"]
        pieces = [
            {"type": "thinking", "thinking": [{"type": "text", "text": '{"choice": 1}'}]},
            {"type": "text", "text": f'{{"argument": {json.dumps(argument)}, '},
            {"type": "text", "text": f'"choice": {choice}}}'},
        ]
        return Say(body=json.dumps({"choices": [{"message": {"content": pieces}}]}).encode())

    server.behave = behave
    assert main(arguments(folder, "--judge", server.url)) == 0
    assert counts(figures(folder)) == (3, 2, 1)
    assert {row["argument"] for row in rows(folder, "judge-verdicts-*.jsonl")} == {argument or ""}
    assert ("of 10 verdicts 10 came without an argument" in capsys.readouterr().err) == (not argument)


def test_the_result_as_json(folder: Path, server: LoopbackJudge, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, "--judge", server.url, "--json")) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["kind"] == "judge" and shown["figures"] == figures(folder)


def test_a_server_that_is_down(folder: Path, server: LoopbackJudge, capsys: pytest.CaptureFixture[str]) -> None:
    server.behave = lambda number, asked: longer(asked) if number <= 2 else Say(status=503, body=b"busy")
    asked = arguments(folder, "--judge", server.url, "--retries", "1", "--parallel", "1")
    assert main(asked) == 1
    assert len(server.asked) == 2 + 4 * 2  # four tasks in a row, two attempts each
    shown = capsys.readouterr()
    assert "failed 4 times in a row" in shown.err
    assert "it answers 503 (busy)" in shown.err
    found = figures(folder)
    assert (found["counted"], found["failed"], found["waiting"]) == (2, 2, 2)  # one judged, and the identical one
    server.behave = lambda number, asked: longer(asked)
    assert main(asked) == 0
    assert len(server.asked) == 10 + 8


def test_a_pair_that_fails_does_not_hold_up_the_others(
    folder: Path, server: LoopbackJudge, capsys: pytest.CaptureFixture[str]
) -> None:
    def behave(number: int, asked: Asked) -> Say:
        return verdict("neither") if asked.question == "two" else longer(asked)

    server.behave = behave
    assert main(arguments(folder, "--judge", server.url)) == 3
    found = figures(folder)
    assert found["failed"] == 1 and not found["complete"]
    assert counts(found) == (2, 2, 1)
    assert len(server.asked) == 8 + 2 * judge_client.UNUSABLE_TRIES
    # What the failed ones have used is known to the next command, which asks for them alone.
    assert found["tokens_in"] == 100 * len(server.asked)
    server.behave = lambda number, asked: longer(asked)
    assert main(arguments(folder, "--judge", server.url)) == 0
    assert len(server.asked) == 8 + 2 * judge_client.UNUSABLE_TRIES + 2
    assert figures(folder)["tokens_in"] == 100 * len(server.asked)


def test_a_judge_that_fails_now_and_then_is_not_down(folder: Path, server: LoopbackJudge) -> None:
    shown = {question: a for question, a, _ in ANSWERS}
    server.behave = lambda number, asked: Say("?") if asked.first == shown[asked.question] else longer(asked)
    assert main(arguments(folder, "--judge", server.url, "--parallel", "1", "--retries", "0")) == 3
    assert figures(folder)["failed"] == 5
    assert len(server.asked) == ASKED


def test_retry_after_is_waited_for(folder: Path, server: LoopbackJudge) -> None:
    server.behave = lambda number, asked: (
        Say(status=429, headers={"Retry-After": "0.4"}, body=b"{}") if number == 1 else longer(asked)
    )
    assert main(arguments(folder, "--judge", server.url, "--parallel", "1", "--limit", "1")) == 0
    first, second, _ = (each.time for each in server.asked)
    assert second - first >= 0.4


def test_a_server_that_asks_for_no_wait_is_still_given_one(
    folder: Path, server: LoopbackJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge_client, "FIRST_WAIT", 0.25)
    server.behave = lambda number, asked: (
        Say(status=429, headers={"Retry-After": "0"}, body=b"{}") if number <= 2 else longer(asked)
    )
    assert main(arguments(folder, "--judge", server.url, "--parallel", "1", "--limit", "1")) == 0
    first, second, third, _ = (each.time for each in server.asked)
    assert second - first >= 0.8 * 0.25
    assert third - second >= 0.8 * 0.5


@pytest.mark.parametrize(
    ("say", "message"),
    [
        (Say(status=429, headers={"Retry-After": "7200"}, body=b"{}"), "asks to wait 7200 s"),
        (Say(status=429, body=b'{"error": {"code": "insufficient_quota", "message": "pay"}}'), "no credit left"),
        (Say(status=401, body=b'{"error": {"message": "bad key"}}'), "refuses the key: it answers 401 (bad key)"),
        (Say(status=404, body=b'{"error": "what model"}'), "no model 'rule-1' there"),
        (Say(status=302, headers={"Location": "http://127.0.0.1:9/"}, body=b""), "it redirects to http://127.0.0.1:9/"),
    ],
)
def test_what_cannot_get_better_ends_at_once(
    say: Say, message: str, folder: Path, server: LoopbackJudge, capsys: pytest.CaptureFixture[str]
) -> None:
    server.behave = lambda number, asked: say
    assert main(arguments(folder, "--judge", server.url, "--parallel", "1")) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(server.asked) == 1
    assert not list((folder / "out").glob("judge-b-*"))  # nobody judged, which is no result
    assert "A wins" not in shown.out


def test_what_a_server_does_not_take_is_left_out(
    folder: Path, server: LoopbackJudge, capsys: pytest.CaptureFixture[str]
) -> None:
    def behave(number: int, asked: Asked) -> Say:
        form = asked.request.get("response_format", {}).get("type")
        for refused, there in (
            ("response_format json_schema is not supported", form == "json_schema"),
            ("unknown field response_format", form == "json_object"),
            ("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'", "max_tokens" in asked.request),
            ("Unsupported value: 'temperature'", "temperature" in asked.request),
        ):
            if there:
                return Say(status=400, body=json.dumps({"error": {"message": refused}}).encode())
        return longer(asked)

    server.behave = behave
    assert main(arguments(folder, "--judge", server.url, "--parallel", "1")) == 0
    assert len(server.asked) == ASKED + 4
    assert server.asked[-1].request.keys() == {"model", "messages", "max_completion_tokens"}
    assert "takes no temperature" in capsys.readouterr().err
    assert counts(figures(folder)) == (3, 2, 1)


def test_a_form_that_is_refused_without_a_word_about_it(folder: Path, server: LoopbackJudge) -> None:
    def behave(number: int, asked: Asked) -> Say:
        return Say(status=400, body=b"bad request") if "response_format" in asked.request else longer(asked)

    server.behave = behave
    assert main(arguments(folder, "--judge", server.url, "--parallel", "1")) == 0
    assert len(server.asked) == ASKED + 2
    assert counts(figures(folder)) == (3, 2, 1)


@pytest.mark.parametrize("bad", ["one", "three"])  # before any answer, and after some
def test_a_pair_that_is_refused_does_not_cost_the_others_their_form(
    bad: str, folder: Path, server: LoopbackJudge
) -> None:
    server.behave = lambda number, asked: (
        Say(status=400, body=b"content management policy") if asked.question == bad else longer(asked)
    )
    assert main(arguments(folder, "--judge", server.url, "--parallel", "1")) == 3
    assert figures(folder)["failed"] == 1
    forms = {each.request.get("response_format", {}).get("type") for each in server.asked if each.question != bad}
    assert forms == {"json_schema"}
    assert len(server.asked) == ASKED + 2 * (bad == "one")  # that once, plainer forms are tried


def test_what_is_always_refused_ends(folder: Path, server: LoopbackJudge) -> None:
    server.behave = lambda number, asked: Say(status=400, body=b"bad request")
    assert main(arguments(folder, "--judge", server.url, "--parallel", "4")) == 1
    assert len(server.asked) <= 2 * ASKED


# --- caps and keys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", ["1", "4"])
@pytest.mark.parametrize(
    ("low", "high"),
    [
        (["--max-tokens-total", "6000"], ["--max-tokens-total", "60000"]),
        (["--max-cost", "0.006"], ["--max-cost", "0.06"]),
    ],
)
def test_the_cap_is_never_exceeded(
    low: list[str], high: list[str], parallel: str, folder: Path, server: LoopbackJudge
) -> None:
    def behave(number: int, asked: Asked) -> Say:
        say = longer(asked)
        say.usage = 1000, 16  # as much as such a request may be
        return say

    server.behave = behave
    options = ["--judge", server.url, "--parallel", parallel, "--judge-tokens", "16"]
    prices = ["--price-in", "1", "--price-out", "1"]
    assert main(arguments(folder, *options, *prices, *low)) == 3
    found = figures(folder)
    assert 0 < found["tokens_in"] + found["tokens_out"] <= 6000
    assert found["cost"] <= 0.006
    assert found["waiting"] > 0
    before = len(server.asked)
    assert found["tokens_in"] == 1000 * before
    # The same command spends nothing more; with a higher cap it goes on.
    assert main(arguments(folder, *options, *prices, *low)) == 3
    assert len(server.asked) - before <= 1
    assert main(arguments(folder, *options, *prices, *high)) == 0
    assert len(server.asked) == len(set(server.orders)) == ASKED


@pytest.mark.parametrize("usage", [None, (-1000, 5)])
def test_use_that_is_not_reported_counts_at_its_most(
    usage: tuple[int, int] | None, folder: Path, server: LoopbackJudge, capsys: pytest.CaptureFixture[str]
) -> None:
    def behave(number: int, asked: Asked) -> Say:
        say = longer(asked)
        say.usage = usage
        return say

    server.behave = behave
    assert main(arguments(folder, "--judge", server.url, "--judge-tokens", "50")) == 0
    sent = sum(len(each.request["messages"][0]["content"]) for each in server.asked)
    found = figures(folder)
    assert found["tokens_in"] >= sent
    assert found["tokens_out"] == ASKED * 50
    assert "of 10 requests the judge did not say what they used" in capsys.readouterr().err


def test_the_key_is_sent_and_never_written(
    folder: Path, server: LoopbackJudge, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")

    def behave(number: int, asked: Asked) -> Say:
        if number == 1:
            return Say(status=500, body=f'{{"error": {{"message": "your key is {KEY}"}}}}'.encode())
        say = longer(asked)
        return verdict(json.loads(say.content)["choice"], f"I was called with {KEY}")

    server.behave = behave
    assert main(arguments(folder, "--judge", server.url, "--api-key-env", "SOME_KEY")) == 0
    assert {each.headers["Authorization"] for each in server.asked} == {f"Bearer {KEY}"}
    shown = capsys.readouterr()
    written = "".join(path.read_text(encoding="utf-8") for path in (folder / "out").iterdir())
    assert "I was called with ***" in written
    assert KEY not in shown.out + shown.err + written
    # OpenAI's key is for OpenAI.
    server.asked.clear()
    assert main(arguments(folder, "--judge", server.url, "--criteria", "Other.")) == 0
    assert not any("Authorization" in each.headers for each in server.asked)


# --- killed in the middle ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_is_lost_and_nothing_asked_twice(how: signal.Signals, folder: Path, server: LoopbackJudge) -> None:
    held, go_on = threading.Barrier(3), threading.Event()  # two requests in flight, and the test

    def behave(number: int, asked: Asked) -> Say:
        if number in (4, 5) and not go_on.is_set():
            held.wait(30)
            go_on.wait(30)
        return longer(asked)

    server.behave = behave
    asked = arguments(folder, "--judge", server.url, "--parallel", "2")
    process = subprocess.Popen(
        [sys.executable, "-m", "luthier", *asked], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    held.wait(30)  # three verdicts are there, and both threads wait for one more
    process.send_signal(how)
    if how != signal.SIGKILL:
        assert process.stderr is not None
        for line in process.stderr:
            if "in flight" in line:
                break
        go_on.set()
    output, _ = process.communicate(timeout=30)
    go_on.set()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[how]
    in_flight = 2 if how == signal.SIGKILL else 0
    assert len(server.asked) == 5
    stored = rows(folder, "judge-verdicts-*.jsonl")
    assert len(stored) == 5 - in_flight
    if how == signal.SIGKILL:  # and the machine may stop in the middle of a line
        (path,) = (folder / "out").glob("judge-verdicts-*.jsonl")
        path.write_bytes(path.read_bytes() + b'{"key": "half')
    else:
        assert "not judged yet" in output
    lost = server.orders[3:5] if in_flight else []
    assert main(asked) == 0
    assert counts(figures(folder)) == (3, 2, 1)
    assert Counter(server.orders) == Counter(dict.fromkeys(server.orders, 1) | dict.fromkeys(lost, 2))
    assert len(set(server.orders)) == ASKED
    before = len(server.asked)
    assert main(asked) == 0  # the file is whole again
    assert len(server.asked) == before


def test_one_command_at_a_time(folder: Path, server: LoopbackJudge, capsys: pytest.CaptureFixture[str]) -> None:
    status: list[int] = []

    def behave(number: int, asked: Asked) -> Say:
        if number == 1:
            status.append(main(arguments(folder, "--judge", server.url)))
        return longer(asked)

    server.behave = behave
    assert main(arguments(folder, "--judge", server.url, "--parallel", "1")) == 0
    assert status == [1]
    assert len(server.asked) == ASKED


