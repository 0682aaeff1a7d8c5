"""Scripts and notebooks for Unsloth, TRL and PEFT: literal arguments are read, and nothing is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.config.convert.command import convert

from .conftest import Convert, Problems

UNSLOTH = '''\
raise SystemExit("this would end the tests if it were run")
from unsloth import FastLanguageModel, is_bfloat16_supported
length = 1024
bits: bool = True
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="some/model",
    max_seq_length=length,
    dtype=None,
    load_in_4bit=bits,
)
model = FastLanguageModel.get_peft_model(
    model, r=8, target_modules=["q_proj", "v_proj"], bias="none", use_gradient_checkpointing="unsloth",
    random_state=-(-7), use_rslora=False, loftq_config=None,
)
PROMPT = """### Question
{}
### Context
{}
### Answer
{}"""
def to_text(rows):
    texts = []
    for question, context, answer in zip(rows["question"], rows["context"], rows["answer"]):
        texts.append(PROMPT.format(question, context, answer) + tokenizer.eos_token)
    return {"text": texts}
from datasets import load_dataset
dataset = load_dataset("some/data", split="train")
dataset = dataset.map(to_text, batched=True)
trainer = SFTTrainer(
    model=model, tokenizer=tokenizer, train_dataset=dataset, dataset_text_field="text", max_seq_length=length,
    args=TrainingArguments(
        per_device_train_batch_size=2, warmup_steps=5, max_steps=60, learning_rate=2e-4, optim="adamw_8bit",
        fp16=not is_bfloat16_supported(), bf16=is_bfloat16_supported(), seed=3407, output_dir="out",
    ),
)
trainer.train()
'''

TRL = """\
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

