"""LLaMA-Factory's YAML, with the datasets that `dataset_info.json` names."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from luthier.config.convert import arguments
from luthier.config.convert import llamafactory_keys as keys
from luthier.config.schema import FIELDS

from .conftest import Convert, Problems

BASE = "model_name_or_path: some/model\ndataset: rows\ntemplate: chatml\n"

INFO: dict[str, Any] = {
    "rows": {"file_name": "rows.json"},
    "named": {"file_name": "n.json", "columns": {"prompt": "q", "response": "a", "system": "s"}},
    "hub": {"hf_hub_url": "some/data", "ms_hub_url": "other/data", "subset": "en", "split": "test", "num_samples": 50},
    "chats": {
        "file_name": "chats.json", "formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "t"},
    },
    "open": {
        "file_name": "open.json", "formatting": "sharegpt", "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "pairs": {"file_name": "p.json", "ranking": True, "columns": {"prompt": "q", "chosen": "c", "rejected": "r"}},
    "talks": {
        "file_name": "t.json", "ranking": True, "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "liked": {"file_name": "k.json", "formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "label"}},
    "texts": {"file_name": "texts.txt", "columns": {"prompt": "text"}},
    "seen": {"file_name": "i.json", "columns": {"images": "images"}},
    "past": {"file_name": "h.json", "columns": {"prompt": "a", "response": "b", "history": "h"}},
    "code": {"script_url": "x"},
    "odd": {"file_name": "o.json", "formating": "sharegpt"},
}  # fmt: skip

SFT = """\
### model
model_name_or_path: some/model
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: rows, chats
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4
output_dir: saves/one
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
eval_dataset: named
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""


@pytest.fixture(autouse=True)
def info(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))


def test_a_config_for_lora(converted: Convert) -> None:
    found = converted(SFT, "sft.yaml")
    lists = [set(found.names(which)) for which in ("carried", "no_effect", "unsupported", "unknown")]
    written = {line.partition(":")[0] for line in SFT.splitlines()[1:]}
    assert written == set.union(*lists) and not lists[2] and not lists[3]
    for first, second in itertools.combinations(lists, 2):
        assert not first & second
    flat = found.flat
    assert flat["adapter"] == "lora" and flat["lora_alpha"] == 16 and flat["lora_target_linear"] is True
    assert flat["special_tokens"] == {"eos_token": "<|eot_id|>"} and flat["chat_template"] == "llama3"
    first, second = flat["datasets"]
    assert first["path"] == "data/rows.json#1000"
    assert first["type"]["no_input_format"] == (
        "<|start_header_id|>user<|end_header_id|>\n\n{instruction}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert second == {
        "path": "data/chats.json#1000", "type": "chat_template", "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"}, "field_tools": "t",
        "roles": {"user": ["human"], "assistant": ["gpt", "function_call"], "tool": ["observation"]},
    }  # fmt: skip
    [held_out] = flat["test_datasets"]
    assert held_out["type"]["field_instruction"] == "q" and held_out["type"]["field_system"] == "s"


