"""Luthier behind lm-evaluation-harness, against the harness's own class for transformers models on the same weights."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier import cli
from luthier.config import Config
from luthier.errors import ConfigError, DataError, RunError
from luthier.evaluate.harness.run import run_harness
from luthier.evaluate.harness.tasks import load_tasks
from luthier.evaluate.opened import Which
from luthier.evaluate.store import Store

needs_harness = [
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None,
        reason='needs lm-evaluation-harness: pip install "luthier[harness]"',
    ),
    pytest.mark.slow,
]

COMMON = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
  cache_dir: {cache}
test_split: test
fewshot_split: test
"""
OWN = {
    "toy_choice": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "toy_letters": """
output_type: multiple_choice
doc_to_text: "Question: {{question}} {{long}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "toy_write": """
output_type: generate_until
doc_to_text: "Question: {{question}} {{long}}\\nAnswer:"
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["e", "<|im_end|>"]
  max_gen_toks: 24
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "toy_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{long}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
""",
}
GROUP = "group: toy_group\ntask: [toy_choice, toy_letters]\naggregate_metric_list:\n  - {metric: acc}\n"
ROWS = 12
TASKS = "toy_group,toy_write,toy_text"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks; in one of the rows `long` is beyond the toy model's 512 tokens."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": f"What is {n} plus {n + 1}?",
            "choices": [str(2 * n + 1), str(2 * n), "the capital of France", f"{n} lazy dogs jump"],
            "answer": n % 4,
            "long": " ".join(f"The fox {k} jumps." for k in range(200 if n == 5 else 0)),
        }
        for n in range(ROWS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"rows": folder / "rows.jsonl", "cache": folder / "cache"}
    for name, text in OWN.items():
        (folder / f"{name}.yaml").write_text(COMMON.format(name=name, **common) + text)
    (folder / "toy_group.yaml").write_text(GROUP)
    remote = COMMON.format(name="toy_remote", **common).replace("path: json", "path: nobody/nothing-there")
    (folder / "toy_remote.yaml").write_text(remote + OWN["toy_choice"])
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, toy_llama_dir: Path) -> Path:
    """A few steps with an adapter, that move the model far enough to say other things."""
    from luthier.train.run import train

    folder = tmp_path_factory.mktemp("asked")
    rows = [{"instruction": f"Add {n} and {n + 1}.", "output": f" {2 * n + 1} jumps"} for n in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "base_model": str(toy_llama_dir),
        "datasets": [{"path": str(folder / "rows.jsonl"), "type": "alpaca"}],
        "adapter": "lora",
        "lora_r": 4,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "sequence_len": 512,
        "bf16": False,
        "output_dir": str(folder / "run"),
        "dataset_prepared_path": str(folder / "prepared"),
    }
    train(Config.from_flat(settings))
    return folder / "run"


def reference(model: Any, tokenizer: Any, tasks: Path, names: list[str], **options: Any) -> dict[str, Any]:
    """What the harness finds by its own class, a few at a time and with padding."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(model=lm, tasks=names, task_manager=manager, bootstrap_iters=0, **options)
    assert found is not None
    return found


def models_of(run: Path, base: Path) -> dict[str, Any]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    return {"target": PeftModel.from_pretrained(load(), str(run)).merge_and_unload().eval(), "compare": load()}


def check_same(role: str, result: dict[str, Any], rows: list[dict[str, Any]], expected: dict[str, Any]) -> int:
    """Every response and every figure; gives how many responses there were."""
    seen = 0
    for task, samples in expected["samples"].items():
        mine = {row["question"]: row for row in rows if row["task"] == task}
        assert mine.keys() == {sample["doc_id"] for sample in samples}
        for sample in samples:
            for got, want in zip(mine[sample["doc_id"]][role]["responses"], sample["resps"], strict=True):
                seen += 1
                if isinstance(want[0], str):
                    assert got == want
                elif isinstance(want[0], tuple):
                    assert got[0][0] == pytest.approx(want[0][0], abs=1e-4) and got[0][1] == want[0][1]
                else:  # the log-prob of a whole text, of up to 2,000 tokens: relative, as fp32 rounds
                    assert got[0] == pytest.approx(want[0], rel=1e-6, abs=1e-4)
    for task, figures in result["figures"]["tasks"].items():
        for name, figure in figures[role].items():
            assert figure["value"] == pytest.approx(expected["results"][task][f"{name},none"], rel=1e-6), (task, name)
    return seen


class TestLive:
    pytestmark = needs_harness

    def test_answers_and_figures_are_those_of_the_harness_s_own_class(
        self, run: Path, tasks: Path, toy_llama_dir: Path, toy_tokenizer: Any, tmp_path: Path
    ) -> None:
        path, result = run_harness(str(run), tasks=TASKS, include_path=tasks, compare="base", shots=2, device="cpu")
        assert path.parent == run / "evaluation" and json.loads(path.read_text()) == result
        rows = [json.loads(line) for line in path.with_name(result["rows"]).read_text().splitlines()]
        said: dict[str, list[Any]] = {}
        for role, model in models_of(run, toy_llama_dir).items():
            expected = reference(model, toy_tokenizer, tasks, TASKS.split(","), num_fewshot=2)
            assert check_same(role, result, rows, expected) == ROWS * (4 + 4 + 1 + 1)
            said[role] = [sample["resps"] for sample in expected["samples"]["toy_write"]]
        assert said["target"] != said["compare"]  # otherwise the adapter could be missing
        for figures in result["figures"]["tasks"].values():
            for name, found in figures["difference"].items():
                before, after = figures["compare"][name], figures["target"][name]
                assert found["value"] == pytest.approx(after["value"] - before["value"])
                assert after["low"] is None or after["low"] <= after["value"] <= after["high"]
        assert result["figures"]["tasks"]["toy_write"]["shots"] == 2

    def test_conversations_are_those_of_the_harness_too(
        self, tasks: Path, toy_llama_dir: Path, toy_tokenizer: Any, tmp_path: Path
    ) -> None:
        options: dict[str, Any] = {"include_path": tasks, "output": tmp_path, "device": "cpu", "limit": 4}
        path, result = run_harness(str(toy_llama_dir), tasks="toy_choice,toy_write", chat=True, shots=1, **options)
        rows = [json.loads(line) for line in path.with_name(result["rows"]).read_text().splitlines()]
        expected = reference(
            models_of_base(toy_llama_dir), toy_tokenizer, tasks, ["toy_choice", "toy_write"], num_fewshot=1, limit=4,
            apply_chat_template=True, fewshot_as_multiturn=True,
        )  # fmt: skip
        assert check_same("target", result, rows, expected) == 4 * (4 + 1)
        assert all(row["arguments"][0][0].startswith("<|im_start|>user\n") for row in rows)

    def test_what_prompts_begin_with_is_computed_once(self, toy_llama_dir: Path, tmp_path: Path) -> None:
        from luthier.evaluate.harness.model import HarnessModel
        from luthier.models.assemble import open_for_inference

        model, tokenizer, _ = open_for_inference(str(toy_llama_dir), device=torch.device("cpu"))
        common = list(range(10, 50))
        # Four letters behind one prompt, and an answer of three tokens behind a longer one.
        requests = [(None, common, [letter]) for letter in (60, 61, 62, 63)] + [(None, [*common, 5, 6], [7, 8, 9])]
        found, computed = [], []
        for budget in (None, 1):
            store = Store(tmp_path / f"{budget}.jsonl", {})
            lm = HarnessModel(model, tokenizer, [0], store, tokens_per_pass=budget)
            found.append(lm._loglikelihood_tokens(requests))
            computed.append(lm.computed)
        assert computed == [40 + 4, 4 * 40 + 44]
        for one, other in zip(*found, strict=True):
            assert one[0] == pytest.approx(other[0], abs=1e-4) and one[1] == other[1]

    def test_passes_that_memory_does_not_hold_are_cut(
        self, toy_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        from luthier.evaluate.harness.model import HarnessModel
        from luthier.models.assemble import open_for_inference
        from luthier.models.policy import Policy

        model, tokenizer, _ = open_for_inference(str(toy_llama_dir), device=torch.device("cpu"))
        requests = [(None, [n + 10] * 20, [5, 6]) for n in range(8)]
        stores = [Store(tmp_path / f"{number}.jsonl", {}) for number in range(2)]
        expected = HarnessModel(model, tokenizer, [0], stores[0])._loglikelihood_tokens(requests)
        real = Policy.forward

        def small(self: Policy, batch: Any) -> Any:
            if len(batch.input_ids) > 50:
                raise torch.OutOfMemoryError("no room")
            return real(self, batch)

        monkeypatch.setattr(Policy, "forward", small)
        found = HarnessModel(model, tokenizer, [0], stores[1], tokens_per_pass=168)._loglikelihood_tokens(requests)
        assert "going on with passes of up to" in caplog.text
        assert [logp for logp, _ in found] == pytest.approx([logp for logp, _ in expected], abs=1e-4)

    def test_a_table_gets_one_row_for_each_model(
        self, tasks: Path, toy_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        table = tmp_path / "results.csv"
        command = ["evaluate", str(toy_llama_dir), "--include_path", str(tasks), "--limit", "3", "--device", "cpu"]
        for name in ("toy_choice", "toy_write"):
            where = ["--record", str(table), "--output", str(tmp_path)]
            assert cli.main([*command, "--tasks", name, "--num_fewshot", "1", *where]) == 0
            assert name in capsys.readouterr().out
        head, *rows = table.read_text().splitlines()
        assert len(rows) == 1 and "toy_choice acc" in head and "toy_write exact_match" in head
        assert (tmp_path / "harness-toy_choice-1shots-first3.json").is_file()

    @pytest.mark.parametrize(
        ("options", "error", "said"),
        [
            ({"tasks": "toy_choise"}, ConfigError, "no such task; near it: toy_choice"),
            ({"tasks": " , "}, ConfigError, "no task is named"),
            ({"tasks": "toy_remote"}, DataError, "the hub cannot be reached, and the data is not on this machine"),
            ({"tasks": "toy_choice", "include_path": "/no/such/folder"}, ConfigError, "there is no such folder"),
            ({"tasks": "toy_choice", "compare": "base"}, ConfigError, "is no run"),
            ({"tasks": "toy_choice", "shots": -1}, ConfigError, "0 or more"),
            ({"tasks": "toy_choice", "limit": 0}, ConfigError, "at least 1 question"),
            ({"tasks": "toy_choice", "output": Path(__file__) / "x"}, RunError, "cannot be written"),
        ],
    )
    def test_what_cannot_be_asked_is_one_error_before_the_model_is_loaded(
        self, options: dict[str, Any], error: type[Exception], said: str, tasks: Path, toy_llama_dir: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(Which, "open", lambda *_, **__: pytest.fail("the model was loaded"))
        with pytest.raises(error, match=said):
            run_harness(str(toy_llama_dir), **{"include_path": tasks, **options})

    def test_a_task_file_that_is_no_yaml_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text("task: [mine\n")
        with pytest.raises(ConfigError, match=r"mine\.yaml cannot be read: ParserError"):
            load_tasks("mine", tmp_path)

    def test_what_a_task_cannot_do_is_one_error(self, tasks: Path, toy_llama_dir: Path, tmp_path: Path) -> None:
        ask: dict[str, Any] = {"include_path": tasks, "device": "cpu", "shots": 50, "output": tmp_path}
        with pytest.raises(RunError, match=r"could not run them: "):
            run_harness(str(toy_llama_dir), tasks="toy_choice", **ask)

    def test_an_interrupted_command_goes_on(
        self, run: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        ask: dict[str, Any] = {"tasks": "toy_letters,toy_write,toy_text", "include_path": tasks, "device": "cpu"}
        ask |= {"limit": 7}
        _, whole = run_harness(str(run), output=tmp_path / "whole", **ask)
        everything = sum(map(len, answers_in(tmp_path / "whole")))
        add, answered = Store.add, []

        def killed(self: Store, row: dict[str, Any]) -> None:
            if len(answered) == everything * 3 // 4:
                self._file.write(b'{"key": "half a li')
                raise KeyboardInterrupt
            answered.append((self.path, row["key"]))
            add(self, row)

        monkeypatch.setattr(Store, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            run_harness(str(run), output=tmp_path / "killed", **ask)
        assert "the same command goes on from there" in caplog.text

        def counted(self: Store, row: dict[str, Any]) -> None:
            answered.append((self.path, row["key"]))
            add(self, row)

        monkeypatch.setattr(Store, "add", counted)
        with caplog.at_level("INFO", "luthier"):
            _, result = run_harness(str(run), output=tmp_path / "killed", **ask)
        assert "requests were answered before" in caplog.text
        assert len(set(answered)) == len(answered) == everything  # nothing is asked twice
        rounded = [json.dumps(found["figures"], default=str) for found in (whole, result)]
        assert json.loads(rounded[1]) == close(json.loads(rounded[0]))

    def test_sampled_texts_are_the_same_after_an_interruption(
        self, toy_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from lm_eval.api.instance import Instance

        from luthier.evaluate.harness.model import HarnessModel
        from luthier.models.assemble import open_for_inference

        model, tokenizer, _ = open_for_inference(str(toy_llama_dir), device=torch.device("cpu"))
        how = {"until": ["@"], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
        prompts = [text for text in ("The fox", "A lazy dog", "What is") for _ in range(3)]
        asked = [Instance("generate_until", {}, (text, how), 0) for text in prompts]

        def say(name: str) -> list[str]:
            store = Store(tmp_path / name, {})
            try:
                return HarnessModel(model, tokenizer, [0], store).generate_until(asked)
            finally:
                store.close()

        whole, add = say("whole"), Store.add
        assert len(set(whole)) > 6  # each time another one

        def killed(self: Store, row: dict[str, Any]) -> None:
            if len(self.rows) == 4:
                raise KeyboardInterrupt
            add(self, row)

        monkeypatch.setattr(Store, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            say("killed")
        monkeypatch.setattr(Store, "add", add)
        assert say("killed") == whole


def answers_in(folder: Path) -> list[list[str]]:
    """The lines of each file of answers, without the first."""
    return [path.read_text().splitlines()[1:] for path in folder.glob("harness-answers-*.jsonl")]


def close(value: Any) -> Any:
    """A JSON value whose numbers may be off as passes of other documents round."""
    if isinstance(value, dict):
        return {key: close(inner) for key, inner in value.items()}
    return pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value


def models_of_base(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_without_the_harness_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, toy_llama_dir: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "luthier\[harness\]"'):
        run_harness(str(toy_llama_dir), tasks="gsm8k")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "gsm8k", "--by", "kind"], "--by does nothing with --tasks"),
        (["--tasks", "gsm8k", "--data", "rows.jsonl"], "--data does nothing with --tasks"),
        (["--include_path", "."], "--include_path goes with --tasks"),
        (["--num_fewshot", "2"], "--shots goes with --benchmark"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "model", *arguments]) == 2
    assert said in capsys.readouterr().err