dataset = load_dataset("some/chats", "en")
settings = {"learning_rate": 1e-4, "packing": True, "max_length": 512}
trainer = SFTTrainer(
    model="some/model",
    args=SFTConfig(output_dir="out", assistant_only_loss=True, eval_strategy="epoch", **settings),
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    peft_config=LoraConfig(target_modules="all-linear", lora_dropout=0.1),
)
"""


def notebook(*cells: str | list[str], kind: str = "code") -> str:
    return json.dumps({"cells": [{"cell_type": kind, "source": source} for source in cells], "nbformat": 4})


def test_a_notebook_for_unsloth(converted: Convert) -> None:
    found = converted(UNSLOTH, "n.py")
    flat = found.flat
    expected = {
        "base_model": "some/model", "sequence_len": 1024, "load_in_4bit": True, "lora_r": 8, "lora_alpha": 16.0,
        "lora_target_modules": ["q_proj", "v_proj"], "gradient_checkpointing": "offload", "micro_batch_size": 2,
        "max_steps": 60, "learning_rate": 2e-4, "optimizer": "adamw_bnb_8bit", "bf16": "auto", "fp16": "auto",
        "seed": 3407, "train_on_inputs": True, "lr_scheduler": "linear", "num_epochs": 3.0, "save_steps": 500,
        "excess_length_strategy": "truncate", "logging_steps": 500,
    }  # fmt: skip
    assert {key: flat[key] for key in expected} == expected
    assert flat["datasets"] == [{"path": "some/data", "type": {
        "format": "### Question\n{instruction}\n### Context\n{input}\n### Answer\n{output}",
        "field_instruction": "question", "field_input": "context", "field_output": "answer",
    }}]  # fmt: skip
    assert {"lora_alpha", "lr_scheduler", "num_epochs"} <= set(found.names("defaults"))
    assert "FastLanguageModel.get_peft_model(random_state)" in found.names("no_effect")
    assert not found.names("unsupported") and not found.names("unknown")


def test_a_script_for_trl(converted: Convert) -> None:
    found = converted(TRL, "t.py")
    flat = found.flat
    expected = {
        "base_model": "some/model", "learning_rate": 1e-4, "sample_packing": True, "sequence_len": 512, "lora_r": 8,
        "lora_alpha": 8.0, "lora_target_linear": True, "lora_dropout": 0.1, "micro_batch_size": 8,
        "evals_per_epoch": 1, "train_on_inputs": False, "gradient_checkpointing": True, "lora_target_modules": None,
    }  # fmt: skip
    assert {key: flat[key] for key in expected} == expected
    assert flat["datasets"] == [{"path": "some/chats", "name": "en", "type": "chat_template"}]
    assert flat["test_datasets"] == [{"path": "some/chats", "name": "en", "split": "test", "type": "chat_template"}]
    assert found.names("to_check") == ["datasets"]  # what a row is cannot be read


def test_a_notebook_is_read_by_its_code_cells_without_magics(converted: Convert) -> None:
    cells: list[str | list[str]] = [
        "%%bash\nnot python at all (",
        "%%capture\n!pip install unsloth \\\n   --no-deps\n%cd x\nimport torch\nif True:\n    !ls\nmodel?",
        ["from trl import SFTTrainer\n", "length = 256"],
        TRL.replace('"max_length": 512', '"max_length": length'),
    ]
    whole = json.loads(notebook(*cells))
    whole["cells"].insert(0, {"cell_type": "markdown", "source": "# `length = 3`"})
    assert converted(json.dumps(whole), "n.ipynb").flat["sequence_len"] == 256


def test_places_in_a_notebook_are_cells(problems: Problems) -> None:
    found = problems(notebook("import x", TRL.replace("lora_dropout=0.1", "lora_droput=0.1")), "n.ipynb")
    assert found == [
        "n.ipynb, cell 2, line 12: LoraConfig(lora_droput) is not a key of LoraConfig's. Did you mean lora_dropout?"
    ]


@pytest.mark.parametrize(
    ("before", "value"),
    [
        ("", "2 * 8"),
        ("n = 8", "f'{n}'"),
        ("", "args.rank"),
        ("", "int('8')"),
        ("r = 8\nr = 16", "r"),
        ("r = 8\nr += 8", "r"),
        ("for r in (8, 16): pass", "r"),
        ("def f():\n    r = 8", "r"),
        ("from x import r", "r"),
        ("r = 8\nif x:\n    r = 16", "r"),
        ("r: int", "r"),
        ("s = {'r': 8}\ns['r'] = 16", "s['r']"),
        ("r = 8\ndel r", "r"),
        ("with open('x') as r: pass", "r"),
        ("r = r", "r"),
    ],
)
def test_what_is_no_literal_is_named_and_not_read(
    before: str, value: str, converted: Convert, problems: Problems
) -> None:
    text = f"{before}\n{TRL}".replace("lora_dropout=0.1", f"r={value}")
    [found] = problems(text, "t.py")
    assert f"LoraConfig(r): not supported: not read: {value} is no literal" in found
    assert converted(text, "t.py", allow=True).flat["lora_r"] == 8


@pytest.mark.parametrize(
    ("before", "value", "expected"),
    [
        ("r = 4", "r", 4),
        ("a = 4\nr = a", "r", 4),
        ("r, other = 4, 5", "r", 4),
        ("r: int = 4", "r", 4),
        ("r = 4\ndef f():\n    r = 9", "r", 4),
        ("def f(r): pass\nr = 4", "r", 4),
        ("r = 4\nx = [r for r in y]", "r", 4),
        ("", "+4", 4),
    ],
)
def test_names_that_stand_for_one_literal_are_read(before: str, value: str, expected: int, converted: Convert) -> None:
    text = f"{before}\n{TRL}".replace("lora_dropout=0.1", f"r={value}")
    assert converted(text, "t.py").flat["lora_r"] == expected


def test_names_are_looked_up_where_python_would(converted: Convert, problems: Problems) -> None:
    body = "".join(f"    {line}\n" for line in TRL.replace("lora_dropout=0.1", "r=rank").splitlines())
    assert converted(f"rank = 4\ndef main():\n{body}", "t.py").flat["lora_r"] == 4
    assert converted(f"rank = 4\ndef main():\n    rank = 6\n{body}", "t.py").flat["lora_r"] == 6
    assert "not read: rank" in problems(f"rank = 4\ndef main(rank):\n{body}", "t.py")[0]
    assert "not read: rank" in problems(f"rank = 4\ndef main():\n    global rank\n{body}", "t.py")[0]


def test_unpacked_arguments_are_read_where_they_are_literal(problems: Problems) -> None:
    [found] = problems(TRL.replace("**settings", "**vars(args)"), "t.py")
    assert "SFTConfig(**vars(args)): not supported: not read" in found
    [found] = problems(TRL.replace('"max_length": 512}', '"max_length": 512}\nsettings["seed"] = 3'), "t.py")
    assert "**settings" in found


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('eval_strategy="epoch"', "seed=3", {"seed": 3, "evals_per_epoch": 0}),
        ('eval_strategy="epoch"', 'report_to="none"', {"report_to": []}),
        ('eval_strategy="epoch"', "bf16=True", {"bf16": True}),
        ('eval_strategy="epoch"', "warmup_ratio=0.1", {"warmup_ratio": 0.1}),
        ('eval_strategy="epoch"', "warmup_steps=0.1", {"warmup_ratio": 0.1}),
        ('eval_strategy="epoch"', 'save_strategy="no"', {"saves_per_epoch": 0}),
        ('eval_strategy="epoch"', 'eval_strategy="steps"', {"eval_steps": 500}),
        ('target_modules="all-linear"', "r=4", {"lora_target_modules": ["q_proj", "v_proj"]}),
        ("assistant_only_loss=True", 'lr_scheduler_type="cosine"', {"train_on_inputs": True}),
        ('    eval_dataset=dataset["test"],\n', "", {"test_datasets": []}),
        ('load_dataset("some/chats", "en")', 'load_dataset("json", data_files={"train": "a.jsonl", "test": "b.jsonl"})',
         {"datasets": [{"path": "a.jsonl", "type": "chat_template"}]}),
        ('load_dataset("some/chats", "en")', 'load_dataset("csv", data_files="a.csv").train_test_split(test_size=50)',
         {"val_set_size": 50, "datasets": [{"path": "a.csv", "type": "chat_template"}]}),
        ('"en")', '"en", split="train[:100]")', {"datasets": [{"path": "some/chats#100", "name": "en",
                                                               "type": "chat_template"}]}),
        ("assistant_only_loss=True", 'dataset_text_field="body"', {"datasets": [{
            "path": "some/chats", "name": "en", "type": "completion", "field": "body"}]}),
    ],
)  # fmt: skip
def test_what_arguments_become(old: str, new: str, expected: dict[str, Any], converted: Convert) -> None:
    text = TRL
    if "split=" in new:  # then what is loaded has no splits
        text = text.replace('dataset["train"]', "dataset").replace('    eval_dataset=dataset["test"],\n', "")
    assert old in text
    flat = converted(text.replace(old, new), "t.py").flat
    assert {key: flat[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ("DPOTrainer", {"rl": "dpo", "learning_rate": 1e-6}),
        ("ORPOTrainer", {"rl": "orpo"}),
        ("KTOTrainer", {"rl": "kto"}),
    ],
)
def test_trainers_are_methods(trainer: str, expected: dict[str, Any], converted: Convert) -> None:
    config = trainer.replace("Trainer", "Config")
    text = f"""
