"""What a run does beside its steps: evaluation, samples, stopping early, what it writes, what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.config import Config
from luthier.data.dataset import prepare
from luthier.data.tokenizer import load_tokenizer
from luthier.errors import ConfigError, LuthierError, ModelError, RunError
from luthier.train import checkpoint
from luthier.train.checkpoint import State
from luthier.train.metrics import Recorder, overfitting_since
from luthier.train.run import train
from tests.train.conftest import losses

MakeConfig = Callable[..., Config]


def _rows(folder: Path, key: str) -> list[dict[str, float]]:
    return [
        row
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        if key in (row := json.loads(line))
    ]


def test_eval_loss_is_transformers_loss_over_the_whole_validation_set(
    run_config: MakeConfig, tmp_path: Path
) -> None:
    config = run_config(
        adapter=None,
        lora_r=None,
        learning_rate=1e-3,
        val_set_size=13,
        eval_steps=2,
        max_steps=4,
        eval_batch_size=3,
    )
    train(config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    validation = prepare(config, load_tokenizer(config)).validation
    assert validation is not None and len(validation) == 13
    total, tokens, correct = 0.0, 0, 0
    for i in range(len(validation)):
        document = validation[i]
        ids, labels = (
            torch.tensor(np.asarray(x, np.int64))[None] for x in (document.input_ids, document.labels)
        )
        with torch.no_grad():
            out = model(input_ids=ids, labels=labels)
        count = int((labels[:, 1:] >= 0).sum())
        total += float(out.loss) * count
        tokens += count
        hits = (out.logits[:, :-1].argmax(-1) == labels[:, 1:]) & (labels[:, 1:] >= 0)
        correct += int(hits.sum())
    last = _rows(tmp_path / "run", "eval_loss")[-1]
    assert last["step"] == 4 and len(_rows(tmp_path / "run", "eval_loss")) == 2
    assert last["eval_loss"] == pytest.approx(total / tokens, abs=1e-5)
    assert last["eval_perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert last["eval_token_accuracy"] == pytest.approx(correct / tokens)


def test_rows_of_metrics_and_the_folder(run_config: MakeConfig, tmp_path: Path) -> None:
    result = train(
        run_config(
            val_set_size=5,
            sample_prompts=["Add 1 and 2."],
            generation_max_new_tokens=4,
            num_generation_samples=2,
            evals_per_epoch=2,
            report_to="tensorboard",
        )
    )
    folder = tmp_path / "run"
    assert result.finished and result.output_dir == folder
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
        "environment.json",
        "loss.png",
        "summary.json",
        "report.html",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert not list(folder.glob(".partial*"))
    row = _rows(folder, "loss")[-1]
    assert set(row) == {
        "step",
        "epoch",
        "loss",
        "token_accuracy",
        "learning_rate",
        "grad_norm",
        "tokens",
        "computed_tokens",
        "trained_tokens",
        "tokens_per_second",
        "seconds",
        "peak_memory_gib",
    }
    assert row["step"] == 6 and row["epoch"] == pytest.approx(6 / 14)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    first = [s for s in samples if s["step"] == samples[0]["step"]]
    assert len(first) == 3 and sum(s["expected"] is not None for s in first) == 2
    assert {"prompt", "text", "max_new_tokens", "temperature", "top_p", "stopped"} <= set(samples[0])
    assert (
        Config.load(folder / "config.yaml").flat()
        == run_config(
            val_set_size=5,
            sample_prompts=["Add 1 and 2."],
            generation_max_new_tokens=4,
            num_generation_samples=2,
            evals_per_epoch=2,
            report_to="tensorboard",
        ).flat()
    )


def test_a_report_that_cannot_be_drawn_costs_no_run(
    run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(folder: Path) -> None:
        raise ZeroDivisionError("a flat axis")

    monkeypatch.setattr("luthier.experiments.report.write_report", fails)
    assert train(run_config(max_steps=1)).finished
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "run" / "report.html").exists()
    assert "no report was made: ZeroDivisionError: a flat axis" in caplog.text


def test_what_a_run_came_to_is_gone_while_it_goes_on(
    run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(run_config(max_steps=2))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["finished"]

    def fails(*_: object, **__: object) -> None:
        raise RunError("stopped here")

    monkeypatch.setattr("luthier.train.run.fit", fails)
    with pytest.raises(RunError, match="stopped here"):
        train(run_config(max_steps=4, resume_from_checkpoint="auto"))
    assert not (tmp_path / "run" / "summary.json").exists()


def test_stops_early_and_keeps_the_best(
    run_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(
        run_config(
            val_set_size=10,
            eval_steps=1,
            early_stopping_patience=2,
            learning_rate=0.5,
            max_steps=50,
            num_epochs=5,
            load_best_model_at_end=True,
            lr_scheduler="constant",
        )
    )
    assert result.finished and result.state.step < 50
    again = train(Config.load(tmp_path / "run" / "config.yaml", ["resume_from_checkpoint=auto"]))
    assert again.state.step == result.state.step
    assert "stopping early" in capsys.readouterr().err
    best = checkpoint.read_masters(tmp_path / "run" / f"checkpoint-{result.state.best_step}")
    assert result.summary["kept_step"] == result.state.best_step and best


def test_overfitting_is_said_with_its_step() -> None:
    state = State(best_step=20, evaluations=[[10, 2.0, 2.0], [20, 1.5, 1.4], [30, 1.6, 1.0]])
    assert overfitting_since(state) == 20
    state.evaluations[-1] = [30, 1.6, 1.5]  # train loss rose as well: something else
    assert overfitting_since(state) is None
    state.evaluations.pop()
    assert overfitting_since(state) is None


def test_a_loss_that_is_not_finite_names_step_and_rows(run_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"at step \d+.*rows\.jsonl:\d+") as raised:
        train(
            run_config(
                adapter=None, lora_r=None, learning_rate=1e30, max_grad_norm=0, optimizer="sgd", save_steps=1
            )
        )
    last = checkpoint.latest(tmp_path / "run")
    assert last is not None and str(last) in str(raised.value)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_full_disk_is_one_message(
    run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = checkpoint.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path, *rest: object) -> None:
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device")
        written(tensors, path, *rest)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match="No space left.*last good checkpoint is checkpoint-2"):
        train(run_config(save_steps=2))
    assert not list((tmp_path / "run").glob(".partial*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_disk_too_full_for_a_row_names_the_file(tmp_path: Path) -> None:
    with Recorder(tmp_path, 1) as recorder:
        recorder._metrics.close()
        recorder._metrics = open("/dev/full", "a")  # noqa: SIM115
        with pytest.raises(RunError, match="/dev/full: cannot be written: No space left"):
            recorder.evaluation({"step": 1})


def test_damaged_weights_are_one_message(run_config: MakeConfig, toy_llama_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(toy_llama_dir, model)
    (model / "model.safetensors").write_bytes(b"garbage" * 10)
    with pytest.raises(ModelError, match="header"):
        train(run_config(base_model=str(model)))


def test_an_unwritable_folder_is_one_message(run_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        train(run_config(output_dir=str(tmp_path / "file" / "run")))


def test_fp16_scales_the_loss_and_comes_near_fp32(
    run_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from luthier.train import run

    values = {"save_steps": 2, "learning_rate": 1e-3}
    train(run_config(**values, output_dir=str(tmp_path / "fp32")))
    monkeypatch.setattr(run, "choose_dtype", lambda config, device: torch.float16)
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", partial(scaler, init_scale=2.0**24))
    train(run_config(**values, output_dir=str(tmp_path / "high")))
    assert "step 1 is skipped: fp16 overflowed; loss scale now 8.38861e+06" in capsys.readouterr().err
    monkeypatch.setattr(torch.amp, "GradScaler", partial(scaler, init_scale=64.0))
    train(run_config(**values))
    assert checkpoint.read_state(tmp_path / "run" / "checkpoint-6")[0].loss_scale["scale"] > 1
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "fp32"), atol=1e-2)
    expected = losses(tmp_path / "run")
    for name in ("checkpoint-6", "checkpoint-4"):
        shutil.rmtree(tmp_path / "run" / name)
    train(run_config(**values, resume_from_checkpoint="auto"))
    assert losses(tmp_path / "run") == expected


def test_gradients_that_are_not_finite_stop_the_run_as_well(
    run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.train import engine

    monkeypatch.setattr(engine, "clip_gradients", lambda masters, max_norm: torch.tensor(math.nan))
    with pytest.raises(RunError, match="gradient's norm is nan at step 1"):
        train(run_config())


@pytest.mark.parametrize("values", [{"bf16": True}, {"fp16": True}])
def test_precision_that_a_cpu_cannot_do_well_is_changed_and_said(
    run_config: MakeConfig, values: dict[str, bool], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from luthier.models.device import bf16_is_fast

    if bf16_is_fast(torch.device("cpu")) and "bf16" in values:
        pytest.skip("this CPU is fast in bf16")
    train(run_config(**values, max_steps=1))
    assert "in fp32 instead" in caplog.text or "in float32 instead" in caplog.text
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["dtype"] == "float32"


def test_matrix_units_of_a_cpu_are_for_wide_models(
    run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.models import device

    monkeypatch.setattr(device, "bf16_is_fast", lambda device: True)
    cpu, config = torch.device("cpu"), run_config(bf16="auto")
    assert device.choose_dtype(config, cpu) == torch.float32
    assert device.choose_dtype(run_config(bf16=True), cpu) == torch.bfloat16
    monkeypatch.setattr(device, "WIDE", 32)
    assert device.choose_dtype(config, cpu) == torch.bfloat16


def test_added_tokens_are_trained_or_refused(run_config: MakeConfig, tmp_path: Path) -> None:
    for values in ({"tokens": ["<new>"]}, {"special_tokens": {"eos_token": "<new>"}}):
        with pytest.raises(ModelError, match="<new>.*never be trained.*lora_modules_to_save"):
            train(run_config(**values, overwrite_output_dir=True))
    train(run_config(special_tokens={"pad_token": "<new pad>"}, overwrite_output_dir=True, max_steps=1))
    train(
        run_config(
            tokens=["<new>"], lora_modules_to_save=["embed_tokens", "lm_head"], overwrite_output_dir=True
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer.convert_tokens_to_ids("<new>") == len(tokenizer) - 1
    train(run_config(adapter=None, lora_r=None, tokens=["<new>"], output_dir=str(tmp_path / "full")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert model.get_input_embeddings().weight.shape[0] >= len(tokenizer)


def test_goes_on_from_an_adapter(run_config: MakeConfig, tmp_path: Path) -> None:
    train(run_config(shuffle=False, lr_scheduler="constant"))
    before = losses(tmp_path / "run")
    again = run_config(
        lora_r=None,
        lora_model_dir=str(tmp_path / "run"),
        output_dir=str(tmp_path / "more"),
        shuffle=False,
        max_steps=1,
    )
    train(again)
    assert losses(tmp_path / "more")[0] < before[0]
    described = json.loads((tmp_path / "more" / "adapter_config.json").read_text())
    assert described["r"] == 4
    assert Config.load(tmp_path / "more" / "config.yaml").adapter.lora_r == 4
    train(Config.load(tmp_path / "more" / "config.yaml", ["resume_from_checkpoint=auto", "max_steps=2"]))
    with pytest.raises(ConfigError, match="lora_r: 64, but the adapter in .* has 4"):
        train(run_config(lora_r=64, lora_model_dir=str(tmp_path / "run"), output_dir=str(tmp_path / "not")))


def test_a_sixteen_bit_model_has_fp32_masters(
    run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Updates too small for bf16 still add up."""
    from luthier.train import run

    monkeypatch.setattr(run, "choose_dtype", lambda config, device: torch.bfloat16)
    config = run_config(adapter=None, lora_r=None, learning_rate=1e-6, lr_scheduler="constant", save_steps=1)
    train(config)
    first, last = (checkpoint.read_masters(tmp_path / "run" / f"checkpoint-{n}") for n in (1, 6))
    assert all(t.dtype == torch.float32 for t in last.values())
    assert all(not torch.equal(first[name], last[name]) for name in last)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype="auto")
    assert saved.dtype == torch.bfloat16


