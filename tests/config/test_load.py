"""What a user writes: types, ranges, unknown names, contradictions, all in one report; and what follows from
it."""

from __future__ import annotations

import pickle

import pytest

from luthier.config import Config, DatasetEntry
from luthier.config.schema import FIELDS, SECTION_OF, SECTIONS
from luthier.errors import ConfigError


def test_all_problems_at_once(report):
    lines = report(
        "lora_rr: 8\nseed: yes\nlora_alpha: 8\nval_set_size: 1.5\nseed: '3'\n",
        "--max_steps=x",
        "datasets.0.typ=alpaca",
        "foo",
    )
    assert [line.split(": ")[0] for line in lines] == [
        *(f"cfg.yml:{n}" for n in (5, 7, 8, 9, 9)),
        *["command line"] * 3,
    ]
    assert "Did you mean lora_r?" in lines[0]


def test_what_is_missing_and_what_is_wrong_are_reported_together(report):
    lines = report("lora_r: x\nwarmup_steps: 1\nwarmup_ratio: 0.1\n", base="")
    assert len(lines) == 4
    assert "warmup_steps and warmup_ratio" in lines[-1]
    assert any("base_model is missing" in line for line in lines)
    assert any("datasets is missing" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learnin_rate: 1e-4", "Did you mean learning_rate?"),
        ("Lora-R: 1", "Did you mean lora_r?"),
        ("epochs: 1", "Did you mean num_epochs?"),
        ("model_name_or_path: m", "Write base_model."),
        ("flash_attention: true", "attn_implementation"),
        ("field_messages: m", "inside an entry of datasets"),
        ("bos_token: m", "inside special_tokens"),
        ("training: {learning_rate: 1e-4}", "at the top level"),
        ("    lora_r: 8", "datasets.0.lora_r is not a key of a dataset entry. It belongs at the top level."),
        ("    feild: x", "Did you mean field?"),
        ("special_tokens: {pad: x}", "Did you mean pad_token?"),
    ],
)
def test_unknown_keys(report, text, words):
    (line,) = report(text + "\n")
    assert line.startswith("cfg.yml:5: ")
    assert words in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: yes", "expected a whole number, found true"),
        ("seed: 3.5", "expected a whole number, found the number 3.5"),
        ("seed: '3'", "found the text '3'. Leave out the quotes."),
        ("learning_rate: true", "expected a number, found true"),
        ("learning_rate: .nan", "finite"),
        ("learning_rate: 0", "greater than 0"),
        ("sequence_len: 0", "at least 1"),
        ("lora_dropout: 1.0\nadapter: lora", "less than 1"),
        ("val_set_size: -1", "at least 0"),
        ("eval_steps: 1.5\nsample_prompts: [a]", "neither a whole number nor a fraction"),
        ("sample_packing: 'yes'", "expected true or false, found the text 'yes'. Leave out the quotes."),
        ("sample_packing: 1", "expected true or false, found the number 1"),
        ("wandb_name: no\nreport_to: wandb", "expected text, found false. YAML reads yes, no"),
        ("revision: 12345", "Put it in quotes"),
        ("optimizer: adamw", "Did you mean adam?"),
        ("report_to: all", "expected tensorboard, wandb, trackio or mlflow, or a list of such"),
        ("report_to: [wandb, tensorbord]", "report_to.1: expected tensorboard"),
        ("bf16: fast", "expected true, false or auto"),
        ("tokens: abc", "expected a list of texts"),
        ("tokens: [a, 3]", "tokens.1: expected text, found the number 3"),
        ("special_tokens: [a]", "expected a mapping, found a list"),
        ("adapter: {r: 3}", "expected lora or qlora, found a mapping"),
        ("peft_layers_to_transform: [-1]\nadapter: lora", "peft_layers_to_transform.0: has to be at least 0"),
        ("output_dir: ''", "output_dir is empty"),
    ],
)
def test_types_and_ranges(report, text, words):
    (line,) = report(text + "\n")
    assert line.startswith("cfg.yml:5: ")
    assert words in line


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("base_model: m\n", None, "datasets is missing"),
        ("base_model: m\ndatasets: []\n", 2, "at least one entry"),
        ("base_model: m\ndatasets: d.jsonl\n", 2, "expected a list of mappings, found the text"),
        ("base_model: m\ndatasets:\n  path: d\n", 2, "expected a list of mappings, found a mapping"),
        ("base_model: m\ndatasets: [d.jsonl]\n", 2, "datasets.0: expected a mapping"),
        ("base_model: m\ndatasets:\n  - type: alpaca\n", 3, "datasets.0.path is missing"),
        (
            "base_model: m\ndatasets:\n  - path: d\n    type: {fromat: x}\n",
            4,
            "datasets.0.type.fromat is not a key",
        ),
        (
            "base_model: m\ndatasets:\n  - path: d\n    type: {format: 3}\n",
            4,
            "expected text, found the number 3",
        ),
        (
            "base_model: m\ndatasets:\n  - path: d\n    type: [a]\n",
            4,
            "expected text or a mapping, found a list",
        ),
        (
            "base_model: m\ndatasets:\n  - path: d\n    roles: {user: human}\n",
            4,
            "roles.user: expected a list",
        ),
    ],
)
def test_datasets(report, text, line, words):
    (message,) = report(text, base="")
    assert message.startswith(f"cfg.yml:{line}: " if line else "cfg.yml: ")
    assert words in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("eval_steps: 5\nevals_per_epoch: 1\nval_set_size: 5", "exclude each other"),
        ("save_steps: 5\nsaves_per_epoch: 1", "exclude each other"),
        ("warmup_steps: 5\nwarmup_ratio: 0.1", "exclude each other"),
        ("val_set_size: 5\ntest_datasets: [{path: e, type: alpaca}]", "exclude each other"),
        ("unfrozen_parameters: [lm_head]\ntrain_last_n_layers: 1", "exclude each other"),
        ("bf16: true\nfp16: true", "both true"),
        ("lora_r: 8", "lora_r does nothing without an adapter"),
        (
            "chat_template_kwargs: {a: 1}",
            "chat_template_kwargs does nothing without a dataset of `type: chat_template`",
        ),
        ("lora_target_linear: true", "lora_target_linear does nothing without an adapter"),
        ("adapter: lora\ntrain_last_n_layers: 2", "without an adapter"),
        ("adapter: lora\nunfrozen_parameters: [lm_head]", "without an adapter"),
        ("load_best_model_at_end: true", "no validation data"),
        ("early_stopping_patience: 2", "no validation data"),
        ("eval_steps: 5", "nothing is evaluated"),
        ("eval_batch_size: 5", "no validation data"),
        ("load_best_model_at_end: true\nval_set_size: 5\nevals_per_epoch: 0", "turns them off"),
        ("num_generation_samples: 2", "no validation data"),
        ("generation_top_p: 0.5", "no samples are generated"),
        ("generate_samples: true", "nothing to answer"),
        ("chat_template: jinja", "needs chat_template_jinja"),
        ("chat_template_jinja: x", "only with `chat_template: jinja`"),
        ("cosine_min_lr_ratio: 0.1\nlr_scheduler: linear", "cosine_with_min_lr"),
        ("lr_scheduler: cosine_with_min_lr", "needs cosine_min_lr_ratio"),
        ("warmup_steps: 5\nlr_scheduler: constant", "constant_with_warmup"),
        ("adam_beta1: 0.8\noptimizer: sgd", "adam optimizers"),
        ("wandb_name: x", "Weights & Biases"),
        ("unfrozen_parameters: ['embed.weight[:32000]']", "'embed.weight[:32000]' asks for a range"),
        ("unfrozen_parameters: ['(']", "not a regular expression"),
        ("adapter: lora\nlora_target_modules: '('", "not a regular expression"),
        ("device_map: {lm_head: 1}", "device_map has to be"),
        ("device_map: cudaa", "device_map has to be"),
    ],
)
def test_contradictions(report, text, words):
    (line,) = report(text + "\n")
    assert words in line


