"""Who is judged and who judges: models and files of answers, a local judge, a person, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.cli import main
from luthier.config import Config
from luthier.errors import ConfigError, DataError
from luthier.evaluate.judge import answers as judge_answers
from luthier.evaluate.judge import name as judge_name
from luthier.evaluate.judge.answers import base_of, is_base_of, open_side, read_prompts
from luthier.evaluate.judge.human import visible
from luthier.evaluate.judge.local import LocalJudge
from luthier.evaluate.judge.question import LOCAL_FORM, question_text
from luthier.experiments.report import write_report


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def roomy_llama(toy_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model with room for a judge's question."""
    folder = tmp_path_factory.mktemp("roomy") / "llama"
    shutil.copytree(toy_llama_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return folder


def transformers_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)


# --- answers of models ---------------------------------------------------------------------------------------------


def test_a_model_answers_greedily_and_once(
    toy_llama_dir: Path,
    toy_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import AutoModelForCausalLM

    model = tmp_path / "model"
    shutil.copytree(toy_llama_dir, model)
    prompts = write_rows(
        tmp_path / "prompts.jsonl",
        [
            {"prompt": "hello"},
            {"instruction": "Add.", "input": "1 2"},
            {"messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "ho"},
                {"role": "user", "content": "and?"},
            ]},
            {"prompt": "too long " * 600},
        ],
    )  # fmt: skip
    questions = [p.question for p in read_prompts(prompts)]
    assert questions[1:3] == ["Add.\n\n1 2", "user: hi\n\nassistant: ho\n\nuser: and?"]
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": q, "answer": "something"} for q in questions])
    asked = ["judge", str(model), str(other), "--prompts", str(prompts), "--human", "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.stdin", io.StringIO("1\nq\n"))
    assert main([*asked, "--max-new-tokens", "8"]) == 3
    assert "no answer to 1 of 4 prompts" in capsys.readouterr().err
    (kept,) = (tmp_path / "out").glob("answers-model-*.jsonl")
    answers = {row["prompt"]: row for row in read(kept)}
    reference = AutoModelForCausalLM.from_pretrained(model)
    turns = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    for question, text in (
        ("hello", turns.format("hello")),
        ("Add.\n\n1 2", turns.format("Add.\n1 2")),
        (questions[2], turns.format("hi") + "ho<|im_end|>\n" + turns.format("and?")),
    ):
        ids = toy_tokenizer(text)["input_ids"]
        output = reference.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
        assert answers[question]["answer"] == toy_tokenizer.decode(output, skip_special_tokens=True)
    assert "context window" in answers[questions[3]]["skipped"]

    # The second time no model is opened, unless something has changed.
    opened: list[str] = []
    real = judge_answers.open_engine
    monkeypatch.setattr(judge_answers, "open_engine", lambda target: (opened.append(target), real(target))[1])
    monkeypatch.setattr("sys.stdin", io.StringIO("2\n0\n"))
    assert main([*asked, "--max-new-tokens", "8"]) == 0
    assert opened == []
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    main([*asked, "--max-new-tokens", "8"])
    assert opened == [str(model)]
    # What was kept is itself a file of answers.
    assert open_side(str(kept)).names >= {str(model.resolve())}


def test_the_page_of_a_run_has_what_a_judge_said_at_once(
    toy_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(toy_llama_dir, run)
    flat = {"base_model": str(toy_llama_dir), "datasets": [{"path": "rows.jsonl", "type": "chat_template"}]}
    (run / "config.yaml").write_text(Config.from_flat(flat).to_yaml())
    page = write_report(run)
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "hello", "answer": "something"}])
    (tmp_path / "p.txt").write_text("hello\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n"))
    asked = ["judge", str(run), str(other), "--prompts", str(tmp_path / "p.txt"), "--human", "--max-new-tokens", "4"]
    assert main(asked) == 0
    assert f"{page} holds this result now" in capsys.readouterr().err
    assert "A judge&#39;s choice" in page.read_text(encoding="utf-8")


