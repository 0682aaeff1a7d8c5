"""Axolotl's YAML: every key in one of four lists, defaults written, and the result a config of ours."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from luthier import cli
from luthier.config import Config
from luthier.config.convert import axolotl_keys as keys
from luthier.config.convert.axolotl_plugins import PLUGINS
from luthier.config.convert.command import config_of
from luthier.config.datasets import DatasetEntry
from luthier.config.schema import FIELDS
from luthier.errors import ConfigError

from .conftest import Convert, Problems

BASE = "base_model: m\nlearning_rate: 1e-4\ndatasets:\n  - path: d.jsonl\n    type: alpaca\n"

QLORA = """\
base_model: some/model-8b
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
load_in_8bit: false
load_in_4bit: true
strict: false
plugins:
  - axolotl.integrations.liger.LigerPlugin
  - axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin
liger_rope: true
liger_rms_norm: true
cut_cross_entropy: true
datasets:
  - path: some/chats
    type: chat_template
    split: train[:20%]
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
    roles:
      user: [human]
      assistant: [gpt]
  - path: d.jsonl
    type:
      field_instruction: question
      field_output: answer
      format: "[INST] {instruction} [/INST]"
      no_input_format:
      system_prompt: ""
chat_template: llama3
dataset_prepared_path: last_run_prepared
val_set_size: 0.05
output_dir: ./out
adapter: qlora
lora_model_dir:
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_qkv_kernel: true
sequence_len: 4096
sample_packing: true
eval_sample_packing: false
pad_to_sequence_len: true
wandb_project:
wandb_entity:
wandb_watch:
wandb_name:
wandb_log_model:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
group_by_length: false
bf16: auto
fp16:
tf32: false
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
early_stopping_patience:
resume_from_checkpoint:
local_rank:
logging_steps: 1
xformers_attention:
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
eval_table_size:
saves_per_epoch: 1
debug_free: &x
deepspeed:
weight_decay: 0.0
fsdp:
fsdp_config:
special_tokens:
  pad_token: <|pad|>
"""
QLORA = QLORA.replace("debug_free: &x\n", "").replace("    split: train[:20%]\n", "")

FULL_FSDP = """\
base_model: some/model
base_model_config: some/model
datasets:
  - path: d.jsonl
    type: completion
    field: body
    trust_remote_code: true
pretraining_dataset:
val_set_size: 0.0
evals_per_epoch: 2
sequence_len: 2048
lora_r:
adapter:
batch_size: 8
micro_batch_size: 2
optimizer: adamw_torch_fused
learning_rate: "2e-5"
float32: false
bfloat16: true
tf32: true
sdp_attention: true
fsdp:
  - full_shard
  - auto_wrap
fsdp_config:
  fsdp_offload_params: false
  fsdp_cpu_ram_efficient_loading: true
  fsdp_use_orig_params: false
  fsdp_sync_module_states: true
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_backward_prefetch: BACKWARD_PRE
"""

DPO = """\
base_model: some/model
rl: dpo
dpo_beta: 0.2
dpo_loss_type: [hinge]
datasets:
  - path: pairs
    type: chat_template.default
    field_messages: dialog
    field_chosen: better
    field_rejected: worse
  - path: other
    type: chatml.intel
    split: train
adapter: lora
lora_r: 8
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
learning_rate: 5e-6
max_steps: 100
use_wandb: true
wandb_name: one
save_strategy: epoch
remove_unused_columns: false
activation_offloading: true
gradient_checkpointing: true
seed: 7
"""

PRETRAIN = """\
base_model: some/model
pretraining_dataset:
  - path: some/texts
    name: en
    type: pretrain
    text_column: body
