"""A run measures the general set before and after itself: right, without a trace in the training, and over a stop."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from luthier.config import Config
from luthier.evaluate import general
from luthier.evaluate.data_eval import evaluate_data
from luthier.models.policy import Policy
from luthier.train import forgetting, run
from luthier.train.run import train
from tests.models.families import toy_model

MakeConfig = Callable[..., Config]
FEW = 22


@pytest.fixture(autouse=True)
def few_rows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Every ninth row, two of each kind: this is about the run."""
    file = tmp_path_factory.mktemp("set") / "general.jsonl"
    file.write_text("".join(general.ROWS.read_text(encoding="utf-8").splitlines(keepends=True)[::9]), encoding="utf-8")
    monkeypatch.setattr(general, "ROWS", file)
    general.rows.cache_clear()
    assert len(general.rows()) == FEW
    caplog.set_level(logging.INFO, "luthier")
    yield
    general.rows.cache_clear()


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation" / "general.json").read_text())
    return found


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluation" / "general.jsonl").read_text().splitlines()]


def same_figures(one: Any, other: Any) -> None:
    """Two of the same shape, numbers within rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            same_figures(one[name], other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for mine, others in zip(one, other, strict=True):
            same_figures(mine, others)
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-5, rel=1e-5)
    else:
        assert one == other


def metrics(folder: Path) -> list[dict[str, Any]]:
    machine = {"seconds", "tokens_per_second", "peak_memory_gib"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in machine} for row in rows]


@pytest.mark.parametrize(
    "values",
    [
        dict(lora_dropout=0.1, val_set_size=8, eval_steps=2, sample_prompts=["Add 1"], generation_do_sample=True),
        dict(adapter=None, lora_r=None, sample_packing=True, sequence_len=128, num_epochs=9, learning_rate=1e-3),
    ],
    ids=["lora with dropout and samples", "all weights, packed"],
)
def test_the_training_is_the_same_to_the_last_bit_with_it_and_without(
    run_config: MakeConfig, tmp_path: Path, values: dict[str, Any]
) -> None:
    for name, on in (("with", True), ("without", False)):
        train(run_config(**values, general_eval=on, output_dir=str(tmp_path / name)))
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
    one, other = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("with", "without"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    if values.get("sample_prompts"):
        assert len({(tmp_path / name / "samples.jsonl").read_bytes() for name in ("with", "without")}) == 1
    assert (tmp_path / "with" / "evaluation" / "general.json").exists()
    assert not any((tmp_path / "without" / name).exists() for name in ("evaluation", "general_before.json"))


def test_it_is_what_evaluate_measures_of_the_weights_that_are_kept(run_config: MakeConfig, tmp_path: Path) -> None:
    """With the best of several evaluations kept, which is not the last."""
    folder = tmp_path / "run"
    best = dict(val_set_size=8, eval_steps=1, save_steps=1, load_best_model_at_end=True)
    train(run_config(general_eval=True, learning_rate=0.3, **best))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["kept_step"] < 6
    own, own_rows = read(folder), rows_of(folder)
    _, afterwards = evaluate_data(str(folder), general=True)
    for name in ("kind", "compare", "names", "rows"):
        assert own[name] == afterwards[name]
    assert own.keys() == afterwards.keys() and own["created"] >= summary["finished"]
    same_figures(own["figures"], afterwards["figures"])
    same_figures(own_rows, rows_of(folder))
    assert own["figures"]["all"]["difference"]["loss"]["value"] != 0


KINDS: dict[str, dict[str, Any]] = {
    "dpo": dict(rl="dpo"),
    "nf4": dict(load_in_4bit=True),
    "small batches": dict(eval_batch_size=1, sequence_len=130, val_set_size=4, max_tokens_per_pass=130),
}


@pytest.mark.parametrize("name", KINDS)
def test_all_kinds_of_runs_are_measured(run_config: MakeConfig, tmp_path: Path, pairs_file: Path, name: str) -> None:
    values = {"max_steps": 3, **KINDS[name]}
    if "rl" in values:
        values["datasets"] = [{"path": str(pairs_file)}]
    train(run_config(general_eval=True, **values))
    own = read(tmp_path / "run")
    assert own["figures"]["all"]["rows"] == FEW
    same_figures(own["figures"], evaluate_data(str(tmp_path / "run"), general=True)[1]["figures"])


def test_a_family_that_runs_one_document_in_a_pass_is_measured(
    run_config: MakeConfig, tmp_path: Path, toy_llama_dir: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toy_llama_dir)
    model = toy_model("bloom", vocab_size=len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    train(run_config(base_model=str(tmp_path / "model"), general_eval=True, max_steps=2))
    same_figures(
        read(tmp_path / "run")["figures"], evaluate_data(str(tmp_path / "run"), general=True)[1]["figures"]
    )


# --- over a stop --------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_has_the_figures_from_before_its_first_step(
    run_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = dict(general_eval=True, save_steps=3)
    train(run_config(**values, output_dir=str(tmp_path / "whole")))
    whole = read(tmp_path / "whole")
    train(run_config(**values, max_steps=6, output_dir=str(tmp_path / "stopped")))
    checkpoint = str(tmp_path / "stopped" / "checkpoint-3")
    (tmp_path / "stopped" / "evaluation" / "general.json").unlink()
    again = dict(resume_from_checkpoint=checkpoint, overwrite_output_dir=True)
    train(run_config(**values, **again, output_dir=str(tmp_path / "stopped")))
    assert read(tmp_path / "stopped")["figures"] == whole["figures"]
    # In a folder of its own, from another's checkpoint; and then from a checkpoint of that one.
    train(run_config(**values, resume_from_checkpoint=checkpoint, output_dir=str(tmp_path / "other")))
    assert read(tmp_path / "other")["figures"] == whole["figures"]
    assert (tmp_path / "other" / "general_before.json").exists()
    assert "forgets is not measured" not in caplog.text


def test_a_run_that_goes_on_without_them_says_so_and_leaves_it_out(
    run_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(run_config(general_eval=False, max_steps=1))
    left = [None, "{", "[1]", '{"rows": "of another set", "nll": [1], "correct": [0]}']
    for steps, text in enumerate(left, start=2):
        if text is not None:
            (tmp_path / "run" / "general_before.json").write_text(text)
        caplog.clear()
        train(run_config(general_eval=True, max_steps=steps, resume_from_checkpoint="auto"))
        assert "the general set was not measured when the run began (general_before.json)" in caplog.text
        assert not (tmp_path / "run" / "evaluation").exists()
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_overwriting_a_run_takes_its_figures_with_it(run_config: MakeConfig, tmp_path: Path) -> None:
    train(run_config(general_eval=True, max_steps=1))
    train(run_config(general_eval=False, max_steps=1, overwrite_output_dir=True))
    assert not (tmp_path / "run" / "general_before.json").exists() and not (tmp_path / "run" / "evaluation").exists()


# --- what it costs ------------------------------------------------------------------------------------------


def test_by_itself_it_is_measured_where_it_costs_little(
    run_config: MakeConfig,
    tmp_path: Path,
    toy_tokenizer: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(run_config(output_dir=str(tmp_path / "short")))
    assert "what the run forgets is not measured: the general set, before and after, would cost" in caplog.text
    assert "general_eval: true measures it all the same; `luthier evaluate RUN --general`" in caplog.text
    assert not (tmp_path / "short" / "evaluation").exists()
    # Its share is that of the tokens of the set among all that the run goes through, at the edge from both sides.
    row = next(row for row in reversed(metrics(tmp_path / "short")) if "tokens" in row)
    share = float(general.general_set(toy_tokenizer).documents.lengths.sum()) / row["tokens"]
    for factor, there in ((1.3, True), (0.7, False)):  # the run's 24 rows are not quite the mean of all 60
        monkeypatch.setattr(forgetting, "MOST", share * factor)
        train(run_config(output_dir=str(tmp_path / str(factor))))
        assert (tmp_path / str(factor) / "evaluation").exists() == there


@pytest.mark.parametrize("limit", [200, 20])
def test_an_end_of_memory_is_survived(
    run_config: MakeConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
) -> None:
    """Passes are cut; where not even one row fits it is left out; and the run never minds."""
    forward = Policy.forward

    def limited(self: Policy, batch: Any) -> Any:
        if not self.training and not torch.is_grad_enabled() and len(batch.input_ids) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, batch)

    build = run.build_policy

    def built(*arguments: Any, **options: Any) -> Policy:
        policy = build(*arguments, **options)
        monkeypatch.setattr(Policy, "forward", limited)
        return policy

    monkeypatch.setattr(run, "build_policy", built)
    train(run_config(general_eval=True, max_steps=2))
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    if limit == 200:
        assert "going on with" in caplog.text and read(tmp_path / "run")["figures"]["all"]["rows"] == FEW
    else:
        assert "what the run forgets is not measured: " in caplog.text
        assert "out of memory in one document" in caplog.text
        assert not (tmp_path / "run" / "evaluation").exists()