def test_a_file_of_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_rows(tmp_path / "a.jsonl", [{"prompt": "one", "answer": "x"}, {"prompt": "spare", "answer": "x"}])
    b = write_rows(
        tmp_path / "b.jsonl",
        [{"instruction": "one", "output": "y"}, {"prompt": "two", "answer": "z"}, {"prompt": "3", "answer": None}],
    )
    (tmp_path / "p.txt").write_text("one\n\n one \r\ntwo\n3\n", encoding="utf-8-sig")
    monkeypatch.setattr("sys.stdin", io.StringIO("0\n"))
    asked = ["judge", str(a), str(b), "--prompts", str(tmp_path / "p.txt"), "--output", str(tmp_path / "out")]
    assert main([*asked, "--human"]) == 0
    shown = capsys.readouterr()
    assert "has no answer to 2 of 3 prompts, which are left out; first: '3': not in the file" in shown.err
    assert "has no answer to 1 of 3 prompts, which are left out; first: '3': null" in shown.err
    assert "1 answers belong to none of the prompts" in shown.err
    assert "repeated prompts, each of which is asked once: 1" in shown.err
    assert "left out: 2 prompts without an answer of A" in shown.out


def test_prompts_as_datasets_name_them(tmp_path: Path) -> None:
    human, gpt = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
    rows: list[dict[str, Any]] = [
        {"prompt": None, "instruction": "q", "input": None},
        {"question": "q", "answer": "a"},
        {"conversations": [human, gpt]},
        {"prompt": None, "messages": [{"role": "user", "content": "q"}]},
    ]
    for row in rows:
        (found,) = read_prompts(write_rows(tmp_path / "p.jsonl", [row]))
        assert found.question == found.instruction == "q"
    (found,) = read_prompts(write_rows(tmp_path / "p.jsonl", [{"conversations": [human, gpt, human]}]))
    assert found.messages == (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "q"},
    )


# --- a local judge -------------------------------------------------------------------------------------------------