@pytest.mark.parametrize(
    "text",
    [
        "adaptor: lora\nlora_r: 8",
        "adapter: galore\nlora_r: 8",
        "val_set_sise: 5\neval_steps: 5\nload_best_model_at_end: true",
        "fp61: true\nbf16: true",
    ],
)
def test_one_mistake_is_one_message(report, text):
    (line,) = report(text + "\n")
    assert line.startswith("cfg.yml:5: ")


@pytest.mark.parametrize(
    "text",
    [
        "adapter:\nlora_r:\nlora_target_linear: false\nlora_modules_to_save: []",
        "adapter: lora\nlora_target_linear: true\nlora_target_modules: [lm_head]",
        "adapter: lora\nlora_target_modules: '.*q_proj'\nlora_alpha: 32",
        "train_last_n_layers: 8\nfreeze_embeddings: true",
        "val_set_size: 0.05\nevals_per_epoch: 4\nsaves_per_epoch: 1\nbf16: auto\ntf32: false",
        "device_map: {'': 0}",
        "optimizer: sgd\noptim_args: {momentum: 0.9}",
        "resume_from_checkpoint: model-out/checkpoint-5",
    ],
)
def test_what_goes_together(load, text):
    load(text + "\n")


def test_numbers_become_what_their_key_wants(load):
    config = load(
        "adapter: lora\nlora_r: 8.0\nlora_alpha: 16\nmax_steps: 1e3\nval_set_size: 100\nsave_steps: 0.5\n"
    )
    values = (config.adapter.lora_r, config.adapter.lora_alpha, config.training.max_steps)
    assert values == (8, 16.0, 1000)
    assert [type(value) for value in values] == [int, float, int]
    assert type(config.data.val_set_size) is int
    assert config.output.save_steps == 0.5


