"""What a trainer leaves behind: the run's folder, the notebook's model, the state; and its ways to go on or stop."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import luthier
from luthier.config import Config
from luthier.errors import ConfigError, DataError, ModelError, RunError
from luthier.models.fused import Fused
from luthier.models.lora import LoRALinear
from luthier.train.run import Given, train
from tests.api.conftest import COMMON, TARGETS, Row, losses

IDS = torch.arange(5, 45)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture
def make(toy_llama_dir: Path, tokenizer: Any, rows: list[Row], tmp_path: Path) -> Callable[..., Any]:
    """A trainer of a few steps on plain text."""

    def trainer(model: Any = None, *, cls: Any = luthier.SFTTrainer, **options: Any) -> Any:
        if model is None:
            model, _ = luthier.FastLanguageModel.from_pretrained(str(toy_llama_dir), load_in_4bit=False)
            model = luthier.FastLanguageModel.get_peft_model(model, r=4, random_state=7)
        given = {name: options.pop(name) for name in list(options) if name in OF_TRAINER}
        arguments = {**COMMON, "max_steps": 6, "output_dir": str(tmp_path / "outputs"), **options}
        values = {
            "train_dataset": [{"text": f"{row['instruction']} {row['output']}"} for row in rows],
            "processing_class": tokenizer,
            **given,
        }
        return cls(model=model, args=luthier.SFTConfig(**arguments), **values)

    return trainer


OF_TRAINER = {"train_dataset", "eval_dataset", "callbacks", "peft_config", "formatting_func", "processing_class"}


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        pytest.param({"use_rslora": True, "layers_to_transform": [1]}, marks=pytest.mark.slow),
        pytest.param({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}, marks=pytest.mark.slow),
        pytest.param({"init_lora_weights": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_model_is_peft_again_with_what_was_trained(
    how: dict[str, Any], make: Callable[..., Any], toy_llama_dir: Path
) -> None:
    model, _ = luthier.FastLanguageModel.from_pretrained(str(toy_llama_dir), load_in_4bit=False)
    model = luthier.FastLanguageModel.get_peft_model(model, **{"r": 4, "random_state": 7, **how})
    kinds = [type(module) for module in model.modules()]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = logits(model)
    trainer = make(model, learning_rate=1e-2)
    trainer.train()

    assert [type(module) for module in model.modules()] == kinds and isinstance(model, PeftModel)
    assert not any(isinstance(m, LoRALinear) or isinstance(vars(m).get("forward"), Fused) for m in model.modules())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    after = logits(model)
    assert (after - before).abs().max() > 0.01
    # The run's own files give the same model to whoever loads them.
    loaded = luthier.load(str(trainer.output_dir)).model
    torch.testing.assert_close(logits(loaded), after, atol=2e-5, rtol=0)
    assert losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.parametrize("whole", [["embed_tokens", "lm_head"], ["lm_head"]])
def test_tied_embeddings(
    whole: list[str], make: Callable[..., Any], toy_llama_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """PEFT trains copies, and a run the one tensor: both hold the same at the end."""
    config = transformers.AutoConfig.from_pretrained(toy_llama_dir, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    model, _ = luthier.FastLanguageModel.from_pretrained(str(tmp_path / "tied"), load_in_4bit=False)
    model = luthier.FastLanguageModel.get_peft_model(model, r=2, modules_to_save=whole)
    trainer = make(model, learning_rate=1e-2, max_steps=3)
    trainer.train()
    torch.testing.assert_close(
        logits(luthier.load(str(trainer.output_dir)).model), logits(model), atol=2e-5, rtol=0
    )
    with torch.no_grad():
        copies = {n: p for n, p in model.named_parameters() if "modules_to_save" in n}
        next(iter(copies.values())).add_(0.1)
    if len(whole) == 2:
        with pytest.raises(ModelError, match="were trained apart"):
            make(model).train()


@pytest.mark.parametrize("init", [True, pytest.param("gaussian", marks=pytest.mark.slow)])
def test_the_config_alone_makes_the_same_run(
    init: Any, make: Callable[..., Any], tmp_path: Path, toy_llama_dir: Path
) -> None:
    """`luthier train` with the notebook's config.yaml: the adapter begins with the same numbers, as seeds are equal."""
    model, _ = luthier.FastLanguageModel.from_pretrained(str(toy_llama_dir), load_in_4bit=False)
    model = luthier.FastLanguageModel.get_peft_model(model, r=4, random_state=7, init_lora_weights=init)
    trainer = make(model, seed=7)
    trainer.train()
    config = Config.load(trainer.output_dir / "config.yaml")
    again = luthier.train(config, output_dir=str(tmp_path / "again"), peft_init_lora_weights=init)
    rows = [json.loads(line) for line in (again.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if "loss" in row] == losses(trainer)


def test_a_second_run_has_a_folder_of_its_own(make: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make()
    first = trainer.train()
    kept = (tmp_path / "outputs" / "metrics.jsonl").read_bytes()
    second = trainer.train()
    assert trainer.output_dir == tmp_path / "outputs-2" and trainer.config.output.output_dir == str(trainer.output_dir)
    assert (tmp_path / "outputs" / "metrics.jsonl").read_bytes() == kept
    assert len(losses(trainer)) == 6  # of this run alone
    assert second.training_loss < first.training_loss  # it went on from where the model was
    replaced = make(overwrite_output_dir=True)
    replaced.train()
    assert replaced.output_dir == tmp_path / "outputs" and not (tmp_path / "outputs-3").exists()


def test_output_dir_is_the_working_folder(
    make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebook.ipynb").write_text("{}")
    with pytest.raises(ConfigError, match='such as "outputs"'):
        make(output_dir=".").train()


def test_resume_gives_the_same_losses(make: Callable[..., Any], tmp_path: Path, rows: list[Row]) -> None:
    whole = make(output_dir=str(tmp_path / "whole"))
    whole.train()

    class StopAt(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    part = make(callbacks=[StopAt()])
    assert part.train().global_step == 3
    assert (tmp_path / "outputs" / "adapter_model.safetensors").is_file()  # an end, not an interruption
    rest = make()
    stats = rest.train(resume_from_checkpoint=True)
    assert stats.global_step == 6 and rest.output_dir == tmp_path / "outputs"
    assert losses(rest) == losses(whole)
    torch.testing.assert_close(logits(rest.model), logits(whole.model), atol=0, rtol=0)

    with pytest.raises(DataError, match="other rows"):
        make(train_dataset=[{"text": "something else"}] * 30).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="no checkpoint in"):
        make(output_dir=str(tmp_path / "nothing")).train(resume_from_checkpoint=True)
    by_path = make()
    by_path.train(resume_from_checkpoint=str(tmp_path / "outputs" / "checkpoint-6"))
    assert losses(by_path) == losses(whole)


def test_an_interruption_can_be_resumed(make: Callable[..., Any], tmp_path: Path, caplog: Any) -> None:
    class Interrupts(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    trainer = make(callbacks=[Interrupts()])
    stats = trainer.train()
    assert stats.global_step in (2, 3)
    assert any("resume_from_checkpoint=True" in record.message for record in caplog.records)
    assert isinstance(trainer.model, PeftModel)
    assert not (tmp_path / "outputs" / "adapter_model.safetensors").exists()
    assert make().train(resume_from_checkpoint=True).global_step == 6


def test_a_failure_leaves_the_model_as_it_was(make: Callable[..., Any]) -> None:
    class Fails(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise ValueError("of the callback")

    trainer = make(callbacks=[Fails()])
    before, kinds = logits(trainer.model), [type(m) for m in trainer.model.modules()]
    with pytest.raises(ValueError, match="of the callback"):
        trainer.train()
    assert [type(m) for m in trainer.model.modules()] == kinds
    assert torch.equal(logits(trainer.model), before)


class Notes(transformers.TrainerCallback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.logs: list[dict[str, float]] = []

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told.append("init")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told.append("begin")
        assert kwargs["model"] is not None and kwargs["processing_class"] is not None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told.append(f"step {state.global_step} of {state.max_steps}")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told.append(f"epoch {state.epoch:g}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(logs)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.told.append(f"evaluate {metrics['eval_loss'] > 0}")
        control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told.append("save")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told.append("end")


def test_callbacks_are_told(make: Callable[..., Any], caplog: Any) -> None:
    caplog.set_level("INFO", logger="luthier")
    notes, data = Notes(), [{"text": f"word {n} of {n}"} for n in range(8)]
    trainer = make(
        train_dataset=data, eval_dataset=data, callbacks=[notes], max_steps=4, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    assert notes.told == [
        "init", "begin", "step 1 of 4", "step 2 of 4", "epoch 1", "evaluate True", "step 3 of 4", "step 4 of 4",
        "epoch 2", "evaluate True", "save", "end",
    ]  # fmt: skip
    assert [logs["loss"] for logs in notes.logs if "loss" in logs] == losses(trainer)
    assert sum("sets should_save" in record.message for record in caplog.records) == 1
    best = min(row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row)
    assert trainer.state.best_metric == best and trainer.state.log_history[-1]["train_runtime"] > 0


def test_early_stopping_is_the_configs(make: Callable[..., Any]) -> None:
    stop = transformers.EarlyStoppingCallback(early_stopping_patience=3)
    trainer = make(callbacks=[stop], eval_dataset=[{"text": "a b c"}], eval_strategy="steps", eval_steps=1)
    assert trainer.config.evaluation.early_stopping_patience == 3


def mean_loss(model: Any, texts: list[str], tokenizer: Any) -> float:
    """Per token of all texts, by the model's own forward."""
    total = count = 0.0
    for text in texts:
        ids = torch.tensor(tokenizer(text + tokenizer.eos_token)["input_ids"])[None]
        with torch.no_grad():
            mean = model.eval()(ids, labels=ids).loss
        total, count = total + float(mean) * (ids.shape[1] - 1), count + ids.shape[1] - 1
    return total / count


def test_evaluate_is_the_loss_of_transformers(make: Callable[..., Any], tokenizer: Any) -> None:
    texts = ["one two three four", "five six seven"]
    trainer = make(eval_dataset=[{"text": text} for text in texts])
    figures = trainer.evaluate()
    assert figures["eval_loss"] == pytest.approx(mean_loss(trainer.model, texts, tokenizer), abs=1e-5)
    assert trainer.evaluate([{"text": texts[0]}], metric_key_prefix="test").keys() >= {"test_loss", "test_runtime"}
    assert not trainer.output_dir.exists()
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after == pytest.approx(mean_loss(trainer.model, texts, tokenizer), abs=1e-5)
    assert abs(after - figures["eval_loss"]) > 1e-3
    with pytest.raises(ConfigError, match="no eval_dataset"):
        make().evaluate()


def test_save_model(make: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make()
    trainer.train()
    trainer.save_model(str(tmp_path / "mine"))
    trainer.save_model()
    again, _ = luthier.FastLanguageModel.from_pretrained(str(tmp_path / "mine"), load_in_4bit=False)
    assert isinstance(again, PeftModel)
    torch.testing.assert_close(logits(again), logits(trainer.model), atol=1e-6, rtol=0)
    of_run, _ = luthier.FastLanguageModel.from_pretrained(str(trainer.output_dir), load_in_4bit=False)
    torch.testing.assert_close(logits(of_run), logits(trainer.model), atol=1e-6, rtol=0)
    trainer = make(again)  # training goes on with an adapter that was loaded
    first = trainer.train().training_loss
    assert losses(trainer)[0] < 6.2 and first > 0
    with pytest.raises(ModelError, match="adapter already"):
        luthier.FastLanguageModel.get_peft_model(again)


def of_row(row: Row) -> str:
    return f"{row['instruction']} => {row['output']}"


def of_batch(rows: dict[str, list[str]]) -> list[str]:
    return [f"{i} => {o}" for i, o in zip(rows["instruction"], rows["output"], strict=True)]


def list_of_row(row: Row) -> list[str]:
    return [of_row(row)]


@pytest.mark.parametrize(
    ("function", "kind"), [(of_row, list), (of_batch, datasets.Dataset.from_list), (list_of_row, list)]
)
def test_formatting_functions(function: Any, kind: Any, make: Callable[..., Any], rows: list[Row]) -> None:
    trainer = make(train_dataset=kind(rows), formatting_func=function, max_steps=1)
    trainer.train()
    written = (trainer.output_dir / "given" / "train.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in written] == [of_row(row) for row in rows]


def test_packing_counts_rows(make: Callable[..., Any]) -> None:
    trainer = make(packing=True, max_length=64, max_steps=-1, num_train_epochs=1)
    assert trainer.config.data.sample_packing and trainer.config.data.sequence_len == 64
    documents = trainer.train().metrics["train_tokens"]
    assert trainer.state.global_step < 80 / 4 / 2 and documents > 0  # several of the 80 rows in each of the step's 4


def test_peft_config_on_a_4bit_model_of_plain_transformers(
    make: Callable[..., Any], toy_llama_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    found = {}
    for name in ("trainer", "prepared"):
        model = AutoModelForCausalLM.from_pretrained(toy_llama_dir, quantization_config=quantized, dtype=torch.float32)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
        torch.manual_seed(1)
        options: dict[str, Any] = {"output_dir": str(tmp_path / name)}
        if name == "trainer":
            options["peft_config"] = lora
        else:
            model = get_peft_model(prepare_model_for_kbit_training(model), lora)
        trainer = make(model, **options)
        assert trainer.config.model.load_in_4bit and not trainer.config.model.bnb_4bit_use_double_quant
        hooks = [len(module._forward_hooks) for module in model.modules()]
        checkpointing = [getattr(module, "gradient_checkpointing", None) for module in model.modules()]
        trainer.train()
        if name == "prepared":  # what PEFT did to the model for training is as it was
            assert [len(module._forward_hooks) for module in model.modules()] == hooks and any(hooks)
            assert [getattr(m, "gradient_checkpointing", None) for m in model.modules()] == checkpointing
        found[name] = losses(trainer)
    assert found["trainer"] == found["prepared"]
    assert found["trainer"][-1] < found["trainer"][0]


def test_full_fine_tuning(make: Callable[..., Any], toy_llama_dir: Path) -> None:
    model, _ = luthier.FastLanguageModel.from_pretrained(str(toy_llama_dir), full_finetuning=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make(model, learning_rate=1e-3)
    assert trainer.config.adapter.adapter is None
    trainer.train()
    assert all(not torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
    torch.testing.assert_close(logits(luthier.load(str(trainer.output_dir)).model), logits(model), atol=2e-5, rtol=0)


def test_part_of_a_model(make: Callable[..., Any], toy_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(toy_llama_dir, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.mlp" in name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make(model, learning_rate=1e-2).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "layers.1.mlp" in name}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ModelError, match="no parameter of the model trains"):
        make(model)


def test_weights_in_16_bits_stay_so(make: Callable[..., Any], toy_llama_dir: Path) -> None:
    """transformers loads a 16-bit checkpoint in 16 bits: the run computes in fp32 where the CPU is slow in them."""
    model = AutoModelForCausalLM.from_pretrained(toy_llama_dir, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    buffers = {name: b.dtype for name, b in model.named_buffers()}
    trainer = make(model, max_steps=2)
    trainer.train()
    assert {name: p.dtype for name, p in model.named_parameters()} == dtypes
    assert {name: b.dtype for name, b in model.named_buffers()} == buffers


def test_what_has_no_checkpoint_is_refused(make: Callable[..., Any], toy_llama_dir: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(toy_llama_dir)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config.to_dict(), "_name_or_path": ""}))
    with pytest.raises(ModelError, match="save_pretrained"):
        make(model)


def test_new_tokens_that_nothing_keeps_are_said(
    make: Callable[..., Any], tokenizer: Any, toy_llama_dir: Path, caplog: Any
) -> None:
    tokenizer.add_tokens(["<new>"])
    for keeps in (False, True):
        model = AutoModelForCausalLM.from_pretrained(toy_llama_dir, dtype=torch.float32)
        model.resize_token_embeddings(len(tokenizer))
        whole = ["embed_tokens", "lm_head"] if keeps else None
        lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=whole, task_type="CAUSAL_LM")
        trainer = make(model, peft_config=lora, processing_class=tokenizer, max_steps=2, overwrite_output_dir=True)
        caplog.clear()
        trainer.train()
        said = [record.message for record in caplog.records if "tokens more than" in record.message]
        assert len(said) == (not keeps)
    torch.testing.assert_close(
        logits(luthier.load(str(trainer.output_dir)).model), logits(trainer.model), atol=2e-5, rtol=0
    )


def test_several_devices(make: Callable[..., Any], toy_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(toy_llama_dir, dtype=torch.float32)
    model.lm_head.to("meta")
    with pytest.raises(ModelError, match="spread over cpu, meta"):
        make(model)


def test_more_tokens_than_embeddings(make: Callable[..., Any], tokenizer: Any) -> None:
    tokenizer.add_tokens([f"<new{n}>" for n in range(5)])
    with pytest.raises(ModelError, match="resize_token_embeddings"):
        make(processing_class=tokenizer).train()


def test_one_process(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    processes = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in processes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match="`luthier train` and its config.yaml"):
        train(trainer.config, Given(trainer.model.get_base_model()))