def test_packed_rows_train_every_document_once_an_epoch(run_config: MakeConfig, tmp_path: Path) -> None:
    config = run_config(
        sample_packing=True,
        sequence_len=256,
        max_steps=None,
        num_epochs=2,
        micro_batch_size=1,
        gradient_accumulation_steps=2,
    )
    result = train(config)
    data = prepare(config, load_tokenizer(config)).train
    assert result.state.documents == 2 * len(data)
    assert result.state.trained_tokens == 2 * int(data.trained.sum())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"base_model": "./no-such-model"}, "no-such-model"),
        ({"lora_model_dir": "./no-adapter", "lora_r": None}, "no adapter here"),
        ({"device_map": "cuda:7"}, "no such device"),
        ({"device_map": {"model.layers.0": "cpu"}}, "one entry"),
        ({"model_type": "NoSuchModel"}, "NoSuchModel"),
        ({"model_type": "LlamaConfig"}, "no model class"),
        ({"model_type": "MistralForCausalLM"}, "does not read .* 'llama' model"),
        ({"optim_args": {"nonsense": 1}}, "optim_args"),
        ({"optim_args": {"weight_decay": 0.1}}, "key of its own: set weight_decay"),
        ({"optim_args": {"betas": [0.1]}}, "adam_beta1"),
        ({"optimizer": "sgd", "optim_args": {"momentum": -1}}, "momentum"),
    ],
)
def test_what_a_user_can_mend_is_one_message(
    run_config: MakeConfig, values: dict[str, object], says: str
) -> None:
    with pytest.raises(LuthierError, match=says):
        train(run_config(**values))