max_steps: 50
learning_rate: 3e-4
deepspeed: deepspeed_configs/zero2.json
use_tensorboard: true
lr_scheduler: constant
warmup_steps: 5
tensor_parallel_size: 1
curriculum_sampling: true
val_set_size: 0
"""

SAMPLES = {"qlora": QLORA, "full": FULL_FSDP, "dpo": DPO, "pretrain": PRETRAIN}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_become_configs_and_each_key_is_in_one_list(name: str, converted: Convert) -> None:
    found = converted(SAMPLES[name])
    lists = [found.names(which) for which in ("carried", "no_effect", "unsupported", "unknown")]
    top = [{key.split(".")[0] for key in each} for each in lists]
    for line in SAMPLES[name].splitlines():
        if not line.startswith((" ", "-")):
            key = line.partition(":")[0]
            assert any(key in each for each in top), key
    for first, second in itertools.combinations(lists, 2):
        assert not set(first) & set(second)
    assert not lists[2] and not lists[3]
    for key in (key for each in lists for key in each):
        assert key in found.report


def test_a_qlora_config(converted: Convert) -> None:
    found = converted(QLORA)
    assert found.flat["attn_implementation"] == "flash_attention_2" and found.flat["load_in_4bit"] is True
    assert found.flat["datasets"][1]["type"] == {
        "field_instruction": "question",
        "field_output": "answer",
        "format": "[INST] {instruction} [/INST]",
    }
    assert "wandb_project" not in found.written
    assert found.said("no_effect", "wandb_project") == ""  # null is unset, and needs no reason
    assert "padding" in found.said("no_effect", "pad_to_sequence_len")
    assert found.names("defaults") == ["save_total_limit"]
    assert "save_total_limit: 4  # default of Axolotl 0.19" in found.text


def test_a_config_for_fsdp_of_the_first_version(converted: Convert) -> None:
    flat = converted(FULL_FSDP).flat
    assert flat["fsdp_version"] == 2 and flat["gradient_accumulation_steps"] == 4
    assert flat["learning_rate"] == 2e-5 and flat["bf16"] is True and flat["adapter"] is None
    assert flat["fsdp_config"] == {"offload_params": False, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
                                   "state_dict_type": "FULL_STATE_DICT"}  # fmt: skip


def test_a_config_for_dpo(converted: Convert) -> None:
    flat = converted(DPO).flat
    assert flat["rl"] == "dpo" and flat["rl_beta"] == 0.2 and flat["dpo_loss_type"] == "hinge"
    assert flat["gradient_checkpointing"] == "offload" and flat["saves_per_epoch"] == 1
    assert flat["report_to"] == ["wandb"] and flat["wandb_name"] == "one"


def test_texts_a_shipped_deepspeed_file_and_what_a_constant_rate_makes_idle(converted: Convert) -> None:
    found = converted(PRETRAIN)
    assert found.flat["datasets"] == [{"path": "some/texts", "name": "en", "type": "completion", "field": "body"}]
    assert found.flat["deepspeed"] == "zero2" and found.flat["shuffle"] is False
    assert "warmup_steps" not in found.written and "no warm-up" in found.said("no_effect", "warmup_steps")


def test_defaults_that_are_others_here_are_written(converted: Convert) -> None:
    found = converted(BASE)
    assert {key: found.flat[key] for key in keys.DEFAULTS} == {key: value for key, (value, _) in keys.DEFAULTS.items()}
    assert found.names("defaults") == list(keys.DEFAULTS)
    assert "sequence_len: 512 (here 2048)" in found.report
    rows = converted(BASE + "val_set_size: 0.1\n")
    assert rows.flat["evals_per_epoch"] == 0  # Axolotl evaluates where it is told when


@pytest.mark.parametrize("table", [keys.DEFAULTS, keys.OF_SAMPLES, keys.OF_SIMPO])
def test_the_tables_of_defaults_hold_what_is_another_here(table: dict[str, tuple[object, str]]) -> None:
    for key, (value, _) in table.items():
        assert FIELDS[key].default != value, key


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("eager_attention: true", {"attn_implementation": "eager"}),
        ("flash_attention: false", {"attn_implementation": None}),
        ("float32: true", {"bf16": False}),
        ("float16: true\nbf16: false", {"fp16": True, "bf16": False}),
        ("device: cpu", {"device_map": "cpu"}),
        ("adapter: lora\nlora_target_modules: all-linear", {"lora_target_linear": True}),
        ("adapter: lora\nlora_rank_pattern: {down_proj: 4}", {"rank_pattern": {"down_proj": 4}}),
        ("adapter: qlora\npeft: {loftq_config: {loftq_bits: 4}}", {"peft_init_lora_weights": "loftq"}),
        ("adapter: qlora\nbnb_config_kwargs: {bnb_4bit_quant_type: fp4}", {"bnb_4bit_quant_type": "fp4"}),
        ("auto_resume_from_checkpoints: true", {"resume_from_checkpoint": "auto"}),
        ("save_strategy: 'no'", {"saves_per_epoch": 0}),
        ("val_set_size: 0.1\neval_strategy: epoch", {"evals_per_epoch": 1}),
        ("dataset_exact_deduplication: true", {"dataset_exact_deduplication": True}),
        ("optim_args: 'momentum=0.9,nesterov=true'\noptimizer: sgd",
         {"optim_args": {"momentum": 0.9, "nesterov": True}}),
        ("lr_scheduler_kwargs: {min_lr_rate: 0.1}", {"cosine_min_lr_ratio": 0.1}),
        ("chat_template: tokenizer_default_fallback_chatml", {"chat_template": "tokenizer_default"}),
        ("model_config: {rope_scaling: {type: linear, factor: 2.0}}",
         {"rope_parameters": {"factor": 2.0, "rope_type": "linear"}}),
        ("model_revision: abc", {"revision": "abc"}),
        ("rl: simpo\nsimpo_gamma: 0.5", {"rl_beta": 0.1, "cpo_alpha": 1.0}),
        ("rl: orpo\ntrl: {beta: 0.3}", {"rl_beta": 0.3}),
        ("wandb_project: p\nuse_wandb: false", {"wandb_project": None}),
        ("weight_decay: '1e-2'\nlora_r: '8'\nadapter: lora", {"weight_decay": 0.01, "lora_r": 8}),
        ("generate_samples: true\nval_set_size: 0.1", {"num_generation_samples": 3, "generation_temperature": 0.7}),
        ("fsdp_config: {fsdp_version: 2, reshard_after_forward: false}", {"fsdp_version": 2}),
        ("fsdp_version: 2\nfsdp_config: {activation_checkpointing: true}", {"gradient_checkpointing": True}),
        ("fsdp: [full_shard, offload]", {"fsdp_config": {"offload_params": True}}),
        ("fsdp_version: 2\nfsdp_config: {sharding_strategy: SHARD_GRAD_OP}",
         {"fsdp_config": {"reshard_after_forward": False}}),
        ("deepspeed: x/zero3_bf16_cpuoffload_all.json", {"deepspeed": "zero3_offload"}),
    ],
)  # fmt: skip
def test_what_a_table_cannot_say(text: str, expected: dict[str, object], converted: Convert) -> None:
    base = BASE.replace("type: alpaca", "type: chatml") if "rl:" in text else BASE
    flat = converted(f"{base}{text}\n").flat
    assert {key: flat[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("{path: some/data, type: alpaca, split: 'train[:50]'}",
         [{"path": "some/data#50", "split": "train", "type": "alpaca"}]),
        ("{path: json, data_files: [a.jsonl, b.jsonl], type: alpaca}",
         [{"path": "a.jsonl", "type": "alpaca"}, {"path": "b.jsonl", "type": "alpaca"}]),
        ("{path: x, type: sharegpt, conversation: chatml}",
         [{"path": "x", "type": "chat_template", "field_messages": "conversations", "chat_template": "chatml"}]),
        ("{path: x, type: gpteacher}", [{"path": "x", "type": "alpaca", "field_output": "response"}]),
        ("{path: x, type: chat_template.default, roles_to_train: [], train_on_eos: turn}",
         [{"path": "x", "type": "chat_template", "roles_to_train": [], "train_on_eos": "turn"}]),
    ],
)  # fmt: skip
def test_entries(entry: str, expected: list[dict[str, object]], converted: Convert) -> None:
    flat = converted(f"base_model: m\ndatasets: [{entry}]\n").flat
    assert flat["datasets"] == expected


def test_both_spellings_of_fsdp_config_are_one(converted: Convert) -> None:
    plain = "fsdp_version: 2\nfsdp_config:\n  offload_params: true\n  state_dict_type: SHARDED_STATE_DICT\n"
    long = plain.replace("  offload", "  fsdp_offload").replace("  state", "  fsdp_state")
    assert converted(BASE + plain).flat == converted(BASE + long).flat


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("context_parapllel_size: 2",
         "context_parapllel_size is not a key of Axolotl's. Did you mean context_parallel_size?"),
        ("micro_batchsize: 2", "Did you mean micro_batch_size?"),
        ("zzz:", "zzz is not a key of Axolotl's."),
        ("liger_rope: true", "without its plugin: `plugins: [axolotl.integrations.liger...]`"),
        ("fsdp_version: 2\nfsdp_config: {offload_parms: true}",
         "fsdp_config.offload_parms is not a key of fsdp_config. Did you mean offload_params?"),
        ("special_tokens: {pda_token: x}", "Did you mean pad_token?"),
        ("test_datasets: [{path: x, type: alpaca, splt: y}]",
         "test_datasets.0.splt is not a key of a dataset entry of Axolotl's. Did you mean split?"),
        ("neftune_noise_alpha: 5", "neftune_noise_alpha: not supported: noise on embeddings"),
        ("context_parallel_size: 2", "context_parallel_size: not supported"),
        ("optimizer: adopt_adamw", "optimizer: not supported: optimizer: expected"),
        ("lr_scheduler: rex", "lr_scheduler: not supported"),
        ("test_datasets: [{path: x, type: 'alpaca:phi'}]",
         "test_datasets.0: not supported: there is no type `alpaca:phi`"),
        ("test_datasets: [{path: x, type: alpaca, split: 'train[5%:]'}]", "only the first rows"),
        ("rl: grpo", "rl: not supported"),
        ("plugins: [my.own.Plugin]", "plugins.0: not supported: my.own.Plugin: code of its own"),
        ("plugins: [axolotl.integrations.kd.KDPlugin]\nkd_alpha: 0.5", "kd_alpha: not supported: it belongs to"),
        ("deepspeed: none_there.json", "none_there.json"),
        ("qat: {weight_dtype: int8}", "qat: not supported"),
    ],
)  # fmt: skip
def test_unknown_and_unsupported_keys_are_errors_with_their_line(text: str, message: str, problems: Problems) -> None:
    found = problems(f"{BASE}{text}\n")
    assert any(line.startswith("axolotl.yml:") and message in line for line in found), found


def test_all_problems_are_told_at_once_in_the_order_of_the_file(problems: Problems) -> None:
    found = problems(f"{BASE}relora: true\nmicro_batchsize: 2\nhub_model_id: me/model\n")
    assert [line.split(":")[1] for line in found] == ["6", "7", "8"]


def test_what_is_not_supported_can_be_left_out_but_not_what_makes_the_run(
    converted: Convert, problems: Problems
) -> None:
    found = converted(f"{BASE}neftune_noise_alpha: 5\nlr_scheduler: rex\n", allow=True)
    assert found.names("unsupported") == ["neftune_noise_alpha", "lr_scheduler"]
    assert found.flat["lr_scheduler"] == "cosine"
    assert "rl: not supported" in problems(f"{BASE}rl: grpo\n", allow=True)[0]
    assert "micro_batchsize" in problems(f"{BASE}micro_batchsize: 2\n", allow=True)[0]


def test_switches_that_are_off_ask_for_nothing(converted: Convert) -> None:
    off = "relora: false\nneftune_noise_alpha:\nxformers_attention: false\ngptq: false\ntrl: {use_vllm: false}\n"
    found = converted(BASE + off + "use_mlflow: false\nhub_model_id: ''\n")
    assert not found.names("unsupported")


# --- luthier train ---


def test_a_file_that_is_valid_here_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cfg.yml").write_text(BASE)
    assert config_of("cfg.yml").data.sequence_len == 2048


def test_one_whose_unknown_keys_are_all_axolotls_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", logger="luthier")
    Path("cfg.yml").write_text(BASE + "flash_attention: true\nlora_r:\n")
    config = config_of("cfg.yml", ["num_epochs=2", "--sequence_len", "64"])
    assert config.model.attn_implementation == "flash_attention_2"
    assert config.data.sequence_len == 64 and config.training.num_epochs == 2
    assert config.place("learning_rate") == "cfg.yml:2: "
    assert "flash_attention -> attn_implementation" in caplog.text and "micro_batch_size: 1 (here 2)" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "flash_attention: true\nsequence_lne: 5\n",  # one is nobody's
        "learning_rat: 1\n",
        "lora_r: 8\n",  # no unknown key: an error of ours
        "liger_rope: true\n",  # a plugin's key without the plugin
        "flash_attention: true\ntest_datasets: [{path: x, typ: alpaca}]\n",
    ],
)
def test_else_the_errors_are_those_of_any_config(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cfg.yml").write_text(BASE + text)
    with pytest.raises(ConfigError) as ours:
        Config.load("cfg.yml")
    with pytest.raises(ConfigError) as found:
        config_of("cfg.yml")
    assert str(found.value) == str(ours.value)


def test_what_is_not_supported_ends_the_run_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cfg.yml").write_text(BASE + "neftune_noise_alpha: 5\n")
    with pytest.raises(ConfigError, match=r"cfg.yml:6: neftune_noise_alpha: not supported.*--allow-unsupported"):
        config_of("cfg.yml")


# --- the verb ---


def test_standard_output_is_yaml_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yml").write_text(QLORA)
    assert cli.main(["convert", "a.yml"]) == 0
    out, err = capfd.readouterr()
    Path("b.yml").write_text(out)
    assert Config.load("b.yml").adapter.lora_r == 32
    assert "carried over" in err and "defaults of Axolotl" in err
    Path("a.yml").write_text(f"{BASE}relora: true\n")
    assert cli.main(["convert", "a.yml"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and "not supported (1)" in err
    assert cli.main(["convert", "a.yml", "--allow-unsupported"]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\n", "v1 schema"),
        ("a: b\n", "neither base_model"),
        ("- a\n", "is a mapping"),
        ("base_model: [\n", "not valid YAML"),
        ("base_model: m\ndatasets: 5\n", "an entry is a mapping"),
        ("base_model: m\ndatasets: [{type: alpaca}]\n", "path"),
        ("base_model: m\n", "datasets is missing"),
    ],
)
def test_files_that_are_no_config(text: str, message: str, problems: Problems) -> None:
    assert any(message in line for line in problems(text)), message


def test_a_file_that_is_not_there() -> None:
    assert cli.main(["convert", "nowhere.yml"]) == 2
    assert cli.main(["convert", "nowhere.py"]) == 2


# --- the tables ---


def test_a_key_is_in_one_table_and_those_of_the_same_name_are_here() -> None:
    tables = [keys.RENAMED, keys.NO_EFFECT, keys.REFUSED, keys.ESSENTIAL, keys.HANDLED]
    tables += [{key for inside in PLUGINS.values() for key in inside}]
    for first, second in itertools.combinations([keys.SAME - {"model_type"}, *tables], 2):
        assert not set(first) & set(second)
    assert set(FIELDS) >= keys.SAME and set(FIELDS) >= set(keys.RENAMED.values())
    inside = [set(DatasetEntry.model_fields), keys.ENTRY_NO_EFFECT, keys.ENTRY_REFUSED, keys.ENTRY_HANDLED]
    for one, other in itertools.combinations(inside, 2):
        assert not set(one) & set(other)


def test_the_names_of_chat_templates_are_those_of_the_data() -> None:
    from luthier.data import templates

    assert {*templates.names(), "jinja", "tokenizer_default"} == keys.TEMPLATES


def test_the_model_as_an_artifact(converted: Convert) -> None:
    base = "base_model: m\ndatasets:\n  - path: p\n    type: alpaca\nwandb_project: lab\n"
    assert converted(base + "wandb_log_model: checkpoint\n").flat["wandb_log_model"] == "checkpoint"
    for nothing in ("", '"false"', "false"):
        found = converted(f"{base}wandb_log_model: {nothing}\n")
        assert found.flat["wandb_log_model"] is False and "wandb_log_model" not in found.written
    off = converted(f"{base}use_wandb: false\nwandb_log_model: end\n")
    assert off.said("no_effect", "wandb_log_model") == "use_wandb is off"


def test_weights_and_streams(converted: Convert, problems: Problems) -> None:
    found = converted(f"{BASE}    weight: 0.5\n  - path: e.jsonl\n    type: alpaca\n    weight: 1.0\n")
    assert [entry.get("weight") for entry in found.flat["datasets"]] == [0.5, 1.0]
    assert "datasets.0.weight" in found.names("carried") and "datasets.1.weight" not in found.names("carried")
    [line] = problems(f"{BASE}    epochs: 2\n")
    assert "datasets.0.epochs is not a key of a dataset entry of Axolotl's" in line
    stream = f"{BASE}max_steps: 9\nstreaming_multipack_buffer_size: 77\n"
    assert converted(f"{stream}streaming: true\n").flat["shuffle_buffer_size"] == 77
    whole = converted(stream)
    assert not whole.flat["streaming"] and "streaming_multipack_buffer_size" in whole.names("no_effect")