from datasets import load_dataset
t = {trainer}("some/model", args={config}(beta=0.3), train_dataset=load_dataset("pairs", split="train"))
"""
    flat = converted(text, "t.py").flat
    assert {key: flat[key] for key in expected} == expected
    assert flat["rl_beta"] == 0.3 and flat["datasets"] == [{"path": "pairs"}] and flat["adapter"] is None


def test_chats_through_the_template_and_answers_only(converted: Convert) -> None:
    text = """
from unsloth import FastModel
model, tokenizer = FastModel.from_pretrained("some/model", load_in_4bit=False, full_finetuning=True)
tokenizer = get_chat_template(tokenizer, chat_template="llama-3.1")
def render(rows):
    talks = rows["talks"]
    return {"text": [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]}
data = standardize_sharegpt(load_dataset("some/talks", split="train")).map(render, batched=True)
trainer = SFTTrainer(model=model, train_dataset=data, args=SFTConfig(dataset_text_field="text"))
trainer = train_on_responses_only(trainer, instruction_part="a", response_part="b")
"""
    flat = converted(text, "t.py").flat
    assert flat["datasets"] == [{"path": "some/talks", "type": "chat_template", "field_messages": "talks"}]
    assert flat["chat_template"] == "llama3" and flat["train_on_inputs"] is False
    assert flat["adapter"] is None and flat["load_in_4bit"] is False


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("learning_rate", "learnin_rate",
         "SFTConfig(learnin_rate) is not a key of SFTConfig's. Did you mean learning_rate?"),
        ('"packing": True', '"neftune_noise_alpha": 5', "neftune_noise_alpha): not supported"),
        ('"packing": True', '"lr_scheduler_type": "polynomial"', "lr_scheduler_type): not supported"),
        ("SFTTrainer(\n", "GRPOTrainer(\n", "GRPOTrainer: not supported"),
        ('model="some/model"', "model=name", "not read: name"),
        ("lora_dropout=0.1", 'bias="all"', "LoraConfig(bias): not supported"),
        ('load_dataset("some/chats", "en")', "make_rows()", "there is no load_dataset"),
        ('load_dataset("some/chats", "en")', "load_dataset(path)", "load_dataset: not supported: not read: path=path"),
        ('dataset["train"]', 'dataset["train"].map(lambda row: row)', "code that makes rows is not run"),
        ('dataset["train"]', 'dataset["train"].filter(good)', "filter(good): not supported"),
        ("    peft_config=", "    callbacks=[], formatting_func=f,\n    peft_config=",
         "formatting_func): not supported"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(old: str, new: str, message: str, problems: Problems) -> None:
    assert old in TRL
    found = problems(TRL.replace(old, new), "t.py")
    assert any(message in line for line in found), found


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("print(1)", "x.py", "there is no call of FastLanguageModel.from_pretrained"),
        ("def f(:", "x.py", "x.py:1: it is not Python"),
        ("", "x.py", "there is no call"),
        ("x = '\0'", "x.py", "not Python"),
        ("{", "x.ipynb", "it is no notebook"),
        ("[]", "x.ipynb", "it is no notebook"),
        ('{"cells": [{"cell_type": "code"}]}', "x.ipynb", "it is no notebook"),
        (notebook("x = 1", "x = = 2"), "x.ipynb", "x.ipynb, cell 2, line 1: it is not Python"),
    ],
)
def test_files_that_are_no_script(text: str, name: str, message: str, problems: Problems) -> None:
    [found] = problems(text, name)
    assert message in found


def test_the_notebooks_of_the_other_door_are_read(tmp_path: Path) -> None:
    """Those that `tests/api` runs; their paths are names of the test's, and so are not read."""
    folder = Path(__file__).parents[2] / "api" / "notebooks"
    for name, adapter, rl in (("alpaca_unsloth", 16, None), ("orpo_qlora", 16, "orpo")):
        path = tmp_path / f"{name}.py"
        path.write_text((folder / f"{name}.txt").read_text())
        found = convert(path)
        assert found.values["lora_r"] == adapter and found.values.get("rl") == rl
        assert not found.report.unknown
        assert all("not read" in item.text for item in found.report.unsupported)
