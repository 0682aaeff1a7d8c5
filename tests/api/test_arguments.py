"""Every argument ends in a key, in a line that says why it does nothing, or in an error that says what to write."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import luthier
from luthier.api import translate
from luthier.errors import ConfigError, DataError, LuthierError, ModelError
from tests.api.conftest import Row

CPU = torch.device("cpu")


def keys(args: Any, eval_data: bool = False) -> dict[str, Any]:
    return translate.keys_of(args, has_eval_data=eval_data, device=CPU)


def classes() -> list[type]:
    import trl
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    theirs = [transformers.TrainingArguments, trl.SFTConfig, trl.DPOConfig, ORPOConfig, trl.KTOConfig, CPOConfig]
    ours = [luthier.SFTConfig, luthier.DPOConfig, luthier.ORPOConfig, luthier.KTOConfig, luthier.CPOConfig]
    return [*theirs, *ours, luthier.TrainingArguments]


def test_every_argument_of_every_class_has_its_place() -> None:
    places = (set(translate.CARRIED), translate.HANDLED, set(translate.NO_EFFECT), set(translate.REFUSED))
    for cls in classes():
        for field in dataclasses.fields(cls):
            assert sum(field.name in place for place in places) == 1, f"{cls.__name__}.{field.name}"


def test_defaults_are_carried_and_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="luthier")
    for cls in classes():
        values = {"use_cpu": True} if cls.__module__.startswith(("trl", "transformers")) else {}
        found = keys(cls(output_dir="x", **values))
        default = cls(output_dir="x", **values)
        assert found["learning_rate"] == default.learning_rate
        assert found["micro_batch_size"] == 8 and found["num_epochs"] == 3.0 and found["lr_scheduler"] == "linear"
    assert not caplog.records


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_steps": 7}, {"max_steps": 7}),
        ({"warmup_steps": 0.1}, {"warmup_ratio": 0.1}),
        ({"warmup_ratio": 0.2}, {"warmup_ratio": 0.2}),
        ({"lr_scheduler_type": "cosine"}, {"lr_scheduler": "cosine"}),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.2}},
            {"cosine_min_lr_ratio": 0.2},
        ),
        ({"optim": "adamw_8bit"}, {"optimizer": "adamw_8bit"}),
        ({"optim": "paged_adamw_32bit"}, {"optimizer": "paged_adamw_32bit"}),
        ({"save_strategy": "epoch"}, {"saves_per_epoch": 1}),
        ({"save_strategy": "no"}, {"saves_per_epoch": 0}),
        ({"save_steps": 0.25}, {"save_steps": 0.25}),
        ({"save_steps": 9, "save_total_limit": 2}, {"save_steps": 9, "save_total_limit": 2}),
        ({"gradient_checkpointing": True}, {"gradient_checkpointing": True}),
        ({"report_to": "tensorboard"}, {"report_to": ["tensorboard"]}),
        ({"report_to": "wandb", "run_name": "mine"}, {"report_to": ["wandb"], "wandb_name": "mine"}),
        ({"train_sampling_strategy": "sequential"}, {"shuffle": False}),
        ({"packing": True}, {"sample_packing": True}),
    ],
    ids=str,
)
def test_what_is_carried_over(given: dict[str, Any], expected: dict[str, Any]) -> None:
    found = keys(luthier.SFTConfig(output_dir="x", **given))
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"eval_strategy": "epoch"}, {"evals_per_epoch": 1}),
        ({"eval_strategy": "steps", "eval_steps": 0.2}, {"eval_steps": 0.2}),
        ({"evaluation_strategy": "steps", "logging_steps": 5}, {"eval_steps": 5}),
        ({}, {"evals_per_epoch": 0}),
    ],
)
def test_when_to_evaluate(given: dict[str, Any], expected: dict[str, Any]) -> None:
    found = keys(luthier.SFTConfig(output_dir="x", **given), eval_data=True)
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize("name", ["dataloader_num_workers", "per_device_eval_batch_size", "ddp_timeout"])
def test_what_has_no_effect_is_said_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="luthier")
    for _ in range(2):
        keys(luthier.SFTConfig(output_dir="x", **{name: 3}))
    (line,) = [record.message for record in caplog.records]
    assert name in line and "no effect here: " in line and translate.NO_EFFECT[name] in line


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"neftune_noise_alpha": 5.0}, "leave it out"),
        ({"deepspeed": "x.json"}, "luthier train config.yaml"),
        ({"lr_scheduler_type": "polynomial"}, "linear, cosine"),
        ({"optim": "galore_adamw", "optim_target_modules": ["q"]}, "leave it out"),
        ({"optim": "adamw_apex_fused"}, "adamw_torch_fused"),
        ({"metric_for_best_model": "accuracy"}, "lowest eval_loss"),
        ({"eval_strategy": "steps"}, "no eval_dataset"),
        ({"push_to_hub": True}, "model.push_to_hub"),
        ({"truncation_mode": "keep_end"}, "keep_start"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}}, "num_cycles"),
        ({"learnin_rate": 1.0}, "did you mean learning_rate"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_had_is_one_error(given: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers would look for deepspeed itself, when its arguments are made.
    monkeypatch.setattr("transformers.training_args.TrainingArguments.__post_init__", lambda self: None)
    with pytest.raises(ConfigError) as error:
        keys(luthier.SFTConfig(output_dir="x", **given))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_8bit_optimizers_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(ConfigError, match=r'adamw_8bit.*pip install.*optim="adamw_torch_fused"'):
        keys(luthier.SFTConfig(output_dir="x", optim="adamw_8bit"))


# --- what the device cannot do ------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without an accelerator")
class TestWithoutAnAccelerator:
    @pytest.mark.parametrize("cls", [luthier.SFTConfig, luthier.DPOConfig, luthier.TrainingArguments])
    @pytest.mark.parametrize("name", ["bf16", "tf32"])
    def test_a_precision_that_is_not_there(self, cls: Any, name: str, caplog: pytest.LogCaptureFixture) -> None:
        args = cls(output_dir="x", **{name: True})
        assert not getattr(args, name)
        (line,) = [record.message for record in caplog.records if record.name == "luthier"]
        assert f"{name}=True" in line and f"write {name}=False" in line

    def test_bfloat16_is_not_supported(self) -> None:
        assert luthier.is_bfloat16_supported() is False

    def test_cuda(self, toy_llama_dir: Path) -> None:
        model, tokenizer = luthier.FastLanguageModel.from_pretrained(str(toy_llama_dir), load_in_4bit=False)
        inputs = tokenizer(["a b"], return_tensors="pt")
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}], return_tensors="pt", return_dict=True, add_generation_prompt=True
        )
        wrapped = luthier.FastLanguageModel.get_peft_model(model, r=2)
        for call in (
            lambda: inputs.to("cuda"),
            lambda: chat.to("cuda:0"),
            lambda: wrapped.to("cuda"),
            wrapped.cuda,
            lambda: model.to(device="cuda"),
        ):
            with pytest.raises(ConfigError, match=r"has no cuda.*\.to\(model\.device\)"):
                call()
        assert inputs.to(wrapped.device)["input_ids"].device == CPU
        assert wrapped.to(torch.float32) is wrapped
        with pytest.raises(ConfigError, match="device_map: cuda"):
            luthier.FastLanguageModel.from_pretrained(str(toy_llama_dir), load_in_4bit=False, device_map="cuda")


def test_4bit_without_bitsandbytes(toy_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.models.quantize.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"bitsandbytes: pip install .*or write load_in_4bit=False"):
        luthier.FastLanguageModel.from_pretrained(str(toy_llama_dir))


# --- models and adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"bias": "all"}, 'write bias="none"'),
        ({"loftq_config": {"loftq_bits": 4}}, "peft_init_lora_weights"),
        ({"init_lora_weights": "pissa"}, "luthier.train"),
        ({"target_modules": ["q_prj"]}, "q_proj"),
        ({"qat_scheme": "int4"}, "leave it out"),
        ({"r": 0}, "lora_r"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be_had(given: dict[str, Any], says: str, toy_llama_dir: Path) -> None:
    model, _ = luthier.FastLanguageModel.from_pretrained(str(toy_llama_dir), load_in_4bit=False)
    before = [type(module) for module in model.modules()]
    with pytest.raises(LuthierError) as error:
        luthier.FastLanguageModel.get_peft_model(model, **given)
    assert says in str(error.value)
    assert [type(module) for module in model.modules()] == before and all(p.requires_grad for p in model.parameters())


def test_arguments_of_loading(toy_llama_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="luthier")
    load = luthier.FastLanguageModel.from_pretrained
    load(str(toy_llama_dir), load_in_4bit=False, fast_inference=True, device_map="sequential")
    assert any("fast_inference has no effect here" in record.message for record in caplog.records)
    for given, says in (
        ({"quantum": True}, "quantum"),
        ({"dtype": "int8"}, "torch.float32"),
        ({"max_seq_length": 0}, "number of tokens"),
    ):
        with pytest.raises(ConfigError, match=says):
            load(str(toy_llama_dir), load_in_4bit=False, **given)
    with pytest.raises(ModelError, match="neither a run, an adapter nor a model"):
        load(str(toy_llama_dir.parent), load_in_4bit=False)


# --- trainers and rows --------------------------------------------------------------------------------------


class Waits(transformers.TrainerCallback):
    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Never called here."""


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"callbacks": [Waits()]}, "Waits waits for on_substep_end"),
        ({"callbacks": [print]}, "no TrainerCallback"),
        (
            {"callbacks": [transformers.EarlyStoppingCallback(2, early_stopping_threshold=0.1)]},
            "early_stopping_threshold",
        ),
        ({"compute_metrics": print}, "luthier evaluate"),
        ({"data_collator": print}, "assistant_only_loss"),
        ({"optimizers": (object(), None)}, "optim=..."),
        ({"learning_rate": 1.0}, "args=SFTConfig"),
        ({"tokenizer": "another"}, "two names"),
        ({"train_dataset": None}, "no train_dataset"),
        ({"train_dataset": []}, "empty"),
        ({"train_dataset": "imdb"}, 'load_dataset("imdb"'),
        ({"args": {"output_dir": "x"}}, "args=SFTConfig(...)"),
        ({"max_seq_length": "2048"}, "number of tokens"),
        ({"train_dataset": {"train": [], "test": []}}, "train_dataset=dataset['train']"),
        ({"train_dataset": (row for row in [{"text": "a"}])}, r"list(dataset.take("),
        ({"train_dataset": [{"question": "a", "answer": "b"}]}, "question, answer"),
        ({"train_dataset": [3]}, "a row is a int"),
        ({"formatting_func": lambda row: row["nothing"]}, "KeyError"),
        ({"formatting_func": lambda row: 3}, "returns a int"),
        ({"peft_config": "LoraConfig"}, "LoraConfig(r=16"),
        ({"quantization_config": object()}, "from_pretrained"),
        ({"args": luthier.SFTConfig(output_dir="x", loss_type="dft")}, "nll"),
        ({"args": luthier.SFTConfig(output_dir="x", assistant_only_loss=True)}, "messages"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_trainers_that_cannot_be_made(
    given: dict[str, Any], says: str, toy_llama_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(toy_llama_dir, dtype=torch.float32)
    values = {
        "model": model,
        "processing_class": tokenizer,
        "train_dataset": [{"text": "one two three"}],
        "args": luthier.SFTConfig(output_dir=str(tmp_path / "out")),
        **given,
    }
    with pytest.raises(LuthierError) as error:
        luthier.SFTTrainer(**values).train()
    assert says in str(error.value)


def test_streams_are_refused_with_what_to_write(toy_llama_dir: Path, tokenizer: Any) -> None:
    import datasets

    stream = datasets.IterableDataset.from_generator(lambda: iter([{"text": "a"}]))
    with pytest.raises(DataError, match=r"Dataset\.from_list\(list\(dataset\.take\("):
        luthier.SFTTrainer(model=str(toy_llama_dir), processing_class=tokenizer, train_dataset=stream)


@pytest.mark.parametrize(
    ("given", "says"), [({"ref_model": object()}, "ref_model=None"), ({"args": ["a", "b"]}, "one loss")]
)
def test_dpo_that_cannot_be_had(given: dict[str, Any], says: str, toy_llama_dir: Path, tokenizer: Any) -> None:
    if "args" in given:
        given = {"args": luthier.DPOConfig(output_dir="x", loss_type=["sigmoid", "hinge"])}
    rows: list[Row] = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    model = transformers.AutoModelForCausalLM.from_pretrained(toy_llama_dir, dtype=torch.float32)
    with pytest.raises(ConfigError, match=says):
        luthier.DPOTrainer(model=model, processing_class=tokenizer, train_dataset=rows, **given)


def test_prompts_of_a_model_with_fewer_positions(toy_llama_dir: Path, tokenizer: Any) -> None:
    """The usual max_length=1024, max_prompt_length=512, and a model that has 512 positions."""
    trainer = luthier.ORPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(toy_llama_dir, dtype=torch.float32),
        args=luthier.ORPOConfig(output_dir="x", max_length=1024, max_prompt_length=512),
        train_dataset=[{"prompt": "a", "chosen": "b", "rejected": "c"}],
        processing_class=tokenizer,
    )
    assert trainer.config.data.sequence_len == 512 and trainer.config.preference.max_prompt_len == 256


def test_a_trainer_says_what_it_has(toy_llama_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(toy_llama_dir, dtype=torch.float32)
    trainer = luthier.SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=["a b c"], args=luthier.SFTConfig(str(tmp_path / "out"))
    )
    assert not hasattr(trainer, "accelerator")
    with pytest.raises(AttributeError, match="there are train, evaluate"):
        trainer.get_train_dataloader()
    assert not (tmp_path / "out").exists()  # nothing is written before train()