def test_defaults_that_are_others_here_are_written(converted: Convert) -> None:
    found = converted(BASE, "c.yaml")
    expected = {"learning_rate": 5e-5, "lr_scheduler": "linear", "micro_batch_size": 8, "num_epochs": 3.0, "lora_r": 8}
    expected |= {"lora_alpha": 16, "excess_length_strategy": "truncate", "adapter": "lora", "bf16": False}
    expected |= {"save_steps": 500, "logging_steps": 500, "gradient_checkpointing": True}
    assert {key: found.written[key] for key in expected} == expected
    assert {*expected} - {"adapter"} <= set(found.names("defaults"))
    for key, (value, _) in (keys.DEFAULTS | keys.OF_LORA | keys.OF_SIMPO).items():
        assert FIELDS[key].default != value, key


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("quantization_bit: 4", {"load_in_4bit": True}),
        ("quantization_bit: 8\nquantization_method: bnb", {"load_in_8bit": True}),
        ("flash_attn: fa2", {"attn_implementation": "flash_attention_2"}),
        ("flash_attn: disabled", {"attn_implementation": "eager"}),
        ("finetuning_type: full", {"adapter": None, "lora_target_linear": None}),
        ("lora_target: q_proj, v_proj\nadditional_target: embed_tokens", {"lora_target_modules": ["q_proj", "v_proj"],
                                                                          "lora_modules_to_save": ["embed_tokens"]}),
        ("pissa_init: true", {"peft_init_lora_weights": "pissa_niter_16"}),
        ("neat_packing: true", {"sample_packing": True}),
        ("use_unsloth_gc: true", {"gradient_checkpointing": "offload"}),
        ("disable_gradient_checkpointing: true", {"gradient_checkpointing": False}),
        ("pure_bf16: true", {"bf16": True}),
        ("deepspeed: examples/deepspeed/ds_z3_config.json", {"deepspeed": "zero3"}),
        ("optim: paged_adamw_8bit\nlearning_rate: '3e-4'", {"optimizer": "paged_adamw_8bit", "learning_rate": 3e-4}),
        ("adapter_name_or_path: saves/one", {"lora_model_dir": "saves/one"}),
        ("add_special_tokens: <a>,<b>", {"special_tokens": {"eos_token": "<|im_end|>",
                                                            "additional_special_tokens": ["<a>", "<b>"]}}),
        ("save_strategy: epoch", {"saves_per_epoch": 1, "save_steps": None}),
        ("eval_strategy: epoch\nval_size: 0.1", {"evals_per_epoch": 1, "val_set_size": 0.1}),
        ("val_size: 0.1", {"evals_per_epoch": 0}),
        ("report_to: [wandb, tensorboard]\nrun_name: x", {"report_to": ["wandb", "tensorboard"], "wandb_name": "x"}),
    ],
)  # fmt: skip
def test_what_keys_become(text: str, expected: dict[str, Any], converted: Convert) -> None:
    flat = converted(f"{BASE}{text}\n", "c.yaml").flat
    assert {key: flat[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("stage", "name", "kind", "flat"),
    [
        ("pt", "texts", {"type": "completion", "field": "text"}, {"sample_packing": True, "rl": None}),
        ("dpo", "pairs", {"type": {"field_prompt": "q", "field_chosen": "c", "field_rejected": "r",
                                   "prompt_format": "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"}},
         {"rl": "dpo"}),
        ("dpo\npref_loss: orpo", "talks", {"field_chosen": "chosen", "type": "chat_template.default"}, {"rl": "orpo"}),
        ("dpo\npref_loss: simpo", "talks", {}, {"rl": "simpo", "rl_beta": 0.1, "simpo_gamma": 0.5}),
        ("dpo\npref_loss: hinge\npref_ftx: 0.5", "talks", {}, {"dpo_loss_type": "hinge", "rpo_alpha": 0.5}),
        ("kto\nkto_chosen_weight: 2", "liked", {"field_label": "label"}, {"rl": "kto", "kto_desirable_weight": 2.0}),
        ("sft", "hub", {"path": "some/data#50", "name": "en", "split": "test"}, {}),
        ("sft", "open", {"type": "chat_template", "roles": {"assistant": ["assistant", "function_call"],
                                                            "tool": ["observation"]}}, {}),
    ],
)  # fmt: skip
def test_stages_and_their_rows(
    stage: str, name: str, kind: dict[str, Any], flat: dict[str, Any], converted: Convert
) -> None:
    found = converted(f"{BASE.replace('rows', name)}stage: {stage}\n", "c.yaml").flat
    [entry] = found["datasets"]
    assert {key: entry[key] for key in kind} == kind
    assert {key: found[key] for key in flat} == flat


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rnk: 8", "lora_rnk is not a key of LLaMA-Factory's. Did you mean lora_rank?"),
        ("stage: ppo", "stage: not supported: ppo"),
        ("finetuning_type: freeze", "finetuning_type: not supported"),
        ("use_galore: true", "use_galore: not supported"),
        ("mix_strategy: interleave_fast", "mix_strategy: not supported"),
        ("mix_strategy: interleave_once\ndisable_shuffling: true", "mix_strategy: not supported"),
        ("mix_strategy: interleave_over\ninterleave_probs: 0.5,0.5", "interleave_probs: not supported: there are 2"),
        ("mix_strategy: interleave_over\ninterleave_probs: '0'", "interleave_probs: not supported: write a number"),
        ("lr_scheduler_type: polynomial", "lr_scheduler_type: not supported"),
        ("neftune_noise_alpha: 5", "neftune_noise_alpha: not supported"),
        ("eval_dataset: rwos", "Did you mean rows?"),
        ("eval_dataset: seen", "images, which are not trained here"),
        ("eval_dataset: past", "earlier turns"),
        ("eval_dataset: code", "scripts, clouds and folders"),
        ("eval_dataset: odd", "formating is not a key of data/dataset_info.json. Did you mean formatting?"),
        ("dataset_dir: ONLINE", "write the datasets with path and type"),
        ("dataset_dir: elsewhere", "there is no dataset_info.json that says what rows is"),
        ("rope_scaling: linear", "rope_scaling: not supported"),
    ],
)
def test_errors_name_the_line(text: str, message: str, problems: Problems) -> None:
    found = problems(f"{BASE}{text}\n", "c.yaml")
    assert any(line.startswith("c.yaml:") and message in line for line in found), found