def test_a_local_judge_is_the_likeliest_choice(roomy_llama: Path, toy_tokenizer: Any) -> None:
    judge = LocalJudge(str(roomy_llama))
    text = question_text("one?", "yes", "no", "Be right.", LOCAL_FORM)
    ids = toy_tokenizer(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    choices = [toy_tokenizer(str(choice))["input_ids"] for choice in (0, 1, 2)]
    assert [len(choice) for choice in choices] == [1, 1, 1]
    log_p = transformers_logits(roomy_llama, ids)[-1]
    expected = [float(log_p[choice[0]]) for choice in choices]
    found = judge._log_likelihoods(ids)
    assert [found[choice] for choice in (0, 1, 2)] == pytest.approx(expected, abs=1e-4)
    verdict = judge.ask(text)
    assert verdict.choice == max(range(3), key=lambda choice: expected[choice])
    share = torch.tensor(expected).softmax(0)
    assert f"answer 1 {float(share[1]):.3f}, answer 2 {float(share[2]):.3f}" in verdict.argument


@pytest.mark.parametrize(
    "endings",
    [
        {"0": [20, 30], "1": [20, 31], "2": [20, 32]},  # a common beginning, as sentencepiece makes one
        {"0": [20, 30], "1": [21, 30], "2": [40, 41]},
    ],
)
def test_choices_of_several_tokens(endings: dict[str, list[int]], roomy_llama: Path) -> None:
    judge = LocalJudge(str(roomy_llama))
    real = judge._engine.tokenizer

    class Splitting:
        def decode(self, ids: list[int]) -> str:
            return str(real.decode(ids))

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": endings[text.strip()]}

    judge._engine.tokenizer = Splitting()
    prompt = [10, 11, 12, 13]
    found = judge._log_likelihoods(prompt)
    whole = {}
    for choice, (first, second) in endings.items():
        log_p = transformers_logits(roomy_llama, [*prompt, first])
        whole[int(choice)] = float(log_p[-2, first] + log_p[-1, second])
    # What all have in common counts alike, and may be left out.
    assert found[1] - found[0] == pytest.approx(whole[1] - whole[0], abs=1e-4)
    assert found[2] - found[0] == pytest.approx(whole[2] - whole[0], abs=1e-4)


def test_judging_locally_from_the_command_line(
    roomy_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_rows(tmp_path / "a.jsonl", [{"prompt": f"q{i}", "answer": "yes"} for i in range(3)])
    b = write_rows(tmp_path / "b.jsonl", [{"prompt": f"q{i}", "answer": "no " * 9000 * (i == 2)} for i in range(3)])
    (tmp_path / "p.txt").write_text("q0\nq1\nq2\n", encoding="utf-8")
    asked = ["judge", str(a), str(b), "--prompts", str(tmp_path / "p.txt"), "--output", str(tmp_path / "out")]
    assert main([*asked, "--judge", f"local:{roomy_llama}"]) == 3
    assert "the question to the judge has" in capsys.readouterr().err
    (result,) = (tmp_path / "out").glob("judge-b-by-*.json")
    figures = json.loads(result.read_text())["figures"]
    assert figures["failed"] == 1
    assert figures["counted"] + figures["flips"]["count"] + figures["wavered"]["count"] == 2
    (stored,) = (tmp_path / "out").glob("judge-verdicts-*.jsonl")
    assert len(read(stored)) == 4


# --- a person ------------------------------------------------------------------------------------------------------


def test_a_person_is_asked_blind_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count = 24
    questions = [f"question {i}" for i in range(count)]
    a = write_rows(tmp_path / "tuned.jsonl", [{"prompt": q, "answer": "good"} for q in questions])
    b = write_rows(tmp_path / "base.jsonl", [{"prompt": q, "answer": "bad"} for q in questions])
    (tmp_path / "p.txt").write_text("\n".join(questions), encoding="utf-8")

    def judge(text: str, seed: str = "0") -> tuple[int, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        sides = [str(a), str(b), "--prompts", str(tmp_path / "p.txt"), "--output", str(tmp_path / "out")]
        status = main(["judge", *sides, "--human", "--seed", seed])
        return status, capsys.readouterr().out

    status, shown = judge("q\n")
    assert status == 3
    assert "tuned" not in shown.split("better (1, 2, 0, q)")[0]

    class Reader(io.StringIO):
        """A person who likes "good", and after some pairs has had enough."""

        def __init__(self, most: int) -> None:
            super().__init__()
            self.most = most
            self.seen: list[tuple[str, int]] = []

        def readline(self, *_: Any) -> str:
            page = capsys.readouterr().out
            if len(self.seen) == self.most:
                return "q\n"
            question = next(line for line in page.splitlines() if line.startswith("question"))
            place = 1 if page.index("good") < page.index("bad") else 2
            self.seen.append((question, place))
            return f"{place} it is good\n"

    def judged_by(reader: Reader, seed: str) -> int:
        monkeypatch.setattr("sys.stdin", reader)
        sides = [str(a), str(b), "--prompts", str(tmp_path / "p.txt"), "--output", str(tmp_path / "out")]
        return main(["judge", *sides, "--human", "--seed", seed])

    first, second = Reader(10), Reader(count)
    assert judged_by(first, "0") == 3
    assert judged_by(second, "7") == 0  # another seed changes what is to come, not what was said
    both = first.seen + second.seen
    assert sorted(question for question, _ in both) == sorted(questions)
    assert [question for question, _ in both] != questions
    assert {place for _, place in both} == {1, 2}
    (result,) = (tmp_path / "out").glob("judge-base-by-human-*.json")
    figures = json.loads(result.read_text())["figures"]
    assert (figures["wins"]["count"], figures["winner"], figures["complete"]) == (count, "a", True)
    (stored,) = (tmp_path / "out").glob("judge-verdicts-human-*.jsonl")
    assert {row["argument"] for row in read(stored)} == {"it is good"}


def test_bytes_that_are_no_text_are_a_wrong_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_rows(tmp_path / "a.jsonl", [{"prompt": "q", "answer": "yes"}])
    b = write_rows(tmp_path / "b.jsonl", [{"prompt": "q", "answer": "no"}])
    (tmp_path / "p.txt").write_text("q\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n3\n\n1x\n2 tr\xe8s\n"), encoding="utf-8"))
    asked = ["judge", str(a), str(b), "--prompts", str(tmp_path / "p.txt"), "--output", str(tmp_path / "out")]
    assert main([*asked, "--human"]) == 0
    assert capsys.readouterr().out.count("better (1, 2, 0, q)") == 5
    (stored,) = (tmp_path / "out").glob("judge-verdicts-human-*.jsonl")
    assert [(row["choice"], row["argument"]) for row in read(stored)] == [(2, "tr\ufffds")]


def test_an_answer_cannot_change_the_terminal() -> None:
    assert visible("a\x1b[2Jb\r\nc\td é \u202e") == "a\\x1b[2Jb\\r\nc\td é \\u202e"


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture
def kin(tmp_path: Path, roomy_llama: Path) -> Path:
    """A run on the toy model with a checkpoint and an adapter, and answers of models elsewhere."""
    run = tmp_path / "run"
    (run / "checkpoint-5").mkdir(parents=True)
    config = Config.from_flat(
        {"base_model": str(roomy_llama), "datasets": [{"path": str(tmp_path / "rows.jsonl"), "type": "alpaca"}]}
    )
    (run / "config.yaml").write_text(config.to_yaml())
    for folder in (run, run / "checkpoint-5"):
        (folder / "config.json").write_text("{}")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(roomy_llama)}))
    write_rows(tmp_path / "gpt-4o.jsonl", [{"prompt": "q", "answer": "x"}])
    write_rows(tmp_path / "hub.jsonl", [{"prompt": "q", "answer": "y", "model": "some/Model-7B"}])
    write_rows(tmp_path / "plain.jsonl", [{"prompt": "q", "answer": "z"}])
    (tmp_path / "p.txt").write_text("q\n")
    return tmp_path