@pytest.mark.parametrize("text", ["off", "'off'", "false"])
def test_a_choice_named_off_is_what_yaml_calls_false(load, text):
    config = load(f"share_prefixes: {text}\n")
    assert config.training.share_prefixes == "off"
    assert load(config.to_yaml(), base="").training.share_prefixes == "off"


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("adapter: lora", "learning_rate", 2e-4),
        ("", "learning_rate", 2e-5),
        ("adapter: lora", "lora_target_linear", True),
        ("fp16: true", "bf16", False),
        ("cosine_min_lr_ratio: 0.1", "lr_scheduler", "cosine_with_min_lr"),
        ("val_set_size: 5", "evals_per_epoch", 1),
        ("", "saves_per_epoch", 1),
        ("sample_prompts: [a]", "generate_samples", True),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", "auto"),
        ("resume_from_checkpoint: false", "resume_from_checkpoint", None),
        ("report_to: wandb", "report_to", ["wandb"]),
        ("wandb_project: p\nreport_to: tensorboard", "report_to", ["tensorboard", "wandb"]),
    ],
)
def test_derived(load, text, key, value):
    config = load(text + "\n")
    assert config.flat()[key] == value
    assert config.origins[key].startswith("derived: ")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("adapter: lora\nlora_target_modules: [q_proj]", "lora_target_linear"),
        ("adapter: lora\nlora_model_dir: a", "lora_target_linear"),
        ("val_set_size: 5\neval_steps: 3", "evals_per_epoch"),
        ("", "evals_per_epoch"),
        ("save_steps: 3", "saves_per_epoch"),
        ("num_generation_samples: 3\nval_set_size: 5\ngenerate_samples: false", "report_to"),
        ("wandb_project: p\nwandb_mode: disabled", "report_to"),
    ],
)
def test_not_derived(load, text, key):
    assert load(text + "\n").origins[key] == "default"


def test_origins(load):
    config = load("adapter: lora\n", "lora_r=4", "datasets.0.split=test")
    origins = config.origins
    assert origins["base_model"] == "cfg.yml:1"
    assert origins["datasets"] == "cfg.yml:2"
    assert origins["datasets.0.path"] == "cfg.yml:3"
    assert origins["datasets.0.split"] == origins["lora_r"] == "command line"
    assert origins["seed"] == "default"
    assert origins["learning_rate"] == "derived: usual with an adapter"
    assert list(config.flat()) == list(FIELDS)


def test_from_python():
    config = Config.from_flat(
        {"base_model": "m", "datasets": [DatasetEntry(path="d", type="alpaca")]}, origin="here"
    )
    assert config.data.datasets[0].type == "alpaca"
    assert config.origins["base_model"] == "here"
    with pytest.raises(ConfigError, match=r"here: seed: expected a whole number") as caught:
        Config.from_flat({"base_model": "m", "datasets": [{"path": "d"}], "seed": "x"}, origin="here")
    assert caught.value.exit_status == 2


def test_replace(load):
    config = load("adapter: lora\n")
    changed = config.replace("no CUDA here", fp16=False, lora_r=4)
    assert (changed.adapter.lora_r, config.adapter.lora_r) == (4, 16)
    assert changed.origins["lora_r"] == "derived: no CUDA here"
    assert changed.adapter.adapter == "lora"
    assert changed.replace("again", lora_r=None).adapter.lora_r == 16
    with pytest.raises(ConfigError, match="Did you mean lora_r"):
        config.replace("x", lora_rr=3)
    with pytest.raises(ConfigError, match="expected a whole number"):
        config.replace("x", lora_r="a")


def test_frozen_and_not_shared(load):
    config = load()
    with pytest.raises(ValueError, match="frozen"):
        config.training.seed = 3  # type: ignore[misc]
    config.flat()["datasets"].clear()
    config.flat()["tokens"].append("x")
    assert config.data.datasets
    assert load().model.tokens == []
    copy = pickle.loads(pickle.dumps(config))
    assert (copy.flat(), copy.origins) == (config.flat(), config.origins)


def test_no_key_is_in_two_sections():
    assert len(SECTION_OF) == sum(len(section.model_fields) for section in SECTIONS.values())


def test_a_misspelt_key_of_another_tool_is_told_its_name() -> None:
    with pytest.raises(ConfigError, match=r"context_parapllel_size is not .* Did you mean context_parallel_size\?"):
        Config.from_flat({
            "base_model": "m", "datasets": [{"path": "p", "type": "alpaca"}], "context_parapllel_size": 2,
        })  # fmt: skip