def test_mixing_means_the_same(converted: Convert) -> None:
    two = BASE.replace("rows", "rows, chats")
    found = converted(f"{two}mix_strategy: interleave_under\ninterleave_probs: 0.7, 0.3\n", "c.yaml")
    assert (found.flat["mix_strategy"], found.flat["mix_stopping"]) == ("interleave", "first_exhausted")
    assert [entry["weight"] for entry in found.flat["datasets"]] == [0.7, 0.3]
    over = converted(f"{two}mix_strategy: interleave_over\n", "c.yaml").flat
    assert (over["mix_strategy"], over["mix_stopping"]) == ("interleave", "all_exhausted")
    assert not any("weight" in entry for entry in over["datasets"])
    for plain in ("concat\ninterleave_probs: 0.7, 0.3", "interleave_once"):
        found = converted(f"{two}mix_strategy: {plain}\n", "c.yaml")
        assert found.flat["mix_strategy"] == "concat" and "mix_strategy" in found.names("no_effect")


def test_streams_and_their_buffers(converted: Convert) -> None:
    found = converted(f"{BASE}streaming: true\nmax_steps: 9\nbuffer_size: 77\n", "c.yaml").flat
    assert (found["streaming"], found["shuffle_buffer_size"]) == (True, 77)
    assert converted(f"{BASE}streaming: true\nmax_steps: 9\n", "c.yaml").flat["shuffle_buffer_size"] == 16384
    found = converted(f"{BASE}streaming: false\nbuffer_size: 77\n", "c.yaml")
    assert not found.flat["streaming"] and {"streaming", "buffer_size"} <= set(found.names("no_effect"))


def test_a_template_whose_text_is_not_known_fits_conversations_only(converted: Convert, problems: Problems) -> None:
    text = BASE.replace("chatml", "yuan")
    assert "need the text of template yuan" in problems(text, "c.yaml")[0]
    found = converted(text.replace("rows", "chats"), "c.yaml")
    assert found.flat["chat_template"] == "tokenizer_default" and found.names("to_check") == ["chat_template"]


def test_dataset_info_stands_beside_the_config_or_in_dataset_dir(tmp_path: Path, converted: Convert) -> None:
    for folder in ("mine", "configs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "dataset_info.json").write_text(json.dumps(INFO))
    named = converted(f"{BASE}dataset_dir: mine\n", "c.yaml")
    assert named.flat["datasets"][0]["path"] == "mine/rows.json"
    (tmp_path / "data" / "dataset_info.json").unlink()
    assert converted(BASE, "configs/c.yaml").flat["datasets"][0]["path"] == "configs/rows.json"


def test_a_broken_dataset_info(tmp_path: Path, problems: Problems) -> None:
    (tmp_path / "data" / "dataset_info.json").write_text("{")
    assert "cannot be read" in problems(BASE, "c.yaml")[0]


def test_a_key_is_in_one_table() -> None:
    tables = [set(keys.RENAMED), set(keys.NO_EFFECT), set(keys.REFUSED), keys.HANDLED]
    for first, second in itertools.combinations(tables, 2):
        assert not first & second
    assert set(keys.RENAMED.values()) <= set(FIELDS)
    assert set(arguments.CARRIED.values()) <= set(FIELDS)