def test_the_base_of_a_run_is_known_by_any_spelling(kin: Path, roomy_llama: Path) -> None:
    spelled = f"{roomy_llama}/../{roomy_llama.name}/"
    assert all(is_base_of(spelled, str(kin / tuned)) for tuned in ("run", "run/checkpoint-5", "adapter"))
    assert not is_base_of(str(kin / "run"), str(kin / "adapter"))
    assert not is_base_of(str(kin / "plain.jsonl"), str(kin / "gpt-4o.jsonl"))
    assert not is_base_of(spelled, spelled)


def test_base_is_what_a_was_trained_from(
    kin: Path, roomy_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {base_of(str(kin / tuned)) for tuned in ("run", "run/checkpoint-5", "adapter")} == {str(roomy_llama)}
    with pytest.raises(ConfigError, match="does not say what it was trained from"):
        base_of(str(kin / "plain.jsonl"))
    monkeypatch.chdir(kin)
    assert main(["judge", "gpt-4o.jsonl", "base", "--prompts", "p.txt", "--human"]) == 2
    assert main(["judge", "adapter", "base", "--prompts", "p.txt", "--judge", f"local:{roomy_llama}"]) == 2
    assert "adapter is, or was made from, the judge" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("side", "judge"),
    [
        ("adapter", "local:{base}"),
        ("run", "local:{base}"),
        ("run/checkpoint-5", "local:{base}"),
        ("run", "local:{kin}/run/checkpoint-5"),
        ("adapter", "local:{kin}/run"),
        ("gpt-4o.jsonl", "openai:gpt-4o-2024-08-06"),
        ("gpt-4o.jsonl", "openai:ft:gpt-4o-2024-08-06:somebody::a1b2"),
        ("hub.jsonl", "http://127.0.0.1:9/v1#model-7b:latest"),
        ("hub.jsonl", "http://127.0.0.1:9/v1#some/model-7b"),
        ("hub.jsonl", "http://127.0.0.1:9/v1#Model-7B"),
        ("run", "http://127.0.0.1:9/v1#llama"),
    ],
)
def test_nobody_judges_themselves_unless_told(
    side: str, judge: str, kin: Path, roomy_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    name = judge.format(base=roomy_llama, kin=kin)
    asked = [str(kin / side), str(kin / "plain.jsonl"), "--prompts", str(kin / "p.txt"), "--judge", name]
    assert main(["judge", *asked]) == 2
    assert "is, or was made from, the judge or its base" in capsys.readouterr().err
    found = judge_name.judge_name(name, human=False)
    assert judge_name.own_judge(found, open_side(str(kin / "plain.jsonl"))) is None
    # Told so, the command goes on, to what is missing here.
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setattr("luthier.evaluate.judge.command._pairs", lambda *_: (_ for _ in ()).throw(DataError("went on")))
    monkeypatch.setenv("SOME", "k")
    key = [] if name.startswith("local") else ["--api-key-env", "SOME"]
    assert main(["judge", *asked, *key, "--allow-self-judging"]) == 1
    shown = capsys.readouterr().err
    assert "went on" in shown and "this says less" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "who judges?"),
        (["--judge", "gpt-4o"], "--judge gpt-4o: no such judge"),
        (["--judge", "http://127.0.0.1/v1"], "an address and a model are needed"),
        (["--judge", "http://me:pw@127.0.0.1/v1#m"], "leave user, password and query out"),
        (["--judge", "openai:gpt-4o"], "the variable OPENAI_API_KEY holds no key"),
        (["--judge", "http://h/v1#m", "--api-key-env", "NOT_SET"], "the variable NOT_SET holds no key"),
        (["--judge", "http://h/v1#m", "--max-cost", "1"], "the prices of m are not known"),
        (["--judge", "http://h/v1#m", "--max-cost", "nan", "--price-in", "1", "--price-out", "1"], "must be above 0"),
        (["--judge", "http://h/v1#m", "--price-in", "1"], "give both"),
        (["--judge", "http://h/v1#m", "--human"], "one of the two"),
        (["--human", "--json"], "the terminal is the person's"),
        (["--human", "--max-cost", "1"], "for a judge behind an endpoint"),
        (["--human", "--api-key-env", "X"], "only a judge behind an endpoint has a key"),
        (["--human", "--criteria", "nothing.txt"], "there is no such file"),
        (["--human", "--criteria", " "], "it is empty"),
    ],
)
def test_what_contradicts_itself(
    options: list[str], message: str, kin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    sides = [str(kin / "plain.jsonl"), str(kin / "hub.jsonl")]
    assert main(["judge", *sides, "--prompts", str(kin / "p.txt"), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", "there is no prompt in it"),
        ("p.jsonl", '{"text": "x"}\n', "p.jsonl:1: a row needs a text under prompt"),
        ("p.jsonl", '{"prompt": "x"}\n{"prompt": 3}\n', "p.jsonl:2"),
        ("p.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}\n', "no user turn"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}\n', "role and content"),
        ("p.jsonl", "no json\n", "not valid JSON"),
    ],
)
def test_bad_prompts(name: str, content: str, message: str, kin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (kin / "bad").mkdir()
    (kin / "bad" / name).write_text(content)
    sides = [str(kin / "plain.jsonl"), str(kin / "hub.jsonl")]
    assert main(["judge", *sides, "--prompts", str(kin / "bad" / name), "--human"]) == 1
    assert message in capsys.readouterr().err


def test_bad_sides(kin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def judge(a: str, b: str) -> str:
        prompts, out = str(kin / "p.txt"), str(tmp_path / "out")
        assert main(["judge", a, b, "--prompts", prompts, "--human", "--output", out]) in (1, 2)
        return capsys.readouterr().err

    plain = str(kin / "plain.jsonl")
    assert "there is nothing to compare" in judge(plain, str(kin / "run" / ".." / "plain.jsonl"))
    # Before anything is loaded: the other side may take hours to answer.
    assert "no such file or folder here" in judge(plain, str(kin / "nothing"))
    (kin / "cut-off").mkdir()
    assert "neither adapter_config.json nor config.json is here" in judge(plain, str(kin / "cut-off"))
    sides = [plain, str(kin / "hub.jsonl"), "--prompts", str(kin / "p.txt")]
    assert main(["judge", *sides, "--judge", f"local:{kin / 'nothing'}"]) == 1
    assert "no such file or folder here" in capsys.readouterr().err
    twice = write_rows(kin / "twice.jsonl", [{"prompt": "q", "answer": "x"}, {"prompt": "q", "answer": "y"}])
    assert "twice.jsonl:2: this prompt has another answer further up" in judge(plain, str(twice))
    other = write_rows(kin / "other.jsonl", [{"prompt": "r", "answer": "x"}])
    assert "there is no prompt that both" in judge(plain, str(other))
    none = write_rows(kin / "none.jsonl", [{"prompt": "q"}])
    assert "none.jsonl:1: a row of answers needs a text under answer" in judge(plain, str(none))
